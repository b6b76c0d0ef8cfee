"""A run on disk: config.json, logs, checkpoints, results.json and figures, in one folder.

config.json is there from the first moment and results.json from the last, so what was interrupted is known for what it
is. Each is written beside its place and then renamed: no reader sees half of one.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

from jaxattn.errors import InputError
from jaxattn.train.config import Config
from jaxattn.train.recipes import changed, recipe


def default_folder(config: Config) -> Path:
    """`runs/`, the data, the recipe if the data does not imply it, and what of model, mix and seed is not the recipe's:
    `runs/digits`, `runs/digits-resnet18-conv-seed1`, `runs/cifar10-vit`."""
    parts, different = [config.data.partition(":")[0]], changed(config)
    parts += [config.recipe] if config.recipe != recipe(None, config.data).recipe else []
    parts += [str(different[name]) for name in ("model", "mix") if name in different]
    parts += [f"seed{config.seed}"] if "seed" in different else []
    return Path("runs", "-".join(parts))


def is_whole(run: Path) -> bool:
    """Whether the run was trained to its end."""
    return (run / "results.json").is_file()


def check_out(out: Path, config: Config, *, resume: bool = False, overwrite: bool = False):
    """Raises before anything is done if the run cannot go into that folder.

    Raises:
      ValueError: `out` holds a run and neither `resume` nor `overwrite` is asked for; it holds the run of another
        configuration that cannot be resumed with this one, or something that is not a run.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "config.json").is_file():
        raise InputError(f"out (={out}) must be new, empty or a run; choose another --out")
    if resume:
        old, new = dataclasses.asdict(read_config(out)), dataclasses.asdict(config)
        different = [f"{name} is {old[name]!r}, not {new[name]!r}" for name in old if old[name] != new[name]]
        if different:
            raise InputError(f"resume: the run in {out} has other settings: {'; '.join(different)}")
    elif not overwrite:
        state = "a run already" if is_whole(out) else "an unfinished run: go on with --resume"
        raise InputError(f"out (={out}) holds {state}; replace it with --overwrite, or choose another --out")


def start_run(out: Path, config: Config, *, resume: bool = False, overwrite: bool = False):
    """Makes the folder of a run, or finds the one that is to go on.

    A run that is replaced is moved to `NAME.replaced` beside it, and removed when `end_run` ends the new one.

    Raises:
      ValueError: as `check_out`, or `out` cannot be written to.
    """
    check_out(out, config, resume=resume, overwrite=overwrite)
    try:
        if overwrite and (out / "config.json").is_file():
            _put_aside(out)
        out.mkdir(parents=True, exist_ok=True)
        write_config(config, out)
    except OSError as error:
        raise InputError(f"out (={out}) cannot be written to: {error}") from error


def end_run(out: Path, results: dict):
    """Writes the results, which makes the run whole, and lets go of the run that it replaces."""
    write_json(out / "results.json", results)
    shutil.rmtree(_replaced(out), ignore_errors=True)


def read_config(run: Path) -> Config:
    """The configuration of a run, checked: it is a run, and of this version."""
    if not run.is_dir():
        raise InputError(f"run (={run}) must be a folder that `jaxattn train` wrote")
    path = run / "config.json"
    if not path.is_file():
        raise InputError(f"run (={run}) must be a folder that `jaxattn train` wrote: config.json is missing")
    try:
        config = Config(**json.loads(path.read_text()))
        config.check()
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from error
    return config


def read_results(run: Path) -> dict:
    """What `end_run` wrote."""
    return json.loads((run / "results.json").read_text())


def read_epochs(run: Path) -> list[dict]:
    """What every epoch measured."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def write_config(config: Config, folder: Path):
    """Writes what `read_config` reads."""
    write_json(folder / "config.json", dataclasses.asdict(config))


def write_json(path: Path, values: dict):
    """One readable file, which is there whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(partial, path)


def digest(*parts: object) -> str:
    """Of bytes as they are, and of all else as it is written."""
    whole = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else repr(part).encode()
        whole.update(len(content).to_bytes(8, "big") + content)
    return whole.hexdigest()[:16]


def _put_aside(out: Path):
    """Moves a run away. Of a whole one and an unfinished one, the whole one is kept."""
    if _replaced(out).exists() and not is_whole(out):
        shutil.rmtree(out)
        return
    shutil.rmtree(_replaced(out), ignore_errors=True)
    out.rename(_replaced(out))


def _replaced(out: Path) -> Path:
    return out.absolute().with_name(f"{out.absolute().name}.replaced")

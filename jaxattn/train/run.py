"""A run on disk: config.json, logs, checkpoints, results.json and figures, in one folder.

config.json is there from the first moment and results.json from the last, so what was interrupted is known for what it
is. Each is written beside its place and then renamed: no reader sees half of one.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from jaxattn.errors import InputError
from jaxattn.files import cut, read_json, read_small, reading, shown
from jaxattn.train.config import Config
from jaxattn.train.recipes import changed, recipe

ADDRESSES = ("gs:", "s3:", "hdfs:", "http:", "https:", "file:")  # not folders, though they could be made as such
FREE = ("data", "epochs")  # what a run that goes on may have otherwise: see `check_out` and `check_same`


class Source(NamedTuple):
    """What a run is trained on: `absolute`, the name of its data from any folder, and the digest of what they were."""

    absolute: str
    fingerprint: str


class Task(NamedTuple):
    """What a run's images are, and what its outputs mean: its network is of use without its data."""

    image_shape: tuple[int, ...]  # height, width, channels; or depth before them
    mean: tuple[float, ...]  # of the pixels from 0 to 1, for each channel: what is subtracted
    std: tuple[float, ...]  # what it is divided by
    classes: tuple[str, ...]


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
        configuration that cannot be resumed with this one, or something that is not a run. A run that is whole may go
        on to more epochs.
    """
    if out.parts[:1] and out.parts[0] in ADDRESSES:
        raise InputError(f"out (={cut(str(out))}) must be a folder of this machine, not an address")
    try:
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
    except (OSError, ValueError) as error:
        raise InputError(f"out (={cut(str(out))}) cannot be a folder: {error}") from error
    if not (out / "config.json").is_file():
        raise InputError(f"out (={out}) must be new, empty or a run; choose another --out")
    if resume:
        old, new = dataclasses.asdict(read_config(out)), dataclasses.asdict(config)
        longer = is_whole(out) and new["epochs"] > old["epochs"]
        free = [*(["data"] if read_source(out) else []), *(["epochs"] if longer else [])]  # see `check_same`
        kept = [name for name in old if name not in free]
        different = [f"{name} is {old[name]!r}, not {new[name]!r}" for name in kept if old[name] != new[name]]
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
        elif is_whole(out) and read_config(out).epochs < config.epochs:  # no longer: it goes on
            (out / "results.json").unlink()
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
    fields = read_json(path)
    try:
        config = Config(**fields)
        config.check()
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from error
    return config


def read_results(run: Path, *numbers: str) -> dict[str, Any]:
    """What `end_run` wrote; these of it must be numbers."""
    path = run / "results.json"
    results = read_json(path)
    for name in numbers:
        if not isinstance(results.get(name), int | float):
            raise InputError(f"{path}: {name} is {shown(results.get(name))}, expected a number")
    return results


def read_epochs(run: Path) -> list[dict[str, Any]]:
    """What every epoch measured."""
    path = run / "metrics.jsonl"
    with reading(path):
        epochs = [json.loads(line) for line in read_small(path).decode("utf-8").splitlines()]
    for number, epoch in enumerate(epochs, start=1):
        needed = ("epoch", "train_loss", "train_accuracy", "validation_accuracy")
        if not isinstance(epoch, dict) or not all(isinstance(epoch.get(name), int | float) for name in needed):
            raise InputError(f"{path}: line {number} is {shown(epoch)}, expected the numbers {', '.join(needed)}")
    return epochs


def write_source(source: Source, folder: Path):
    """Writes what `read_source` reads."""
    write_json(folder / "data.json", source._asdict())


def read_source(run: Path) -> Source | None:
    """What a run is trained on; None of a run of before this was kept."""
    path = run / "data.json"
    if not path.exists():
        return None
    found = read_json(path)
    if found.keys() != set(Source._fields) or not all(isinstance(value, str) for value in found.values()):
        raise InputError(f"{path}: has {', '.join(map(shown, found))}, expected {' and '.join(Source._fields)}")
    return Source(**found)


def write_task(task: Task, folder: Path):
    """Writes what `read_task` reads."""
    write_json(folder / "task.json", task._asdict())


def read_task(run: Path) -> Task:
    """What a run's images are, and its classes.

    Raises:
      ValueError: it was not kept, or the file is damaged.
    """
    path = run / "task.json"
    found = read_json(path)
    kinds = {"image_shape": int, "mean": int | float, "std": int | float, "classes": str}
    whole = found.keys() == kinds.keys() and all(
        isinstance(found[name], list) and all(isinstance(part, kind) for part in found[name])
        for name, kind in kinds.items()
    )
    task = Task(**{name: tuple(values) for name, values in found.items()}) if whole else None
    if (
        task is None
        or len(task.image_shape) not in (3, 4)
        or not all(0 < n < 1 << 20 for n in task.image_shape)
        or not len(task.mean) == len(task.std) == task.image_shape[-1]
        or not all(math.isfinite(number) for number in task.mean + task.std)
        or min(task.std) <= 0
    ):
        raise InputError(f"{path}: has {', '.join(map(shown, found))}, expected {', '.join(kinds)}, which fit together")
    return task


def check_same(run: Path, name: str, fingerprint: str):
    """Raises if these are not the data that a run is trained on, wherever they lie now.

    Raises:
      ValueError: an image, a label or a class is another, or there are more or fewer.
    """
    source = read_source(run)
    if source is not None and source.fingerprint != fingerprint:
        raise InputError(
            f"data (={name!r}) must be what the run in {run} is trained on: its images, labels or classes are others "
            f"(they are {fingerprint}, and were {source.fingerprint})"
        )


def identity(config: Config, fingerprint: str) -> str:
    """A digest of what a checkpoint is of: all settings but how long it trains and where its data lie, and the data."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE}
    return digest(sorted(settings.items()), fingerprint)


def write_config(config: Config, folder: Path):
    """Writes what `read_config` reads."""
    write_json(folder / "config.json", dataclasses.asdict(config))


def write_json(path: Path, values: dict):
    """One readable file, which is there whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
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

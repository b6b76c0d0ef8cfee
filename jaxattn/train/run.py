"""A run on disk: config.json, metrics.jsonl, results.json, the checkpoint and the figures, in one folder.

The folder appears under its name only when all of it is written; until then it is NAME.partial-PID beside it.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from jaxattn.train.config import Config
from jaxattn.train.extras import InputError


def default_folder(config: Config) -> Path:
    """`runs/`, the data, and the network, mix and seed where they are not the default command's: `runs/digits`,
    `runs/digits-resnet18-conv-seed1`."""
    parts = [config.data.partition(":")[0]]
    parts += [config.model] if config.model != Config.model else []
    parts += [config.mix] if config.mix != Config.mix else []
    parts += [f"seed{config.seed}"] if config.seed != Config.seed else []
    return Path("runs", "-".join(parts))


@contextlib.contextmanager
def new_run(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write a run into. It is renamed to `out` at the end of the block, and removed if that fails.

    Raises:
      ValueError: `out` exists and `overwrite` is False, or `out` holds something that is not a run.
    """
    occupied = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if occupied and not (out / "config.json").is_file():
        raise InputError(f"out (={out}) exists and is not a run; choose another --out")
    if occupied and not overwrite:
        raise InputError(f"out (={out}) holds a run already; replace it with --overwrite, or choose another --out")
    partial = out.absolute().with_name(f"{out.absolute().name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        replaced = partial.with_suffix(partial.suffix + ".replaced")
        if out.exists():
            out.rename(replaced)  # until the new run stands in its place, the old one is not removed
        partial.rename(out)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read_config(run: Path) -> Config:
    """The configuration of a run, checked: it is a run, whole, and of this version."""
    if not run.is_dir():
        raise InputError(f"run (={run}) is not a folder; give one that `jaxattn train` wrote")
    path = run / "config.json"
    if not path.is_file():
        raise InputError(f"run (={run}) is not a run: config.json is missing")
    try:
        config = Config(**json.loads(path.read_text()))
        config.check()
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from error
    return config


def write_config(config: Config, folder: Path):
    """Writes what `read_config` reads."""
    write_json(folder / "config.json", dataclasses.asdict(config))


def write_json(path: Path, values: dict):
    """One readable file."""
    path.write_text(json.dumps(values, indent=2) + "\n")

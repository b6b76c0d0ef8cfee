"""What a run writes while it goes: lines of JSON and TensorBoard's event files."""

import json
import os
from pathlib import Path
from typing import Any

from jaxattn.errors import InputError, needs_extra
from jaxattn.files import read_small, reading, reason


class Log:
    """`steps.jsonl` and `metrics.jsonl` (epochs) in the run's folder, and the same numbers for TensorBoard beside them.

    A run that goes on at `step` first forgets what was written after it, since it will be written again.
    """

    def __init__(self, folder: Path, step: int):
        with needs_extra("train"):
            from tensorboardX import SummaryWriter
        self.epochs = _keep(folder / "metrics.jsonl", step)
        _keep(folder / "steps.jsonl", step)
        self.files = {name: open(folder / f"{name}.jsonl", "a", encoding="utf-8") for name in ("steps", "metrics")}  # noqa: SIM115
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step or None, flush_secs=10)

    def steps(self, values: dict[str, Any]):
        """Means over the last few steps."""
        self._write("steps", values)

    def epoch(self, values: dict[str, Any]):
        """Means over an epoch, and the validation."""
        self.epochs.append(values)
        self._write("metrics", values)

    def close(self):
        """Flushes and closes the files."""
        for file in (*self.files.values(), self.board):
            file.close()

    def _write(self, name: str, values: dict[str, Any]):
        file = self.files[name]
        if not os.fstat(file.fileno()).st_nlink:  # what is written would be in no folder
            raise InputError(f"{file.name} was removed")
        file.write(json.dumps(values) + "\n")
        file.flush()
        for key, value in values.items():
            if key != "step":
                self.board.add_scalar(f"{name}/{key}", value, values["step"])


class Silent:
    """The log of a process that writes nothing, as another does."""

    def __init__(self):
        self.epochs: list[dict] = []

    def steps(self, values: dict[str, Any]):
        """Means over the last few steps."""

    def epoch(self, values: dict[str, Any]):
        """Means over an epoch, and the validation."""
        self.epochs.append(values)

    def close(self):
        """There is nothing to close."""


def _keep(path: Path, step: int) -> list[dict[str, Any]]:
    """Leaves the lines up to `step` in the file, and returns them. What a killed process left half written goes."""
    if not path.exists():
        return []
    with reading(path):
        lines = read_small(path).decode("utf-8", "replace").splitlines()
    kept: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            if values["step"] > step:
                break
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            if number == len(lines):  # half written
                break
            raise InputError(f"{path}: line {number} is no line of a run's log: {reason(error)}") from error
        kept.append(values)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(values) + "\n" for values in kept), encoding="utf-8")
    os.replace(partial, path)
    return kept

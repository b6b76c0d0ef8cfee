"""What a run writes while it goes: lines of JSON and TensorBoard's event files."""

import json
import os
from pathlib import Path
from typing import Any

from jaxattn.errors import needs_extra


class Log:
    """`steps.jsonl` and `metrics.jsonl` (epochs) in the run's folder, and the same numbers for TensorBoard beside them.

    A run that goes on at `step` first forgets what was written after it, since it will be written again.
    """

    def __init__(self, folder: Path, step: int):
        with needs_extra("train"):
            from tensorboardX import SummaryWriter
        self.epochs = _keep(folder / "metrics.jsonl", step)
        _keep(folder / "steps.jsonl", step)
        self.files = {name: open(folder / f"{name}.jsonl", "a") for name in ("steps", "metrics")}  # noqa: SIM115
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
        self.files[name].write(json.dumps(values) + "\n")
        self.files[name].flush()
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


def _keep(path: Path, step: int) -> list[dict]:
    """Leaves the lines up to `step` in the file, and returns them. What a killed process left half written goes."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            values = json.loads(line)
        except ValueError:
            break
        if values["step"] > step:
            break
        kept.append(values)
    if path.exists():
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(values) + "\n" for values in kept))
        os.replace(partial, path)
    return kept

"""What one seed of an experiment gave, kept on disk, so that a study that was interrupted goes on."""

import dataclasses
import json
import time
from pathlib import Path

import jax

from jaxattn.plots import inline_svg
from jaxattn.study.claim import Claim, Measurement, Setting
from jaxattn.train.run import digest, write_json

PACKAGE = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Kept:
    """What one seed of an experiment gave, as it is kept."""

    numbers: dict[str, float]
    verdict: str
    notes: str
    svg: str
    seconds: float


def kept(claim: Claim, path: Path, setting: Setting) -> Kept:
    """What is kept at `path`, or a new run, which is kept. Two claims may share an experiment, and so its runs."""
    if path.is_file():
        return Kept(**json.loads(path.read_text()))
    start = time.perf_counter()
    with jax.default_matmul_precision("highest"):  # by default GPUs and TPUs round products of float32
        run = claim.experiment(setting)
    seconds = time.perf_counter() - start
    numbers = {name: float(value) for name, value in run.numbers.items()}
    result = Kept(numbers, run.verdict, run.notes, drawing(run, claim), seconds)
    write_json(path, dataclasses.asdict(result))
    return result


def drawing(made: Measurement, claim: Claim) -> str:
    """A measurement's figures as SVG, one after the other."""
    drawn = enumerate(made.figures)
    return "".join(f if isinstance(f, str) else inline_svg(f, f"claim{claim.number}-{n}") for n, f in drawn)


def code_version() -> str:
    """A digest of the library's sources: a result of other code is not taken from the cache."""
    return digest(*(path.read_bytes() for path in sorted(PACKAGE.rglob("*.py"))))

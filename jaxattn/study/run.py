"""The runner: each experiment once a seed, kept on disk, so that what was interrupted goes on."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from jaxattn.plots import inline_svg
from jaxattn.study.claim import FAILED, Claim, Measurement, Profile, Setting, decide
from jaxattn.study.claims import CLAIMS
from jaxattn.study.report import write_report
from jaxattn.study.seeds import UNDECIDED
from jaxattn.train.data import Dataset, load
from jaxattn.train.extras import InputError, needs_extra
from jaxattn.train.report import environment
from jaxattn.train.run import write_json

with needs_extra("train"):
    from tqdm import tqdm

SEEDS = {"quick": 3, "full": 5}
PACKAGE = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Kept:
    """What one seed of an experiment gave, as it is kept."""

    numbers: dict[str, float]
    verdict: str
    notes: str
    svg: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Result:
    """What all seeds of a claim gave: each number once a seed, what was made of all of them, and the verdict."""

    number: int
    verdict: str
    numbers: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    summary: dict[str, float] = dataclasses.field(default_factory=dict)
    notes: str = ""
    svg: str = ""
    error: str = ""
    seconds: float = 0.0


def study(claims: str | None, profile: Profile, seeds: int | None, data: str, out: Path) -> list[Result]:
    """Runs the claims that `claims` names, as "5,10,21", or all; writes report.html and report.json into `out`.

    Raises:
      ValueError: a claim that is no number from 1 to 22, seeds below 1, data that cannot be loaded, or a folder that
        cannot be written to.
    """
    chosen = select(claims)
    count = SEEDS[profile] if seeds is None else seeds
    if count < 1:
        raise InputError(f"seeds (={count}) must be at least 1")
    dataset = load(data)
    cache = out / "cache"
    settings = {"profile": profile, "seeds": count, "data": data}
    try:
        cache.mkdir(parents=True, exist_ok=True)
        write_json(out / "settings.json", settings)
    except OSError as error:
        raise InputError(f"out (={out}) cannot be written to: {error.strerror}") from error
    made_with = {name: value for name, value in environment().items() if name != "CPU cores"}
    key = digest(code_version(), profile, data, fingerprint(dataset), made_with)
    results = []
    with tqdm(total=len(chosen) * count, unit="run", disable=None) as bar:  # None: shown on a terminal only
        for claim in chosen:
            bar.set_description(f"claim {claim.number}")
            settled = []
            try:
                for seed in range(count):
                    path = cache / f"{claim.experiment.__name__}-{seed}-{key}.json"
                    settled.append(kept(claim, path, Setting(profile, seed, dataset)))
                    bar.update()
                results.append(conclude(claim, settled))
            except Exception as error:  # whatever it is belongs in the report, and the others still run
                bar.update(count - len(settled))
                results.append(Result(claim.number, FAILED, error=f"{type(error).__name__}: {error}"))
    write_report(out, list(zip(chosen, results, strict=True)), settings)
    return results


def select(text: str | None) -> list[Claim]:
    """The claims that `text` names, in their order.

    >>> [claim.number for claim in select("5,1")]
    [1, 5]
    """
    if text is None:
        return list(CLAIMS)
    known = {claim.number for claim in CLAIMS}
    try:
        wanted = {int(part) for part in text.split(",")}
    except ValueError as error:
        raise InputError(f"claims (={text!r}) must be numbers with commas between them, as 5,10,21") from error
    if unknown := sorted(wanted - known):
        raise InputError(f"claims (={text!r}): there is no claim {unknown[0]}; allowed: 1 to {max(known)}")
    return [claim for claim in CLAIMS if claim.number in wanted]


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


def conclude(claim: Claim, seeds: Sequence[Kept]) -> Result:
    """The verdict of all seeds: the judge's, or the one that they share."""
    numbers = {name: [seed.numbers[name] for seed in seeds] for name in seeds[0].numbers}
    seconds = sum(seed.seconds for seed in seeds)
    if claim.judge is not None:
        made = claim.judge(numbers)
        svg = drawing(made, claim) + seeds[0].svg
        return Result(claim.number, made.verdict, numbers, dict(made.numbers), made.notes, svg, seconds=seconds)
    verdicts = {seed.verdict for seed in seeds}
    verdict = verdicts.pop() if len(verdicts) == 1 else decide(True, UNDECIDED)
    return Result(claim.number, verdict, numbers, {}, seeds[0].notes, seeds[0].svg, seconds=seconds)


def drawing(made: Measurement, claim: Claim) -> str:
    """A measurement's figures as SVG, one after the other."""
    drawn = enumerate(made.figures)
    return "".join(f if isinstance(f, str) else inline_svg(f, f"claim{claim.number}-{n}") for n, f in drawn)


def code_version() -> str:
    """A digest of the library's sources: a result of other code is not taken from the cache."""
    return digest(*(path.read_bytes() for path in sorted(PACKAGE.rglob("*.py"))))


def fingerprint(data: Dataset) -> str:
    """A digest of some of the images, so that a data set that changed under its name is run anew."""
    images, labels = data.train.fetch(np.arange(min(64, len(data.train))))
    return digest(images.tobytes(), labels.tobytes(), len(data.train), len(data.test))


def digest(*parts: object) -> str:
    """Of bytes as they are, and of all else as it is written."""
    whole = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else repr(part).encode()
        whole.update(len(content).to_bytes(8, "big") + content)
    return whole.hexdigest()[:16]


def summary(results: Sequence[Result]) -> str:
    """A line a claim, for the terminal."""
    reason = lambda result: f" ({result.error})" if result.error else ""
    return "\n".join(f"claim {result.number:2d}: {result.verdict}{reason(result)}" for result in results)

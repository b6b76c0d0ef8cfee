"""The runner: each claim once, kept on disk, so that what was interrupted goes on."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxattn.plots import inline_svg
from jaxattn.study.claim import FAILED, NOT_YET, Claim, Profile, Setting
from jaxattn.study.claims import CLAIMS
from jaxattn.study.report import write_report
from jaxattn.train.data import Dataset, load
from jaxattn.train.extras import InputError, needs_extra
from jaxattn.train.run import write_json

with needs_extra("train"):
    from tqdm import tqdm

SEEDS = {"quick": 3, "full": 5}
PACKAGE = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Result:
    """What all seeds of a claim gave: each number once a seed, and the verdict that they share."""

    number: int
    verdict: str
    numbers: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    notes: str = ""
    svg: str = ""
    error: str = ""


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
    try:
        cache.mkdir(parents=True, exist_ok=True)
        write_json(out / "settings.json", {"profile": profile, "seeds": count, "data": data})
    except OSError as error:
        raise InputError(f"out (={out}) cannot be written to: {error.strerror}") from error
    version = code_version()
    results = []
    for claim in (bar := tqdm(chosen, desc="claims", unit="claim", disable=None)):  # None: shown on a terminal only
        bar.set_postfix_str(f"claim {claim.number}")
        key = digest(version, claim.number, profile, count, data, fingerprint(dataset))
        results.append(cached(claim, cache / f"{claim.number:02d}-{key}.json", profile, count, dataset))
    write_report(out, list(zip(chosen, results, strict=True)), {"profile": profile, "seeds": count, "data": data})
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


def cached(claim: Claim, path: Path, profile: Profile, seeds: int, data: Dataset) -> Result:
    """The result that is kept at `path`, or a new one, which is kept unless it failed."""
    if path.is_file():
        return Result(**json.loads(path.read_text()))
    result = run_claim(claim, profile, seeds, data)
    if result.verdict not in (FAILED, NOT_YET):
        write_json(path, dataclasses.asdict(result))
    return result


def run_claim(claim: Claim, profile: Profile, seeds: int, data: Dataset) -> Result:
    """Runs a claim with each seed. What it raises is its result, so that the others still run."""
    if claim.experiment is None:
        return Result(claim.number, NOT_YET)
    try:
        runs = [claim.experiment(Setting(profile, seed, data)) for seed in range(seeds)]
        numbers = {name: [float(run.numbers[name]) for run in runs] for name in runs[0].numbers}
        verdicts = {run.verdict for run in runs}
        verdict = verdicts.pop() if len(verdicts) == 1 else "depends on the seed"
        svg = "" if runs[0].figure is None else inline_svg(runs[0].figure, f"claim{claim.number}")
        return Result(claim.number, verdict, numbers, runs[0].notes, svg)
    except Exception as error:  # whatever it is belongs in the report
        return Result(claim.number, FAILED, error=f"{type(error).__name__}: {error}")


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
    return "\n".join(f"claim {result.number:2d}: {result.verdict}" for result in results)

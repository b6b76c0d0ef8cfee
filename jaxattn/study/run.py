"""The study: each experiment once a seed, side by side in processes, and of each claim the verdict."""

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxattn.errors import InputError
from jaxattn.study.claim import FAILED, Claim, Profile, decide
from jaxattn.study.kept import Kept, drawing
from jaxattn.study.progress import Progress
from jaxattn.study.report import often, write_report
from jaxattn.study.seeds import UNDECIDED
from jaxattn.study.worker import Job, Task
from jaxattn.study.workers import answers, default_jobs
from jaxattn.train.data import load
from jaxattn.train.run import write_json

SEEDS = {"quick": 3, "full": 5}
SOURCE = "jaxattn.study.claims"  # the module whose CLAIMS are studied


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
    runs: list[str] = dataclasses.field(default_factory=list)  # the verdict of each run, this one's first


def study(
    claims: str | None,
    profile: Profile,
    seeds: int | None,
    data: str,
    out: Path,
    jobs: int | None = None,
    runs: int = 1,
) -> list[Result]:
    """Runs the claims that `claims` names, as "5,10,21", or all, in `jobs` processes.

    Says on the standard error how far it is, and writes report.html, report.json and verdicts.md into `out`. Each of
    several `runs` has seeds of its own; what is reported is the first, and how many came out as it did.

    Raises:
      ValueError: a claim that is no number from 1 to 22, seeds, jobs or runs below 1, data that cannot be loaded, or a
        folder that cannot be written to.
    """
    chosen = select(claims)
    count = SEEDS[profile] if seeds is None else seeds
    jobs = default_jobs() if jobs is None else jobs
    for name, value in (("seeds", count), ("jobs", jobs), ("runs", runs)):
        if value < 1:
            raise InputError(f"{name} (={value}) must be at least 1")
    load(data)  # what is wrong with it is said before anything runs
    settings = {"profile": profile, "seeds": count, "data": data} | ({"runs": runs} if runs > 1 else {})
    cache = out / "cache"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        write_json(out / "settings.json", settings)
    except OSError as error:
        raise InputError(f"out (={out}) must be a folder that can be written to: {error.strerror}") from error
    results, made_with = run_all(chosen, count, runs, Job(SOURCE, profile, data, str(cache)), jobs)
    write_report(out, list(zip(chosen, results, strict=True)), settings, made_with)
    return results


def run_all(
    chosen: Sequence[Claim], seeds: int, runs: int, job: Job, jobs: int
) -> tuple[list[Result], Mapping[str, str]]:
    """The result of each claim, in their order, and what they were made with. Run r has the `seeds` from r seeds on."""
    sharing: dict[Callable[..., Any], list[Claim]] = {}  # by their experiment, the longest first
    for claim in sorted(chosen, key=lambda claim: -claim.cost):
        sharing.setdefault(claim.experiment, []).append(claim)
    claims_of = {claims[0].number: claims for claims in sharing.values()}
    total = seeds * runs
    tasks = [[Task(number, seed) for seed in range(total)] for number in claims_of]
    settled: dict[int, dict[int, Kept]] = {number: {} for number in claims_of}  # by seed
    results: dict[int, Result] = {}
    made_with: Mapping[str, str] = {}
    cost = sum(total * claims[0].cost for claims in claims_of.values())
    with Progress(cost, len(chosen)) as progress, contextlib.closing(answers(job, tasks, jobs)) as found:
        for task, answer in found:
            claims, kept, error = claims_of[task.claim], settled[task.claim], answer.get("error")
            if claims[0].number in results:  # it has failed, while another process was at another seed
                continue
            progress.goes_on(claims[0].cost * (total - len(kept) if error else 1))
            if error is None:
                made_with = answer["environment"]
                kept[task.seed] = Kept(**answer["kept"])
                if len(kept) < total:
                    continue
            seeds_of = [[kept[seed] for seed in range(n, n + seeds) if seed in kept] for n in range(0, total, seeds)]
            for claim in claims:
                each = [conclude(claim, of_run, error) for of_run in seeds_of]
                verdicts = [result.verdict for result in each]
                results[claim.number] = dataclasses.replace(each[0], runs=verdicts if runs > 1 else [])
                progress.ended(line(results[claim.number]))
    return [results[claim.number] for claim in chosen], made_with


def select(text: str | None) -> list[Claim]:
    """The claims that `text` names, in their order.

    >>> [claim.number for claim in select("5,1")]
    [1, 5]
    """
    claims: Sequence[Claim] = importlib.import_module(SOURCE).CLAIMS
    if text is None:
        return list(claims)
    known = {claim.number for claim in claims}
    try:
        wanted = {int(part) for part in text.split(",")}
    except ValueError as error:
        raise InputError(f"claims (={text!r}) must be numbers with commas between them, as 5,10,21") from error
    if unknown := sorted(wanted - known):
        raise InputError(f"claims (={text!r}) must be from 1 to {max(known)}: there is no claim {unknown[0]}")
    return [claim for claim in claims if claim.number in wanted]


def conclude(claim: Claim, seeds: Sequence[Kept], error: str | None) -> Result:
    """The verdict of all seeds together; that the claim failed, where there is an error, or the judge raises one."""
    if error is None:
        try:
            return judged(claim, seeds)
        except Exception as raised:  # whatever it is belongs in the report, and the other claims still run
            error = f"{type(raised).__name__}: {raised}"
    return Result(claim.number, FAILED, error=error)


def judged(claim: Claim, seeds: Sequence[Kept]) -> Result:
    """The judge's verdict of all seeds, or the one that they share."""
    numbers = {name: [seed.numbers[name] for seed in seeds] for name in seeds[0].numbers}
    seconds = sum(seed.seconds for seed in seeds)
    if claim.judge is not None:
        made = claim.judge(numbers)
        svg = drawing(made, claim) + seeds[0].svg
        return Result(claim.number, made.verdict, numbers, dict(made.numbers), made.notes, svg, seconds=seconds)
    verdicts = {seed.verdict for seed in seeds}
    verdict = verdicts.pop() if len(verdicts) == 1 else decide(True, UNDECIDED)
    return Result(claim.number, verdict, numbers, {}, seeds[0].notes, seeds[0].svg, seconds=seconds)


def summary(results: Sequence[Result]) -> str:
    """A line a claim, for the terminal."""
    return "\n".join(map(line, results))


def line(result: Result) -> str:
    """A claim's number and verdict, how often it came out, and the error if there was one."""
    return f"claim {result.number:2d}: {often(result)}" + (f" ({result.error})" if result.error else "")

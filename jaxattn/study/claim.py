"""A claim: who says what, the experiment that tests it, and the threshold that was written down before it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxattn.train.data import Dataset

SOURCE = "Zhihu 448924025"
FAILED = "failed to run"
Profile = Literal["quick", "full"]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What an experiment is run with. In the folder `kept`, if there is one, accuracies are for all experiments."""

    profile: Profile
    seed: int
    data: Dataset
    kept: Path | None = None


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What one run of an experiment gave, or what a judge made of all of them.

    Args:
      numbers: what was measured, by name.
      verdict: "holds", "fails" or "depends on ...", computed from the numbers and the claim's threshold; empty where
        the claim has a judge.
      figures: of matplotlib, or the text of an SVG.
      notes: what a reader should know beside the numbers.
    """

    numbers: Mapping[str, float]
    verdict: str = ""
    figures: Sequence[Any] = ()
    notes: str = ""


Numbers = Mapping[str, Sequence[float]]  # each once a seed


class Published(NamedTuple):
    """Figures by others, that belong beside ours: quoted, with their source."""

    source: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of the debate.

    Args:
      number: its place in the debate, 1 to 22.
      author: who makes it.
      text: the claim, in English.
      chinese: the claim, in Chinese: a paraphrase in the author's sense, as `text` is.
      about: the experiment, in three sentences.
      hypothesis: what we expect of it.
      threshold: which numbers make it hold, and which make it depend on something.
      experiment: `experiment(setting, ...) -> Measurement`, whose other arguments are the mechanism.
      judge: `judge(numbers) -> Measurement`, from each number once a seed: the verdict of all seeds together. Without
        it each seed has its own.
      published: figures by others.
      cost: about the seconds that a seed takes in the quick profile, by which the longest go first.
    """

    number: int
    author: str
    text: str
    chinese: str
    about: str
    hypothesis: str
    threshold: str
    experiment: Callable[..., Measurement]
    judge: Callable[[Numbers], Measurement] | None = None
    published: Sequence[Published] = ()
    cost: float = 1.0


def claim(**fields: Any) -> Callable[[Callable[..., Measurement]], Claim]:
    """Makes an experiment a claim, with `Claim`'s other arguments as they are given here.

    >>> words = {"about": "Divide.", "hypothesis": "Even.", "threshold": "remainder = 0"}
    >>> @claim(number=0, author="nobody", text="Two is even.", chinese="二是偶数。", **words)
    ... def even(setting, n=2):
    ...     return Measurement({"remainder": n % 2}, decide(n % 2 == 0))
    >>> even.experiment(None).verdict, even.experiment(None, n=3).verdict
    ('holds', 'fails')
    """
    return lambda experiment: Claim(experiment=experiment, **fields)


def decide(holds: bool, on: str | None = None) -> str:
    """The verdict: "fails", or "holds", or if it does so on a condition only, "depends on" that."""
    if not holds:
        return "fails"
    return "holds" if on is None else f"depends on {on}"

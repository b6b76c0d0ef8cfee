"""What several seeds say together: a mean, and how sure it is."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from jaxattn.study.claim import decide

UNDECIDED = "the seed"  # what a verdict depends on where the seeds don't decide


class Interval(NamedTuple):
    """A mean, and the 95 % interval about it."""

    mean: float
    low: float
    high: float

    def above(self, threshold: float) -> bool | None:
        """Whether the whole interval is above the threshold; None if the threshold is inside."""
        if self.low > threshold:
            return True
        return False if self.high <= threshold else None


def interval(values: Sequence[float]) -> Interval:
    """By Student's t. One value says nothing of its spread, so its interval is all numbers.

    >>> interval([1.0, 2.0, 3.0])  # 2 ± 4.303 / √3
    Interval(mean=2.0, low=-0.484..., high=4.484...)
    """
    mean, n = float(np.mean(values)), len(values)
    if n == 1:
        return Interval(mean, -math.inf, math.inf)
    half = float(stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half)


def difference(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Of a - b, seed by seed: what the seeds share, such as the images, drops out."""
    return interval([x - y for x, y in zip(a, b, strict=True)])


def together(outcomes: Sequence[bool | None], on: str) -> str:
    """The verdict: "holds" if all outcomes are true, "fails" if none is; else what it depends on, or the seed if one is
    None.

    >>> together([True, False], "the task"), together([True, None], "the task"), together([False, False], "the task")
    ('depends on the task', 'depends on the seed', 'fails')
    """
    if None in outcomes:
        return decide(True, UNDECIDED)
    return decide(any(outcomes), None if all(outcomes) else on)


def negated(outcome: bool | None) -> bool | None:
    return None if outcome is None else not outcome


def points(value: Interval) -> str:
    """An interval of a share, in percentage points.

    >>> points(Interval(0.02, -0.01, 0.05))
    '+2.0 points (-1.0 to +5.0)'
    """
    if not math.isfinite(value.low):
        return f"{100 * value.mean:+.1f} points (of one seed, so without an interval)"
    return f"{100 * value.mean:+.1f} points ({100 * value.low:+.1f} to {100 * value.high:+.1f})"

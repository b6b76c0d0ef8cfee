"""What `einsum` has to know of a way to compute an equation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array

from jaxattn.extents import Resolved


class Problem(NamedTuple):
    """What is to be computed, and on which machine."""

    resolved: Resolved
    dtypes: tuple[np.dtype, ...]  # of the operands, then of the result
    backend: str


class Lowering(NamedTuple):
    """One way to compute an equation, as pure functions. `Match` is whatever `match` finds, which the others are given.

    match: of a problem. None where it can't be computed in this way, or where another one is faster.
    describe: the way in words, for a reader of the plan.
    temporaries: an estimate of the bytes that it holds besides operands and result, of which a number has `width`.
    run: `(resolved, match, operands, precision, accumulate)` to the result, in the dtype `accumulate`.
    widens: whether operands narrower than the result are first cast to its dtype.
    """

    name: str
    match: Callable[[Problem], Any]
    describe: Callable[[Resolved, Any], str]
    temporaries: Callable[[Resolved, Any, int], int]
    run: Callable[..., Array]
    widens: bool = False

"""What `einsum` has to know of a way to compute an equation."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
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
    flops: of all its products and sums; by default as if they were made at once.
    """

    name: str
    match: Callable[[Problem], Any]
    describe: Callable[[Resolved, Any], str]
    temporaries: Callable[[Resolved, Any, int], int]
    run: Callable[..., Array]
    widens: bool = False
    flops: Callable[[Resolved, Any], int] | None = None


def first_match(lowerings: Sequence[Lowering], problem: Problem) -> tuple[Lowering, Any]:
    """The first lowering that can compute a problem, and its match."""
    matches = ((lowering, lowering.match(problem)) for lowering in lowerings)
    return next(found for found in matches if found[1] is not None)


def statistics_dtype(dtype: np.dtype) -> np.dtype:
    """Of sums: float32 of what is narrower."""
    return np.dtype(jnp.float32) if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4 else dtype


def evaluate(
    lowering: Lowering, resolved: Resolved, match: Any, operands: Sequence[Array], precision: Any, dtype: np.dtype
) -> Array:
    """What a lowering makes of operands of any dtypes."""
    common = np.dtype(jnp.result_type(*operands))
    if lowering.widens and common.itemsize < dtype.itemsize:
        common = dtype
    operands = [x.astype(common) for x in operands]
    return lowering.run(resolved, match, operands, precision, statistics_dtype(dtype)).astype(dtype)

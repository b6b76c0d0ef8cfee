"""What `einsum` has to know of a way to compute an equation."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxattn import machine
from jaxattn.extents import Resolved
from jaxattn.lowerings.multilinear import multilinear
from jaxattn.promotion import broadcasting


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
    composed: whether `run` solves problems of its own.
    """

    name: str
    match: Callable[[Problem], Any]
    describe: Callable[[Resolved, Any], str]
    temporaries: Callable[[Resolved, Any, int], int]
    run: Callable[..., Array]
    widens: bool = False
    flops: Callable[[Resolved, Any], int] | None = None
    composed: bool = False


@functools.lru_cache(maxsize=4096)
def first_match(lowerings: tuple[Lowering, ...], problem: Problem) -> tuple[Lowering, Any]:
    """The first lowering that can compute a problem, and its match."""
    matches = ((lowering, lowering.match(problem)) for lowering in lowerings)
    return next(found for found in matches if found[1] is not None)


def statistics_dtype(dtype: np.dtype) -> np.dtype:
    """Of sums: float32 of what is narrower."""
    return np.dtype(jnp.float32) if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4 else dtype


@dataclasses.dataclass(frozen=True)
class Solution:
    """What the first lowering that can makes of operands of any dtypes, on the machine that it is traced for."""

    lowerings: tuple[Lowering, ...]
    problem: Problem  # of known sizes, by which the lowering is chosen
    resolved: Resolved
    precision: Any
    dtype: np.dtype

    def match(self, backend: str) -> tuple[Lowering, Any]:
        return first_match(self.lowerings, self.problem._replace(backend=backend))

    @broadcasting
    def __call__(self, *operands: Array) -> Array:
        lowering, match = self.match(machine.backend())
        common = np.dtype(jnp.result_type(*operands))
        if lowering.widens and common.itemsize < self.dtype.itemsize:
            common = self.dtype
        arrays = [x.astype(common) for x in operands]
        found = lowering.run(self.resolved, match, arrays, self.precision, statistics_dtype(self.dtype))
        return found.astype(self.dtype)


def evaluate(solution: Solution, operands: Sequence[Array]) -> Array:
    """The solution, on a CPU as a primitive where its way is the CPU's own: a program for another platform has that
    platform's. What is XLA's own stands in a program as it is, so that `jax.checkpoint` can tell products from the
    rest."""
    here = solution.match(machine.backend())
    own = machine.backend() == "cpu" and not here[0].composed and here != solution.match("gpu")
    return multilinear(solution, operands) if own else solution(*operands)

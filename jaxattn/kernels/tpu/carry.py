"""Sums for keys, where the kernel takes strips: at the end of a strip those that are done go out to HBM, and the next
strip begins with the others.

    dk[first + y] = sums[y]  for y < done,      sums[y] = sums[y + done]  for the next strip

Strips come one after the other, so each sum is added up in one order, and no key is written twice. What goes out is
copied while the next strip is computed.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxattn.kernels.tpu.block import I32
from jaxattn.kernels.tpu.plan import Plan


def scratch(plan: Plan, dtype: Any) -> list[Any]:
    """What goes out, for dk and for dv, and a semaphore for each; nothing, where there are no strips."""
    if plan.strips is None:
        return []
    of_strip = [plan.strips.keys, *(axis.length for axis in plan.axes[1:]), plan.heads.lanes]
    return [pltpu.VMEM(of_strip, dtype)] * 2 + [pltpu.SemaphoreType.DMA] * 2


def begin(plan: Plan, table: Any, strip: Any, sums: Sequence[Any]) -> None:
    """Where a strip begins: what is not done of the strip before, and zeros."""
    strips = plan.strips
    assert strips is not None, "without strips all sums begin as zeros"
    done = _of_strip(plan, table, jnp.maximum(strip - I32(1), 0))[1]

    def carry(y: Any, _: Any) -> Any:
        there = (strip > 0) & (y + done < strips.keys)
        for total in sums:  # in turn: a later place is read before it is written
            total[y] = jnp.where(there, total[jnp.minimum(y + done, strips.keys - 1)], 0.0)
        return I32(0)

    lax.fori_loop(np.int32(0), np.int32(strips.keys), carry, I32(0))


def send(
    plan: Plan,
    table: Any,
    step: tuple[Any, Any, Any],
    sums: Sequence[Any],
    factors: Sequence[Any],
    targets: Sequence[Any],
    kept: Sequence[Any],
) -> None:
    """Where a step (block of heads, entry, strip) ends: sums times factors, to the targets in HBM. `kept` is what
    `scratch` asked for."""
    strips, lanes = plan.strips, plan.heads.lanes
    assert strips is not None, "without strips a step writes all keys itself"
    copies, semaphores = kept[:2], kept[2:]
    (block, entry, strip), last = step, strips.number - 1
    (first, done), (_, before) = (_of_strip(plan, table, x) for x in (strip, jnp.maximum(strip - I32(1), 0)))
    lane = pl.multiple_of(block * I32(lanes), lanes) if plan.heads.blocks > 1 else 0
    others = (slice(None),) * (len(plan.axes) - 1)

    def moves(y: Any) -> list[Any]:
        to = entry, first + y, *others, pl.ds(lane, lanes)
        triples = zip(copies, targets, semaphores, strict=True)
        return [pltpu.make_async_copy(copy.at[y], target.at[to], semaphore) for copy, target, semaphore in triples]

    def wait(y: Any) -> None:  # of a copy only its size counts
        for move in moves(y):
            move.wait()

    def start(y: Any) -> None:
        for total, factor, copy in zip(sums, factors, copies, strict=True):
            copy[y] = (total[y] * factor).astype(copy.dtype)
        for move in moves(y):
            move.start()

    _over(strips.keys, wait, where=lambda y: (strip > 0) & (y < before))
    _over(strips.keys, start, where=lambda y: y < done)
    _over(strips.keys, wait, where=lambda y: (strip == last) & (y < done))


def _of_strip(plan: Plan, table: Any, strip: Any) -> tuple[Any, Any]:
    """Where its keys begin, and how many of them are done with it."""
    begins = 2 * len(plan.looped) + 1
    return table[begins, strip * I32(plan.step_rows)], table[begins + 1, strip * I32(plan.step_rows)]


def _over(count: int, body: Any, where: Any) -> None:
    """`body` of each of so many places, in turn, where that is so."""

    def step(y: Any, _: Any) -> Any:
        pl.when(where(y))(lambda: body(y))
        return I32(0)

    lax.fori_loop(np.int32(0), np.int32(count), step, I32(0))

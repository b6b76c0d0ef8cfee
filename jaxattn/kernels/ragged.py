"""Grids of different sizes in one batch, padded to one size: every query has its own range of slots.

Where a grid ends decides which keys a window holds under "shift", and a kernel's geometry is static. So a window that
shifts becomes a wider one that does not, with room for wherever it may shift to: k slots become 2k - 1, centred, and
what is given by slot moves along. What a query sees of them is a run, `slot_ranges`, which may be traced.
"""

import dataclasses
import functools
import operator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxattn.kernels.operands import Operands, Options
from jaxattn.window import Along, Window, place


class Run(NamedTuple):
    """The queries of one axis: which are in their own grid, where their own slot 0 is, and which slots they see."""

    inside: Bool[Array, "*batch queries"]
    first: Int[Array, "*batch queries"]
    low: Int[Array, "*batch queries"]
    high: Int[Array, "*batch queries"]


def shifts(along: Along) -> bool:
    """Whether a window may start elsewhere where the grid ends earlier."""
    return along.boundary == "shift" and not (along.causal and along.block == along.dilation == 1)


def widened(window: Window) -> Window:
    """One that starts where it starts wherever the grid ends, and has every slot of the window on any smaller grid."""
    wide = [_widened(along) for along in window.along]
    return Window(**{name: tuple(getattr(along, name) for along in wide) for name in Along._fields})


def _widened(along: Along) -> Along:
    if not shifts(along):
        return along
    return along._replace(size=along.size if along.causal else 2 * along.size - 1, block=1, boundary="mask")


def fit(operands: Operands, options: Options, sizes: Int[Array, "*batch rank"]) -> tuple[Operands, Options]:
    """The same for grids of these sizes, at the start of a padded one: each as if it were alone."""
    window, rank = options.window, len(options.keys)
    wide = None if window is None else widened(window)
    sizes = jnp.clip(sizes.astype(jnp.int32), 0, jnp.asarray(options.keys, jnp.int32))
    runs = [_run(options, a, sizes[..., a, None]) for a in range(rank)]
    queries = functools.reduce(operator.and_, (_along_grid(run.inside, a, rank) for a, run in enumerate(runs)))
    index = [jnp.arange(n, dtype=jnp.int32) for n in options.keys]
    keys = [_along_grid(i < sizes[..., a, None], a, rank) for a, i in enumerate(index)]
    within = functools.reduce(operator.and_, keys)

    blank = lambda x, inside: jnp.where(inside[..., None, None], x, jnp.zeros((), x.dtype))
    fitted: dict[str, Array | None] = {
        "query": blank(operands.query, queries)
    }  # what stands in the padding reaches no sum
    fitted |= {name: blank(getattr(operands, name), within) for name in ("key", "value")}
    if operands.key_mask is not None and window is not None:  # a zero that stands outside is no key
        zeros = [~inside for inside, along in zip(keys, window.along, strict=True) if along.boundary == "zero"]
        fitted["key_mask"] = functools.reduce(operator.or_, zeros, operands.key_mask)
    if operands.extra_key is not None:
        seen = True if operands.extra_mask is None else operands.extra_mask
        shape = (*queries.shape, operands.extra_key.shape[-3])
        fitted["extra_mask"] = jnp.broadcast_to(queries[..., None] & seen, shape)
    if operands.sink is not None:
        fitted["sink"] = jnp.where(queries[..., None], operands.sink, -jnp.inf)
    ends = [[_along_grid(end, a, rank) for end in (run.low, run.high)] for a, run in enumerate(runs)]
    ranges = [jnp.stack([jnp.where(queries, end, 0) for end in pair], -1) for pair in ends]
    fitted["slot_ranges"] = jnp.stack(ranges, -2)
    if window is None or wide is None:
        return operands._replace(**fitted), options
    more = [b - a for a, b in zip(window.sizes, wide.sizes, strict=True)]
    fitted["relative_bias"] = _padded(operands.relative_bias, more)
    fitted["key_embedding"] = _padded_embedding(operands.key_embedding, window, more)
    for name in ("bias", "slot_mask"):
        fitted[name] = _moved(getattr(operands, name), runs, window, wide)
    return operands._replace(**fitted), dataclasses.replace(options, window=wide)


def _run(options: Options, axis: int, size: Int[Array, "*batch 1"]) -> Run:
    """Of one axis, for each of its sizes."""
    queries = jnp.arange(options.queries[axis], dtype=jnp.int32)
    if options.window is None:
        return Run(*jnp.broadcast_arrays(queries < size, 0 * size, 0 * size, size))
    along = options.window.along[axis]
    x = along.stride * queries
    start, low, high = place(along, x, size, jnp, fit=along.boundary == "shift")
    first = (start - place(_widened(along), x, options.keys[axis], jnp)[0]) // along.dilation
    inside = (x < size) & ((high == along.size) if along.boundary == "valid" else True)
    return Run(*jnp.broadcast_arrays(inside, first, first + low, first + high))


def _along_grid(x: Array, axis: int, rank: int) -> Array:
    """[*batch, n], to be broadcast against a grid, [*batch, 1.., n, ..1]."""
    return x.reshape(*x.shape[:-1], *[1] * axis, x.shape[-1], *[1] * (rank - axis - 1))


def _padded(table: Array | None, more: list[int]) -> Array | None:
    """A table over the offsets [heads, *(2k-1), ...], of windows of so many slots more: the new are never seen."""
    if table is None:
        return None
    return jnp.pad(table, [(0, 0), *((n, n) for n in more), *[(0, 0)] * (table.ndim - len(more) - 1)])


def _padded_embedding(table: Array | None, window: Window, more: list[int]) -> Array | None:
    """The same of r, which may be in parts, an axis each."""
    if table is None or table.ndim == window.rank + 2:
        return _padded(table, more)
    ends = np.cumsum([2 * size - 1 for size in window.sizes])[:-1]
    parts = zip(jnp.split(table, ends, axis=1), more, strict=True)
    return jnp.concatenate([jnp.pad(part, [(0, 0), (n, n), (0, 0)]) for part, n in parts], axis=1)


def _moved(x: Array | None, runs: list[Run], window: Window, wide: Window) -> Array | None:
    """[*batch|1, *queries|1, heads|1, *slots|1] by the slots of the wide window: slot u is slot first + u of it."""
    for a, (run, along, size) in enumerate(zip(runs, window.along, wide.sizes, strict=True)):
        axis = a - window.rank
        if x is None or not shifts(along) or x.shape[axis] == 1:
            continue
        slot = jnp.arange(size, dtype=jnp.int32) - run.first[..., None]
        others = [1] * (window.rank - a - 1)
        index = slot.reshape(*slot.shape[:-2], *[1] * a, slot.shape[-2], *others, *[1] * (1 + a), size, *others)
        x = jnp.take_along_axis(x, jnp.clip(index, 0, along.size - 1), axis)
    return x

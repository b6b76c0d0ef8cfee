"""Operands as the kernels take them: tokens in their own order, heads side by side in lanes.

A flat array is [entries, *tokens, lanes]. Where heads fill the lanes, and the last axis whole words of 32 bits, that is
the array itself, seen otherwise: nothing is copied.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxattn.kernels.loop import take
from jaxattn.kernels.operands import Operands, hiding_score
from jaxattn.kernels.tpu.plan import ANY, LANES, MATCH, Heads, Plan, is_filled_up

QUERIES, KEYS = range(2)  # of an axis in `Plan.outside`


def flat_queries(x: Array, plan: Plan) -> Array:
    """[*batch, *queries, heads, dim] as [entries, *queries, members · lanes]."""
    heads = plan.heads
    x = _in_order(_entries(x, len(plan.axes)), plan, QUERIES)
    x = x.reshape(*x.shape[:-2], heads.key_heads, heads.members, x.shape[-1])
    x = _flat(jnp.swapaxes(x, -2, -3), heads, plan.array_lanes).reshape(*x.shape[:-3], -1)
    return _filled_up(x, [axis.query_count for axis in plan.axes])


def flat_keys(x: Array, plan: Plan) -> Array:
    """[*batch, *keys, key_heads, dim] as [entries, *keys, lanes]."""
    x = _in_order(_entries(x, len(plan.axes)), plan, KEYS)
    return _filled_up(_flat(x, plan.heads, plan.array_lanes), [axis.key_count for axis in plan.axes])


class Beside(NamedTuple):
    """What kernels are given beside the grids of tokens, where it is there."""

    of_queries: Array | None = None  # codes: [entries|1, *tokens, 128]
    of_keys: Array | None = None
    extra_key: Array | None = None  # [entries, extra_places, blocks · lanes]
    extra_value: Array | None = None


def flat_extra(x: Array, plan: Plan) -> Array:
    """[*batch, extra, key_heads, dim] as [entries, extra_places, blocks · lanes]."""
    x = _flat(_entries(x, 1), plan.heads, plan.heads.blocks * plan.heads.lanes)
    return jnp.pad(x, [(0, 0), (0, plan.extra_places - plan.extra), (0, 0)])


def by_query(x: Array, plan: Plan, shape: tuple[int, ...]) -> Array:
    """`flat_queries`, undone, for an array of this shape."""
    heads, rank = plan.heads, len(plan.axes)
    grid = shape[-rank - 2 : -2]
    for a, (n, (places, _)) in enumerate(zip(grid, plan.outside, strict=False), 1):
        if places is not None and not is_filled_up(places, n):
            x = take(x, np.argsort(np.where(places < 0, n, places), kind="stable")[:n], a)
    x = x[(slice(None), *map(slice, grid))]
    x = x.reshape(*x.shape[:-1], heads.members, -1)[..., : heads.key_heads * heads.dim]
    if dropped := heads.dim - shape[-1]:
        x = jnp.concatenate(lax.split(x, (shape[-1], dropped) * heads.key_heads, x.ndim - 1)[::2], -1)
    return jnp.swapaxes(x.reshape(*x.shape[:-1], heads.key_heads, -1), -2, -3).reshape(shape)


def _in_order(x: Array, plan: Plan, which: int, other: Array | float = 0) -> Array:
    """[entries, *grid, ...], where the kernel takes strips, in the order of their tiles; `other` is for what is no
    token. What is only filled up is left to `_filled_up`."""
    for a, places in enumerate([x[which] for x in plan.outside], 1):
        n = x.shape[a]
        if places is None or is_filled_up(places, n):
            continue
        there = (places >= 0).reshape(-1, *[1] * (x.ndim - a - 1))
        x = take(x, places, a)
        x = x if there.all() else jnp.where(there, x, jnp.asarray(other, x.dtype))
    return x


def _filled_up(x: Array, counts: Sequence[int]) -> Array:
    """[entries, *grid, ...] with so many tokens along each axis. Done once heads fill the lanes: it costs least."""
    more = [n - m for n, m in zip(counts, x.shape[1:], strict=False)]
    return jnp.pad(x, [(0, 0), *[(0, n) for n in more], *[(0, 0)] * (x.ndim - 1 - len(more))]) if any(more) else x


def codes(operands: Operands, plan: Plan) -> Beside:
    """Who sees whom by a mask of keys and by segments: of queries and of keys 128 numbers each, whose product is MATCH
    where one sees the other, else less by 2 at least. Both flat; of the queries None where all of them are alike.

    The bits of a segment's number are ±1, so that the product counts those that agree. What is masked has zeros.
    """
    mask, of_queries, of_keys = operands.key_mask, operands.query_segments, operands.key_segments
    rank, dtype = len(plan.axes), operands.query.dtype
    if mask is None and of_keys is None:
        return Beside()
    batch = operands.key.shape[: -rank - 2]

    def entries(x: Array) -> Array:
        """[*batch|1, *tokens, 128] as [entries|1, *tokens, 128]."""
        shared = all(n == 1 for n in x.shape[: len(batch)])
        x = x if shared else jnp.broadcast_to(x, (*batch, *x.shape[len(batch) :]))
        return _entries(x[..., None, :], rank)[..., 0, :]

    seen = jnp.ones((1,) * (len(batch) + rank), dtype) if mask is None else mask.astype(dtype)
    seen = seen[..., None]
    lanes = lambda x, before: jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (before, LANES - before - x.shape[-1])])
    if of_queries is None or of_keys is None:
        queries, keys = None, lanes(MATCH * seen, ANY)
    else:
        own = lanes(_bits(of_queries, dtype), 0).at[..., ANY].set(1)
        queries = _in_order(entries(own), plan, QUERIES)
        queries = _filled_up(queries, [axis.query_count for axis in plan.axes])
        bits = _bits(of_keys, dtype)
        keys = lanes(bits * seen * (MATCH // bits.shape[-1]), 0)
    all_see = jnp.zeros(LANES, dtype).at[ANY].set(MATCH)  # zeros around the grid
    keys = _in_order(entries(keys), plan, KEYS, all_see)
    return Beside(queries, _filled_up(keys, [axis.key_count for axis in plan.axes]))


def _bits(numbers: Array, dtype: DTypeLike) -> Array:
    """[..., bits], each 1 or -1."""
    count = 8 * numbers.dtype.itemsize
    bits = numbers[..., None] >> jnp.arange(count, dtype=numbers.dtype) & jnp.ones((), numbers.dtype)
    return 2 * bits.astype(dtype) - 1


def score_table(relative_bias: Array | None, plan: Plan) -> Array:
    """What is added to the scores of a tile, [patterns, members, blocks, abreast · queries, keys], or with the last two
    the other way round: the relative bias, and a score that hides where the window does. Without a relative bias it is
    the same for all members and blocks."""
    hide, keys_first = hiding_score(jnp.float32), plan.keys_first
    seen = sees(plan, keys_first or relative_bias is not None)
    if relative_bias is None:
        table = jnp.where(seen, 0.0, hide).astype(jnp.float32)[:, None, None]
        return _and_extra(table, plan, -2 if keys_first else -1)
    spread, table = _spread(jnp.where(relative_bias <= hide / 2, hide, relative_bias), plan), []
    for n, at in enumerate(np.ndindex(*[len(axis.low) for axis in plan.axes])):
        box = [slice(axis.offset(p), axis.offset(p) + axis.columns) for axis, p in zip(plan.axes, at, strict=True)]
        bias = spread[:, :, *box].reshape(*spread.shape[:2], plan.box, -1)
        table.append(jnp.where(seen[n], bias, hide))
    found = _and_extra(jnp.stack(table), plan, -2)
    return found if keys_first else jnp.swapaxes(found, -1, -2)


def _and_extra(table: Array, plan: Plan, axis: int) -> Array:
    """With the scores of extra tokens behind those of a box: every query of the tile's own sees them, and none what
    fills them up."""
    if not plan.extra:
        return table
    shape = list(table.shape)
    shape[axis] = plan.extra_places
    seen = lax.broadcasted_iota(jnp.int32, shape, table.ndim + axis) < plan.extra
    if plan.overlaps:
        at = [np.indices(n).reshape(len(plan.axes), -1) for n in zip(*(x.own.shape for x in plan.axes), strict=True)]
        own = np.array([x.own[p][:, q] for x, p, q in zip(plan.axes, *at, strict=True)]).all(0)
        own = np.tile(own, plan.heads.abreast)[:, None, None]
        seen = seen & (own[..., None, :] if axis == -2 else own[..., None])
    extra = jnp.where(seen, 0.0, hiding_score(jnp.float32)).astype(table.dtype)
    return jnp.concatenate([table, extra], axis)


def _spread(relative_bias: Array, plan: Plan) -> Array:
    """[members, blocks, *columns, abreast · queries], for columns enough that the box of every pattern is a slice."""
    heads, rank = plan.heads, len(plan.axes)
    bias = relative_bias.astype(jnp.float32).reshape(heads.key_heads, heads.members, *relative_bias.shape[1:])
    bias = jnp.pad(bias, [(0, heads.blocks * heads.abreast - heads.key_heads), *[(0, 0)] * (rank + 1)])
    bias = jnp.moveaxis(bias.reshape(heads.blocks, heads.abreast, *bias.shape[1:]), 2, 0)
    for axis in plan.axes:  # [members, blocks, abreast, offsets of axes to come, (columns, queries) of those before]
        columns = axis.columns + max(map(axis.offset, range(len(axis.low))))
        entry = np.arange(columns) + axis.relative[:, 0].min() - axis.step * np.arange(axis.tile)[:, None]
        which = (entry[..., None] == np.arange(bias.shape[3])).astype(np.float32)
        bias = jnp.einsum("mbge...,tce->mbg...ct", bias, which, precision="highest")
    bias = jnp.transpose(bias, (0, 1, *range(3, 3 + 2 * rank, 2), 2, *range(4, 4 + 2 * rank, 2)))
    bias = bias.reshape(*bias.shape[: 2 + rank], -1)
    # with the queries in the lanes before it is sliced: left alone, the compiler keeps the columns there, which are few
    return with_layout_constraint(bias, Layout(major_to_minor=tuple(range(bias.ndim))))


def shape_of(shape: tuple[int, ...], dtype: DTypeLike, like: Array) -> jax.ShapeDtypeStruct:
    """What varies over the mesh axes that `like` varies over."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def sees(plan: Plan, keys_first: bool) -> Array:
    """Whether a query sees a key, by the window alone, [patterns, abreast · queries, keys] or the other way round."""
    rank, seen = len(plan.axes), jnp.ones((), bool)
    patterns = np.indices([len(axis.low) for axis in plan.axes]).reshape(rank, -1)
    queries = np.indices([axis.tile for axis in plan.axes]).reshape(rank, -1)
    columns = np.indices([axis.columns for axis in plan.axes]).reshape(rank, -1)
    for axis, pattern, query, column in zip(plan.axes, patterns, queries, columns, strict=True):
        low, high = (np.tile(x[pattern][:, query], plan.heads.abreast) for x in (axis.low, axis.high))
        low, high, column = (
            (low[:, None], high[:, None], column[:, None]) if keys_first else (low[..., None], high[..., None], column)
        )
        seen = seen & (jnp.asarray(low) <= column) & (column < jnp.asarray(high))
    return seen


def _entries(x: Array, rank: int) -> Array:
    """The batch as one axis."""
    return x.reshape(math.prod(x.shape[: -rank - 2]), *x.shape[-rank - 2 :])


def _flat(x: Array, heads: Heads, lanes: int) -> Array:
    """[..., key_heads, dim] as [..., lanes], with zeros behind every head, and then to so many lanes. Heads are first
    put side by side in the lanes: there a TPU moves them in a third of the time."""
    *batch, count, dim = x.shape
    x = x.reshape(*batch, count * dim)
    if missing := heads.dim - dim:
        zeros = jnp.zeros((*batch, missing), x.dtype)
        parts = [part for head in lax.split(x, (dim,) * count, len(batch)) for part in (head, zeros)]
        x = jnp.concatenate(parts, -1)
    missing = lanes - x.shape[-1]
    return jnp.pad(x, [*[(0, 0)] * len(batch), (0, missing)]) if missing else x


def tiled_rows(x: Array, plan: Plan) -> Array:
    """[*batch, *queries, heads] as [entries, members, blocks, tile rows, tile columns, abreast · queries]."""
    heads, rank = plan.heads, len(plan.axes)
    x = _entries(x[..., None], rank)[..., 0]
    x = _in_order(x, plan, QUERIES)
    for a, axis in enumerate(plan.axes, 1):
        x = x if axis.queries is None else take(x, axis.queries, a)
    x = _filled_up(x, [axis.places for axis in plan.axes])
    for a, axis in enumerate(plan.axes, 1):
        of_tiles = np.add.outer(axis.begin, np.arange(axis.tile)).ravel()
        x = take(x, of_tiles, a) if axis.overlaps else x
    x = x.reshape(*x.shape[:-1], heads.key_heads, heads.members)
    x = jnp.pad(x, [*[(0, 0)] * (rank + 1), (0, heads.blocks * heads.abreast - heads.key_heads), (0, 0)])
    x = x.reshape(len(x), *(n for axis in plan.axes for n in (axis.tiles, axis.tile)), -1, heads.abreast, heads.members)
    counts, sizes = range(1, 2 * rank + 1, 2), range(2, 2 * rank + 1, 2)
    x = jnp.transpose(x, (0, 2 * rank + 3, 2 * rank + 1, *counts, 2 * rank + 2, *sizes))
    return x.reshape(*x.shape[:3], plan.tile_rows, plan.tile_columns, -1)

"""Queries whose place on the grid is traced: attention under a window as attention without one, of keys around them.

The program is the same wherever they stand. The keys that they may see are a slice as long as the windows of so many
neighbours reach, and who sees which is a mask; the terms of positions are looked up, and become a bias. Queries [T] and
the keys of the slice [S] are then those of all axes of the grid, one after the other.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from jaxattn.kernels import terms
from jaxattn.kernels.loop import take
from jaxattn.kernels.operands import Operands, Options, embedding_parts, statistics_dtype
from jaxattn.window import Along, Axis, place


class _Columns(NamedTuple):
    """The keys of a slice along one axis, for `t` queries."""

    query: Int[Array, "t"]  # its index on the query grid
    key: Int[Array, "s"]  # -1 for none
    named_key: Int[Array, "s"]  # the same, with the position itself for none
    begin: Any  # where the slice begins, if it is one of the keys in order; 0: all of them
    slot: Int[Array, "t s"]  # of the query; clipped, where it is none
    entry: Int[Array, "t s"]  # of a table over the offsets; clipped
    seen: Bool[Array, "t s"] | None  # None: all by all

    def take(self, x: Array, axis: int) -> Array:
        """What stands at these keys; zeros, or False, where none does."""
        if self.begin is None:
            return take(x, self.key, axis)
        return x if len(self.key) == x.shape[axis] else lax.dynamic_slice_in_dim(x, self.begin, len(self.key), axis)


def whole(operands: Operands, options: Options, offset: Sequence[Any] | None) -> tuple[Operands, Options]:
    """The operands and options of the same attention without a window; as they are, where no offset is traced."""
    window = options.window
    if offset is None or window is None or 0 in operands.query.shape:
        return operands, options
    places = zip(window.along, window.axes(options.keys), offset, options.queries, strict=True)
    columns = [_columns(along, axis, jnp.asarray(first, int), count) for along, axis, first, count in places]
    rank, sizes = len(columns), window.sizes
    batch = operands.query.ndim - rank - 2
    slot = _flat_index([c.slot for c in columns], sizes)
    taken = functools.partial(_taken, columns=columns, batch=batch)
    inside = functools.reduce(_pairs(jnp.logical_and), [(c.key >= 0)[None] for c in columns])[0]  # [S]
    masks: list[Array] = []  # [T, heads|1, S], perhaps after batch axes
    if any(c.seen is not None for c in columns):
        seen = [jnp.ones_like(c.slot, bool) if c.seen is None else c.seen for c in columns]
        masks.append(functools.reduce(_pairs(jnp.logical_and), seen)[:, None])
    if operands.key_mask is not None:
        masks.append((taken(operands.key_mask) | ~inside)[..., None, None, :])
    if operands.query_segments is not None and operands.key_segments is not None:
        own = operands.query_segments.reshape(*operands.query_segments.shape[:batch], -1)
        same = own[..., None] == taken(operands.key_segments)[..., None, :]
        masks.append((same | ~inside)[..., None, :])
    if operands.slot_mask is not None:
        masks.append(_by_column(operands.slot_mask, options, slot))
    lift = lambda x: jnp.expand_dims(x, range(batch + 3 - x.ndim))
    bias = _bias(operands, options, columns, slot)
    dense = Operands(
        query=terms.flat_grid(operands.query, rank),
        key=taken(operands.key),
        value=taken(operands.value),
        scale=operands.scale,
        soft_cap=operands.soft_cap,
        bias=None if bias is None else lift(bias),
        slot_mask=lift(functools.reduce(jnp.logical_and, masks)) if masks else None,
        extra_key=operands.extra_key,
        extra_value=operands.extra_value,
        extra_mask=None if operands.extra_mask is None else _rows(operands.extra_mask, rank),
        sink=operands.sink,
        dropout_key=operands.dropout_key,
    )
    options = dataclasses.replace(
        options,
        window=None,
        queries=(dense.query.shape[batch],),
        keys=(dense.key.shape[batch],),
        score_mod=None if options.score_mod is None else _score_mod(options.score_mod, columns),
        tile=None,
        offset=None,
    )
    return dense, options


def _columns(along: Along, axis: Axis, first: Array, count: int) -> _Columns:
    """The keys that `count` queries from `first` on may see along one axis."""
    k, d, n = along.size, along.dilation, axis.length
    query = jnp.clip(first, 0, len(axis.start) - count) + jnp.arange(count)
    x = along.stride * query
    start, low, high = place(along, x, n, jnp)
    # From the first window's start to the last one's end. Windows of a block start together, and those of different
    # residue classes are moved inwards by different lengths.
    span = d * (k - 1) + 1
    reach = span if count == 1 else span + along.stride * (count - 1) + (along.block - 1) * d + d - 1
    step = d if count == 1 else 1
    origin, begin = start.min(), None  # the keys in the order of their positions
    ends = along.boundary in ("shift", "mask", "valid")  # nobody sees beyond the grid
    if along.boundary == "wrap" and reach == n:  # once around: each key stands at one position
        position, begin = origin + (jnp.arange(n) - origin) % n, 0
    elif ends and reach >= n:
        position, begin = jnp.arange(n), 0
    else:
        if ends and step == 1:
            origin = begin = jnp.clip(origin, 0, n - reach)
        position = origin + step * jnp.arange((reach - 1) // step + 1)
    key = axis.fold(position)
    slot, rest = jnp.divmod(position - start[:, None], d)
    entry = (position - x[:, None]) // d + k - 1
    around = along.boundary == "wrap" and d == 1 and k == n  # once, and all see all
    return _Columns(
        query=query,
        key=key,
        named_key=jnp.where(key < 0, position, key),
        begin=begin,
        slot=jnp.clip(slot, 0, k - 1),
        entry=jnp.clip(entry, 0, 2 * k - 2),
        seen=None if around else (rest == 0) & (low[:, None] <= slot) & (slot < high[:, None]),
    )


def _bias(operands: Operands, options: Options, columns: Sequence[_Columns], slot: Array) -> Array | None:
    """q·r[j-i] + relative_bias[j-i] + bias, [..., T, heads|1, S]; None where there is none of them."""
    found: list[Array] = []
    everywhere, dtype = tuple(range(len(columns))), statistics_dtype(operands.query.dtype)

    def entries(axes: Sequence[int]) -> Array:
        index = [c.entry if a in axes else jnp.zeros_like(c.entry) for a, c in enumerate(columns)]
        return _flat_index(index, [2 * axis.size - 1 if a in axes else 1 for a, axis in enumerate(options.axes)])

    for axes, table in embedding_parts(operands, options):
        query = terms.flat_grid(operands.query, len(columns))
        table = table.reshape(len(table), -1, table.shape[-1])
        table = jnp.broadcast_to(table, (query.shape[-2], *table.shape[1:]))
        logits = terms.product("...thd,hmd->...thm", query, table, options)
        found.append(_look_up(logits, entries(axes)))
    if operands.relative_bias is not None:
        table = operands.relative_bias.reshape(len(operands.relative_bias), -1).astype(dtype)
        found.append(jnp.swapaxes(table[:, entries(everywhere)], 0, 1))
    if operands.bias is not None:
        found.append(_by_column(operands.bias, options, slot).astype(dtype))
    return functools.reduce(jnp.add, found) if found else None


def _by_column(x: Array, options: Options, slot: Array) -> Array:
    """[..., *queries|1, heads|1, *slots|1] by column, [..., T, heads|1, S]."""
    rank = len(options.axes)
    batch, heads = x.shape[: -2 * rank - 1], x.shape[-rank - 1]
    x = jnp.broadcast_to(x, (*batch, *options.queries, heads, *(axis.size for axis in options.axes)))
    return _look_up(x.reshape(*batch, len(slot), heads, -1), slot)


def _look_up(x: Array, index: Array) -> Array:
    """x[..., t, h, index[t, s]]"""
    return jnp.take_along_axis(x, index[:, None].reshape(*[1] * (x.ndim - 3), len(index), 1, -1), -1)


def _rows(x: Array, rank: int) -> Array:
    """[..., *queries, n] with one axis for the queries."""
    return x.reshape(*x.shape[: -rank - 1], -1, x.shape[-1])


def _taken(x: Array, columns: Sequence[_Columns], batch: int) -> Array:
    """[*batch, *keys, ...] at the columns, [*batch, S, ...]."""
    for axis, along in enumerate(columns, batch):
        x = along.take(x, axis)
    return x.reshape(*x.shape[:batch], -1, *x.shape[batch + len(columns) :])


def _score_mod(score_mod: Callable, columns: Sequence[_Columns]) -> Callable:
    """The caller's function, told where the queries and the keys stand on their grids."""
    queries, keys = ([getattr(c, name) for c in columns] for name in ("query", "named_key"))

    def at(index: Array, tables: list[Array]) -> tuple[Array, ...]:
        places = jnp.unravel_index(index, tuple(map(len, tables)))
        return tuple(table[place] for table, place in zip(tables, places, strict=True))

    return lambda score, head, query, key: score_mod(score, head, at(query[0], queries), at(key[0], keys))


def _flat_index(index: Sequence[Array], sizes: Sequence[int]) -> Array:
    """[T, S], of an index along each axis [t, s] that of all in row-major order."""
    total = index[0]
    for one, size in zip(index[1:], sizes[1:], strict=True):
        total = _pairs(lambda a, b, size=size: a * size + b)(total, one)
    return total


def _pairs(function: Callable) -> Callable:
    """Of [t, s] and [u, v] all combinations, [t·u, s·v]."""

    def of_all(a: Array, b: Array) -> Array:
        found = function(a[:, None, :, None], b[None, :, None, :])
        return found.reshape(a.shape[0] * b.shape[0], a.shape[1] * b.shape[1])

    return of_all

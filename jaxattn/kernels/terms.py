"""The terms of a tile's scores: what is added to q·k, who sees whom, and dropout, by column.

What is given by slot (bias, masks, relative tables, dropout) is sheared into columns, since slot u of query q is column
u + shift[q]. Arrays are those of one tile: scores are [*batch, key_heads, group, *queries, *columns].
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxattn.kernels.operands import Operands, Options, dropout_factors, embedding_parts, statistics_dtype
from jaxattn.kernels.tiles import AxisTiles

Tables = tuple[AxisTiles, ...]  # an axis each, in NumPy; with one row for each of its tiles,
Rows = tuple[AxisTiles, ...]  # or with the row of one tile, perhaps traced


def relative(operands: Operands, options: Options, rows: Rows, tables: Tables, dtype: jnp.dtype) -> Array:
    """q·r[j-i] + relative_bias[j-i]: first for every offset of the tables, then sheared into columns.

    A part of r that depends on the offset along one axis alone is sheared along it, and is the same along the others.
    """
    rank, key_heads, total = len(rows), operands.key.shape[-2], jnp.zeros((), dtype)
    everywhere, terms = tuple(range(rank)), {}
    for axes, table in embedding_parts(operands, options):
        offsets, heads = table.shape[1:-1], "kg" if table.shape[0] > 1 else ""
        shared = [key_heads, len(table) // key_heads] if heads else []
        flat = table.reshape(*shared, math.prod(offsets), table.shape[-1])
        logits = product(f"...kgqd,{heads}md->...kgqm", grouped(operands, rank), flat, options)
        along = [2 * options.axes[a].size - 1 if a in axes else 1 for a in everywhere]
        terms[axes] = logits.reshape(*logits.shape[:-2], *(len(row.shift) for row in rows), *along)
    if operands.relative_bias is not None:
        table = operands.relative_bias
        bias = table.reshape(key_heads, len(table) // key_heads, *[1] * rank, *table.shape[1:]).astype(dtype)
        terms[everywhere] = terms[everywhere] + bias if everywhere in terms else bias
    for axes, logits in terms.items():
        for a in axes:
            logits = shear(logits, rows[a].relative, tables[a].relative, tables[a].keys.shape[1], rank, a)
        total = total + logits
    return total


def visible(operands: Operands, options: Options, rows: Rows, tables: Tables) -> Array:
    """Who takes part. What stands outside under "zero" has no key, so no key mask and no segment."""
    rank = len(rows)
    mask = inside = jnp.ones((), bool)
    for axis, row in enumerate(rows):
        slot = np.arange(len(row.keys)) - row.shift[:, None]
        sees = (row.low[:, None] <= slot) & (slot < row.high[:, None])
        over_grids = (len(slot), *[1] * (rank - 1), -1, *[1] * (rank - axis - 1))
        mask = mask & sees.reshape(over_grids)
        if operands.slot_ranges is not None:
            ranges = operands.slot_ranges[(..., axis, slice(None), *[None] * rank)]  # [..., *queries, 2, *1]
            ranges = jnp.expand_dims(jnp.moveaxis(ranges, -rank - 1, 0), (-2 * rank - 1, -2 * rank - 2))
            slot = slot.astype(np.int32).reshape(over_grids)
            mask = mask & (ranges[0] <= slot) & (slot < ranges[1])
        inside = inside & along(row.keys >= 0, rank - axis - 1)
    if operands.key_mask is not None:
        of_keys = jnp.expand_dims(operands.key_mask, range(-2 * rank - 2, -rank))
        mask = mask & (of_keys | ~inside)
    if operands.query_segments is not None and operands.key_segments is not None:
        query = operands.query_segments.reshape(*operands.query_segments.shape, *[1] * rank)
        key = jnp.expand_dims(operands.key_segments, range(-2 * rank, -rank))
        mask = mask & (jnp.expand_dims(query == key, (-2 * rank - 1, -2 * rank - 2)) | ~inside)
    if operands.slot_mask is not None:
        mask = mask & to_columns(split_heads(operands.slot_mask, operands, rank), options, rows, tables)
    return mask


def dropout(operands: Operands, options: Options, rows: Rows, tables: Tables) -> tuple[Array, Array]:
    """What multiplies the weights of the columns, and of the extra tokens [*batch, key_heads, group, n, extra]."""
    rank, slots = len(rows), tuple(axis.size for axis in options.axes)
    query, key_heads = operands.query, operands.key.shape[-2]
    index = jnp.zeros((), int)
    for axis, row in enumerate(rows):
        index = index * options.queries[axis] + along(row.queries, rank - axis - 1)
    extra = 0 if operands.extra_key is None else operands.extra_key.shape[-3]
    shape, dtype = (
        (*query.shape[: -rank - 2], query.shape[-2], math.prod(slots) + extra),
        statistics_dtype(query.dtype),
    )
    kept = jax.vmap(lambda i: dropout_factors(operands, options, i, shape, dtype))(index.reshape(-1))
    kept = jnp.moveaxis(kept, 0, -2)
    kept = kept.reshape(*shape[:-2], key_heads, shape[-2] // key_heads, *kept.shape[-2:])
    of_slots = kept[..., : math.prod(slots)].reshape(*kept.shape[:-2], *index.shape, *slots)
    return to_columns(of_slots, options, rows, tables), kept[..., math.prod(slots) :]


def to_columns(x: Array, options: Options, rows: Rows, tables: Tables) -> Array:
    """[..., *queries|1, *slots|1] by column; zero, or False, in a column that is none of a query's slots."""
    for axis, (row, table) in enumerate(zip(rows, tables, strict=True)):
        if x.shape[axis - len(rows)] != 1 or options.axes[axis].size == 1:  # else the same in every slot
            x = shear(x, -row.shift, -table.shift, table.keys.shape[1], len(rows), axis)
    return x


def shear(x: Array, start: Array | np.ndarray, starts: np.ndarray, size: int, rank: int, axis: int) -> Array:
    """Query q's row of the result is its row of x from `start[q]` on, `size` long, zero outside x.

    `x` ends in `rank` axes of queries and `rank` more; `starts` holds the starts of every tile, which bound the
    padding.
    """
    along, low, high = x.ndim - rank + axis, starts.min(), starts.max()
    query = along - rank
    padding = [(0, 0)] * x.ndim
    padding[along] = max(-low, 0), max(high + size - x.shape[along], 0)
    x, before = jnp.pad(x, padding), padding[along][0]
    if low == high:
        return jax.lax.slice_in_dim(x, low + before, low + before + size, axis=along)
    row = lambda x, first: jax.lax.dynamic_slice_in_dim(x, first, size, along - 1)
    if x.shape[query] == 1:
        return jax.vmap(row, (None, 0), query)(jnp.squeeze(x, query), start + before)
    return jax.vmap(row, (query, 0), query)(x, start + before)


def split_heads(x: Array, operands: Operands, rank: int) -> Array:
    """[..., *queries, heads|1, *slots] with its heads in two axes before the queries."""
    x = jnp.moveaxis(x, -rank - 1, -2 * rank - 1)
    heads = (1, 1) if x.shape[-2 * rank - 1] == 1 else (operands.key.shape[-2], -1)
    return x.reshape(*x.shape[: -2 * rank - 1], *heads, *x.shape[-2 * rank :])


def along(x: Array | np.ndarray, after: int) -> Array:
    """A vector, to be broadcast along the axis that `after` others follow."""
    return jnp.asarray(x).reshape(-1, *[1] * after)


def grouped(operands: Operands, rank: int) -> Array:
    """The query, [*batch, key_heads, group, queries, head_dim]."""
    query = flat_grid(operands.query, rank)
    key_heads = operands.key.shape[-2]
    query = query.reshape(*query.shape[:-2], key_heads, query.shape[-2] // key_heads, query.shape[-1])
    return jnp.moveaxis(query, -4, -2)


def flat_grid(x: Array, rank: int, trailing: int = 2) -> Array:
    """[*batch, *grid, heads, head_dim], or what else follows the grid, with one axis for the grid."""
    end = x.ndim - trailing
    return x.reshape(*x.shape[: end - rank], math.prod(x.shape[end - rank : end]), *x.shape[end:])


def product(equation: str, left: Array, right: Array, options: Options) -> Array:
    dtype = statistics_dtype(left.dtype)
    return jnp.einsum(equation, left, right, precision=options.precision, preferred_element_type=dtype)

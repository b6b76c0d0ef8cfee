"""Windowed attention in tiles of queries that JAX itself can differentiate, as often as it likes.

It computes what `xla` computes, in the same tiles, and more slowly: second derivatives go through it, and functions of
the caller's (score_mod, a normaliser), which may close over what is differentiated. `xla` takes its terms from here.

A loop takes a few tiles at a time, so that neither the `N × window` weights nor gathered keys ever exist at once, and
forgets each tile's scores: the derivative computes them again (`jax.checkpoint`). Memory is O(N) in both directions.
Within a tile, scores are [*batch, key_heads, group, *queries, *columns]; what is given by slot (bias, masks, relative
tables, dropout) is sheared into columns, since slot u of query q is column u + shift[q].
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxattn.kernels import problem, target, tiles
from jaxattn.kernels.problem import Operands, Options
from jaxattn.kernels.tiles import AxisTiles
from jaxattn.kernels.walk import take
from jaxattn.normalize import NORMALIZERS, logsumexp

Tables = tuple[AxisTiles, ...]  # an axis each, in NumPy; with one row for each of its tiles,
Rows = tuple[AxisTiles, ...]  # or with the row of one tile, perhaps traced


def attend(operands: Operands, options: Options) -> tuple[Array, ...]:
    """The output [*batch, *queries, heads, value_dim]; with `options.residuals` also lse [*batch, *queries, heads]."""
    query, axes = operands.query, options.axes
    if 0 in query.shape[:-1]:
        return problem.nothing(operands, options)
    batch, heads, dims = query.ndim - len(axes) - 2, query.shape[-2], (query.shape[-1], operands.value.shape[-1])
    backend = target.backend()
    sizes = options.tile or tiles.best_sizes(axes, heads, dims, backend)
    tables = tuple(tiles.cut(axis, t) for axis, t in zip(axes, sizes, strict=True))
    grid = tuple(len(table.queries) for table in tables)
    tile = np.unravel_index(np.arange(math.prod(grid)), grid)
    rows = tuple(AxisTiles(*(field[t] for field in table)) for table, t in zip(tables, tile, strict=True))
    own = _cut_queries(operands, options, tables)

    def run(own: dict[str, Array], rows: Rows) -> tuple[Array, Array]:
        own = own | _take_keys(operands, rows, tables)
        return _attend_tile(operands._replace(**own), options, rows, tables)

    columns = math.prod(table.keys.shape[1] for table in tables)
    held = math.prod(query.shape[:batch]) * heads * tiles.size(math.prod(sizes), columns, dims)
    at_once = tiles.run(math.prod(grid), max(1, tiles.room(backend) // held))
    if math.prod(grid) == 1:  # nothing to loop over, and a static place
        output, lse = jax.tree.map(lambda x: x[None], run(*jax.tree.map(lambda x: x[0], (own, rows))))
    elif at_once == math.prod(grid):
        output, lse = jax.vmap(run)(own, rows)
    else:
        output, lse = jax.lax.map(lambda tile: jax.checkpoint(run)(*tile), (own, rows), batch_size=at_once)
    return tuple(_restore(x, tables, batch) for x in (output, lse)[: 1 + options.residuals])


def _attend_tile(operands: Operands, options: Options, rows: Rows, tables: Tables) -> tuple[Array, Array]:
    """One tile, whose queries and columns are the grids of `operands`: [*batch, *queries, heads, ...]."""
    rank = len(rows)
    scores, mask = _scores(operands, options, rows, tables)
    in_slots = options.normalize not in NORMALIZERS.values()  # a function of the caller's sees a window in order
    if in_slots:
        scores, mask = (_to_slots(x, options, rows, tables) for x in (scores, mask))
    shape = scores.shape  # [*batch, key_heads, group, *queries, *columns or *slots]
    scores, mask = _flat(scores, rank), _flat(mask, rank)
    width = scores.shape[-1]
    if operands.extra_key is not None:
        extra = problem.cap(_products(operands, operands.extra_key, options), operands.soft_cap)
        scores = jnp.concatenate([scores, extra], -1)
        mask = jnp.concatenate([mask, jnp.ones_like(extra, bool)], -1)
    weights = problem.apply(options.normalize, scores, mask)
    lse = jnp.moveaxis(logsumexp(scores, mask), -1, -3)
    weights, extra = weights[..., :width].reshape(shape), weights[..., width:]
    if in_slots:
        weights = to_columns(weights, options, rows, tables)
    if options.dropout_rate > 0:
        kept, kept_extra = dropout(operands, options, rows, tables)
        weights, extra = weights * kept, extra * kept_extra
    output = _mix(_flat(weights, rank), _flat_grid(operands.value, rank), options)
    if operands.extra_value is not None:
        output = output + _mix(extra, operands.extra_value, options)
    grid = operands.query.shape[:-1]
    return output.reshape(*grid, -1).astype(operands.value.dtype), lse.reshape(grid)


def _scores(operands: Operands, options: Options, rows: Rows, tables: Tables) -> tuple[Array, Array]:
    """The final scores of the slots and who takes part, [*batch, key_heads, group, *queries, *columns]."""
    rank = len(rows)
    scores = _products(operands, _flat_grid(operands.key, rank), options)
    grid = tuple(len(row.shift) for row in rows) + tuple(len(row.keys) for row in rows)
    scores = scores.reshape(*scores.shape[:-2], *grid)
    if operands.relative_bias is not None or operands.key_embedding is not None:
        scores = scores + relative(operands, options, rows, tables, scores.dtype)
    if operands.bias is not None:
        bias = split_heads(operands.bias, operands, rank)
        scores = scores + to_columns(bias, options, rows, tables).astype(scores.dtype)
    mask = jnp.broadcast_to(visible(operands, options, rows, tables), scores.shape)
    scores, mask = problem.without_hidden(scores, mask)
    scores = problem.cap(scores, operands.soft_cap)
    if options.score_mod is not None:
        heads = jnp.arange(operands.query.shape[-2]).reshape(*scores.shape[-2 * rank - 2 : -2 * rank], *[1] * 2 * rank)
        query = tuple(_along(row.queries, 2 * rank - axis - 1) for axis, row in enumerate(rows))
        key = tuple(_along(row.named_keys, rank - axis - 1) for axis, row in enumerate(rows))
        modified = options.score_mod(scores, heads, query, key)
        scores = jnp.broadcast_to(modified, scores.shape).astype(scores.dtype)
    return problem.without_hidden(scores, mask)


def relative(operands: Operands, options: Options, rows: Rows, tables: Tables, dtype: jnp.dtype) -> Array:
    """q·r[j-i] + relative_bias[j-i]: first for every offset of the tables, then sheared into columns.

    A part of r that depends on the offset along one axis alone is sheared along it, and is the same along the others.
    """
    rank, key_heads, total = len(rows), operands.key.shape[-2], jnp.zeros((), dtype)
    everywhere, terms = tuple(range(rank)), {}
    for axes, table in problem.embeddings(operands, options):
        offsets, heads = table.shape[1:-1], "kg" if table.shape[0] > 1 else ""
        flat = table.reshape(*([key_heads, -1] if heads else []), math.prod(offsets), table.shape[-1])
        logits = _einsum(f"...kgqd,{heads}md->...kgqm", _grouped(operands, rank), flat, options)
        along = [2 * options.axes[a].size - 1 if a in axes else 1 for a in everywhere]
        terms[axes] = logits.reshape(*logits.shape[:-2], *(len(row.shift) for row in rows), *along)
    if operands.relative_bias is not None:
        table = operands.relative_bias
        bias = table.reshape(key_heads, -1, *[1] * rank, *table.shape[1:]).astype(dtype)
        terms[everywhere] = terms[everywhere] + bias if everywhere in terms else bias
    for axes, logits in terms.items():
        for a in axes:
            logits = _shear(logits, rows[a].relative, tables[a].relative, tables[a].keys.shape[1], rank, a)
        total = total + logits
    return total


def visible(operands: Operands, options: Options, rows: Rows, tables: Tables) -> Array:
    """Who takes part. What stands outside under "zero" has no key, so no key mask and no segment."""
    rank = len(rows)
    mask = inside = jnp.ones((), bool)
    for axis, row in enumerate(rows):
        slot = np.arange(len(row.keys)) - row.shift[:, None]
        sees = (row.low[:, None] <= slot) & (slot < row.high[:, None])
        mask = mask & sees.reshape(len(sees), *[1] * (rank - 1), -1, *[1] * (rank - axis - 1))
        inside = inside & _along(row.keys >= 0, rank - axis - 1)
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
        index = index * options.queries[axis] + _along(row.queries, rank - axis - 1)
    extra = 0 if operands.extra_key is None else operands.extra_key.shape[-3]
    shape, dtype = (
        (*query.shape[: -rank - 2], query.shape[-2], math.prod(slots) + extra),
        problem.statistics_dtype(query.dtype),
    )
    kept = jax.vmap(lambda i: problem.dropout_factors(operands, options, i, shape, dtype))(index.reshape(-1))
    kept = jnp.moveaxis(kept, 0, -2)
    kept = kept.reshape(*shape[:-2], key_heads, -1, *kept.shape[-2:])
    of_slots = kept[..., : math.prod(slots)].reshape(*kept.shape[:-2], *index.shape, *slots)
    return to_columns(of_slots, options, rows, tables), kept[..., math.prod(slots) :]


def to_columns(x: Array, options: Options, rows: Rows, tables: Tables) -> Array:
    """[..., *queries|1, *slots|1] by column; zero, or False, in a column that is none of a query's slots."""
    for axis, (row, table) in enumerate(zip(rows, tables, strict=True)):
        if x.shape[axis - len(rows)] > 1 or options.axes[axis].size == 1:  # else the same in every slot
            x = _shear(x, -row.shift, -table.shift, table.keys.shape[1], len(rows), axis)
    return x


def _to_slots(x: Array, options: Options, rows: Rows, tables: Tables) -> Array:
    """[..., *queries, *columns] by slot; zero, or False, where a slot has no column."""
    for axis, (row, table) in enumerate(zip(rows, tables, strict=True)):
        x = _shear(x, row.shift, table.shift, options.axes[axis].size, len(rows), axis)
    return x


def _shear(x: Array, start: Array | np.ndarray, starts: np.ndarray, size: int, rank: int, axis: int) -> Array:
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


def _products(operands: Operands, key: Array, options: Options) -> Array:
    """scale·(q·k), [*batch, key_heads, group, queries, keys], for keys [*batch, keys, key_heads, head_dim]."""
    return operands.scale * _einsum("...kgqd,...wkd->...kgqw", _grouped(operands, len(options.axes)), key, options)


def _mix(weights: Array, value: Array, options: Options) -> Array:
    """sum_j A_ij v_j, [*batch, queries, key_heads, group, value_dim]."""
    return _einsum("...kgqw,...wkd->...qkgd", weights.astype(value.dtype), value, options)


def _einsum(equation: str, left: Array, right: Array, options: Options) -> Array:
    dtype = problem.statistics_dtype(left.dtype)
    return jnp.einsum(equation, left, right, precision=options.precision, preferred_element_type=dtype)


def _grouped(operands: Operands, rank: int) -> Array:
    """The query, [*batch, key_heads, group, queries, head_dim]."""
    query = _flat_grid(operands.query, rank)
    query = query.reshape(*query.shape[:-2], operands.key.shape[-2], -1, query.shape[-1])
    return jnp.moveaxis(query, -4, -2)


def split_heads(x: Array, operands: Operands, rank: int) -> Array:
    """[..., *queries, heads|1, *slots] with its heads in two axes before the queries."""
    x = jnp.moveaxis(x, -rank - 1, -2 * rank - 1)
    heads = (1, 1) if x.shape[-2 * rank - 1] == 1 else (operands.key.shape[-2], -1)
    return x.reshape(*x.shape[: -2 * rank - 1], *heads, *x.shape[-2 * rank :])


def _flat_grid(x: Array, rank: int) -> Array:
    """[*batch, *grid, heads, head_dim] with one axis for the grid."""
    return x.reshape(*x.shape[: -rank - 2], math.prod(x.shape[-rank - 2 : -2]), *x.shape[-2:])


def _flat(x: Array, rank: int) -> Array:
    """[..., *queries, *columns] with one axis for each."""
    return x.reshape(*x.shape[: -2 * rank], math.prod(x.shape[-2 * rank : -rank]), math.prod(x.shape[-rank:]))


def _along(x: Array | np.ndarray, after: int) -> Array:
    """A vector, to be broadcast along the axis that `after` others follow."""
    return jnp.asarray(x).reshape(-1, *[1] * after)


def _cut_queries(operands: Operands, options: Options, tables: Tables) -> dict[str, Array]:
    """What differs from query to query, by tile: [tiles, *batch, *queries, ...]."""
    rank = len(tables)
    batch, index = operands.query.ndim - rank - 2, [table.queries for table in tables]
    own = {"query": _cut(operands.query, index, batch)}
    if operands.query_segments is not None:
        own["query_segments"] = _cut(operands.query_segments, index, batch)
    for name in ("bias", "slot_mask"):
        x = getattr(operands, name)
        if x is not None and math.prod(x.shape[batch : batch + rank]) > 1:
            full = jnp.broadcast_to(x, (*x.shape[:batch], *options.queries, *x.shape[batch + rank :]))
            own[name] = _cut(full, index, batch)
    return own


def _take_keys(operands: Operands, rows: Rows, tables: Tables) -> dict[str, Array]:
    """What belongs to the keys of one tile: [*batch, *columns, ...]."""
    batch = operands.query.ndim - len(rows) - 2
    names = ("key", "value", "key_mask", "key_segments")
    taken = {name: getattr(operands, name) for name in names if getattr(operands, name) is not None}
    for axis, (row, table) in enumerate(zip(rows, tables, strict=True), batch):
        index = table.keys[0] if (table.keys == table.keys[0]).all() else row.keys
        taken = {name: take(x, index, axis) for name, x in taken.items()}
    return taken


def _cut(x: Array, index: Sequence[np.ndarray], batch: int) -> Array:
    """[*batch, *grid, ...] by tile, [tiles, *batch, *tile, ...]."""
    rank = len(index)
    for axis, table in enumerate(index, batch):
        x = take(x, table.ravel(), axis)
    x = x.reshape(*x.shape[:batch], *(n for table in index for n in table.shape), *x.shape[batch + rank :])
    x = jnp.moveaxis(x, range(batch, batch + 2 * rank, 2), range(rank))
    return x.reshape(-1, *x.shape[rank:])


def _restore(x: Array, tables: Tables, batch: int) -> Array:
    """[tiles, *batch, *tile, ...] as [*batch, *queries, ...]: what `_cut` did, undone."""
    rank = len(tables)
    x = x.reshape(*(len(table.queries) for table in tables), *x.shape[1:])
    x = jnp.moveaxis(x, range(rank), range(batch, batch + 2 * rank, 2))
    x = x.reshape(*x.shape[:batch], *(table.queries.size for table in tables), *x.shape[batch + 2 * rank :])
    for axis, table in enumerate(tables, batch):
        place = np.unique(table.queries, return_index=True)[1]  # where each query came first
        in_order = np.array_equal(place, np.arange(len(place)))
        x = jax.lax.slice_in_dim(x, 0, len(place), axis=axis) if in_order else take(x, place, axis)
    return x

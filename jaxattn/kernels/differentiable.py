"""Windowed attention in tiles of queries that JAX itself can differentiate, as often as it likes.

It computes what `xla` computes, in the same tiles, and more slowly: second derivatives go through it, and functions of
the caller's (score_mod, a normaliser), which may close over what is differentiated.

A loop takes a few tiles at a time, so that neither the `N × window` weights nor gathered keys ever exist at once, and
forgets each tile's scores: the derivative computes them again (`jax.checkpoint`). Memory is O(N) in both directions.
Within a tile, scores are [*batch, key_heads, group, *queries, *columns].
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxattn import machine
from jaxattn.kernels import terms, tiles
from jaxattn.kernels.loop import take
from jaxattn.kernels.operands import (
    Operands,
    Options,
    apply_normalizer,
    empty_result,
    modified,
    soft_capped,
    without_hidden,
)
from jaxattn.kernels.terms import Rows, Tables
from jaxattn.normalize import NORMALIZERS, logsumexp
from jaxattn.sizes import Extent, planned

Body = Callable[[Operands, Options, Rows, Tables], tuple[Array, ...]]  # arrays [*batch, *queries, ...] of one tile


def attend(operands: Operands, options: Options) -> tuple[Array, ...]:
    """The output [*batch, *queries, heads, value_dim]; with `options.residuals` also lse [*batch, *queries, heads]."""
    if 0 in operands.query.shape[:-1]:
        return empty_result(operands, options)
    return over_tiles(_attend_tile, operands, options)[: 1 + options.residuals]


def over_tiles(body: Body, operands: Operands, options: Options) -> tuple[Array, ...]:
    """What `body` makes of every tile, put together: [*batch, *queries, ...]."""
    query, axes = operands.query, options.axes
    batch, heads, dims = query.ndim - len(axes) - 2, query.shape[-2], (query.shape[-1], operands.value.shape[-1])
    backend = machine.backend()
    sizes = options.tile or tiles.best_sizes(axes, heads, dims, backend)
    tables = tuple(tiles.cut(axis, t) for axis, t in zip(axes, sizes, strict=True))
    grid = tuple(len(table.queries) for table in tables)
    tile = np.unravel_index(np.arange(math.prod(grid)), grid)
    own = _cut_queries(operands, options, tables)

    def run(own: dict[str, Array], tile: Sequence[Any]) -> tuple[Array, ...]:
        rows = tuple(tiles.rows_of(table, t, axis) for table, t, axis in zip(tables, tile, axes, strict=True))
        own = own | _take_keys(operands, rows, tables)
        return body(operands._replace(**own), options, rows, tables)

    columns = math.prod(table.keys.shape[1] for table in tables)
    held = planned(math.prod(query.shape[:batch])) * heads * tiles.tile_numbers(math.prod(sizes), columns, dims)
    at_once = tiles.tiles_per_step(math.prod(grid), max(1, tiles.step_budget(backend) // held))
    if math.prod(grid) == 1:  # nothing to loop over, and a static place
        found = jax.tree.map(lambda x: x[None], run({name: x[0] for name, x in own.items()}, [0] * len(axes)))
    elif at_once == math.prod(grid):
        found = jax.vmap(run)(own, tuple(map(jnp.asarray, tile)))
    else:
        each = (own, tuple(map(jnp.asarray, tile)))
        found = jax.lax.map(lambda one: jax.checkpoint(run)(*one), each, batch_size=at_once)
    return tuple(_restore(x, tables, batch) for x in found)


def _attend_tile(operands: Operands, options: Options, rows: Rows, tables: Tables) -> tuple[Array, Array]:
    """One tile, whose queries and columns are the grids of `operands`: [*batch, *queries, heads, ...]."""
    weights, extra, lse = weigh(operands, options, rows, tables)
    return mix(weights, extra, operands, options), lse.reshape(operands.query.shape[:-1])


def weigh(operands: Operands, options: Options, rows: Rows, tables: Tables) -> tuple[Array, Array, Array]:
    """The weights of a tile's slots, [*batch, key_heads, group, *queries, *columns], those of the extra tokens,
    [*batch, key_heads, group, queries, extra], and lse, [*batch, queries, key_heads, group]."""
    rank = len(rows)
    in_slots = options.normalize not in NORMALIZERS.values()  # a function of the caller's sees a window in order
    (scores, mask), shape = score(operands, options, rows, tables, in_slots)
    weights = apply_normalizer(options.normalize, scores, mask)
    lse = jnp.moveaxis(logsumexp(scores, mask), -1, -3)
    width = math.prod(shape[-rank:])
    weights, extra = weights[..., :width].reshape(shape), weights[..., width:]
    if in_slots:
        weights = terms.to_columns(weights, options, rows, tables)
    if options.dropout_rate > 0:
        kept, kept_extra = terms.dropout(operands, options, rows, tables)
        weights, extra = weights * kept, extra * kept_extra
    return weights, extra, lse


def score(
    operands: Operands, options: Options, rows: Rows, tables: Tables, in_slots: bool
) -> tuple[tuple[Array, Array], tuple[Extent, ...]]:
    """The final scores of a tile and who takes part, [*batch, key_heads, group, queries, columns + extra tokens], or by
    slot; and the shape that those of the slots have before their axes are made one."""
    scores, mask = _scores(operands, options, rows, tables)
    if in_slots:
        scores, mask = (to_slots(x, options, rows, tables) for x in (scores, mask))
    shape = scores.shape  # [*batch, key_heads, group, *queries, *columns or *slots]
    scores, mask = flat(scores, len(rows)), flat(mask, len(rows))
    if operands.extra_key is not None:
        extra = soft_capped(_products(operands, operands.extra_key, options), operands.soft_cap)
        scores = jnp.concatenate([scores, extra], -1)
        seen = jnp.ones_like(extra, bool)
        if operands.extra_mask is not None:
            seen = seen & jnp.expand_dims(terms.flat_grid(operands.extra_mask, len(rows), trailing=1), (-3, -4))
        mask = jnp.concatenate([mask, seen], -1)
    return (scores, mask), shape


def mix(weights: Array, extra: Array, operands: Operands, options: Options) -> Array:
    """sum_j A_ij v_j of a tile, [*batch, *queries, heads, value_dim], of weights as `weigh` has them."""
    rank = len(options.axes)
    output = _mix(flat(weights, rank), terms.flat_grid(operands.value, rank), options)
    if operands.extra_value is not None:
        output = output + _mix(extra, operands.extra_value, options)
    return output.reshape(*operands.query.shape[:-1], output.shape[-1]).astype(operands.value.dtype)


def _scores(operands: Operands, options: Options, rows: Rows, tables: Tables) -> tuple[Array, Array]:
    """The final scores of the slots and who takes part, [*batch, key_heads, group, *queries, *columns]."""
    rank = len(rows)
    scores = _products(operands, terms.flat_grid(operands.key, rank), options)
    grid = tuple(len(row.shift) for row in rows) + tuple(len(row.keys) for row in rows)
    scores = scores.reshape(*scores.shape[:-2], *grid)
    if operands.relative_bias is not None or operands.key_embedding is not None:
        scores = scores + terms.relative(operands, options, rows, tables, scores.dtype)
    if operands.bias is not None:
        bias = terms.split_heads(operands.bias, operands, rank)
        scores = scores + terms.to_columns(bias, options, rows, tables).astype(scores.dtype)
    mask = jnp.broadcast_to(terms.visible(operands, options, rows, tables), scores.shape)
    scores, mask = without_hidden(scores, mask)
    scores = soft_capped(scores, operands.soft_cap)
    if options.score_mod is not None:
        heads = jnp.arange(operands.query.shape[-2]).reshape(*scores.shape[-2 * rank - 2 : -2 * rank], *[1] * 2 * rank)
        query = tuple(terms.along(row.queries, 2 * rank - axis - 1) for axis, row in enumerate(rows))
        key = tuple(terms.along(row.named_keys, rank - axis - 1) for axis, row in enumerate(rows))
        scores = modified(options, scores, heads, query, key)
    return without_hidden(scores, mask)


def to_slots(x: Array, options: Options, rows: Rows, tables: Tables) -> Array:
    """[..., *queries, *columns] by slot; zero, or False, where a slot has no column."""
    for axis, (row, table) in enumerate(zip(rows, tables, strict=True)):
        x = terms.shear(x, row.shift, table.shift, options.axes[axis].size, len(rows), axis)
    return x


def _products(operands: Operands, key: Array, options: Options) -> Array:
    """scale·(q·k), [*batch, key_heads, group, queries, keys], for keys [*batch, keys, key_heads, head_dim]."""
    query = terms.grouped(operands, len(options.axes))
    return operands.scale * terms.product("...kgqd,...wkd->...kgqw", query, key, options)


def _mix(weights: Array, value: Array, options: Options) -> Array:
    """sum_j A_ij v_j, [*batch, queries, key_heads, group, value_dim]."""
    return terms.product("...kgqw,...wkd->...qkgd", weights.astype(value.dtype), value, options)


def flat(x: Array, rank: int) -> Array:
    """[..., *queries, *columns] with one axis for each."""
    return x.reshape(*x.shape[: -2 * rank], math.prod(x.shape[-2 * rank : -rank]), math.prod(x.shape[-rank:]))


def _cut_queries(operands: Operands, options: Options, tables: Tables) -> dict[str, Array]:
    """What differs from query to query, by tile: [tiles, *batch, *queries, ...]."""
    rank = len(tables)
    batch, index = operands.query.ndim - rank - 2, [table.queries for table in tables]
    own = {"query": _cut(operands.query, index, batch)}
    for name in ("query_segments", "slot_ranges", "extra_mask"):
        x = getattr(operands, name)
        own |= {} if x is None else {name: _cut(x, index, batch)}
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
    return x.reshape(math.prod(x.shape[:rank]), *x.shape[rank:])


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

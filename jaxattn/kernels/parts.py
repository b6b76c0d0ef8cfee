"""The parts of attention by slot: scores, weights, and the mix of values by weights.

They go through the tiles of `differentiable`, so that what they hold is what they return, and a few tiles. A slot
stands in a column of its tile: what is by slot is sheared into columns, and back.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn import machine
from jaxattn.kernels import differentiable, terms
from jaxattn.kernels import loop as loops
from jaxattn.kernels.differentiable import Rows, Tables
from jaxattn.kernels.operands import Operands, Options, statistics_dtype

SHARED = ("scale", "soft_cap", "relative_bias", "key_embedding", "sink", "dropout_key")  # have no batch


def scores(operands: Operands, options: Options) -> Float[Array, "*batch_and_queries heads slots"]:
    """The final scores of the slots and then of the extra tokens; -inf where one takes no part."""

    def of_tile(operands: Operands, options: Options, rows: Rows, tables: Tables) -> tuple[Array]:
        (found, mask), _ = differentiable.score(operands, options, rows, tables, in_slots=True)
        return (_by_query(jnp.where(mask, found, -jnp.inf), operands),)

    return _of_tiles(of_tile, operands, options)


def weights(operands: Operands, options: Options) -> Float[Array, "*batch_and_queries heads slots"]:
    """The weights of the slots and then of the extra tokens: normalised, dropout applied."""

    def of_tile(operands: Operands, options: Options, rows: Rows, tables: Tables) -> tuple[Array]:
        found, extra, lse = differentiable.weigh(operands, options, rows, tables)
        found = differentiable.flat(differentiable.to_slots(found, options, rows, tables), len(rows))
        found = jnp.concatenate([found, extra], -1)
        if operands.sink is not None:
            lse = jnp.moveaxis(jnp.where(lse == -jnp.inf, 0, lse), -3, -1)  # where nothing is seen all weights are 0
            found = found * jax.nn.sigmoid(lse - operands.sink.reshape(*lse.shape[-3:-1], 1))[..., None]
        return (_by_query(found, operands),)

    return _of_tiles(of_tile, operands, options)


def mix(operands: Operands, options: Options) -> Float[Array, "*batch_and_queries heads value_dim"]:
    """sum_j A_ij v_j, of weights [*batch, *queries, heads, slots + extra] that stand where attention has its query."""
    slots = tuple(axis.size for axis in options.axes)

    def of_tile(operands: Operands, options: Options, rows: Rows, tables: Tables) -> tuple[Array]:
        given = terms.grouped(operands, len(rows))  # [*batch, key_heads, group, queries, slots + extra]
        by_slot, extra = given[..., : math.prod(slots)], given[..., math.prod(slots) :]
        queries = operands.query.shape[-2 - len(rows) : -2]
        by_slot = by_slot.reshape(*given.shape[:-2], *queries, *slots)
        found = terms.to_columns(by_slot, options, rows, tables)
        found = jnp.where(terms.visible(operands, options, rows, tables), found, 0)
        return (differentiable.mix(found, extra, operands, options),)

    return _of_tiles(of_tile, operands, options, operands.value.shape[-1], operands.value.dtype)


def _of_tiles(
    body: Callable, operands: Operands, options: Options, last: int | None = None, dtype: Any = None
) -> Array:
    """What `body` makes of the tiles, [*batch, *queries, heads, last]; of no queries, nothing. Where a step has no room
    for the whole batch, some entries at a time: what they make is written in place."""
    query, extra = operands.query, operands.extra_key
    if 0 in query.shape[:-1]:
        slots = math.prod(axis.size for axis in options.axes) + (0 if extra is None else extra.shape[-3])
        dtype = statistics_dtype(query.dtype) if dtype is None else dtype
        return jnp.zeros((*query.shape[:-1], slots if last is None else last), dtype)
    run = lambda operands: differentiable.over_tiles(body, operands, options)[0]
    loop = loops.plan_loop(operands, options)
    if loop.chunks == 1:
        return run(operands)
    batch = query.shape[: -2 - len(options.axes)]
    # of a batch that is cut over devices a chunk is every so many entries: else the loop would gather it
    chunk = 0 if machine.device_count() == 1 else 1
    lead = (loop.chunks, -1) if chunk == 0 else (-1, loop.chunks)
    each, same = {}, {}
    for name, x in operands._asdict().items():
        if x is None or name in SHARED:
            continue
        elif math.prod(x.shape[: len(batch)]) == 1:
            same[name] = x.reshape(1, *x.shape[len(batch) :])
        else:
            x = jnp.broadcast_to(x, (*batch, *x.shape[len(batch) :]))
            each[name] = jnp.moveaxis(x.reshape(*lead, *x.shape[len(batch) :]), chunk, 0)
    found = jax.lax.map(jax.checkpoint(lambda each: run(operands._replace(**same, **each))), each)
    return jnp.moveaxis(found, 0, chunk).reshape(*query.shape[:-1], found.shape[-1])


def _by_query(x: Array, operands: Operands) -> Array:
    """[*batch, key_heads, group, queries, slots] as [*batch, *queries, heads, slots]."""
    return jnp.moveaxis(x, -2, -4).reshape(*operands.query.shape[:-1], x.shape[-1])

"""Attention of queries that stand at given places, between the tokens as well."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxattn import arguments, explicit, machine
from jaxattn.arguments import Arrays, Operand, Settings
from jaxattn.attention import attention
from jaxattn.checked import shown
from jaxattn.kernels.operands import Operands, Options, embedding_parts, statistics_dtype
from jaxattn.normalize import Normalizer
from jaxattn.promotion import broadcasting
from jaxattn.window import Axis, Window


def attention_at(
    query: Operand,
    positions: Operand,
    key: Operand,
    value: Operand,
    bias: Operand | None = None,
    mask: Operand | tuple[Operand | None, Operand | None] | None = None,
    *,
    window: Window,
    scale: float | Operand | None = None,
    relative_bias: Operand | None = None,
    key_embedding: Operand | Sequence[Operand] | None = None,
    logits_soft_cap: float | Operand | None = None,
    normalize: str | Normalizer = "softmax",
    segment_ids: Operand | Sequence[Operand] | None = None,
    extra_key: Operand | None = None,
    extra_value: Operand | None = None,
    extra_positions: Operand | None = None,
    sink_logits: Operand | None = None,
    precision: jax.lax.PrecisionLike = None,
    return_residuals: bool = False,
) -> Any:
    """`attention` of n queries that stand at given places of the keys' grid: points, other resolutions, learned ones.

        s_ij = scale·(q_i · k_j) + q_i · r[j - p_i] + relative_bias[j - p_i] + bias_ij,    j in N(p_i)

    A query at p has the window of the token nearest to p (half way between two, of the later one; on a causal axis, of
    the last one that does not come after p). Off the grid that is the token at its border, or on an axis that wraps
    around the one that p comes to. Where p lies between tokens, so does the offset j - p between those of the tables:
    their entries are interpolated, linearly along each axis, and beyond the last one it serves.

    Args:
        query: [*batch, n, heads, head_dim].
        positions: p, [*batch, n, rank], integers or floating point, in tokens of the key's grid; a NaN gives NaN.
            Queries of a grid that is s times as coarse stand, as in a convolution, at s·i, or with their centres at
            s·i + (s - 1)/2. They are differentiated through the tables alone: a window moves by whole tokens.
        key, value: [*batch, *grid, key_heads, head_dim or value_dim].
        bias: broadcasts against [*batch, n, heads, *k].
        mask: of keys, [*batch or 1, *grid] or [*grid], or by slot, as `bias`; or a pair of both.
        window: its stride is not looked at: the positions say where queries stand.
        segment_ids: integers [*batch, *grid], where a query takes that of its nearest token; or a pair for query
            [*batch, n] and key; or without the batch, the same for every entry.
        scale, relative_bias, key_embedding, logits_soft_cap, normalize, extra_key, extra_value, extra_positions,
            sink_logits, precision, return_residuals: as in `attention`.

    Returns:
        [*batch, n, heads, value_dim], and lse [*batch, n, heads] with `return_residuals`, as `attention` does. It
        gathers the keys and values of every query, n × window of them.

    Raises:
        ValueError: naming the argument, what came and what is allowed.

    References:
        Zhu et al. 2020, deformable attention (arXiv 2010.04159); Xia et al. 2022, DAT (2201.00520).

    Example:
        >>> x = jnp.linspace(0, 1, 64 * 8).reshape(8, 8, 1, 8)
        >>> places = jnp.array([[0, 0], [3, 4]])
        >>> found = attention_at(x[places[:, 0], places[:, 1]], places, x, x, window=Window((3, 3)))
        >>> on_the_grid = jaxattn.attention(x, x, x, window=Window((3, 3)))
        >>> jnp.allclose(found[1], on_the_grid[3, 4], rtol=1e-5).item()
        True
    """
    arrays = Arrays(
        query=query,
        key=key,
        value=value,
        bias=bias,
        mask=mask,
        scale=scale,
        relative_bias=relative_bias,
        key_embedding=key_embedding,
        logits_soft_cap=logits_soft_cap,
        segment_ids=segment_ids,
        extra_key=extra_key,
        extra_value=extra_value,
        extra_positions=extra_positions,
        sink_logits=sink_logits,
    )
    if not isinstance(window, Window):
        raise ValueError(f"attention_at: window (={window!r}) must be a jaxattn.Window")
    try:
        arrays, settings = arguments.read(
            arrays,
            window=dataclasses.replace(window, stride=1),
            score_mod=None,
            normalize=normalize,
            dropout_rate=0.0,
            broadcast_dropout=False,
            precision=precision,
            tile=None,
            implementation=None,
            return_residuals=return_residuals,
        )
        places = arguments.converted("positions", positions)
        # a function of the caller's may hold what changes, which a cache would freeze
        attend = _attend if settings.has_functions else _attend_compiled
        return attend(arrays, places, settings, machine.backend())
    except ValueError as error:
        raise ValueError(str(error).replace("attention: ", "attention_at: ", 1)) from None


class _Row(NamedTuple):
    """The window of every query along one axis."""

    token: Array  # [*batch, n], whose window it is
    key: Array  # [*batch, n, size], the key in each slot; -1 for none
    sees: Array  # [*batch, n, size]
    first: Array  # [*batch, n], the entry of slot 0 in a table over the offsets, which may lie between two


def _row(axis: Axis, causal: bool, position: Array) -> _Row:
    """The row of the nearest token in the window's own table, and how far the query stands from where that begins."""
    between, wraps = jnp.issubdtype(position.dtype, jnp.floating), axis.boundary == "wrap"
    if position.dtype.itemsize < 4:
        position = position.astype(jnp.int32)
    # what is far off the grid is told in int32 as well
    if wraps:
        position = position % axis.length
    elif between:
        position = jnp.clip(position, -arguments.FAR, arguments.FAR)
    position = position if between else arguments.as_int32(position)
    nearest = jnp.floor(position if causal else position + 0.5).astype(jnp.int32) if between else position
    token = nearest % axis.length if wraps else jnp.clip(nearest, 0, len(axis.start) - 1)
    start, low, high = (jnp.asarray(x, jnp.int32)[token][..., None] for x in (axis.start, axis.low, axis.high))
    slot = jnp.arange(axis.size, dtype=jnp.int32)
    begins = start[..., 0] + (nearest - token if wraps else 0)
    if between:
        first = (begins.astype(position.dtype) - position) / axis.dilation + axis.size - 1
    else:
        first = (begins - position) // axis.dilation + axis.size - 1
    key = axis.fold(start + axis.dilation * slot)
    return _Row(token, key, (low <= slot) & (slot < high), first)


@broadcasting
def _attend(arrays: Arrays, positions: Any, settings: Settings, platform: str) -> Any:
    del platform  # by which a compiled call is found
    attend = lambda arrays, positions: _gather(arrays, positions, settings)
    found = explicit.as_query(attend, jnp.asarray(arrays.query), 1 + settings.return_residuals)(arrays, positions)
    return found if settings.return_residuals else found[0]


_attend_compiled = jax.jit(_attend, static_argnums=(2, 3))


def _gather(arrays: Arrays, positions: Any, settings: Settings) -> tuple[Array, ...]:
    """Gather each query's keys, and attend to them without a window: a sequence of one query each."""
    window: Any = settings.window
    rank = window.rank
    positions = jnp.asarray(positions)
    wanted = (*jnp.shape(arrays.query)[:-2], rank)
    number = any(jnp.issubdtype(positions.dtype, kind) for kind in (jnp.floating, jnp.integer))
    if not number or positions.shape != wanted:
        raise ValueError(
            f"attention: positions (={shown(positions)}) must be integers or floating point, [*batch, n, rank] = "
            f"{list(wanted)} for query (={shown(arrays.query)}) and window (={window})"
        )
    between = jnp.issubdtype(positions.dtype, jnp.floating)
    positions = positions.astype(statistics_dtype(positions.dtype)) if between else positions
    grid = jnp.shape(arrays.key)[-rank - 2 : -2]
    axes = window.axes(grid) if len(grid) == rank else ()
    rows = [_row(axis, window.along[a].causal, positions[..., a]) for a, axis in enumerate(axes)]
    arrays = arrays._replace(segment_ids=_of_tokens(arrays.segment_ids, rows, grid))
    operands, options = arguments.check(arrays, settings, places=positions)
    if between:  # who stands nowhere sees nothing that could be told
        nowhere = jnp.isnan(sum(row.first for row in rows))[..., None, None]
        operands = operands._replace(query=jnp.where(nowhere, jnp.nan, operands.query))
    index, inside, sees = _outer(rows, grid)
    batch = operands.query.shape[:-3]
    mask = sees[..., None, :]
    for of_keys in _of_keys(operands, index, batch):  # what stands outside has no key
        mask = mask & (of_keys | ~inside)[..., None, :]
    if operands.slot_mask is not None:
        mask = mask & _flat(operands.slot_mask, options)
    keys, values = (_gathered(x, index, inside) for x in (operands.key, operands.value))
    extra_keys, extra_values = _each(operands.extra_key, index), _each(operands.extra_value, index)
    bias = _terms(operands, options, rows)
    # tokens that not every query sees are slots without terms
    if operands.extra_mask is not None and extra_keys is not None and extra_values is not None:
        seen = jnp.broadcast_to(operands.extra_mask, (*index.shape[:-1], operands.extra_mask.shape[-1]))[..., None, :]
        mask = jnp.concatenate([jnp.broadcast_to(mask, (*index.shape[:-1], *mask.shape[-2:])), _like(seen, mask)], -1)
        bias = None if bias is None else jnp.pad(bias, [*[(0, 0)] * (bias.ndim - 1), (0, seen.shape[-1])])
        keys, values = (jnp.concatenate(x, -3) for x in ((keys, extra_keys), (values, extra_values)))
        extra_keys = extra_values = None
    found = attention(
        operands.query[..., None, :, :],
        keys,
        values,
        bias=bias,
        mask=mask[..., None, :],
        scale=operands.scale,
        logits_soft_cap=operands.soft_cap,
        normalize="softmax" if settings.return_residuals else settings.normalize,
        extra_key=extra_keys,
        extra_value=extra_values,
        sink_logits=operands.sink,
        precision=settings.precision,
        return_residuals=settings.return_residuals,
    )
    found = found if settings.return_residuals else (found,)
    return tuple(jnp.squeeze(x, len(batch) + 1) for x in found)


def _like(x: Array, mask: Array) -> Array:
    """[*batch, n, 1, extra] for as many heads as a mask has."""
    return jnp.broadcast_to(x, (*x.shape[:-2], mask.shape[-2], x.shape[-1]))


def _outer(rows: Sequence[_Row], grid: Sequence[int]) -> tuple[Array, Array, Array]:
    """Of each query and slot, [*batch, n, slots]: the key's number in the grid, whether there is one, and whether the
    window has it take part."""
    index, inside, sees, lead = jnp.zeros((), jnp.int32), jnp.ones((), bool), jnp.ones((), bool), rows[0].token.shape
    for a, (row, length) in enumerate(zip(rows, grid, strict=True)):
        spread = lambda x, a=a: x.reshape(*lead, *(x.shape[-1] if b == a else 1 for b in range(len(rows))))
        index = index * length + spread(jnp.maximum(row.key, 0))
        inside, sees = inside & spread(row.key >= 0), sees & spread(row.sees)
    shape = (*lead, *(row.key.shape[-1] for row in rows))
    flat = lambda x: jnp.broadcast_to(x, shape).reshape(*lead, math.prod(shape[len(lead) :]))
    return flat(index), flat(inside), flat(sees)


def _taken(x: Array, index: Array, batch: tuple[int, ...], trailing: int) -> Array:
    """[*batch, *grid, ...] at the numbers [*batch, n, slots]."""
    x = jnp.broadcast_to(x, (*batch, *x.shape[len(batch) :]))
    rest = x.shape[x.ndim - trailing :]
    x = x.reshape(*batch, math.prod(x.shape[len(batch) : x.ndim - trailing]), *rest)
    flat = index.reshape(*batch, math.prod(index.shape[len(batch) :]), *[1] * trailing)
    return jnp.take_along_axis(x, flat, axis=len(batch)).reshape(*index.shape, *rest)


def _gathered(x: Array, index: Array, inside: Array) -> Array:
    """Keys, or values, [*batch, n, slots, heads, dim]; zeros outside. The transpose of gathering is a sum."""
    found = _taken(x.astype(statistics_dtype(x.dtype)), index, index.shape[:-2], 2).astype(x.dtype)
    return jnp.where(inside[..., None, None], found, jnp.zeros((), x.dtype))


def _of_keys(operands: Operands, index: Array, batch: tuple[int, ...]) -> list[Array]:
    """The mask of keys, and whether their segment is the query's, [*batch, n, slots]."""
    found = [] if operands.key_mask is None else [_taken(operands.key_mask, index, batch, 0)]
    if operands.query_segments is not None and operands.key_segments is not None:
        found.append(operands.query_segments[..., None] == _taken(operands.key_segments, index, batch, 0))
    return found


def _of_tokens(ids: Any, rows: Sequence[_Row], grid: Sequence[int]) -> Any:
    """Segments of one array as a pair: a query is of that of its nearest token."""
    if not rows or ids is None or isinstance(ids, tuple | list):
        return ids
    batch, number = rows[0].token.shape[:-1], jnp.zeros((), jnp.int32)
    if not arguments.is_for_entries(jnp.shape(ids), batch, tuple(grid)):
        return ids  # which is refused
    of_all = jnp.broadcast_to(ids, (*batch, *grid))
    for row, length in zip(rows, grid, strict=True):
        number = number * length + row.token
    return _taken(of_all, number[..., None], batch, 0)[..., 0], ids


def _each(extra: Array | None, index: Array) -> Array | None:
    """Extra tokens, for each query."""
    return (
        extra if extra is None else jnp.broadcast_to(extra[..., None, :, :, :], (*index.shape[:-1], *extra.shape[-3:]))
    )


def _flat(x: Array, options: Options) -> Array:
    """[*batch|1, n|1, heads|1, *slots|1] with one axis for the slots."""
    slots = tuple(axis.size for axis in options.axes)
    return jnp.broadcast_to(x, (*x.shape[: -len(slots)], *slots)).reshape(*x.shape[: -len(slots)], math.prod(slots))


def _terms(operands: Operands, options: Options, rows: Sequence[_Row]) -> Array | None:
    """q·r[j - p] + relative_bias[j - p] + bias, [*batch, n, heads, 1, slots]."""
    rank, dtype, found = len(rows), statistics_dtype(operands.query.dtype), []
    if operands.bias is not None:
        found.append(operands.bias.astype(dtype))
    tables = [(tuple(range(rank)), operands.relative_bias.astype(dtype))] if operands.relative_bias is not None else []
    for axes, table in embedding_parts(operands, options):
        flat = jnp.broadcast_to(table, (operands.query.shape[-2], *table.shape[1:]))
        flat = flat.reshape(len(flat), -1, table.shape[-1])
        product = jnp.einsum(
            "...hd,hmd->...hm", operands.query, flat, precision=options.precision, preferred_element_type=dtype
        )
        tables.append((axes, product.reshape(*product.shape[:-1], *table.shape[1:-1])))
    for axes, table in tables:  # [..., heads, *(2k-1)] along the axes on which it depends
        table = jnp.expand_dims(table, [a - rank for a in range(rank) if a not in axes])
        table = table.reshape(*[1] * (operands.query.ndim - 1 + rank - table.ndim), *table.shape)
        for a in axes:
            table = _between(table, rows[a], a, rank)
        found.append(table)
    return None if not found else _flat(sum(found[1:], found[0]), options)[..., None, :]


def _between(table: Array, row: _Row, a: int, rank: int) -> Array:
    """A table [*batch|1, n|1, heads, *offsets or slots] at every query's slots along axis a of the window."""
    first, slot = row.first, jnp.arange(row.key.shape[-1], dtype=jnp.int32)
    whole = jnp.floor(first).astype(jnp.int32)
    spread = lambda x: x.reshape(*first.shape, *[1] * (1 + a), x.shape[-1], *[1] * (rank - 1 - a))
    entry = lambda u: spread(jnp.clip(whole[..., None] + u, 0, table.shape[a - rank] - 1))
    at = lambda u: jnp.take_along_axis(table, entry(u), axis=a - rank)
    if not jnp.issubdtype(first.dtype, jnp.floating):
        return at(slot)
    part = spread((first - whole.astype(first.dtype))[..., None]).astype(table.dtype)
    lower, upper = at(slot), at(slot + 1)
    upper = jnp.where((part == 0) & (upper == -jnp.inf), 0, upper)  # one that hides, beside the entry that is meant
    return (1 - part) * lower + part * upper

"""What `attention` is given, checked: every check and nothing else.

`read` looks at each call's values. `check` looks at shapes and dtypes alone, while a program is traced: so a call whose
arguments look like an earlier one's is not checked again.
"""

import itertools
import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from jaxattn import machine
from jaxattn.checked import REFUSED, allowed_precision, shown
from jaxattn.functions import Known, known
from jaxattn.kernels import backends, ragged
from jaxattn.kernels.operands import Operands, Options, ScoreMod, hiding_score, statistics_dtype
from jaxattn.normalize import NORMALIZERS, Normalizer
from jaxattn.sizes import is_int, is_sequence, is_symbolic
from jaxattn.window import FOLDING, Axis, Window

# Loose on purpose: a wrong shape is a ValueError that says what was expected.
Operand = Shaped[Array | np.ndarray, "..."]


class Arrays(NamedTuple):
    """The arguments that may be traced."""

    query: Any
    key: Any
    value: Any
    bias: Any = None
    mask: Any = None
    scale: Any = None
    relative_bias: Any = None
    key_embedding: Any = None
    logits_soft_cap: Any = None
    segment_ids: Any = None
    grid_sizes: Any = None
    extra_key: Any = None
    extra_value: Any = None
    extra_positions: Any = None
    sink_logits: Any = None
    dropout_key: Any = None
    query_offset: Any = None


class Settings(NamedTuple):
    """The others: hashable, and equal only where they mean the same."""

    window: Window | None
    score_mod: ScoreMod | None
    normalize: Normalizer
    dropout_rate: float
    precision: jax.lax.PrecisionLike
    tile: int | tuple[int, ...] | None
    asked: tuple[str | None, ...]
    return_residuals: bool
    broadcast_dropout: bool
    query_offset: tuple[int, ...] | str | None
    soft_cap: float | None = None

    @property
    def has_functions(self) -> bool:
        """Whether a function of the caller's takes part that may hold what changes."""
        ours = (None, *NORMALIZERS.values())
        return any(not isinstance(f, Known) and f not in ours for f in (self.score_mod, self.normalize))


def read(
    arrays: Arrays,
    *,
    window: Any,
    score_mod: Any,
    normalize: Any,
    dropout_rate: Any,
    precision: Any,
    tile: Any,
    implementation: Any,
    return_residuals: Any,
    broadcast_dropout: Any,
) -> tuple[Arrays, Settings]:
    """The arguments with all that depends on values checked."""
    if window is not None and not isinstance(window, Window):
        raise ValueError(f"attention: window (={window!r}) must be None or a jaxattn.Window")
    if implementation is not None and not isinstance(implementation, str):
        raise ValueError(f"attention: implementation (={implementation!r}) must be None or a name")
    if arrays.scale is not None:
        _check_number("scale", arrays.scale)
    if arrays.logits_soft_cap is not None:
        _check_soft_cap(arrays.logits_soft_cap)
    key = _dropout_key(dropout_rate, arrays.dropout_key)
    for name in ("query", "key", "value"):
        if getattr(arrays, name) is None:
            raise ValueError(f"attention: {name} (=None) must be an array of numbers")
    if not isinstance(return_residuals, bool | np.bool_):
        raise ValueError(f"attention: return_residuals (={shown(return_residuals)}) must be True or False")
    if not isinstance(broadcast_dropout, bool | np.bool_):
        raise ValueError(f"attention: broadcast_dropout (={shown(broadcast_dropout)}) must be True or False")
    arrays, query_offset = _query_offset(arrays, window, normalize)
    if precision is not None and allowed_precision(precision) is REFUSED:
        raise ValueError(f"attention: precision (={shown(precision)}) must be None, a jax.lax.Precision, or its name")
    as_arrays = Arrays(*(x if x is None else converted(name, x) for name, x in arrays._asdict().items()))
    _check_sizes(as_arrays, 1 if window is None else window.rank)
    settings = Settings(
        window=window,
        score_mod=_function("score_mod", score_mod),
        normalize=_normalizer(normalize, return_residuals),
        dropout_rate=float(dropout_rate),
        precision=tuple(precision) if isinstance(precision, list) else precision,
        tile=_integers(tile),
        asked=backends.asked(implementation),
        return_residuals=bool(return_residuals),
        broadcast_dropout=bool(broadcast_dropout),
        query_offset=query_offset,
        soft_cap=_known_cap(arrays.logits_soft_cap),
    )
    return as_arrays._replace(dropout_key=key), settings


def check(arrays: Arrays, settings: Settings, places: Array | None = None) -> tuple[Operands, Options]:
    """What kernels are given: operands in one layout, and options. Depends on shapes and dtypes alone.
    With `places`, [*batch, n, rank], there are n queries on one axis, and those say where they stand."""
    query, key, value = _floating(query=arrays.query, key=arrays.key, value=arrays.value)
    geometry = _geometry(
        query, key, value, settings.window, places is not None, settings.query_offset, arrays.query_offset
    )
    extra_key, extra_value = _extra(arrays.extra_key, arrays.extra_value, key, value, geometry)
    key_mask, slot_mask = _masks(arrays.mask, geometry)
    query_segments, key_segments = _segments(arrays.segment_ids, geometry)
    scale, soft_cap = arrays.scale, arrays.logits_soft_cap
    dropout_key, key_impl = _key_bits(arrays.dropout_key)
    operands = Operands(
        query=query,
        key=key,
        value=value,
        scale=jnp.asarray(max(query.shape[-1], 1) ** -0.5 if scale is None else scale, statistics_dtype(query.dtype)),
        soft_cap=None if soft_cap is None else jnp.asarray(soft_cap, statistics_dtype(query.dtype)),
        bias=_slotwise("bias", arrays.bias, geometry),
        slot_mask=slot_mask,
        key_mask=key_mask,
        relative_bias=_relative("relative_bias", arrays.relative_bias, geometry),
        key_embedding=_embedding(arrays.key_embedding, geometry),
        query_segments=query_segments,
        key_segments=key_segments,
        extra_key=extra_key,
        extra_value=extra_value,
        extra_mask=_not_ahead(arrays.extra_positions, extra_key, geometry, places),
        sink=_sink(arrays.sink_logits, settings.normalize, geometry),
        dropout_key=dropout_key,
    )
    options = Options(
        window=settings.window,
        queries=geometry.queries,
        keys=geometry.keys,
        normalize=settings.normalize,
        score_mod=settings.score_mod,
        dropout_rate=settings.dropout_rate,
        key_impl=key_impl,
        precision=settings.precision,
        residuals=settings.return_residuals,
        tile=_tile(settings.tile, geometry),
        offset=geometry.offset,
        broadcast_dropout=settings.broadcast_dropout,
        soft_cap=settings.soft_cap,
    )
    sizes = _grid_sizes(arrays, settings, geometry)
    return (operands, options) if sizes is None else ragged.fit(operands, options, sizes)


class _Geometry(NamedTuple):
    """The sizes that every other argument is checked against."""

    window: Window | None
    axes: tuple[Axis, ...]
    batch: tuple[int, ...]
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    slots: tuple[int, ...]
    heads: int
    key_heads: int
    head_dim: int
    dtype: Any
    offset: tuple[int, ...] | None
    traced_offset: Any

    def standing(self, axis: int) -> Array:
        """The indices of the queries along an axis, on the window's query grid."""
        count = self.queries[axis]
        first: Any = 0 if self.offset is None else self.offset[axis]
        if self.traced_offset is not None and self.window is not None:
            last = self.window.query_grid(self.keys)[axis] - count
            first = jnp.clip(self.traced_offset[axis], 0, last)
        return first + jnp.arange(count, dtype=jnp.int32)


def _geometry(
    query: Array,
    key: Array,
    value: Array,
    window: Window | None,
    anywhere: bool,
    offset: Any = None,
    traced: Any = None,
) -> _Geometry:
    rank = 1 if window is None else window.rank
    for_query = 1 if anywhere else rank
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim < (for_query if name == "query" else rank) + 2:
            _refuse(name, x, f"[*batch, *grid, heads, head_dim] with a grid of rank {rank}: at least {rank + 2} axes")
        if any(map(is_symbolic, x.shape[-rank - 2 :])):
            _refuse(name, x, "sizes that are known: symbolic (jax.export) may be the batch axes alone")
    batch = query.shape[: -for_query - 2]
    queries, keys = query.shape[len(batch) : -2], key.shape[-rank - 2 : -2]
    if key.shape[: -rank - 2] != batch:
        _refuse("key", key, f"the batch axes of query, {batch}, before a grid of rank {rank}, heads and head_dim")
    if value.shape[:-1] != key.shape[:-1]:
        _refuse("value", value, f"{(*key.shape[:-1], 'value_dim')}, like key up to its last axis")
    heads, key_heads = query.shape[-2], key.shape[-2]
    if key_heads == 0 or heads % key_heads != 0:
        raise ValueError(
            f"attention: key has {key_heads} heads and query {heads}: query's heads must be a multiple of key's"
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"attention: key has head_dim {key.shape[-1]} and query {query.shape[-1]}: they must be equal")
    if window is None:
        axes = (Axis.everything(queries[0], keys[0]),)
    else:
        axes = window.axes(keys)
        made = tuple(len(axis.start) for axis in axes)
        if traced is not None:  # of which any may be meant
            offset = (0,) * rank
        elif offset == "end":
            offset = tuple(n - m for n, m in zip(made, queries, strict=True))
        if not anywhere and offset is None and queries != made:
            raise ValueError(f"attention: query has the grid {queries}; of key's grid {keys}, {window} makes {made}")
        if offset is not None:
            if any(o < 0 or o + m > n for o, m, n in zip(offset, queries, made, strict=True)):
                raise ValueError(
                    f"attention: query_offset (={offset}) must leave query's grid {queries} within the {made} queries "
                    f"that {window} makes of key's grid {keys}"
                )
            axes = tuple(axis.rows(*part) for axis, *part in zip(axes, offset, queries, strict=True))
    slots = tuple(axis.size for axis in axes)
    heads_and_dim = heads, key_heads, query.shape[-1]
    return _Geometry(window, axes, batch, queries, keys, slots, *heads_and_dim, query.dtype, offset, traced)


def _floating(**operands: Operand) -> list[Array]:
    """The operands as arrays of their promoted dtype."""
    arrays = {name: jnp.asarray(x) for name, x in operands.items()}
    for name, x in arrays.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            _refuse(name, x, "a floating-point array")
    dtype = jnp.result_type(*arrays.values())
    return [x.astype(dtype) for x in arrays.values()]


def _extra(
    key: Operand | None, value: Operand | None, keys: Array, values: Array, geometry: _Geometry
) -> tuple[Array | None, Array | None]:
    if key is None and value is None:
        return None, None
    if key is None or value is None:
        there, missing = ("value", "key") if key is None else ("key", "value")
        raise ValueError(f"attention: extra_{missing} (=None) must be given where extra_{there} is")
    key, value = jnp.asarray(key), jnp.asarray(value)
    n = key.shape[-3] if key.ndim >= 3 else "n"
    for name, x, dim in (("extra_key", key, keys.shape[-1]), ("extra_value", value, values.shape[-1])):
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.shape != (*geometry.batch, n, geometry.key_heads, dim):
            _refuse(name, x, f"floating point, {(*geometry.batch, n, geometry.key_heads, dim)}")
    return key.astype(geometry.dtype), value.astype(geometry.dtype)


def _not_ahead(
    positions: Operand | None, extra_key: Array | None, geometry: _Geometry, places: Array | None
) -> Array | None:
    """Whether each query sees each extra token, [*batch|1, *queries, extra]."""
    if positions is None:
        return None
    positions, along = jnp.asarray(positions), () if geometry.window is None else geometry.window.along
    given = f"attention: extra_positions (={positions.dtype}{list(positions.shape)}) must be"
    if extra_key is None:
        raise ValueError(f"{given} None without extra_key and extra_value, the tokens that stand there")
    if not any(axis.causal for axis in along):
        raise ValueError(
            f"{given} None with window={geometry.window}, which is causal along no axis: over a whole sequence, "
            "Window(tokens, causal=True)"
        )
    shape, n = (extra_key.shape[-3], len(along)), len(geometry.queries)
    if positions.shape not in (shape, (*geometry.batch, *shape)) or not jnp.issubdtype(positions.dtype, jnp.integer):
        _refuse("extra_positions", positions, f"integers {shape} or {(*geometry.batch, *shape)}")
    positions = positions.reshape((1,) * (len(geometry.batch) + 2 - positions.ndim) + positions.shape)
    seen = jnp.ones((*positions.shape[:-2], *geometry.queries, shape[0]), bool)
    for a, axis in enumerate(along):
        if axis.causal:
            if places is None:
                standing = (axis.stride * geometry.standing(a)).reshape(-1, *[1] * (n - a))
            else:
                standing = places[..., a, None]
            token = jnp.expand_dims(as_int32(positions[..., a]), range(-n - 1, -1))
            seen = seen & (token.astype(standing.dtype) <= standing)
    return seen


def _grid_sizes(arrays: Arrays, settings: Settings, geometry: _Geometry) -> Array | None:
    if arrays.grid_sizes is None:
        return None
    sizes, along = jnp.asarray(arrays.grid_sizes), () if geometry.window is None else geometry.window.along
    if sizes.shape != (*geometry.batch, len(geometry.keys)) or not jnp.issubdtype(sizes.dtype, jnp.integer):
        _refuse("grid_sizes", sizes, f"integers {(*geometry.batch, len(geometry.keys))}: a grid for each entry")

    def refuse(where: str, instead: str) -> None:
        given = f"{sizes.dtype}{list(sizes.shape)}"
        raise ValueError(f"attention: grid_sizes (={given}) must be None {where}; {instead}")

    for axis in along:
        if axis.boundary in FOLDING:
            refuse(f"with boundary {axis.boundary!r}", "'shift', 'mask', 'zero' and 'valid' work")
        if axis.boundary == "zero" and arrays.segment_ids is not None:
            refuse("with segment_ids and boundary 'zero'", "boundary 'mask' or 'shift', or a mask by slot, works")
        if ragged.shifts(axis) and settings.normalize not in NORMALIZERS.values():
            refuse(
                "with a function to normalize and boundary 'shift'",
                f"boundary 'mask' works, and so do {', '.join(map(repr, NORMALIZERS))}",
            )
    if geometry.offset is not None:
        refuse("with query_offset", "queries of the whole grid, or an entry of the batch at a time, work")
    if geometry.window is None and geometry.queries != geometry.keys:
        refuse(f"with {geometry.queries[0]} queries of {geometry.keys[0]} keys", "a mask says which of them attend")
    return sizes


def _sink(logits: Operand | None, normalize: Normalizer, geometry: _Geometry) -> Array | None:
    if logits is None:
        return None
    logits = jnp.asarray(logits)
    if logits.shape != (geometry.heads,) or not jnp.issubdtype(logits.dtype, jnp.floating):
        _refuse("sink_logits", logits, f"floating point, {(geometry.heads,)}: one for each head of query")
    if normalize is not NORMALIZERS["softmax"]:
        named = next((repr(name) for name, ours in NORMALIZERS.items() if ours is normalize), "a function")
        raise ValueError(
            f"attention: sink_logits (={logits.dtype}{list(logits.shape)}) must be None with normalize={named}: only "
            "'softmax' has a denominator that they can be added to"
        )
    return logits.astype(statistics_dtype(geometry.dtype))


def _relative(name: str, table: Operand | None, geometry: _Geometry) -> Array | None:
    if table is None:
        return None
    if geometry.window is None:
        raise ValueError(f"attention: {name} needs a window: over a whole grid, Window(grid, boundary='shift')")
    table = jnp.asarray(table)
    offsets = tuple(2 * k - 1 for k in geometry.slots)
    embedding = name == "key_embedding"
    shape = (geometry.heads, *offsets, *([geometry.head_dim] if embedding else []))
    allowed = [shape, (1, *shape[1:])] if embedding else [shape]
    if len(geometry.slots) == 1 < table.ndim - 1 - embedding:
        axes = table.ndim - 1 - embedding
        raise ValueError(
            f"attention: {name} has shape {table.shape}, a table over {axes} axes, and the window has one, of size "
            f"{geometry.slots[0]}: for this size along every axis, write Window({geometry.slots * axes})"
        )
    if not jnp.issubdtype(table.dtype, jnp.floating) or table.shape not in allowed:
        _refuse(
            name, table, f"floating point, {' or '.join(map(str, allowed))} for the window of size {geometry.slots}"
        )
    for axis in geometry.axes:
        axis.relative()  # raises where an offset puts keys beyond the table
    return table.astype(geometry.dtype) if embedding else _hiding(table, geometry)


def _embedding(tables: Operand | Sequence[Operand] | None, geometry: _Geometry) -> Array | None:
    """r as one array: tables by axis one after the other, [heads or 1, Σ(2k-1), head_dim], of which r is the sum."""
    if geometry.window is None or not isinstance(tables, tuple | list):
        return _relative("key_embedding", cast(Any, tables), geometry)
    axes, heads, head_dim = geometry.axes, geometry.heads, geometry.head_dim
    if len(tables) != len(axes):
        raise ValueError(
            f"attention: key_embedding is a sequence of {len(tables)}; allowed: one table for all axes, or one for "
            f"each of the window's {len(axes)}"
        )
    tables = [jnp.asarray(table) for table in tables]
    dims = [table.shape[-1] if table.ndim == 3 else head_dim for table in tables]
    after_each_other = len(axes) > 1 and sum(dims) == head_dim
    if after_each_other:
        before = np.cumsum([0, *dims])
        around = [(int(start), head_dim - int(end)) for start, end in itertools.pairwise(before)]
    else:
        dims, around = [head_dim] * len(axes), [(0, 0)] * len(axes)
    for a, (axis, table, dim) in enumerate(zip(axes, tables, dims, strict=True)):
        shape = (heads, 2 * axis.size - 1, dim)
        if not jnp.issubdtype(table.dtype, jnp.floating) or table.shape not in (shape, (1, *shape[1:])):
            parts = "" if after_each_other or len(axes) == 1 else ", or dims that make up head_dim"
            _refuse(f"key_embedding[{a}]", table, f"floating point, {shape} or {(1, *shape[1:])}{parts}")
        axis.relative()
    most = max(len(table) for table in tables)
    padded = [jnp.pad(table, [(0, 0), (0, 0), pad]) for table, pad in zip(tables, around, strict=True)]
    padded = [jnp.broadcast_to(table, (most, *table.shape[1:])).astype(geometry.dtype) for table in padded]
    return jnp.concatenate(padded, axis=1)


def _slotwise(name: str, x: Operand | None, geometry: _Geometry) -> Array | None:
    """`bias` or a mask by slot, with every axis present: [*batch|1, *queries|1, heads|1, *slots|1]."""
    if x is None:
        return None
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating if name == "bias" else jnp.bool_):
        _refuse(name, x, "a floating-point array" if name == "bias" else "a bool array, True where a query attends")
    batch, queries, heads, slots = geometry.batch, geometry.queries, geometry.heads, geometry.slots
    full = (*batch, heads, *queries, *slots) if geometry.window is None else (*batch, *queries, heads, *slots)
    if not _broadcasts(x.shape, full):
        layout = "[*batch, heads, T, S]" if geometry.window is None else "[*batch, *query_grid, heads, *k]"
        keys = f", or a mask of keys {(*batch, *geometry.keys)}" if name == "mask" and geometry.window else ""
        _refuse(name, x, f"what broadcasts against {layout} = {full}{keys}")
    x = x.reshape((1,) * (len(full) - x.ndim) + x.shape)
    x = _hiding(x, geometry) if name == "bias" else x
    return jnp.swapaxes(x, -2, -3) if geometry.window is None else x


def _hiding(bias: Array, geometry: _Geometry) -> Array:
    """The bias, with -inf for the least number of its dtype, which to wider scores may be one among others."""
    least = float(jnp.finfo(bias.dtype).min)
    if least <= hiding_score(statistics_dtype(geometry.dtype)) / 2:
        return bias
    return jnp.where(bias <= least, -jnp.inf, bias)


def _masks(
    mask: Operand | tuple[Operand | None, Operand | None] | None, geometry: _Geometry
) -> tuple[Array | None, Array | None]:
    """A mask of keys and one by slot: a pair of them, or one that can be only one of both."""
    if isinstance(mask, tuple):
        if geometry.window is None and mask[0] is not None:
            raise ValueError(
                "attention: mask[0] must be None without a window: [*batch, 1, 1, S] is a mask of keys, for all heads"
            )
        return _key_mask("mask[0]", mask[0], geometry), _slotwise("mask[1]", mask[1], geometry)
    if mask is None or geometry.window is None:
        return None, _slotwise("mask", mask, geometry)
    if not _is_key_mask(np.shape(mask), geometry):
        return None, _slotwise("mask", mask, geometry)
    mask = jnp.asarray(mask)
    if _broadcasts(mask.shape, (*geometry.batch, *geometry.queries, geometry.heads, *geometry.slots)):
        raise ValueError(
            f"attention: mask (={mask.dtype}{list(mask.shape)}) must be one that can be read in one way, and the "
            f"window {geometry.slots} on the grid {geometry.keys} leaves two: mask=(mask, None) says which keys take "
            "part, mask=(None, mask) which slots"
        )
    return _key_mask("mask", mask, geometry), None


def _key_bits(key: Any) -> tuple[Array | None, Any]:
    """The bits of a key made of the given one, and their kind. The derivative draws with them again: that is no second
    use of the key that the caller gave."""
    if key is None:
        return None, None
    key = jnp.asarray(key)
    typed = key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
    return jax.random.key_data(jax.random.split(typed, 1)[0]), jax.random.key_impl(typed)


def _is_key_mask(shape: tuple[int, ...], geometry: _Geometry) -> bool:
    """Whether a shape is [*batch|1, *keys], or the grid of the keys alone."""
    return is_for_entries(shape, geometry.batch, geometry.keys)


def _key_mask(name: str, mask: Operand | None, geometry: _Geometry) -> Array | None:
    """A mask of keys with every axis present: [*batch|1, *keys]."""
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        _refuse(name, mask, "a bool array, True where a query attends")
    if not _is_key_mask(mask.shape, geometry):
        _refuse(name, mask, f"a mask of keys {(*geometry.batch, *geometry.keys)}, or {geometry.keys} for every entry")
    return _with_batch(mask, geometry.batch, geometry.keys)


def _segments(ids: Operand | Sequence[Operand] | None, geometry: _Geometry) -> tuple[Array | None, Array | None]:
    if ids is None:
        return None, None
    batch, of_queries, of_keys = geometry.batch, geometry.queries, geometry.keys
    if isinstance(ids, tuple | list):
        if len(ids) != 2:
            raise ValueError(
                f"attention: segment_ids is a sequence of {len(ids)}; allowed: one array, or a pair for query and key"
            )
        query, key = jnp.asarray(ids[0]), jnp.asarray(ids[1])
    else:
        query = key = jnp.asarray(ids)
        before = key.ndim - len(of_keys)
        if is_for_entries(key.shape, batch, of_keys) and (geometry.window is not None or of_queries == of_keys):
            axes = geometry.axes
            if geometry.window is not None and geometry.traced_offset is not None:
                axes = geometry.window.axes(of_keys)
            for axis, along in enumerate(axes, before):
                if not np.array_equal(along.query, np.arange(along.length)):
                    query = jnp.take(query, along.query, axis=axis)  # the id of the key that the query stands on
            if geometry.traced_offset is not None:
                starts = [jnp.int32(0)] * before + list(geometry.traced_offset)
                query = jax.lax.dynamic_slice(query, starts, (*query.shape[:before], *of_queries))
    shared = f", or without the batch {batch} for every entry" if batch else ""
    for x, shape in ((query, of_queries), (key, of_keys)):
        if not is_for_entries(x.shape, batch, shape) or not jnp.issubdtype(x.dtype, jnp.integer):
            _refuse(
                "segment_ids",
                x,
                f"integers {(*batch, *of_keys)}, or a pair of integers {(*batch, *of_queries)} for query and "
                f"{(*batch, *of_keys)} for key{shared}",
            )
    return _with_batch(query, batch, of_queries), _with_batch(key, batch, of_keys)


def _tile(tile: int | tuple[int, ...] | None, geometry: _Geometry) -> tuple[int, ...] | None:
    if tile is None:
        return None
    sizes = tile if isinstance(tile, tuple) else (tile,) * len(geometry.axes)
    blocks = tuple(axis.block for axis in geometry.axes)
    if len(sizes) == len(blocks) and all(t >= 1 and t % block == 0 for t, block in zip(sizes, blocks, strict=True)):
        return tuple(max(b, min(t, n + -n % b)) for t, n, b in zip(sizes, geometry.queries, blocks, strict=True))
    raise ValueError(
        f"attention: tile (={tile!r}) must be None, an int, or an int for each of the {len(blocks)} axes; positive "
        f"multiples of the window's block {blocks}"
    )


def is_for_entries(shape: tuple[int, ...], batch: tuple[int, ...], grid: tuple[int, ...]) -> bool:
    """Whether a shape is [*batch|1, *grid], or the grid alone."""
    given, own = shape[: -len(grid)], shape[-len(grid) :]
    return own == grid and len(given) in (0, len(batch)) and _broadcasts(given, batch)


def _with_batch(x: Array, batch: tuple[int, ...], grid: tuple[int, ...]) -> Array:
    """With every axis present: [*batch|1, *grid]."""
    return x.reshape((1,) * (len(batch) + len(grid) - x.ndim) + x.shape)


def _broadcasts(shape: tuple[int, ...], full: tuple[int, ...]) -> bool:
    return len(shape) <= len(full) and all(n in (1, m) for n, m in zip(shape[::-1], full[::-1], strict=False))


def _refuse(name: str, x: Array | np.ndarray, expected: str) -> Any:
    raise ValueError(f"attention: {name} is {x.dtype}{list(x.shape)}; expected {expected}")


# What depends on values

FAR = 2**30  # tokens: twice as many are still an int32
TYPES = (jax.Array, np.ndarray, jax.ShapeDtypeStruct, numbers.Real)


def converted(name: str, x: Any) -> Any:
    """An array, or a tuple of arrays where several may be given."""
    if name == "mask" and isinstance(x, tuple) and any(part is None or hasattr(part, "shape") for part in x):
        if len(x) != 2:
            raise ValueError(f"attention: mask (={len(x)} arrays) must be one, or a pair: of keys, and by slot")
        return tuple(part if part is None else converted(f"mask[{n}]", part) for n, part in enumerate(x))
    if name in ("segment_ids", "key_embedding", "query_offset") and isinstance(x, tuple | list):
        return tuple(converted(f"{name}[{n}]", part) for n, part in enumerate(x))
    if isinstance(x, jax.Array | jax.ShapeDtypeStruct):
        return x
    try:
        jnp.result_type(x) if isinstance(x, TYPES) else (x := jnp.asarray(x))
    except (TypeError, ValueError):
        raise ValueError(f"attention: {name} (={x!r}) must be an array of numbers") from None
    return x


def _check_sizes(arrays: Arrays, rank: int) -> None:
    """Of grid sizes that are known: that the grid holds them."""
    sizes, grid = arrays.grid_sizes, getattr(arrays.key, "shape", ())[-rank - 2 : -2]
    if _is_traced(sizes) or not isinstance(sizes, np.ndarray | jax.Array):
        return
    if sizes.shape[-1:] == (len(grid),) and jnp.issubdtype(sizes.dtype, jnp.integer):
        beyond = (np.asarray(sizes) < 0) | (np.asarray(sizes) > np.array(grid))
        if beyond.any():
            found = np.asarray(sizes)[beyond.any(-1)][0].tolist()
            raise ValueError(
                f"attention: grid_sizes (={found}) must be from 0 to the grid that holds them, {list(grid)}"
            )


def _dropout_key(rate: Any, key: Any) -> Any:
    if isinstance(rate, bool) or not isinstance(rate, numbers.Real) or not 0 <= float(rate) < 1:
        raise ValueError(f"attention: dropout_rate (={rate!r}) must be a number >= 0 and < 1")
    if float(rate) > 0 and key is None:
        raise ValueError(f"attention: dropout_key (=None) must be a jax.random.key, for dropout_rate is {rate}")
    if key is None:
        return None
    raw = isinstance(key, np.ndarray | jax.Array) and key.dtype == jnp.uint32 and key.ndim == 1
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0
    if not (raw or typed):
        raise ValueError(f"attention: dropout_key (={key!r}) must be one jax.random.key")
    return key if float(rate) > 0 else None


def _is_traced(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer)  # pyright: ignore[reportAttributeAccessIssue]


def _query_offset(arrays: Arrays, window: Window | None, normalize: Any) -> tuple[Arrays, Any]:
    """The arguments with a traced `query_offset` as one array [rank]; and one that is static, a tuple or "end"."""
    given = arrays.query_offset
    if given is None:
        return arrays, None
    if window is None:
        raise ValueError(
            f"attention: query_offset (={shown(given)}) must be None without a window, which alone asks where a query "
            "stands: for causal attention over all n keys, Window(n, causal=True)"
        )
    if isinstance(given, str) and given == "end":
        return arrays._replace(query_offset=None), given
    several = isinstance(given, tuple | list) or (isinstance(given, jax.Array | np.ndarray) and given.ndim == 1)
    parts: list[Any] = list(given) if several else [given]
    one = lambda x: isinstance(x, jax.Array | jax.ShapeDtypeStruct) and x.shape == ()
    fits = [(is_int(x) and x >= 0) or (one(x) and jnp.issubdtype(x.dtype, jnp.integer)) for x in parts]
    if len(parts) != window.rank or not all(fits):
        raise ValueError(
            f"attention: query_offset (={shown(given)}) must be None, 'end', or an int >= 0 for each of the window's "
            f"axes ({window.rank}), which may be traced"
        )
    if all(map(is_int, parts)):
        return arrays._replace(query_offset=None), tuple(map(int, parts))
    if callable(normalize) and normalize not in NORMALIZERS.values():
        raise ValueError(
            f"attention: normalize (={normalize!r}) must be one of {', '.join(map(repr, NORMALIZERS))} where "
            "query_offset is traced, for a function would not see a window in order; with an int it does"
        )
    return arrays._replace(query_offset=tuple(map(as_int32, parts))), None


def as_int32(x: Any) -> Any:
    """Places as int32; one that is too far off to be told in it is as far off as can be, and does not wrap around."""
    dtype = getattr(x, "dtype", jnp.int32)
    if dtype == jnp.int32:
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, jnp.int32)
    low, high = (max(jnp.iinfo(dtype).min, -FAR), min(jnp.iinfo(dtype).max, FAR))
    return jnp.clip(x, low, high).astype(jnp.int32)


def _check_number(name: str, value: Any) -> None:
    kinds = (jnp.floating, jnp.integer)
    array = isinstance(value, np.ndarray | jax.Array) and any(jnp.issubdtype(value.dtype, kind) for kind in kinds)
    if np.shape(value) != () or isinstance(value, bool) or not (array or isinstance(value, numbers.Real)):
        raise ValueError(f"attention: {name} (={value!r}) must be one real number")
    if isinstance(value, np.ndarray | numbers.Real) and not math.isfinite(float(value)):
        raise ValueError(f"attention: {name} (={value!r}) must be finite")


def _known_cap(value: Any) -> float | None:
    """A number of the caller's program, on a TPU, one of whose kernels has it in its own program."""
    return float(value) if machine.backend() == "tpu" and isinstance(value, numbers.Real) else None


def _check_soft_cap(value: Any) -> None:
    number = isinstance(value, numbers.Real) or (isinstance(value, np.ndarray | jax.Array) and value.shape == ())
    if number and not _is_traced(value) and not 0 < float(value) < math.inf:
        raise ValueError(f"attention: logits_soft_cap (={value}) must be None or a finite number > 0")
    _check_number("logits_soft_cap", value)


def _normalizer(normalize: Any, return_residuals: Any) -> Any:
    if return_residuals and normalize != "softmax":
        raise ValueError(
            f"attention: return_residuals (={return_residuals!r}) must be False with normalize={normalize!r}: only "
            "softmax has a log-sum-exp"
        )
    if isinstance(normalize, str) and normalize in NORMALIZERS:
        return NORMALIZERS[normalize]
    if isinstance(normalize, str) or not callable(normalize):
        raise ValueError(
            f"attention: normalize (={normalize!r}) must be one of {', '.join(map(repr, NORMALIZERS))} or a function"
        )
    return normalize if normalize in NORMALIZERS.values() else known(normalize) or normalize


def _integers(tile: Any) -> int | tuple[int, ...] | None:
    """`tile` as ints of Python's, of which 1 and True are not the same."""
    if tile is None:
        return None
    several = is_sequence(tile)
    sizes: list[Any] = list(tile) if several else [tile]
    if not all(map(is_int, sizes)):
        raise ValueError(f"attention: tile (={tile!r}) must be None, an int, or an int for each axis of the grid")
    return tuple(map(int, sizes)) if several else int(sizes[0])


def _function(name: str, value: Any) -> Any:
    if value is not None and not callable(value):
        raise ValueError(f"attention: {name} (={value!r}) must be None or a function")
    return value if value is None else known(value) or value

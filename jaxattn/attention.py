"""Attention over windows of any rank: check, choose an implementation, call."""

import functools
import itertools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped

from jaxattn.kernels import derivative, reference
from jaxattn.kernels.problem import Operands, Options, ScoreMod, statistics_dtype
from jaxattn.normalize import NORMALIZERS, Normalizer, logsumexp
from jaxattn.window import Axis, Window

Operand = Shaped[
    Array | np.ndarray, "..."
]  # loose on purpose: a wrong shape is a ValueError that says what was expected
IMPLEMENTATIONS: dict[str, Callable[[Operands, Options], tuple[Array, ...]]] = {
    "reference": reference.attend,
    "xla": derivative.attend,
}


def attention(
    query: Operand,
    key: Operand,
    value: Operand,
    bias: Operand | None = None,
    mask: Operand | None = None,
    *,
    window: Window | None = None,
    scale: float | Operand | None = None,
    relative_bias: Operand | None = None,
    key_embedding: Operand | Sequence[Operand] | None = None,
    score_mod: ScoreMod | None = None,
    logits_soft_cap: float | Operand | None = None,
    normalize: str | Normalizer = "softmax",
    segment_ids: Operand | Sequence[Operand] | None = None,
    extra_key: Operand | None = None,
    extra_value: Operand | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Operand | None = None,
    precision: jax.lax.PrecisionLike = None,
    implementation: str | None = None,
    tile: int | Sequence[int] | None = None,
    return_residuals: bool = False,
) -> Any:
    """Multi-head attention, each query over its own window of keys.

    For query i, with j over the slots of its window and then the extra tokens:

        s_ij = scale·(q_i · k_j) + q_i · r[j-i] + relative_bias[j-i] + bias_ij     then soft cap, score_mod, mask
        y_i  = sum_j A_ij v_j,   A_i = normalize(s_i)

    Shapes: `batch` is any number of axes, `grid` the axes of the window (one, without a window), and k `window.size`.
    Query head h uses key head h // (heads / key_heads). Batch axes match exactly; only bias and mask broadcast.

    Args:
        query: [*batch, *query_grid, heads, head_dim], floating point. `query_grid` is ``window.query_grid(grid)``.
        key: [*batch, *grid, key_heads, head_dim].
        value: [*batch, *grid, key_heads, value_dim].
        bias: added to the score; broadcasts against [*batch, *query_grid, heads, *k], or without a window against
            [*batch, heads, T, S]. A bias of -inf masks, and so does the least finite number.
        mask: bool, True attends; broadcasts like `bias`. With a window, a mask whose last axes are the grid, after as
            many batch axes as the key has (of its sizes, or 1), is a mask of keys, [*batch, *grid].
        window: which keys a query sees; None: all of them. A slot outside the grid under boundary "zero" is a zero key
            and a zero value: its score is its bias terms, and neither a mask of keys nor segments apply to it.
        scale: None is head_dim ** -0.5.
        relative_bias: [heads, *(2k-1)], indexed by k - 1 + (key - stride·query) / dilation per axis, where `key` is the
            position of the slot before any folding at the boundary.
        key_embedding: r, [heads or 1, *(2k-1), head_dim], indexed like `relative_bias`; or a tuple of one table for
            each axis of the window, [heads or 1, 2k-1, dim], which costs less: where dim is head_dim, r is their sum
            (BoTNet, MViTv2); where the dims make up head_dim, they stand one after the other (SASA).
        score_mod: ``score_mod(score, head, query_index, key_index) -> score``, elementwise, on tiles of scores against
            which the integer arrays broadcast: the query head, the query's index in the query grid and the key's in the
            key grid (tuples, one array per axis; a slot outside the grid gives its position there). Not applied to
            extra tokens. A score of -inf masks.
        logits_soft_cap: cap·tanh(s / cap), extra tokens included.
        normalize: "softmax"; "relu", max(s, 0) / count; "sigmoid", sigma(s - log count), where count is the number of
            visible slots and extra tokens; "sparsemax"; "none", the scores themselves; or a function `(scores, mask) ->
            weights` over the last axis, which holds the whole window in order. What is masked is zeroed afterwards.
        segment_ids: integers [*batch, *grid], or a pair for query [*batch, *query_grid] and key; a query attends to
            keys of its own segment. From one array, a strided query takes the id of the key it stands on.
        extra_key, extra_value: [*batch, n, key_heads, head_dim] and [..., value_dim]: tokens that every query sees,
            always, after its slots. They take no bias.
        dropout_rate: in [0, 1), of the normalised weights. The same `dropout_key` drops the same weights, in every
            implementation, forward and backward.
        dropout_key: a `jax.random.key`, needed where `dropout_rate` > 0.
        precision: as in `jax.lax.dot_general`.
        implementation: None chooses; "reference" is the readable one, which gathers `N × window` keys; "xla" tiles, and
            is slower with a function of yours (`score_mod`, `normalize`), which may close over what is differentiated.
        tile: queries per tile along each axis of the grid, multiples of the window's block, for "xla"; an int serves
            all axes. None chooses by a model of the cost, from shapes and backend. It changes speed and memory only.
        return_residuals: also return lse, the log of the sum of exponentials of the final scores; softmax only.

    Returns:
        [*batch, *query_grid, heads, value_dim] in the promoted dtype of query, key and value (statistics in float32, or
        float64 for float64). A query with nothing to attend to gives zeros, and zero gradients. With
        `return_residuals`, a pair with lse [*batch, *query_grid, heads], -inf where there is nothing to attend to; see
        `merge_attentions`. Keys and values are expected to be finite: one that is not may reach queries nearby that do
        not see it, as in dense attention under a mask (0 · NaN); "reference" keeps it to those that do.

    Raises:
        ValueError: before anything is compiled, naming the argument, what came and what is allowed.

    References:
        Vaswani et al. 2017 (arXiv 1706.03762); Ramachandran et al. 2019 (1906.05909); Hassani et al. 2023 (2204.07143).

    Example:
        >>> x = jnp.ones((1, 8, 8, 2, 16))  # batch 1, grid 8 × 8, 2 heads of 16
        >>> attention(x, x, x, window=Window((3, 3))).shape
        (1, 8, 8, 2, 16)

        Queries coarser than the keys are a stride. Queries finer than the keys are heads: those that stand on one key
        are folded into a group, which shares that key's window (and has a relative_bias for each of its members).

        >>> fine, keys = jnp.ones((8, 2, 16)), jnp.ones((4, 2, 16))  # two queries on each key
        >>> folded = fine.reshape(4, 2, 2, 16).swapaxes(1, 2).reshape(4, 4, 16)  # [keys, heads · 2, head_dim]
        >>> output = attention(folded, keys, keys, window=Window(3))
        >>> output.reshape(4, 2, 2, 16).swapaxes(1, 2).reshape(8, 2, 16).shape
        (8, 2, 16)
    """
    query, key, value = _floating(query=query, key=key, value=value)
    geometry = _geometry(query, key, value, window)
    extra_key, extra_value = _extra(extra_key, extra_value, key, value, geometry)
    key_mask, slot_mask = _masks(mask, geometry)
    query_segments, key_segments = _segments(segment_ids, geometry)
    operands = Operands(
        query=query,
        key=key,
        value=value,
        scale=_scalar("scale", query.shape[-1] ** -0.5 if scale is None else scale, query.dtype),
        soft_cap=None if logits_soft_cap is None else _soft_cap(logits_soft_cap, query.dtype),
        bias=_slotwise("bias", bias, geometry),
        slot_mask=slot_mask,
        key_mask=key_mask,
        relative_bias=_relative("relative_bias", relative_bias, geometry),
        key_embedding=_embedding(key_embedding, geometry),
        query_segments=query_segments,
        key_segments=key_segments,
        extra_key=extra_key,
        extra_value=extra_value,
        dropout_key=_dropout(dropout_rate, dropout_key),
    )
    options = Options(
        window=window,
        queries=geometry.queries,
        keys=geometry.keys,
        normalize=_normalizer(normalize, return_residuals),
        score_mod=_callable_or_none("score_mod", score_mod),
        dropout_rate=float(dropout_rate),
        precision=precision,
        residuals=bool(return_residuals),
        tile=_tile(tile, geometry),
    )
    found = _under_mesh(_choose(implementation, options), query)(operands, options)
    return found if return_residuals else found[0]


def merge_attentions(outputs: Sequence[Operand], lses: Sequence[Operand], *, return_residuals: bool = False) -> Any:
    """Join softmax attentions of the same queries over disjoint sets of keys, exactly.

    ``y = sum_n exp(lse_n - lse) y_n`` with ``lse = log sum_n exp(lse_n)``: what one attention over all the keys gives,
    for outputs [*batch, *grid, heads, value_dim] and lses [*batch, *grid, heads] as `attention(...,
    return_residuals=True)` returns them. Where every part is empty (its lse is -inf) the result is zeros, with zero
    gradients. `return_residuals` also returns lse.

    >>> q, k, v = (jnp.full((4, 1, 2), 0.1 * n) for n in range(3))
    >>> half = [attention(q, k[s], v[s], return_residuals=True) for s in (slice(0, 1), slice(1, 4))]
    >>> jnp.allclose(merge_attentions(*zip(*half)), attention(q, k, v)).item()
    True
    """
    outputs, lses = list(outputs), list(lses)
    if len(outputs) == 0 or len(outputs) != len(lses):
        raise ValueError(
            f"merge_attentions: {len(outputs)} outputs and {len(lses)} lses: give as many of each, at least one"
        )
    outputs, lses = [jnp.asarray(output) for output in outputs], [jnp.asarray(lse) for lse in lses]
    for output, lse in zip(outputs, lses, strict=True):
        if output.shape != outputs[0].shape or lse.shape != outputs[0].shape[:-1]:
            raise ValueError(
                f"merge_attentions: an output of shape {output.shape}, its lse of shape {lse.shape}: every output is "
                f"{outputs[0].shape}, as the first, and its lse {outputs[0].shape[:-1]}"
            )
    scores = jnp.stack(lses, axis=-1)
    present = scores != -jnp.inf
    scores = jnp.where(present, scores, 0)
    weights = NORMALIZERS["softmax"](scores, present)
    stacked = jnp.where(present[..., None, :], jnp.stack(outputs, axis=-1), 0)
    merged = (stacked.astype(weights.dtype) * weights[..., None, :]).sum(-1).astype(stacked.dtype)
    return (merged, logsumexp(scores, present)) if return_residuals else merged


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


def _geometry(query: Array, key: Array, value: Array, window: Window | None) -> _Geometry:
    if window is not None and not isinstance(window, Window):
        raise ValueError(f"attention: window is {window!r}; allowed: None or a jaxattn.Window")
    rank = 1 if window is None else window.rank
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim < rank + 2:
            _refuse(name, x, f"[*batch, *grid, heads, head_dim] with a grid of rank {rank}: at least {rank + 2} axes")
    batch = query.shape[: -rank - 2]
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
        if queries != window.query_grid(keys):
            made = window.query_grid(keys)
            raise ValueError(f"attention: query has the grid {queries}; of key's grid {keys}, {window} makes {made}")
    slots = tuple(axis.size for axis in axes)
    return _Geometry(window, axes, batch, queries, keys, slots, heads, key_heads, query.shape[-1], query.dtype)


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
        raise ValueError(f"attention: extra_{'key' if key is None else 'value'} is missing: give both or neither")
    key, value = jnp.asarray(key), jnp.asarray(value)
    n = key.shape[-3] if key.ndim >= 3 else "n"
    for name, x, dim in (("extra_key", key, keys.shape[-1]), ("extra_value", value, values.shape[-1])):
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.shape != (*geometry.batch, n, geometry.key_heads, dim):
            _refuse(name, x, f"floating point, {(*geometry.batch, n, geometry.key_heads, dim)}")
    return key.astype(geometry.dtype), value.astype(geometry.dtype)


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
    return table.astype(geometry.dtype) if embedding else table


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
    return jnp.swapaxes(x, -2, -3) if geometry.window is None else x


def _masks(mask: Operand | None, geometry: _Geometry) -> tuple[Array | None, Array | None]:
    """A mask of keys, or one by slot."""
    of_keys = (*geometry.batch, *geometry.keys)
    if mask is None or geometry.window is None:
        return None, _slotwise("mask", mask, geometry)
    mask = jnp.asarray(mask)
    if mask.shape == geometry.keys and not _broadcasts(mask.shape, (geometry.heads, *geometry.slots)):
        mask = mask.reshape((1,) * len(geometry.batch) + mask.shape)  # the same keys in every batch entry
    same_grid = mask.shape[len(geometry.batch) :] == geometry.keys
    if mask.ndim == len(of_keys) and same_grid and _broadcasts(mask.shape, of_keys):
        return (
            (mask, None)
            if mask.dtype == jnp.bool_
            else _refuse("mask", mask, "a bool array, True where a query attends")
        )
    return None, _slotwise("mask", mask, geometry)


def _segments(ids: Operand | Sequence[Operand] | None, geometry: _Geometry) -> tuple[Array | None, Array | None]:
    if ids is None:
        return None, None
    of_queries, of_keys = (*geometry.batch, *geometry.queries), (*geometry.batch, *geometry.keys)
    if isinstance(ids, tuple | list):
        if len(ids) != 2:
            raise ValueError(
                f"attention: segment_ids is a sequence of {len(ids)}; allowed: one array, or a pair for query and key"
            )
        query, key = jnp.asarray(ids[0]), jnp.asarray(ids[1])
    else:
        query = key = jnp.asarray(ids)
        if key.shape == of_keys and (geometry.window is not None or of_queries == of_keys):
            for axis, along in enumerate(geometry.axes, len(geometry.batch)):
                if not np.array_equal(along.query, np.arange(along.length)):
                    query = jnp.take(query, along.query, axis=axis)  # the id of the key that the query stands on
    for x, shape in ((query, of_queries), (key, of_keys)):
        if x.shape != shape or not jnp.issubdtype(x.dtype, jnp.integer):
            _refuse(
                "segment_ids",
                x,
                f"integers {of_keys}, or a pair of integers {of_queries} for query and {of_keys} for key",
            )
    return query, key


def _dropout(rate: float, key: Operand | None) -> Array | None:
    if not isinstance(rate, numbers.Real) or not 0 <= rate < 1:
        raise ValueError(f"attention: dropout_rate is {rate!r}; allowed: a number >= 0 and < 1")
    if rate > 0 and key is None:
        raise ValueError(f"attention: dropout_key is missing with dropout_rate {rate}: give a jax.random.key")
    if rate == 0 or key is None:
        return None
    raw = isinstance(key, np.ndarray | jax.Array) and key.dtype == jnp.uint32 and key.ndim == 1
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0
    if not (raw or typed):
        raise ValueError(f"attention: dropout_key is {key!r}; allowed: one jax.random.key")
    return jnp.asarray(key)


def _scalar(name: str, value: Any, dtype: Any) -> Array:
    kinds = (jnp.floating, jnp.integer)
    array = isinstance(value, np.ndarray | jax.Array) and any(jnp.issubdtype(value.dtype, kind) for kind in kinds)
    if np.shape(value) != () or not (array or isinstance(value, numbers.Real)):
        raise ValueError(f"attention: {name} is {value!r}; allowed: one real number")
    return jnp.asarray(value, statistics_dtype(dtype))


def _soft_cap(value: Any, dtype: Any) -> Array:
    traced = isinstance(value, jax.core.Tracer)  # pyright: ignore[reportAttributeAccessIssue]
    number = isinstance(value, numbers.Real) or (isinstance(value, np.ndarray | jax.Array) and value.shape == ())
    if number and not traced and not 0 < float(value) < math.inf:
        raise ValueError(f"attention: logits_soft_cap is {value}; allowed: None or a finite number > 0")
    return _scalar("logits_soft_cap", value, dtype)


def _callable_or_none(name: str, value: Any) -> Any:
    if value is not None and not callable(value):
        raise ValueError(f"attention: {name} is {value!r}; allowed: None or a function")
    return value


def _normalizer(normalize: str | Normalizer, return_residuals: bool) -> Normalizer:
    if return_residuals and normalize != "softmax":
        raise ValueError(f"attention: return_residuals with normalize={normalize!r}: only softmax has a log-sum-exp")
    if isinstance(normalize, str) and normalize in NORMALIZERS:
        return NORMALIZERS[normalize]
    if isinstance(normalize, str) or not callable(normalize):
        raise ValueError(
            f"attention: normalize is {normalize!r}; allowed: {', '.join(map(repr, NORMALIZERS))} or a function"
        )
    return normalize


def _tile(tile: Any, geometry: _Geometry) -> tuple[int, ...] | None:
    if tile is None:
        return None
    sizes = tuple(tile) if isinstance(tile, Sequence) else (tile,) * len(geometry.axes)
    blocks = tuple(axis.block for axis in geometry.axes)
    integers = len(sizes) == len(blocks) and all(
        isinstance(t, int | np.integer) and not isinstance(t, bool) for t in sizes
    )
    if integers and all(t >= 1 and t % block == 0 for t, block in zip(sizes, blocks, strict=True)):
        return tuple(int(min(t, n + -n % b)) for t, n, b in zip(sizes, geometry.queries, blocks, strict=True))
    raise ValueError(
        f"attention: tile is {tile!r}; allowed: None, an int, or an int for each of the {len(blocks)} axes; positive "
        f"multiples of the window's block {blocks}"
    )


def _choose(implementation: str | None, options: Options) -> Callable[[Operands, Options], tuple[Array, ...]]:
    if implementation is not None and implementation not in tuple(IMPLEMENTATIONS):
        allowed = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"attention: implementation is {implementation!r}; allowed: None, {allowed}")
    attend = IMPLEMENTATIONS["xla" if implementation is None else implementation]
    ours = options.score_mod is None and options.normalize in NORMALIZERS.values()
    return _compiled(attend) if ours else attend  # a function of the caller's may hold state that a cache would freeze


@functools.cache
def _compiled(attend: Callable) -> Callable:
    return jax.jit(attend, static_argnums=1)


def _under_mesh(attend: Callable, query: Array) -> Callable:
    """Under Explicit mesh axes, let the compiler propagate shardings inside; the output is sharded as the query is."""
    sharding = jax.typeof(query).sharding
    if not sharding.mesh.explicit_axes:
        return attend
    specs = (PartitionSpec(*sharding.spec[:-1]),)
    return lambda operands, options: jax.sharding.auto_axes(
        lambda operands: attend(operands, options),
        axes=sharding.mesh.explicit_axes,
        out_sharding=specs * (1 + options.residuals),
    )(operands)


def _broadcasts(shape: tuple[int, ...], full: tuple[int, ...]) -> bool:
    return len(shape) <= len(full) and all(n in (1, m) for n, m in zip(shape[::-1], full[::-1], strict=False))


def _refuse(name: str, x: Array | np.ndarray, expected: str) -> Any:
    raise ValueError(f"attention: {name} is {x.dtype}{list(x.shape)}; expected {expected}")

"""What every kernel is given: operands in one canonical layout, and options. `attention` has checked all of it."""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxattn.normalize import NORMALIZERS, Normalizer, softmax
from jaxattn.window import Axis, Window

ScoreMod = Callable[[Array, Array, tuple[Array, ...], tuple[Array, ...]], Array]


class Operands(NamedTuple):
    """Arrays. `queries` and `keys` are grids; `|1` marks what may be an axis of length one, to be broadcast."""

    query: Array  # [*batch, *queries, heads, head_dim]
    key: Array  # [*batch, *keys, key_heads, head_dim]
    value: Array  # [*batch, *keys, key_heads, value_dim]
    scale: Array  # one number
    soft_cap: Array | None = None  # one number
    bias: Array | None = None  # [*batch|1, *queries|1, heads|1, *slots|1]
    slot_mask: Array | None = None  # the same
    key_mask: Array | None = None  # [*batch|1, *keys]
    relative_bias: Array | None = None  # [heads, *(2k-1)]
    key_embedding: Array | None = None  # [heads|1, *(2k-1), head_dim], or a part for each axis [heads|1, Σ(2k-1), ...]
    query_segments: Array | None = None  # [*batch|1, *queries]
    key_segments: Array | None = None  # [*batch|1, *keys]
    slot_ranges: Array | None = None  # [*batch|1, *queries, rank, 2], the slots seen along each axis, from and to
    extra_key: Array | None = None  # [*batch, extra, key_heads, head_dim]
    extra_value: Array | None = None  # [*batch, extra, key_heads, value_dim]
    extra_mask: Array | None = None  # [*batch|1, *queries, extra], None: every query sees them
    sink: Array | None = None  # [heads] or [*batch, *queries, heads]
    dropout_key: Array | None = None  # its bits, of the kind `Options.key_impl`


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything that is not an operand; hashable, so that a kernel is traced once for each."""

    window: Window | None
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    normalize: Normalizer = softmax
    score_mod: ScoreMod | None = None
    dropout_rate: float = 0.0
    key_impl: Hashable | None = None
    precision: jax.lax.PrecisionLike = None
    residuals: bool = False  # whether lse is wanted
    tile: tuple[int, ...] | None = None  # queries per tile along each axis
    offset: tuple[int, ...] | None = None  # the first of the window's queries along each axis; None: they are all here
    broadcast_dropout: bool = False
    soft_cap: float | None = None  # the operand's value, where it is known while a program is traced

    @property
    def has_functions(self) -> bool:
        """Whether a function of the caller's takes part, which may close over what is differentiated."""
        return self.score_mod is not None or self.normalize not in NORMALIZERS.values()

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The slots of every query along each axis of the grid."""
        if self.window is None:
            return (Axis.everything(self.queries[0], self.keys[0]),)
        axes = self.window.axes(self.keys)
        if self.offset is None:
            return axes
        return tuple(axis.rows(*part) for axis, *part in zip(axes, self.offset, self.queries, strict=True))


def statistics_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Scores, maxima and sums are held in float32, or in float64 where the operands are."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def embedding_parts(operands: Operands, options: Options) -> list[tuple[tuple[int, ...], Array]]:
    """The parts whose sum is r: the axes along whose offsets each depends, and its table [heads|1, *(2k-1), head_dim]
    over those axes."""
    table, axes = operands.key_embedding, options.axes
    if table is None:
        return []
    if table.ndim == len(axes) + 2:
        return [(tuple(range(len(axes))), table)]
    ends = np.cumsum([2 * axis.size - 1 for axis in axes])
    return [((a,), part) for a, part in enumerate(jnp.split(table, ends[:-1], axis=1))]


def empty_result(operands: Operands, options: Options) -> tuple[Array, ...]:
    """What attention makes of no queries, no heads, or an empty batch."""
    shape, dtype = operands.query.shape[:-1], operands.query.dtype
    output = jnp.zeros((*shape, operands.value.shape[-1]), dtype)
    return (output, jnp.zeros(shape, statistics_dtype(dtype)))[: 1 + options.residuals]


def soft_capped(scores: Array, soft_cap: Array | None) -> Array:
    """cap·tanh(s / cap)."""
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def hiding_score(dtype: DTypeLike) -> float:
    """A score that hides: so low that -inf may be replaced by it, so high that a few of them add up to a finite sum, of
    which a maximum, and a difference from the maximum, can be taken."""
    return float(jnp.finfo(dtype).min) / 8


def without_hidden(scores: Array, mask: Array) -> tuple[Array, Array]:
    """A score that hides is a masked slot. Masked scores become 0: finite, and without a derivative."""
    mask = mask & is_seen(scores)
    return jnp.where(mask, scores, 0), mask


def is_seen(scores: Array) -> Array:
    """Where scores do not hide; -inf does, and so does the least number of their dtype. A NaN is seen."""
    return ~(scores <= hiding_score(scores.dtype) / 2)


def modified(options: Options, scores: Array, head: Array, query: Sequence[Array], key: Sequence[Array]) -> Array:
    """What `options.score_mod` makes of scores, whose axes the indices are given too, so that its result has them as
    well. The indices `query` are among the queries that there are, and it is told those on the whole grid."""
    score_mod = options.score_mod
    if score_mod is None:
        return scores
    lift = lambda x: jnp.expand_dims(x, range(scores.ndim - x.ndim))
    query = [x + first for x, first in zip(query, options.offset or (0,) * len(query), strict=True)]
    found = score_mod(scores, lift(head), tuple(map(lift, query)), tuple(map(lift, key)))
    shape = getattr(found, "shape", ())
    if (what := not_real(found)) is not None:
        raise ValueError(
            f"attention: score_mod (={score_mod!r}) must return scores, real numbers, and not {what}: who attends is "
            "said by mask=, or by jnp.where(allowed, score, -jnp.inf)"
        )
    if shape and (len(shape) != scores.ndim or any(n not in (1, m) for n, m in zip(shape, scores.shape, strict=True))):
        raise ValueError(
            f"attention: score_mod (={score_mod!r}) must return an array that its arguments broadcast to, and not one "
            f"of shape {shape}: it is given tiles of scores, and arrays of your own are to be indexed by its indices"
        )
    return jnp.broadcast_to(found, scores.shape).astype(scores.dtype)


def not_real(found: Any) -> str | None:
    """What a function of the caller's returned, where that is no array of real numbers."""
    if not (hasattr(found, "dtype") or isinstance(found, int | float)):
        return repr(found)
    dtype = jnp.result_type(found)
    real = any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer))
    return None if real else str(dtype)


def apply_normalizer(normalize: Normalizer, scores: Array, mask: Array) -> Array:
    """Weights, zero where masked, whatever the normaliser makes of it."""
    weights = normalize(scores, mask)
    what = not_real(weights)
    if what not in (None, "bool"):
        raise ValueError(f"attention: normalize (={normalize!r}) must return weights, real numbers, and not {what}")
    if jnp.shape(weights) != scores.shape:
        raise ValueError(
            f"attention: normalize returned shape {jnp.shape(weights)}; allowed: the scores' own, {scores.shape}"
        )
    return jnp.where(mask, weights, 0).astype(scores.dtype)


def dropout_factors(
    operands: Operands, options: Options, query: Array, shape: tuple[int, ...], dtype: DTypeLike
) -> Array:
    """What multiplies the weights of the query of flat index `query`, 0 or 1 / (1 - rate): `shape` is [*batch, heads,
    slots].

    One stream of bits for each query: so the bits, `N × window` of them, never exist at once, and do not depend on how
    queries are tiled. With `broadcast_dropout`, one for all entries of the batch and all heads.
    """
    if operands.dropout_key is None:
        raise ValueError(f"attention: dropout_key (=None) must be a key, for dropout_rate is {options.dropout_rate}")
    key = jax.random.wrap_key_data(operands.dropout_key, impl=options.key_impl)
    key = jax.random.fold_in(key, query)
    drawn = shape[-1:] if options.broadcast_dropout else shape
    keep = jax.random.bernoulli(key, jnp.float32(1 - options.dropout_rate), drawn)
    return jnp.broadcast_to(keep, shape).astype(dtype) / (1 - options.dropout_rate)

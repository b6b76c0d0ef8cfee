"""Normalisers: what turns one query's scores into weights. `(scores, mask) -> weights`, over the last axis.

Masked weights are zero, and so is all of a row with nothing to attend to; its gradient is zero too, never NaN. Every
`jnp.where` is doubled for that: the inner one keeps what is masked away from exp and from division.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Normalizer = Callable[[Array, Array], Array]
FEW = 64  # slots


def softmax(scores: Float[Array, "*rows slots"], mask: Bool[Array, "*#rows slots"]) -> Float[Array, "*rows slots"]:
    """exp(s_j) / sum_j exp(s_j)."""
    exponential = _shifted_exp(scores, mask)[0]
    return exponential / _or_one(exponential.sum(-1, keepdims=True))


def logsumexp(scores: Float[Array, "*rows slots"], mask: Bool[Array, "*#rows slots"]) -> Float[Array, "*rows"]:
    """log sum_j exp(s_j); -inf, with zero gradient, where there is nothing to sum."""
    exponential, largest = _shifted_exp(scores, mask)
    total = exponential.sum(-1)
    return jnp.where(total == 0, -jnp.inf, jnp.log(_or_one(total)) + largest[..., 0])


def relu(scores: Float[Array, "*rows slots"], mask: Bool[Array, "*#rows slots"]) -> Float[Array, "*rows slots"]:
    """max(s_j, 0) / count, where count is the number of visible slots (Wortsman et al. 2023, arXiv 2309.08586)."""
    return jnp.where(mask & ~(scores <= 0), scores, 0) / _count(scores, mask)  # a NaN stays


def sigmoid(scores: Float[Array, "*rows slots"], mask: Bool[Array, "*#rows slots"]) -> Float[Array, "*rows slots"]:
    """sigma(s_j - log count), where count is the number of visible slots (Ramapuram et al. 2024, arXiv 2409.04431)."""
    return jnp.where(mask, jax.nn.sigmoid(scores - jnp.log(_count(scores, mask))), 0)


def sparsemax(scores: Float[Array, "*rows slots"], mask: Bool[Array, "*#rows slots"]) -> Float[Array, "*rows slots"]:
    """The Euclidean projection of the scores onto the simplex: max(s_j - tau, 0), with exact zeros.

    Martins & Astudillo 2016, arXiv 1602.02068. Its derivative is the projection onto the support with the mean over the
    support taken out. The support is piecewise constant, so no derivative passes through what finds it.
    """
    largest = _largest(scores, mask)
    shifted = jnp.where(mask, scores - largest, 0)
    fixed = jax.lax.stop_gradient(jnp.where(mask, shifted, -2))  # the support lies within 1 of the largest
    support = mask & (_supported_by_pairs if scores.shape[-1] <= FEW else _supported_by_rank)(fixed)
    tau = (jnp.where(support, shifted, 0).sum(-1, keepdims=True) - 1) / _count(scores, support)
    # no comparison finds a NaN: a row that holds one has no support
    return jnp.where(support, shifted - tau, 0) * jnp.where(jnp.isnan(largest), largest, 1)


def _supported_by_pairs(scores: Array) -> Array:
    """Where sum_i max(s_i - s_j, 0) < 1: no sort, which is slow on the CPU, but the square of the slots."""
    return jnp.maximum(scores[..., None, :] - scores[..., :, None], 0).sum(-1) < 1


def _supported_by_rank(scores: Array) -> Array:
    """The same by sorting, whose time does not grow with the square of the slots."""
    descending = -jnp.sort(-scores, axis=-1)
    rank = jnp.arange(1, scores.shape[-1] + 1, dtype=scores.dtype)
    within = 1 + rank * descending > jnp.cumsum(descending, axis=-1)
    size = jnp.where(within, rank, 0).max(-1, keepdims=True)
    threshold = (jnp.where(rank <= size, descending, 0).sum(-1, keepdims=True) - 1) / size
    return scores > threshold


def none(scores: Float[Array, "*rows slots"], mask: Bool[Array, "*#rows slots"]) -> Float[Array, "*rows slots"]:
    """The scores themselves."""
    return jnp.where(mask, scores, 0)


NORMALIZERS: dict[str, Normalizer] = {
    "softmax": softmax,
    "relu": relu,
    "sigmoid": sigmoid,
    "sparsemax": sparsemax,
    "none": none,
}


def _largest(scores: Array, mask: Array) -> Array:
    """Each row's largest visible score, 0 where there is none; a constant shift, so without a derivative."""
    lowest = jnp.finfo(scores.dtype).min
    largest = jnp.max(jnp.where(mask, scores, lowest), axis=-1, keepdims=True, initial=lowest)
    return jax.lax.stop_gradient(jnp.where(mask.any(-1, keepdims=True), largest, 0))


def _shifted_exp(scores: Array, mask: Array) -> tuple[Array, Array]:
    largest = _largest(scores, mask)
    return jnp.where(mask, jnp.exp(jnp.where(mask, scores - largest, 0)), 0), largest


def _or_one(total: Array) -> Array:
    return jnp.where(total == 0, 1, total)


def _count(scores: Array, mask: Array) -> Array:
    visible = jnp.broadcast_to(mask, scores.shape).sum(-1, keepdims=True)
    return jnp.maximum(visible, 1).astype(scores.dtype)

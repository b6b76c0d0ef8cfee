"""How far, how locally, about which offset and how sharply each head looks: one number, or a few, for each head.

The offset of slot u of query i is δ_iu = key - stride · query, in tokens of the key grid. Each measure is a mean over
the queries, all alike, of a mean over the slots under p_h(u|i) = A_h(i, u) / Σ_u A_h(i, u). Here u runs over the slots
that hold a key: what lies outside the grid is left out. A query with no weight on any key is left out too, and a head
without any such weight has NaN. Batch axes stay: the mean over images is `.mean(0)`.

Everywhere, `weights` is `[*batch, *query_grid, heads, slots]`, finite, not negative, slots row-major over the window,
and `indices` is `Window.indices(shape)`, `[*query_grid, *window, rank]`, -1 where a slot holds no key. Where every
query sees the whole grid, that is `Window(shape).indices(shape)`. Where a boundary folds ("wrap" and the like), a slot
counts as the key that it holds. Sums are in float64, whatever the dtype of the weights.
"""

import math
from typing import NamedTuple

import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jaxattn.checked import checked
from jaxattn.sizes import Size, per_axis

Weights = Float[Array | np.ndarray, "*batch_and_query_grid heads slots"]
Indices = Int[np.ndarray, "*query_grid_and_window rank"]
PerHead = Float[np.ndarray, "..."]


@checked
def attention_distance(weights: Weights, indices: Indices, stride: Size = 1) -> PerHead:
    """The mean distance between a query and what it attends to, mean_i Σ_u p_h(u|i) ‖δ_iu‖, `[*batch, heads]`.

    In tokens; times the side of a patch, it is in pixels (Dosovitskiy et al. 2021, arXiv 2010.11929, figure 7;
    Raghu et al. 2021, 2108.08810).

    Args:
      weights, indices: as this module says.
      stride: of the window; an int serves all axes.

    Raises:
      ValueError: the shapes don't fit each other, a weight is negative or not finite, or the stride isn't positive.

    >>> from jaxattn import Window
    >>> corner = np.zeros((3, 3, 1, 4))
    >>> corner[..., -1] = 1.0  # one head, which looks at the neighbour below and to the right
    >>> attention_distance(corner, Window((2, 2), boundary="valid").indices((4, 4)))
    array([1.41421356])
    """
    look = _look("attention_distance", weights, indices, stride)
    return _expected(look, np.linalg.norm(look.offsets, axis=-1))


@checked
def locality(weights: Weights, indices: Indices, size: Size, stride: Size = 1) -> PerHead:
    """The share of weight in a window of k = `size` tokens about the query, `[*batch, heads]`, from 0 to 1.

    mean_i Σ_u p_h(u|i) [-(k//2) <= δ_iu <= (k-1)//2 along every axis]: 1 where a k × k convolution reaches as far.

    Args:
      weights, indices, stride: as in `attention_distance`.
      size: of the window; an int serves all axes.

    Raises:
      ValueError: as in `attention_distance`, or the size isn't positive.

    >>> from jaxattn import Window
    >>> uniform = np.full((5, 5, 1, 25), 1 / 25)  # along an axis, the five queries have 2, 3, 3, 3 and 2 tokens near
    >>> locality(uniform, Window((5, 5)).indices((5, 5)), 3)
    array([0.2704])
    """
    look = _look("locality", weights, indices, stride)
    k = np.asarray(per_axis("locality", "size", size, look.offsets.shape[-1]))
    near = ((-(k // 2) <= look.offsets) & (look.offsets <= (k - 1) // 2)).all(-1)
    return _expected(look, near.astype(float))


@checked
def head_centers(weights: Weights, indices: Indices, stride: Size = 1) -> PerHead:
    """The mean offset of each head, c_h = mean_i Σ_u p_h(u|i) δ_iu, `[*batch, heads, rank]`.

    For quadratic attention, far from the border, it is the centre Δ_h where that is whole (Cordonnier, Loukas & Jaggi
    2020, arXiv 1911.03584, whose figures show it).

    Args:
      weights, indices, stride: as in `attention_distance`.

    Raises:
      ValueError: as in `attention_distance`.

    >>> from jaxattn import Window
    >>> weights = np.full((3, 1, 3), [0.0, 0.25, 0.75])
    >>> head_centers(weights, Window(3, boundary="valid").indices((5,)))
    array([[1.75]])
    """
    look = _look("head_centers", weights, indices, stride)
    return _expected(look, look.offsets)


@checked
def head_spreads(weights: Weights, indices: Indices, stride: Size = 1) -> PerHead:
    """The covariance of each head's offsets about its centre, `[*batch, heads, rank, rank]`.

    mean_i Σ_u p_h(u|i) δ_iu δ_iuᵀ - c_h c_hᵀ: zero for a head that always looks at one offset, as a convolution's do.
    For quadratic attention, far from the border, it is I / 2α, or Σ_h, but for what the sum over whole offsets differs
    from an integral: little where that is a token wide (Cordonnier, Loukas & Jaggi 2020, arXiv 1911.03584).

    Args:
      weights, indices, stride: as in `attention_distance`.

    Raises:
      ValueError: as in `attention_distance`.

    >>> from jaxattn import Window
    >>> weights = np.full((3, 1, 3), [0.0, 0.25, 0.75])
    >>> head_spreads(weights, Window(3, boundary="valid").indices((5,)))
    array([[[0.1875]]])
    """
    look = _look("head_spreads", weights, indices, stride)
    center = _expected(look, look.offsets)
    squares = _expected(look, look.offsets[..., :, None] * look.offsets[..., None, :])
    return squares - center[..., :, None] * center[..., None, :]


@checked
def entropy(weights: Weights, indices: Indices) -> PerHead:
    """The mean entropy of a query's weights in nats, -mean_i Σ_u p_h(u|i) log p_h(u|i), `[*batch, heads]`.

    Zero where each query looks at one token, and log k where it looks at k tokens alike; 0 log 0 is 0.

    Args:
      weights, indices: as this module says.

    Raises:
      ValueError: as in `attention_distance`.

    >>> from jaxattn import Window
    >>> entropy(np.full((4, 1, 3), 1 / 3), Window(3).indices((4,)))  # log 3
    array([1.09861229])
    """
    look = _look("entropy", weights, indices, 1)
    logs = np.log(look.shares, where=look.shares > 0, out=np.zeros_like(look.shares))
    return -(look.shares * logs).sum((-3, -1)) / look.queries + 0.0  # no -0


class _Look(NamedTuple):
    """Where each head looks: p_h(u|i), the offsets, and how many queries of a head have weight on a key."""

    shares: np.ndarray  # [*batch, queries, heads, slots]; zero for a slot or a query that is left out
    offsets: np.ndarray  # [queries, slots, rank]
    queries: np.ndarray  # [*batch, heads]; NaN for none


def _look(name: str, weights, indices, stride) -> _Look:
    weights, indices = np.asarray(weights), np.asarray(indices)
    rank = rank_of(name, weights, indices)
    grid, (heads, slots) = indices.shape[:rank], weights.shape[-2:]
    stride = np.asarray(per_axis(name, "stride", stride, rank))
    weights = weights.reshape(*weights.shape[: -2 - rank], -1, heads, slots).astype(np.float64)
    valid = np.isfinite(weights) & (weights >= 0)
    if not valid.all():
        raise ValueError(f"{name}: weights must be finite and at least 0, and one is {weights[~valid][0]}")
    keys = indices.reshape(-1, slots, rank)
    queries = np.moveaxis(np.indices(grid), 0, -1).reshape(-1, 1, rank)
    weights = np.where(np.all(keys >= 0, axis=-1)[:, None], weights, 0.0)
    total = weights.sum(-1, keepdims=True)
    shares = np.divide(weights, total, where=total > 0, out=np.zeros_like(weights))
    seen = (total > 0).sum((-3, -1))
    return _Look(shares, (keys - stride * queries).astype(float), np.where(seen, seen, np.nan))


def _expected(look: _Look, values: np.ndarray) -> np.ndarray:
    """The mean of values by query and slot, `[queries, slots, ...]`, over both: `[*batch, heads, ...]`."""
    pairs = look.shares.swapaxes(-3, -2).reshape(*look.queries.shape, -1)  # [*batch, heads, queries · slots]
    flat = values.reshape(pairs.shape[-1], -1)
    return (pairs @ flat / look.queries[..., None]).reshape(*look.queries.shape, *values.shape[2:])


def rank_of(name: str, weights: np.ndarray, indices: np.ndarray) -> int:
    """The rank of the grid, where weights and indices are of one window."""
    rank = indices.shape[-1] if indices.ndim else 0
    if rank < 1 or indices.ndim != 2 * rank + 1:
        raise ValueError(
            f"{name}: indices (={list(indices.shape)}) must be [*query_grid, *window, rank], as "
            "Window.indices(shape) gives them"
        )
    grid, slots = indices.shape[:rank], math.prod(indices.shape[rank:-1])
    if weights.ndim < rank + 2 or weights.shape[-2 - rank : -2] != grid or weights.shape[-1] != slots:
        raise ValueError(
            f"{name}: weights (={list(weights.shape)}) must be [*batch, {', '.join(map(str, grid))}, heads, {slots}] "
            f"for indices of {list(indices.shape)}"
        )
    return rank

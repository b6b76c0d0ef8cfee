"""Theorem 1 of Cordonnier, Loukas & Jaggi 2020 (arXiv 1911.03584): K² quadratic heads are a K × K convolution.

Head h looks at the offset of tap h: its weights are softmax_δ(-α‖δ - Δ_h‖²), and its values x W_h, with W_h the
kernel's matrix at that tap. At a finite α it also sees some of the other taps' tokens: it is the convolution by

    W'_δ = Σ_h A_h(δ) W_h,        A_h(δ) → 1[δ = Δ_h] as α → ∞.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxattn.boundary import BOUNDARIES
from jaxattn.checked import Extended, checked
from jaxattn.einsum import einsum
from jaxattn.kernels.operands import statistics_dtype
from jaxattn.sizes import Size
from jaxattn.zoo.equations import Padding
from jaxattn.zoo.parameters import matched
from jaxattn.zoo.quadratic import quadratic_scores
from jaxattn.zoo.slide import Slide

# exp(-1000) is zero in float64, so that with whole centres a softmax over scores -1000·‖δ - Δ‖² is exactly one-hot
HARD = 1000.0


@checked
def error_bound(alpha: Extended, ndim: int) -> float:
    """The weight that a quadratic head puts off its own token, at most,

        1 - θ(α)^-n,        θ(α) = Σ_m exp(-α m²), over all integers m

    with n = `ndim`: reached over an infinite grid, about 2n·exp(-α) for a large α. In a window it is less.

    Raises:
      ValueError: alpha is not positive, or ndim not a positive int.

    >>> print(f"{error_bound(8, 2):.2g}, {error_bound(16, 2):.2g}")
    0.0013, 4.5e-07
    """
    if not alpha > 0:
        raise ValueError(f"error_bound: alpha (={alpha}) must be a number > 0, or inf")
    m = np.arange(1, 2 + math.ceil(math.sqrt(750 / min(alpha, 750))))  # beyond, the terms are zero
    return float(-np.expm1(-ndim * np.log1p(2 * np.exp(-alpha * m**2).sum())))


@checked
def conv_to_attention(
    kernel: Float[Array | np.ndarray, "*window part out_features"],
    *,
    alpha: Extended | None = None,
    rtol: float | None = None,
    strides: Size = 1,
    padding: Padding = "SAME",
    dilation: Size = 1,
    groups: int = 1,
    boundary: str = "zero",
    head_dim: int | None = None,
) -> tuple[dict[str, Any], jax.Array]:
    """The quadratic attention that computes a convolution, one head to a tap, and how far it is from it.

    `zoo.quadratic_attention(x, params)` is `zoo.conv(x, kernel, strides=strides, ...)` within `bound`:

        |attention(x) - conv(x)| <= bound · max|x|,        bound = max_o Σ_{δ, c} |W'_δ - W_δ|[c, o],

    besides rounding. The attention is a convolution too, by the kernel W' = Σ_h A_h(·) W_h, so that this is the norm of
    the difference, no more: where a whole window lies in the grid, some x reaches it.

    Over the whole grid instead, as in the paper (`{**params, "window": None}`, for strides and dilation 1), it is the
    convolution with edge padding, within 2 · error_bound(alpha, rank) · max_o Σ_{δ, c} |W_δ|[c, o].

    Args:
      kernel: `[*window, features / groups, out_features]`; its rank less two is the number of grid axes.
      alpha: how sharply each head looks at its token; inf is the hard limit, with bound 0. The default.
      rtol: instead of alpha, chooses it so that bound <= rtol · max_o Σ_{δ, c} |W_δ|[c, o], the convolution's own norm.
      strides, padding, dilation, groups: as in `zoo.conv`, and "SAME_LOWER".
      boundary: what stands in the padding, "zero", "edge", "reflect" or "wrap". Attention that leaves out what is not
        there ("mask") is no convolution with zeros: as α grows, it becomes the one with "edge".
      head_dim: values per head and group. Each tap's matrix (in each group) is then factorised as V_h O_h, which takes
        its rank; None: `value` holds the matrices themselves, and there is no `out`.

    Returns:
      params, the mapping that `zoo.quadratic_attention` takes, in the kernel's dtype (its "window" is a `zoo.Slide`);
      and the bound, a scalar.

    Raises:
      ValueError: an argument out of its range, or a head_dim that is less than a tap's rank, by name.

    >>> import jax.numpy as jnp
    >>> from jaxattn import zoo
    >>> kernel = jnp.arange(9.0).reshape(3, 3, 1, 1)
    >>> params, bound = conv_to_attention(kernel, alpha=8)
    >>> x = jnp.sin(jnp.arange(36.0)).reshape(6, 6, 1)
    >>> error = jnp.abs(zoo.quadratic_attention(x, params) - zoo.conv(x, kernel)).max()
    >>> print(f"{error:.3f} <= {bound:.3f}")
    0.002 <= 0.007
    """
    kernel = jnp.asarray(kernel)
    rank = kernel.ndim - 2
    _check_kernel(kernel, groups, boundary, head_dim)
    slide = Slide(kernel.shape[:rank], strides, padding, dilation, boundary)
    sharpness = _sharpness(alpha, rtol, rank, kernel.dtype)
    taps = math.prod(kernel.shape[:rank])
    value = jnp.moveaxis(kernel.reshape(taps, *kernel.shape[rank:]), 0, 1)
    slots = [np.arange(k) - (k - 1) // 2 for k in kernel.shape[:rank]]
    params = {
        "centre": jnp.asarray(np.stack(np.meshgrid(*slots, indexing="ij"), -1).reshape(taps, rank), kernel.dtype),
        "alpha": jnp.full((taps,), sharpness, kernel.dtype),
        "value": value,
        "window": slide,
    }
    if head_dim is not None:
        params["value"], params["out"] = _factorized(value, groups, head_dim)
    return params, _distance(kernel, float(sharpness))


@checked
def attention_to_conv(params: Mapping[str, Any], *, groups: int = 1) -> tuple[jax.Array, dict[str, Any]]:
    """The convolution that a sliding quadratic attention is: `kernel, options`, for `zoo.conv(x, kernel, **options)`.

        W'_δ = Σ_h A_h(δ) V_h O_h

    Weights by position alone are the same for every query, so this is exact for every α, and for a trained attention
    too; hard heads give back the kernel that `conv_to_attention` was given. A `bias` stays where it is, in `params`.

    Args:
      params: as `zoo.quadratic_attention` takes them, with a `zoo.Slide` as their "window".
      groups: how many groups the features are split into; the parameters' shapes don't tell.

    Returns:
      kernel `[*window, features / groups, out_features]`, and strides, padding, dilation, groups and boundary. A
      padding of "SAME_LOWER" is not one of `zoo.conv`'s.

    Raises:
      ValueError: the attention is over the whole grid, or its boundary "mask" normalises over the tokens inside. Such
        attention differs from any convolution at the border; `nearest_conv` says by how much.

    >>> import jax.numpy as jnp
    >>> params, _ = conv_to_attention(jnp.array([[[1.0]], [[2.0]], [[4.0]]]), strides=2)
    >>> kernel, options = attention_to_conv(params)
    >>> kernel[:, 0, 0], options["strides"]
    (Array([1., 2., 4.], dtype=float32), (2,))
    """
    slide = params.get("window")
    if not isinstance(slide, Slide) or slide.boundary == "mask":
        raise ValueError(
            f"attention_to_conv: params['window'] (={slide!r}) must be a zoo.Slide whose boundary is 'zero', 'edge', "
            "'reflect' or 'wrap': a convolution slides, with something outside. For others, nearest_conv takes their "
            "weights"
        )
    arrays = {name: array for name, array in params.items() if name != "window"}
    params = matched("quadratic_attention", arrays, slide.rank, axes=slide.rank)
    if params["value"].shape[2] % groups:
        raise ValueError(
            f"attention_to_conv: groups (={groups}) must divide the last axis of params['value'] "
            f"(={list(params['value'].shape)})"
        )
    slots = [np.arange(k) - (k - 1) // 2 for k in slide.window.sizes]
    weights = jax.nn.softmax(quadratic_scores(params, slots), axis=range(1, 1 + len(slots)))
    matrices = params["value"]
    if "out" in params:
        matrices = einsum("c h (g d), h (g d) o -> c h (g o)", matrices, params["out"], g=groups)
    kernel = jnp.einsum("h...,cho->...co", weights, matrices)
    options = {name: getattr(slide, name) for name in ("strides", "padding", "dilation", "boundary")}
    return kernel, {**options, "groups": groups}


@checked
def nearest_conv(
    weights: Float[Array | np.ndarray, "*queries heads slots"],
    value: Float[Array | np.ndarray, "value_heads in_features out_features"],
    mask: Bool[Array | np.ndarray, "*queries_mask"] | None = None,
) -> tuple[Float[Array, "slots in_features out_features"], Float[Array, ""]]:
    """The least-squares convolution to an attention whose weights differ from query to query, and what it leaves.

    An attention is the map x ↦ Σ_h Σ_u A_h(i, u) V_h x_u of the tokens in each query's window. The convolution that is
    nearest to it, in the sum of squares over all queries, slots and matrix entries, has the mean matrix at each slot,

        W_u = mean_i Σ_h A_h(i, u) V_h,        residual = √(Σ_{i,u} ‖Σ_h A_h(i, u) V_h - W_u‖² / Σ_{i,u} ‖Σ_h …‖²)

    Args:
      weights: A, `[*queries, heads, slots]`, as `nn.Attention.weights` gives them; batch axes count as queries.
      value: V, `[heads, in_features, out_features]`: the products W_V,h W_O,h.
      mask: bool, `[*queries, slots]` or what broadcasts to it: the slots that hold a token. Others don't count.

    Returns:
      kernel `[slots, in_features, out_features]`, and the residual: 0 for a convolution, at most 1.

    Raises:
      ValueError: shapes that don't fit, by name.

    >>> import jax.numpy as jnp
    >>> _, residual = nearest_conv(jnp.array([[[1.0, 0.0]], [[1.0, 0.0]]]), jnp.ones((1, 1, 1)))
    >>> kernel, other = nearest_conv(jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]]), jnp.ones((1, 1, 1)))
    >>> kernel[:, 0, 0], f"{residual:.2f}", f"{other:.2f}"
    (Array([0.5, 0.5], dtype=float32), '0.00', '0.71')
    """
    weights, value = jnp.asarray(weights), jnp.asarray(value)
    if weights.ndim < 3 or weights.shape[-2] != value.shape[0]:
        raise ValueError(
            f"nearest_conv: weights (={list(weights.shape)}) and value (={list(value.shape)}) must be "
            "[*queries, heads, slots] and [heads, in_features, out_features]"
        )
    heads, slots = weights.shape[-2:]
    full = (*weights.shape[:-2], slots)
    mask = jnp.asarray(True if mask is None else mask)
    if mask.ndim > len(full) or any(n not in (1, m) for n, m in zip(mask.shape[::-1], full[::-1], strict=False)):
        raise ValueError(f"nearest_conv: mask (={list(mask.shape)}) must broadcast to {list(full)}")
    held = jnp.broadcast_to(mask, full).reshape(-1, 1, slots)
    weights = jnp.where(held, weights.reshape(-1, heads, slots), 0)
    mean = weights.sum(0) / jnp.maximum(held.sum(0), 1).astype(weights.dtype)  # [heads, slots]
    gram = jnp.einsum("hco,kco->hk", value, value)

    def squares(a):
        return jnp.einsum("nhu,nku,hk->", a, a, gram)

    away = jnp.where(held, weights - mean, 0)
    total = squares(weights)
    residual = jnp.sqrt(jnp.maximum(squares(away), 0) / jnp.where(total > 0, total, 1))
    return jnp.einsum("hu,hco->uco", mean, value), residual


def _sharpness(alpha: float | None, rtol: float | None, ndim: int, dtype) -> np.ndarray:
    """α as a number of `dtype`, at least what was asked for."""
    if alpha is not None and rtol is not None:
        raise ValueError(f"conv_to_attention: alpha (={alpha}) and rtol (={rtol}) must not both be given")
    if rtol is not None:
        if rtol <= 0:
            raise ValueError(f"conv_to_attention: rtol (={rtol}) must be a number > 0 (alpha=inf is exact)")
        alpha = _alpha_for(rtol, ndim)
    alpha = math.inf if alpha is None else alpha
    if not alpha > 0:
        raise ValueError(f"conv_to_attention: alpha (={alpha}) must be a number > 0, or inf for the hard limit")
    wanted = min(float(alpha), HARD)
    rounded = np.asarray(wanted, dtype)
    return rounded if float(rounded) >= wanted else np.nextafter(rounded, np.asarray(np.inf, dtype))


def _alpha_for(rtol: float, ndim: int) -> float:
    """The α at which every head's weights are within rtol of one-hot: |A_h - 1[Δ_h]|₁ <= 2·error_bound = rtol."""
    low, high = 1e-3, HARD
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 2 * error_bound(middle, ndim) > rtol else (low, middle)
    return high


@functools.partial(jax.jit, static_argnums=1)
def _distance(kernel: jax.Array, alpha: float) -> jax.Array:
    """max_o Σ_{δ, c} |Σ_h A_h(δ) W_h - W_δ|[c, o], with A - 1 computed as such: a difference would be rounding."""
    shape = kernel.shape[:-2]
    slots = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, len(shape))
    away = np.exp(-alpha * ((slots[:, None] - slots) ** 2).sum(-1))
    np.fill_diagonal(away, 0)
    off = away.sum(1, keepdims=True)
    excess = (away - np.diag(off[:, 0])) / (1 + off)  # A - 1, [heads, slots]
    wide = kernel.astype(statistics_dtype(kernel.dtype)).reshape(-1, *kernel.shape[-2:])
    return jnp.abs(jnp.einsum("hu,hco->uco", jnp.asarray(excess, wide.dtype), wide)).sum((0, 1)).max()


def _factorized(value: jax.Array, groups: int, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """V and O with V_h O_h = W_h in every group, from `[features / groups, heads, (groups out)]`, by SVD."""
    features, heads, out = value.shape
    matrices = value.reshape(features, heads, groups, out // groups).transpose(1, 2, 0, 3)
    left, scale, right = jnp.linalg.svd(matrices, full_matrices=False)  # scale [heads, groups, rank]
    kept = min(head_dim, scale.shape[-1])
    if kept < scale.shape[-1]:
        rounding = max(matrices.shape[-2:]) * jnp.finfo(scale.dtype).eps * scale.max()
        needed = int((scale > rounding).sum(-1).max())
        if head_dim < needed:
            raise ValueError(
                f"conv_to_attention: head_dim (={head_dim}) must be at least {needed}, the rank of a tap's matrix, or "
                "None for no factors"
            )
    root = jnp.sqrt(scale[..., :kept])
    spare = [(0, 0)] * 3 + [(0, head_dim - kept)]
    inner = jnp.pad(left[..., :kept] * root[..., None, :], spare)  # [heads, groups, features / groups, head_dim]
    outer = jnp.pad((right[..., :kept, :] * root[..., None]).swapaxes(-1, -2), spare)
    return (
        inner.transpose(2, 0, 1, 3).reshape(features, heads, groups * head_dim),
        outer.transpose(0, 1, 3, 2).reshape(heads, groups * head_dim, out // groups),
    )


def _check_kernel(kernel: jax.Array, groups: int, boundary: str, head_dim: int | None) -> None:
    if kernel.ndim < 3 or 0 in kernel.shape:
        raise ValueError(
            f"conv_to_attention: kernel (={kernel.dtype}{list(kernel.shape)}) must be floating point, "
            "[*window, features / groups, out_features]"
        )
    if kernel.shape[-1] % groups:
        raise ValueError(
            f"conv_to_attention: groups (={groups}) must be an int that divides out_features (={kernel.shape[-1]})"
        )
    if boundary not in BOUNDARIES:
        raise ValueError(
            f"conv_to_attention: boundary (={boundary!r}) must be one of {', '.join(map(repr, BOUNDARIES))}. With "
            "'mask' the weights are normalised over the tokens inside, which is no convolution with zeros outside; its "
            "hard limit is the convolution with 'edge'"
        )

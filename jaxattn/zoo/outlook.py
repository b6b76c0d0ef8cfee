"""Outlook attention: the centre of a window makes all the weights within it, and the windows are laid back."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jaxtyping import ArrayLike, Real

from jaxattn.einsum import einsum
from jaxattn.sizes import Size, per_axis
from jaxattn.zoo.equations import axes
from jaxattn.zoo.parameters import affine, parameters
from jaxattn.zoo.pool import mean_pool
from jaxattn.zoo.registry import row
from jaxattn.zoo.softmax import softmax


@row(
    "outlook attention (VOLO)", weights="windows u that hold i: (W x_u)_{slot i,j}", source="window centre",
    shared="head / no", normalizer="softmax, then fold", paper="Yuan et al. 2021 (2106.13112)",
    shapes={"value": "features -> heads head_dim", "attention": "features -> heads *window *window",
    "out": "heads head_dim -> out_features"},
)  # fmt: skip
def outlook_attention(
    x: Real[ArrayLike, "*batch_and_grid features"],
    params: Mapping[str, Any],
    *,
    strides: Size = 1,
    scale: float | None = None,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """In the window around u, slot r of the output takes slot t of the input with a weight that u alone makes; what
    the windows that hold a token give it is added,

        z[s·u + r, h] += m[u, h, r],    m[u, h, r] = Σ_t A[u, h, r, t] · v[s·u + t, h],
        A[u, h, r] = softmax_t(scale · (W_A x̄_u + b_A)[h, r, t]),    v = W_V x,    y = W_O z

        m = einsum("... s*u0+t0 h d, ... u0 h r0 t0 -> ... u0 h r0 d", v, A)
        z = einsum("... u0 h r0 d -> ... s*u0+r0 h d", m)

    where x̄ is x, or with strides s the mean of the s × s tokens that begin at s·u (Yuan et al. 2021, VOLO, arXiv
    2106.13112). Outside the grid stand zeros, which take their weight.

    Args:
      x: `[*batch, *grid, features]`, with any number of batch axes.
      params: "value" `[features, heads, head_dim]`, "attention" `[features, heads, *window, *window]` (output's slot
        first), "out" `[heads, head_dim, out_features]`, and optionally "value_bias" `[heads, head_dim]`,
        "attention_bias" `[heads, *window, *window]`, "out_bias" `[out_features]`. The window's rank is the grid's.
      strides: of the windows, an int or one for each axis of the grid; the output has the input's grid all the same,
        with zeros before the output projection where no window reaches.
      scale: None means head_dim ** -0.5.

    Returns:
      `[*batch, *grid, out_features]`, in the dtype of x and params. The softmax is in float32 at least.

    Raises:
      ValueError: a parameter is missing or unknown, or a shape or an argument doesn't fit, by name.

    >>> import jax.numpy as jnp
    >>> params = {"value": jnp.ones((8, 2, 4)), "attention": jnp.ones((8, 2, 3, 3, 3, 3)), "out": jnp.ones((2, 4, 8))}
    >>> outlook_attention(jnp.ones((2, 9, 9, 8)), params, strides=2).shape
    (2, 9, 9, 8)
    """
    params, x, grid = parameters("outlook_attention", x, params)
    rank = len(grid)
    strides = per_axis("outlook_attention", "strides", strides, rank)
    r, t, u = (axes(name, rank) for name in "rtu")
    value = affine("... c, c h d -> ... h d", x, params, "value", precision)
    scores = affine(f"... c, c h {r} {t} -> ... h {r} {t}", mean_pool(x, strides), params, "attention", precision)
    read, written = (" ".join(f"{s}*u{k}+{name}{k}" for k, s in enumerate(strides)) for name in "tr")
    weights = softmax(scores * (value.shape[-1] ** -0.5 if scale is None else scale), tuple(range(-rank, 0)))
    pads = _pads(grid, params["attention"].shape[2 : 2 + rank], strides)
    # One einsum would do both, in as many steps as the window has pairs of slots; two take as many as it has slots.
    mixed = einsum(
        f"... {read} h d, ... {u} h {r} {t} -> ... {u} h {r} d", value, weights, padding=pads, precision=precision
    )
    y = einsum(f"... {u} h {r} d -> ... {written} h d", mixed, padding=pads, boundary="zero", precision=precision)
    return affine("... h d, h d o -> ... o", y, params, "out", precision)


def _pads(grid: Sequence[int], size: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """The padding of what is read, and the same as what is cropped of what is written: the grid is kept."""
    lows = [(k - 1) // 2 for k in size]
    ends = [(-(-n // s) - 1) * s + k for n, k, s in zip(grid, size, strides, strict=True)]
    return [(low, end - low - n) for low, end, n in zip(lows, ends, grid, strict=True)]

"""CvT's attention: queries, keys and values from depthwise convolutions."""

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax import lax
from jaxtyping import ArrayLike, Real

from jaxattn.checked import MeshAxis
from jaxattn.halo import split_attention
from jaxattn.sizes import Size
from jaxattn.zoo.depthwise import depthwise_conv
from jaxattn.zoo.equations import same
from jaxattn.zoo.heads import PROJECTIONS
from jaxattn.zoo.parameters import affine, parameters
from jaxattn.zoo.registry import row


@row(
    "CvT", weights="q·k, with q,k,v from depthwise convolutions", source="pair", shared="head / no",
    normalizer="softmax", paper="Wu et al. 2021 (2103.15808)", shapes=dict.fromkeys(("query_kernel", "key_kernel",
    "value_kernel"), "*window features") | PROJECTIONS | {"out": "heads value_dim -> out_features"},
)  # fmt: skip
def cvt_attention(
    x: Real[ArrayLike, "*batch_and_grid features"],
    params: Mapping[str, Any],
    *,
    strides: Size = 1,
    kv_strides: Size = 1,
    scale: float | None = None,
    precision: lax.PrecisionLike = None,
    axis_name: MeshAxis | None = None,
) -> jax.Array:
    """Attention over the whole grid between tokens that a depthwise convolution has made,

        y_i = b_O + Σ_h W_O,h Σ_j softmax_j(scale · q_i·k_j) v_j,    q = W_Q (w_Q ∗ x), k = W_K (w_K ∗ x), ...

    where ∗ is `depthwise_conv`, centred, with zeros outside (Wu et al. 2021, arXiv 2103.15808). With `kv_strides` 2, as
    in the paper, there are a quarter of the keys. The batch normalisation that the paper has between w and W is, once
    trained, a scale and a shift of each channel, which w and the bias of W can hold.

    Args:
      x: `[*batch, *grid, features]`, with any number of batch axes.
      params: "query_kernel", "key_kernel", "value_kernel" `[*window, features]`, whose rank less one is the grid's;
        "query", "key" `[features, heads, head_dim]`, "value" `[features, heads, value_dim]`, "out" `[heads, value_dim,
        out_features]`, and optionally "query_bias", "key_bias", "value_bias", "out_bias", of those shapes without what
        is summed.
      strides: of the queries' convolution, an int or one for each axis.
      kv_strides: of the keys' and values'.
      scale: None means head_dim ** -0.5.

    Returns:
      `[*batch, *positions, out_features]`, ceil(n / stride) positions to an axis of n, in the dtype of x and params.

    Raises:
      ValueError: a parameter is missing or unknown, or a shape or an argument doesn't fit, by name.

    >>> import jax.numpy as jnp
    >>> params = {name: jnp.ones((8, 2, 4)) for name in ("query", "key", "value")} | {"out": jnp.ones((2, 4, 6))}
    >>> params |= {f"{name}_kernel": jnp.ones((3, 3, 8)) for name in ("query", "key", "value")}
    >>> cvt_attention(jnp.ones((2, 7, 7, 8)), params, kv_strides=2).shape
    (2, 7, 7, 6)
    """
    params, x, grid = parameters("cvt_attention", x, params)
    batch = x.shape[: x.ndim - 1 - len(grid)]

    def tokens(name, strides):
        kernel = params[f"{name}_kernel"]
        centred = same(kernel.shape[:-1], (1,) * len(grid))
        local = depthwise_conv(x, kernel, strides=strides, padding=centred, precision=precision, axis_name=axis_name)
        return affine("... c, c h d -> ... h d", local, params, name, precision)

    def in_a_row(z):
        return z.reshape(*batch, math.prod(z.shape[len(batch) : -2]), *z.shape[-2:])

    query, key, value = tokens("query", strides), tokens("key", kv_strides), tokens("value", kv_strides)
    y = split_attention(*map(in_a_row, (query, key, value)), axis_name=axis_name, scale=scale, precision=precision)
    y = y.reshape(*query.shape[:-1], value.shape[-1])
    return affine("... h d, h d o -> ... o", y, params, "out", precision)

"""Attention in which one side of the pair is learned: the queries, or the keys."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import ArrayLike, Real

from jaxattn.attention import attention
from jaxattn.checked import MeshAxis
from jaxattn.halo import shard_count, split_attention
from jaxattn.sizes import Size, is_symbolic, per_axis
from jaxattn.window import Window
from jaxattn.zoo.heads import join
from jaxattn.zoo.parameters import affine, parameters
from jaxattn.zoo.registry import row


@row(
    "QnA", weights="learned q · k_j + b_{j-i}", source="key + learned", shared="head / no", normalizer="softmax",
    paper="Arar et al. 2022 (2112.11435)", shapes={"query": "heads head_dim", "key": "features -> heads head_dim",
    "value": "features -> heads value_dim", "bias": "heads *window", "out": "heads value_dim -> out_features"},
)  # fmt: skip
def qna(
    x: Real[ArrayLike, "*batch_and_grid features"],
    params: Mapping[str, Any],
    *,
    strides: Size = 1,
    scale: float | None = None,
    precision: lax.PrecisionLike = None,
    axis_name: MeshAxis | None = None,
) -> jax.Array:
    """Local attention whose queries are learned, the same at every position,

        y_i = b_O + Σ_h W_O,h Σ_r softmax_r(scale · q_h · k_{s·i+r} + b_h[r]) v_{s·i+r},    k = W_K x, v = W_V x

    so that windows that overlap ask the same of a token (Arar et al. 2022, arXiv 2112.11435). Tokens outside the grid
    are left out. A head has one query here, where the paper's may have several; to divide a query by its length,
    as the paper does, is the caller's.

    Args:
      x: `[*batch, *grid, features]`, with any number of batch axes.
      params: "query" `[heads, head_dim]`, "key" `[features, heads, head_dim]`, "value" `[features, heads, value_dim]`,
        "bias" b `[heads, *window]`, whose rank less one is the grid's, "out" `[heads, value_dim, out_features]`, and
        optionally "key_bias", "value_bias", "out_bias", of those shapes without what is summed. Slot r of a window of
        k is the token at r - k//2.
      strides: an int, or one for each axis of the grid: with s, a window at every s-th token.
      scale: None means head_dim ** -0.5.

    Returns:
      `[*batch, *positions, out_features]`, ceil(n / stride) positions to an axis of n, in the dtype of x and params.

    Raises:
      ValueError: a parameter is missing or unknown, or a shape or an argument doesn't fit, by name.

    >>> import jax.numpy as jnp
    >>> params = {"query": jnp.ones((2, 4)), "key": jnp.ones((8, 2, 4)), "value": jnp.ones((8, 2, 4))}
    >>> params |= {"bias": jnp.ones((2, 3, 3)), "out": jnp.ones((2, 4, 8))}
    >>> qna(jnp.ones((2, 7, 7, 8)), params, strides=2).shape
    (2, 4, 4, 8)
    """
    p, x, grid = parameters("qna", x, params)
    window = Window(p["bias"].shape[1:], stride=per_axis("qna", "strides", strides, len(grid)), boundary="mask")
    key, value = (affine("... c, c h d -> ... h d", x, p, name, precision) for name in ("key", "value"))
    whole = (grid[0] * shard_count(axis_name), *grid[1:])
    first, *others = window.query_grid(whole)
    positions = (first // shard_count(axis_name), *others)
    query = jnp.broadcast_to(p["query"], (*x.shape[: x.ndim - 1 - len(grid)], *positions, *p["query"].shape))
    y = split_attention(
        query, key, value, p["bias"], axis_name=axis_name, window=window, scale=scale, precision=precision
    )
    return affine("... h d, h d o -> ... o", y, p, "out", precision)


@row(
    "parameter-key attention", weights="q from data, k (and v) parameters: a convolution read as attention",
    source="learned key", shared="head / no", normalizer="any", paper="Sukhbaatar et al. 2019 (1907.01470)",
    shapes={"query": "?features -> heads head_dim", "key": "keys heads head_dim", "value": "keys heads value_dim",
    "out": "?heads value_dim -> out_features"},
)  # fmt: skip
def parameter_key_attention(
    x: Real[ArrayLike, "*batch_and_grid features"],
    params: Mapping[str, Any],
    *,
    normalize: str | Callable[..., jax.Array] = "softmax",
    scale: float | None = None,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """Attention to keys and values that are parameters, not tokens,

        y_i = b_O + Σ_h W_O,h Σ_m A_h(i, m) v_m,h,    A_h(i, ·) = normalize(scale · q_i,h · k_·,h),    q = W_Q x

    the persistent memory of Sukhbaatar et al. 2019 (arXiv 1907.01470), alone. Read backwards, it is what a convolution
    is: a filter is a key, its response is a score, and the next layer's weights are the values. With `normalize="none"`
    each head is two 1 × 1 convolutions in a row, keys then values; with "relu" there is the nonlinearity between them,
    a feed-forward layer.

    Args:
      x: `[*batch, *grid, features]`, with any number of axes before the features: positions don't see each other.
      params: "key" `[keys, heads, head_dim]`, "value" `[keys, heads, value_dim]`, and optionally "query" `[features,
        heads, head_dim]` (without it x is the query of every head, and head_dim is features) and "query_bias" `[heads,
        head_dim]`, "out" `[heads, value_dim, out_features]` (without it the heads stand one after the other) and
        "out_bias" `[out_features]`.
      normalize: as in `attention`; note that there "relu" and "sigmoid" divide by the number of keys.
      scale: None means head_dim ** -0.5.

    Returns:
      `[*batch, *grid, out_features]`, in the dtype of x and params.

    Raises:
      ValueError: a parameter is missing or unknown, or a shape doesn't fit, by name.

    >>> import jax.numpy as jnp
    >>> params = {"key": jnp.ones((100, 2, 4)), "value": jnp.ones((100, 2, 5)), "query": jnp.ones((8, 2, 4))}
    >>> parameter_key_attention(jnp.ones((2, 7, 7, 8)), params).shape
    (2, 7, 7, 10)
    """
    sizes = {} if "query" in params else {"head_dim": np.shape(x)[-1]}
    params, x, _ = parameters("parameter_key_attention", x, params, 0, **sizes)
    heads, width = params["key"].shape[-2:]
    query = jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], heads, x.shape[-1]))
    query = affine("... c, c h d -> ... h d", x, params, "query", precision) if "query" in params else query
    how: dict[str, Any] = {"scale": scale, "normalize": normalize, "precision": precision}
    attend = lambda tokens: attention(tokens, params["key"], params["value"], **how)
    batch = [n for n in x.shape[:-1] if is_symbolic(n)]
    for _ in batch:  # which no sequence can take in
        attend = jax.vmap(attend)
    # the others in one sequence: tokens don't see each other
    y = attend(query.reshape(*batch, math.prod(x.shape[len(batch) : -1]), heads, width))
    return join(y.reshape(*x.shape[:-1], *y.shape[-2:]), params, precision)

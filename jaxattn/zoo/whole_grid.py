"""Attention over a whole grid: every token sees every token, and where they stand enters as a bias or an embedding."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Real

from jaxattn.attention import attention
from jaxattn.checked import MeshAxis
from jaxattn.halo import shard_count
from jaxattn.window import Window
from jaxattn.zoo.heads import EMBEDDINGS, PROJECTIONS, join, project
from jaxattn.zoo.parameters import check_grid, grid_rank, parameters
from jaxattn.zoo.registry import row
from jaxattn.zoo.sliding import windowed


@row(
    "ViT", weights="q·k/√d, global", source="pair", shared="head / no", normalizer="softmax",
    paper="Vaswani et al. 2017 (1706.03762); Dosovitskiy et al. 2021 (2010.11929)", shapes=PROJECTIONS,
)  # fmt: skip
def global_attention(
    x: Real[ArrayLike, "*batch_and_grid features"],
    params: Mapping[str, Any],
    *,
    rank: int | None = None,
    mask: Bool[Array | np.ndarray, "*mask"] | None = None,
    scale: float | None = None,
    precision: lax.PrecisionLike = None,
    implementation: str | None = None,
) -> jax.Array:
    """Multi-head self-attention over all tokens,

        y_i = b_O + Σ_h W_O,h Σ_j softmax_j(scale · q_i·k_j) v_j,    q = W_Q x + b_Q, k = W_K x + b_K, v = W_V x + b_V.

    (Vaswani et al. 2017, arXiv 1706.03762; for images Dosovitskiy et al. 2021, ViT, arXiv 2010.11929.) The same
    parameters give the same result in `flax.nnx.MultiHeadAttention`.

    Args:
      x: `[*batch, *grid, features]`, with any number of batch axes.
      params: "query", "key" `[features, heads, head_dim]`, "value" `[features, heads, value_dim]`, and optionally
        "query_bias", "key_bias", "value_bias" (those shapes without features), "out" `[heads, value_dim,
        out_features]` and "out_bias" `[out_features]`. Without "out" the heads' outputs stand one after the other.
      rank: the number of grid axes, all of whose tokens see each other; None for `[tokens, features]` or `[batch,
        tokens, features]`, whose tokens have one axis.
      mask: bool, broadcasting against `[*batch, heads, tokens, tokens]` (a grid's tokens row-major); True attends.
      scale: None means head_dim ** -0.5.

    Returns:
      `[*batch, *grid, out_features]`, in the dtype of x and params.

    Raises:
      ValueError: a parameter is missing or unknown, or a shape doesn't fit, by name.

    >>> import jax.numpy as jnp
    >>> params = {name: jnp.ones((8, 2, 4)) for name in ("query", "key", "value")}
    >>> global_attention(jnp.ones((3, 5, 8)), params | {"out": jnp.ones((2, 4, 6))}).shape
    (3, 5, 6)
    """
    if rank is None and np.ndim(x) > 3:
        raise ValueError(
            f"global_attention: x (={list(np.shape(x))}) must be [batch, tokens, features] where rank is None: give "
            f"rank={np.ndim(x) - 2} for a grid whose tokens all see each other, or rank=1 to see along its last axis"
        )
    rank = 1 if rank is None else rank
    p, x, grid = parameters("global_attention", x, params, rank)
    batch = x.shape[: x.ndim - 1 - rank]
    query, key, value = project(x.reshape(*batch, math.prod(grid), x.shape[-1]), p, precision)
    y = attention(query, key, value, mask=mask, scale=scale, precision=precision, implementation=implementation)
    y = join(y, p, precision)
    return y.reshape(*batch, *grid, y.shape[-1])


@row(
    "CoAtNet", weights="q·k/√d + w_{i-j}, global", source="pair + learned", shared="head / no", normalizer="softmax",
    paper="Dai et al. 2021 (2106.04803)", shapes=PROJECTIONS | {"relative_bias": "heads *offsets"},
)  # fmt: skip
def coatnet_attention(
    x: Real[ArrayLike, "*batch_and_grid features"],
    params: Mapping[str, Any],
    *,
    scale: float | None = None,
    precision: lax.PrecisionLike = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention over a grid, with a depthwise convolution's kernel, as large as the grid, added to the scores,

        y_i = Σ_h W_O,h Σ_j softmax_j(scale · q_i·k_j + w_h[j-i]) v_j.

    (Dai et al. 2021, CoAtNet, arXiv 2106.04803, "pre" normalisation; the paper's w_{i-j} is w[j-i] here.)

    Args:
      x: `[*batch, *grid, features]`, with any number of batch axes.
      params: "relative_bias" w, `[heads, *(2n-1)]` for a grid of n tokens per axis, indexed by n - 1 + j - i; its rank
        less one is the grid's. "query", "key" `[features, heads, head_dim]`, "value" `[features, heads, value_dim]`,
        and optionally "query_bias", "key_bias", "value_bias" (without features), "out" `[heads, value_dim,
        out_features]` and "out_bias" `[out_features]`. Without "out" the heads' outputs stand one after the other.
      scale: None means head_dim ** -0.5.

    Returns:
      `[*batch, *grid, out_features]`, in the dtype of x and params.

    Raises:
      ValueError: a parameter is missing or unknown, or a shape doesn't fit, by name.

    >>> import jax.numpy as jnp
    >>> params = {name: jnp.ones((8, 2, 4)) for name in ("query", "key", "value")}
    >>> coatnet_attention(jnp.ones((3, 4, 5, 8)), params | {"relative_bias": jnp.ones((2, 7, 9))}).shape
    (3, 4, 5, 8)
    """
    window = Window(whole_grid("coatnet_attention", x, grid_rank("coatnet_attention", params)))
    return windowed(
        "coatnet_attention", x, params, window, scale=scale, precision=precision, implementation=implementation
    )


@row(
    "BoTNet", weights="SASA, global", source="pair", shared="head / no", normalizer="softmax",
    paper="Srinivas et al. 2021 (2101.11605)", shapes=PROJECTIONS | EMBEDDINGS,
)  # fmt: skip
def botnet_attention(
    x: Real[ArrayLike, "*batch_and_grid features"],
    params: Mapping[str, Any],
    *,
    query_scale: float | None = None,
    precision: lax.PrecisionLike = None,
    implementation: str | None = None,
    axis_name: MeshAxis | None = None,
) -> jax.Array:
    """Attention over a grid with relative embeddings of rows and columns, added to the keys,

        y_i = Σ_h W_O,h Σ_j softmax_j(query_scale · q_i·(k_j + r[j-i])) v_j,    r[δ] = row[δ1] + column[δ2].

    (Srinivas et al. 2021, Bottleneck Transformers, arXiv 2101.11605. There the tables are shared by the heads, which
    stand one after the other: no "out".)

    Args:
      x: `[*batch, *grid, features]`, with any number of batch axes.
      params: "embedding_0", "embedding_1", ..., one for each axis of the grid: `[heads or 1, 2n-1, head_dim]` for n
        tokens along it, indexed by n - 1 + j - i; or all of head_dim / rank, which then stand one after the other.
        "query", "key" `[features, heads, head_dim]`, "value" `[features, heads, value_dim]`, and optionally
        "query_bias", "key_bias", "value_bias" (without features), "out" `[heads, value_dim, out_features]` and
        "out_bias" `[out_features]`. Without "out" the heads' outputs stand one after the other.
      query_scale: of the query, so of both terms; None means head_dim ** -0.5.

    Returns:
      `[*batch, *grid, out_features]`, in the dtype of x and params.

    Raises:
      ValueError: a parameter is missing or unknown, or a shape doesn't fit, by name.

    >>> import jax.numpy as jnp
    >>> params = {name: jnp.ones((8, 2, 4)) for name in ("query", "key", "value")}
    >>> tables = {"embedding_0": jnp.ones((1, 7, 4)), "embedding_1": jnp.ones((1, 9, 4))}
    >>> botnet_attention(jnp.ones((3, 4, 5, 8)), params | tables).shape
    (3, 4, 5, 8)
    """
    window = Window(whole_grid("botnet_attention", x, grid_rank("botnet_attention", params), axis_name))
    return windowed(
        "botnet_attention", x, params, window, scale=query_scale, scaled=True, precision=precision,
        implementation=implementation, axis_name=axis_name,
    )  # fmt: skip


@row(
    "learned 2-D relative (Cordonnier)", weights="q·k + q·(row_{δ1} + col_{δ2}), content on or off", source="pair",
    shared="head / no", normalizer="softmax", paper="Cordonnier, Loukas & Jaggi 2020 (1911.03584)",
    shapes=PROJECTIONS | {"key": "?features -> heads head_dim"} | EMBEDDINGS,
)  # fmt: skip
def learned_relative_attention(
    x: Real[ArrayLike, "*batch_and_grid features"],
    params: Mapping[str, Any],
    *,
    query_scale: float | None = None,
    precision: lax.PrecisionLike = None,
    implementation: str | None = None,
    axis_name: MeshAxis | None = None,
) -> jax.Array:
    """Attention over a grid whose scores may come from relative positions alone,

        y_i = b_O + Σ_h W_O,h Σ_j softmax_j(query_scale · (q_i·k_j + q_i·(row_h[δ1] + column_h[δ2]))) v_j,    δ = j - i,

    without q_i·k_j where there is no key among the parameters. (Cordonnier, Loukas & Jaggi 2020, arXiv 1911.03584,
    its learned embedding with and without content. With it, this is `botnet_attention` with a table for each head.)

    Args:
      x: `[*batch, *grid, features]`, with any number of batch axes.
      params: "embedding_0", "embedding_1", ..., one for each axis of the grid: `[heads or 1, 2n-1, head_dim]` for n
        tokens along it, indexed by n - 1 + j - i; or all of head_dim / rank, which then stand one after the other.
        "query" `[features, heads, head_dim]`, "value" `[features, heads, value_dim]`; optionally "key", shaped as
        "query", for content, "query_bias", "key_bias", "value_bias" (without features), "out" `[heads, value_dim,
        out_features]` and "out_bias" `[out_features]`. Without "out" the heads' outputs stand one after the other.
      query_scale: of the query, so of both terms; None means head_dim ** -0.5.

    Returns:
      `[*batch, *grid, out_features]`, in the dtype of x and params.

    Raises:
      ValueError: a parameter is missing or unknown, or a shape doesn't fit, by name.

    >>> import jax.numpy as jnp
    >>> params = {name: jnp.ones((8, 2, 4)) for name in ("query", "value")}
    >>> tables = {"embedding_0": jnp.ones((2, 7, 4)), "embedding_1": jnp.ones((2, 9, 4))}
    >>> learned_relative_attention(jnp.ones((3, 4, 5, 8)), params | tables).shape
    (3, 4, 5, 8)
    """
    window = Window(
        whole_grid("learned_relative_attention", x, grid_rank("learned_relative_attention", params), axis_name)
    )
    return windowed(
        "learned_relative_attention", x, params, window, scale=query_scale, scaled=True, precision=precision,
        implementation=implementation, axis_name=axis_name,
    )  # fmt: skip


def whole_grid(layer: str, x, rank: int, axis_name: str | None = None) -> tuple[int, ...]:
    """The last `rank` axes of x before its features, and of all shards where the first is split."""
    check_grid(layer, x, rank)
    first, *others = np.shape(x)[np.ndim(x) - 1 - rank : -1]
    return (first * shard_count(axis_name), *others)

"""Attention in windows that slide, token by token or block by block."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
from jax import lax
from jaxtyping import ArrayLike, Real

from jaxattn.halo import split_attention
from jaxattn.sizes import Size, every_axis, per_axis
from jaxattn.window import Window
from jaxattn.zoo.heads import EMBEDDINGS, PROJECTIONS, embedding, join, offsets, project
from jaxattn.zoo.parameters import grid_rank, parameters
from jaxattn.zoo.registry import row


@row(
    "SASA", weights="q_i·(k_j + r_{j-i})", source="pair", shared="head / no", normalizer="softmax",
    paper="Ramachandran et al. 2019 (1906.05909)", shapes=PROJECTIONS | EMBEDDINGS,
)  # fmt: skip
def sasa(
    x: Real[ArrayLike, "*batch_and_grid features"],
    params: Mapping[str, Any],
    *,
    window: Window | Size,
    scale: float | None = 1.0,
    precision: lax.PrecisionLike = None,
    implementation: str | None = None,
) -> jax.Array:
    """Stand-alone self-attention: each token attends to a window around it, with relative embeddings added to the keys,

        y_i = Σ_h W_O,h Σ_{j in N(i)} softmax_j(scale · q_i·k_j + q_i·r_h[j-i]) v_j,

    where half of the dimensions of r[δ] embed δ1 and the other half δ2. (Ramachandran et al. 2019, arXiv 1906.05909:
    scale 1, and the heads one after the other: no "out".)

    Args:
      x: `[*batch, *grid, features]`, with any number of batch axes.
      params: "embedding_0", "embedding_1", ..., one for each axis of the window: `[heads or 1, 2k-1, head_dim / rank]`
        for k tokens along it, indexed by k - 1 + (j - i) / dilation; or all of head_dim, which then are added. "query",
        "key" `[features, heads, head_dim]`, "value" `[features, heads, value_dim]`, and optionally "query_bias",
        "key_bias", "value_bias" (without features), "out" `[heads, value_dim, out_features]` and "out_bias"
        `[out_features]`. Without "out" the heads' outputs stand one after the other.
      window: a `Window`, or its size, an int or one for each axis, which moves inward at the border. With boundary
        "zero" zero keys and values stand outside.
      scale: of q·k alone; None means head_dim ** -0.5.

    Returns:
      `[*batch, *query_grid, out_features]`, in the dtype of x and params; the grid itself, where the window
      has no stride.

    Raises:
      ValueError: a parameter is missing or unknown, or a shape doesn't fit, by name.

    >>> import jax.numpy as jnp
    >>> params = {name: jnp.ones((8, 2, 4)) for name in ("query", "key", "value")}
    >>> tables = {"embedding_0": jnp.ones((2, 5, 2)), "embedding_1": jnp.ones((2, 5, 2))}
    >>> sasa(jnp.ones((1, 6, 7, 8)), params | tables, window=(3, 3)).shape
    (1, 6, 7, 8)
    """
    window = as_window("sasa", window, grid_rank("sasa", params))
    return windowed("sasa", x, params, window, scale=scale, precision=precision, implementation=implementation)


@row(
    "HaloNet", weights="SASA, N = block + halo", source="pair", shared="head / no", normalizer="softmax",
    paper="Vaswani et al. 2021 (2103.12731)", shapes=PROJECTIONS | EMBEDDINGS,
)  # fmt: skip
def halo_attention(
    x: Real[ArrayLike, "*batch_and_grid features"],
    params: Mapping[str, Any],
    *,
    block: Size,
    halo: Annotated[Size, 0],
    boundary: str | Sequence[str] = "zero",
    scale: float | None = 1.0,
    precision: lax.PrecisionLike = None,
    implementation: str | None = None,
) -> jax.Array:
    """Blocked local attention: the tokens of a block attend to the block and a halo around it,

        y_i = Σ_h W_O,h Σ_{j in N(i)} softmax_j(scale · q_i·k_j + q_i·r_h[j-i]) v_j,
        N(i) = {b·⌊i/b⌋ - a, ..., b·⌊i/b⌋ + b + a - 1}    along each axis, with a block of b and a halo of a.

    (Vaswani et al. 2021, HaloNet, arXiv 2103.12731: scale 1, and the heads one after the other: no "out".)

    Args:
      x: `[*batch, *grid, features]`, with any number of batch axes. The last block of an axis may be cut off.
      params: as in `sasa`, for a window of k = b + 2a tokens per axis: "embedding_0", "embedding_1", ...
        `[heads or 1, 2k-1, head_dim / rank or head_dim]`, indexed by k - 1 + j - i; "query", "key" `[features, heads,
        head_dim]`, "value" `[features, heads, value_dim]`; optionally "query_bias", "key_bias", "value_bias", "out"
        `[heads, value_dim, out_features]` and "out_bias".
      block: b, an int, or one for each axis of the grid.
      halo: a, an int, or one for each axis.
      boundary: what stands outside: "zero", zero keys and values that take part, or "mask", nothing; or another one of
        `Window`'s; one, or one for each axis.
      scale: of q·k alone; None means head_dim ** -0.5.

    Returns:
      `[*batch, *grid, out_features]`, in the dtype of x and params.

    Raises:
      ValueError: a parameter is missing or unknown, or a shape doesn't fit, by name.

    >>> import jax.numpy as jnp
    >>> params = {name: jnp.ones((8, 2, 4)) for name in ("query", "key", "value")}
    >>> tables = {"embedding_0": jnp.ones((2, 11, 2)), "embedding_1": jnp.ones((2, 11, 2))}
    >>> halo_attention(jnp.ones((1, 8, 8, 8)), params | tables, block=(4, 4), halo=1).shape
    (1, 8, 8, 8)
    """
    blocks = every_axis("halo_attention", "block", block, grid_rank("halo_attention", params))
    window = halo_window("halo_attention", blocks, halo, boundary)
    return windowed(
        "halo_attention", x, params, window, scale=scale, precision=precision, implementation=implementation
    )


@row(
    "NAT, DiNAT", weights="q·k/√d + b_{j-i}, shifted window, dilated", source="pair + learned", shared="head / no",
    normalizer="softmax", paper="Hassani et al. 2023 (2204.07143); Hassani & Shi 2022 (2209.15001)",
    shapes=PROJECTIONS | {"relative_bias": "?heads *offsets"},
)  # fmt: skip
def neighborhood_attention(
    x: Real[ArrayLike, "*batch_and_grid features"],
    params: Mapping[str, Any],
    *,
    window: Window | Size,
    scale: float | None = None,
    precision: lax.PrecisionLike = None,
    implementation: str | None = None,
) -> jax.Array:
    """Each token attends to its k nearest along each axis, with a bias for each offset,

        y_i = b_O + Σ_h W_O,h Σ_{j in N(i)} softmax_j(scale · q_i·k_j + b_h[j-i]) v_j.

    At the border the window moves inward and keeps its size. (Hassani et al. 2023, NAT, arXiv 2204.07143; dilated,
    `window=Window((7, 7), dilation=2)`, Hassani & Shi 2022, DiNAT, arXiv 2209.15001.)

    Args:
      x: `[*batch, *grid, features]`, with any number of batch axes.
      params: "relative_bias" b, `[heads, *(2k-1)]` for a window of k tokens per axis, indexed by
        k - 1 + (j - i) / dilation, which may be left out. "query", "key" `[features, heads, head_dim]`, "value"
        `[features, heads, value_dim]`, and optionally "query_bias", "key_bias", "value_bias" (without features), "out"
        `[heads, value_dim, out_features]` and "out_bias" `[out_features]`. Without "out" the heads' outputs stand one
        after the other.
      window: a `Window`, or its size, an int (where there is a bias, whose axes are counted) or one for each axis.
      scale: None means head_dim ** -0.5.

    Returns:
      `[*batch, *query_grid, out_features]`, in the dtype of x and params; the grid itself, where the window
      has no stride.

    Raises:
      ValueError: a parameter is missing or unknown, or a shape doesn't fit, by name.

    >>> import jax.numpy as jnp
    >>> params = {name: jnp.ones((8, 2, 4)) for name in ("query", "key", "value")}
    >>> bias = {"relative_bias": jnp.ones((2, 5, 5))}
    >>> neighborhood_attention(jnp.ones((1, 6, 7, 8)), params | bias, window=(3, 3)).shape
    (1, 6, 7, 8)
    """
    if "relative_bias" not in params and isinstance(window, int):
        raise ValueError(
            f"neighborhood_attention: window (={window}) must be an int for each axis, or a Window, where params have "
            "no relative_bias, which would say how many axes there are"
        )
    where = "neighborhood_attention"
    window = as_window(where, window, grid_rank(where, params))
    return windowed(where, x, params, window, scale=scale, precision=precision, implementation=implementation)


def as_window(where: str, window: Window | Size, rank: int) -> Window:
    """A window of this size; an int is that of every axis.

    >>> as_window("layer", 3, 2).sizes
    (3, 3)
    """
    return window if isinstance(window, Window) else Window(every_axis(where, "window", window, rank))


def halo_window(where: str, blocks: Sequence[int], halo: Size, boundary: str | Sequence[str]) -> Window:
    """The window of a block and its halo.

    >>> halo_window("layer", (2,), 1, "mask").indices((6,))[..., 0]
    array([[-1,  0,  1,  2],
           [-1,  0,  1,  2],
           [ 1,  2,  3,  4],
           [ 1,  2,  3,  4],
           [ 3,  4,  5, -1],
           [ 3,  4,  5, -1]])
    """
    halos = per_axis(where, "halo", halo, len(blocks), least=0)
    return Window([b + 2 * a for b, a in zip(blocks, halos, strict=True)], block=blocks, boundary=boundary)


def windowed(
    layer: str,
    x,
    params: Mapping[str, Any],
    window: Window,
    *,
    scale: float | None,
    precision: lax.PrecisionLike,
    implementation: str | None,
    axis_name: str | None = None,
    scaled: bool = False,
) -> jax.Array:
    """Attention in a window with scores scale · q_i·k_j + q_i·r[j-i] + b[j-i], of which r and b are there where the
    parameters have them; `scaled`, the scale is the query's, and so of both products."""
    p, x, _ = parameters(layer, x, params, window.rank, offsets=offsets(window.sizes))
    query, key, value = project(x, p, precision)
    query = _standing(query, window)
    if scaled:
        query, scale = query * (query.shape[-1] ** -0.5 if scale is None else scale), 1.0
    y = split_attention(
        query,
        key,
        value,
        axis_name=axis_name,
        window=window,
        scale=scale,
        relative_bias=p.get("relative_bias"),
        key_embedding=embedding(layer, p, window.rank),
        precision=precision,
        implementation=implementation,
    )
    return join(y, p, precision)


def _standing(query: jax.Array, window: Window) -> jax.Array:
    """The queries of the tokens at which a strided window stands."""
    strides: Any = window.stride
    if all(s == 1 for s in strides):
        return query
    grid = query.shape[-2 - window.rank : -2]
    steps = (slice(0, n * s, s) for n, s in zip(window.query_grid(grid), strides, strict=True))
    return query[(..., *steps, slice(None), slice(None))]

"""Attention-augmented convolution: some channels from a convolution, the others from attention over the whole grid."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import ArrayLike, Real

from jaxattn.checked import MeshAxis
from jaxattn.halo import split_attention
from jaxattn.window import Window
from jaxattn.zoo.dense import conv
from jaxattn.zoo.equations import same, with_neighbours
from jaxattn.zoo.heads import PROJECTIONS, offsets, project
from jaxattn.zoo.parameters import affine, biased, grid_rank, parameters
from jaxattn.zoo.registry import row
from jaxattn.zoo.whole_grid import whole_grid


@row(
    "attention-augmented convolution", weights="concat(conv, global SASA)", source="learned + pair",
    shared="mixed / mixed", normalizer="none / softmax", paper="Bello et al. 2019 (1904.09925)",
    shapes={"kernel": "*window features -> conv_features"}
    | PROJECTIONS | {"out": "heads value_dim -> attention_features", "embedding_{axis}": "offsets_{axis} head_dim"},
)  # fmt: skip
def augmented_conv(
    x: Real[ArrayLike, "*batch_and_grid features"],
    params: Mapping[str, Any],
    *,
    query_scale: float | None = None,
    precision: lax.PrecisionLike = None,
    axis_name: MeshAxis | None = None,
) -> jax.Array:
    """A convolution beside attention over the whole grid, whose queries also see how far a key is along each axis,

        y_i = [ Σ_r W_r x_{i+r} ;  Σ_h W_O,h Σ_j softmax_j(query_scale · q_i·(k_j + r^0[j_0-i_0] + r^1[j_1-i_1])) v_j ]

    (Bello et al. 2019, arXiv 1904.09925), with zeros outside the grid in the convolution, and as many relative
    embeddings r as the grid has axes. The heads share them.

    Args:
      x: `[*batch, *grid, features]`, with any number of batch axes.
      params: "kernel" `[*window, features, conv_features]`, whose rank less two is the grid's; "query", "key"
        `[features, heads, head_dim]`, "value" `[features, heads, value_dim]`, "out" `[heads, value_dim,
        attention_features]`; "embedding_0", "embedding_1", one for each axis of the grid, `[2n - 1, head_dim]` where
        the axis has n tokens, of which entry n - 1 is offset zero; and optionally "kernel_bias" `[conv_features]`,
        "query_bias", "key_bias", "value_bias", "out_bias", of those shapes without what is summed.
      query_scale: of the query, so of both terms; None means head_dim ** -0.5.

    Returns:
      `[*batch, *grid, conv_features + attention_features]`, in the dtype of x and params, the convolution's first.

    Raises:
      ValueError: a parameter is missing or unknown, or a shape doesn't fit, by name.

    >>> import jax.numpy as jnp
    >>> params = {name: jnp.ones((8, 2, 4)) for name in ("query", "key", "value")} | {"out": jnp.ones((2, 4, 6))}
    >>> params |= {"kernel": jnp.ones((3, 3, 8, 10)), "embedding_0": jnp.ones((9, 4)), "embedding_1": jnp.ones((13, 4))}
    >>> augmented_conv(jnp.ones((2, 5, 7, 8)), params).shape
    (2, 5, 7, 16)
    """
    rank = grid_rank("augmented_conv", params)
    grid = whole_grid("augmented_conv", x, rank, axis_name)
    p, x, _ = parameters("augmented_conv", x, params, rank, offsets=offsets(grid))
    size, ones = p["kernel"].shape[:rank], (1,) * rank
    around, padding = with_neighbours(x, axis_name, same(size, ones), size, ones, ones)
    convolved = biased(conv(around, p["kernel"], padding=padding, precision=precision), p, "kernel_bias")
    query, key, value = project(x, p, precision)
    y = split_attention(
        query * (query.shape[-1] ** -0.5 if query_scale is None else query_scale),
        key,
        value,
        axis_name=axis_name,
        window=Window(grid),
        key_embedding=tuple(p[f"embedding_{axis}"][None] for axis in range(rank)),  # one for all heads
        scale=1.0,
        precision=precision,
    )
    return jnp.concatenate([convolved, affine("... h d, h d o -> ... o", y, p, "out", precision)], axis=-1)

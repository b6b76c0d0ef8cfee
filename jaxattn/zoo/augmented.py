"""Attention-augmented convolution: some channels from a convolution, the others from attention over the whole grid."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn.attention import attention
from jaxattn.window import Window
from jaxattn.zoo.dense import conv
from jaxattn.zoo.parameters import affine, features, named
from jaxattn.zoo.registry import row


@row(
    "attention-augmented convolution",
    weights="concat(conv, global SASA)",
    source="learned + pair",
    shared="mixed / mixed",
    normalizer="none / softmax",
    paper="Bello et al. 2019 (1904.09925)",
)
def augmented_conv(
    x, params: Mapping[str, Any], *, query_scale: float | None = None, precision: lax.PrecisionLike = None
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
      precision: as in `jax.lax.dot_general`.

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
    rank = max(np.ndim(params.get("kernel", ())) - 2, 1)
    names = [f"embedding_{axis}" for axis in range(rank)]
    params = named(
        "augmented_conv", params, features("augmented_conv", x, rank), kernel="*window features conv_features",
        kernel_bias="?conv_features", query="features heads head_dim", query_bias="?heads head_dim",
        key="features heads head_dim", key_bias="?heads head_dim", value="features heads value_dim",
        value_bias="?heads value_dim", out="heads value_dim attention_features", out_bias="?attention_features",
        **{name: f"offsets_{axis} head_dim" for axis, name in enumerate(names)},
    )  # fmt: skip
    x, grid = jnp.asarray(x), np.shape(x)[-1 - rank : -1]
    for name, n in zip(names, grid, strict=True):
        if len(params[name]) != 2 * n - 1:
            raise ValueError(
                f"augmented_conv: params[{name!r}] has {len(params[name])} offsets; expected {2 * n - 1} for {n} tokens"
            )
    convolved = conv(x, params["kernel"], precision=precision)
    convolved = convolved + params["kernel_bias"] if "kernel_bias" in params else convolved
    query, key, value = (
        affine("... c, c h d -> ... h d", x, params, name, precision) for name in ("query", "key", "value")
    )
    query = query * (query.shape[-1] ** -0.5 if query_scale is None else query_scale)
    embedding = tuple(params[name][None] for name in names)  # one for all heads
    everywhere = Window(grid, boundary="shift")
    y = attention(query, key, value, window=everywhere, key_embedding=embedding, scale=1.0, precision=precision)
    return jnp.concatenate([convolved, affine("... h d, h d o -> ... o", y, params, "out", precision)], axis=-1)

"""The parameters that the attention layers' modules share, by the names and in the shapes that the zoo takes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

default_kernel_init = nnx.initializers.lecun_normal()
small_init = nnx.initializers.truncated_normal(0.02)


def make_projections(
    layer: nnx.Module,
    num_heads: int,
    in_features: int,
    qkv_features: int | None,
    out_features: int | None,
    *,
    use_bias: bool,
    out_projection: bool = True,
    out_bias: bool | None = None,
    kernel_init: Callable[..., Any],
    param_dtype: Any,
    rngs: nnx.Rngs,
    without: Sequence[str] = (),
) -> int:
    """Give a module its query, key, value and out, with biases if asked for, and return head_dim.

    A kernel is drawn as a matrix, so that an initialiser sees its true fans; biases begin at zero. None for
    `qkv_features` and `out_features` is `in_features`, for `out_bias` is `use_bias`. `without` names what this layer
    does not have.
    """
    qkv_features = in_features if qkv_features is None else qkv_features
    name = type(layer).__name__
    if num_heads < 1 or qkv_features % num_heads:
        raise ValueError(f"{name}: num_heads (={num_heads}) must divide qkv_features (={qkv_features})")
    if not out_projection and out_features not in (None, qkv_features):
        raise ValueError(
            f"{name}: without an output projection, out_features (={out_features}) must be qkv_features "
            f"(={qkv_features})"
        )
    out_features = in_features if out_features is None else out_features
    heads = (num_heads, qkv_features // num_heads)
    biased = dict.fromkeys(("query", "key", "value"), use_bias) | {"out": use_bias if out_bias is None else out_bias}
    for projection in biased:
        if projection in without or (projection == "out" and not out_projection):
            continue
        before, after = (heads, (out_features,)) if projection == "out" else ((in_features,), heads)
        matrix = kernel_init(rngs.params(), (math.prod(before), math.prod(after)), param_dtype)
        setattr(layer, projection, nnx.Param(matrix.reshape(*before, *after)))
        if biased[projection]:
            setattr(layer, f"{projection}_bias", nnx.Param(jnp.zeros(after, param_dtype)))
    return heads[1]


def axis_width(layer: nnx.Module, head_dim: int, rank: int) -> int:
    """How wide each axis's embedding is, where they stand one after the other."""
    if head_dim % rank:
        raise ValueError(f"{type(layer).__name__}: the window's {rank} axes must divide head_dim (={head_dim})")
    return head_dim // rank


def make_embeddings(
    layer: nnx.Module, heads: int, size: Sequence[int], width: int, init: Callable[..., Any], dtype: Any, rngs: nnx.Rngs
):
    """Give a module a relative embedding `[heads, 2k-1, width]` for each axis of a window of `size` k."""
    for axis, k in enumerate(size):
        table = init(rngs.params(), (heads, 2 * k - 1, width), dtype)
        setattr(layer, f"embedding_{axis}", nnx.Param(table))


def offset_bias(heads: int, size: Sequence[int], init: Callable[..., Any], dtype: Any, rngs: nnx.Rngs) -> nnx.Param:
    """A bias `[heads, *(2k-1)]` for each offset in a window of `size` k."""
    return nnx.Param(init(rngs.params(), (heads, *(2 * k - 1 for k in size)), dtype))

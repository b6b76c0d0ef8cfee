"""Pooling of grids that may be split over devices."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxattn.einsum import einsum
from jaxattn.halo import shard_count, split_pad


def average_pool(
    x: Float[Array, "*batch height width channels"], axis_name: str | None = None
) -> Float[Array, "*batch height2 width2 channels"]:
    """2 × 2 means, stride 2; an odd edge has nothing beyond it to average with, and repeating it says so."""
    quarter = jnp.full((2, 2), 0.25, x.dtype)
    if axis_name is not None:
        x = split_pad(x, x.ndim - 3, axis_name, (0, 0), size=2, stride=2)
    return einsum("... 2*i+r 2*j+s c, r s -> ... i j c", x, quarter, padding="SAME", boundary="edge")


def max_pool(
    x: Float[Array, "*batch height width channels"],
    size: tuple[int, int],
    strides: tuple[int, int],
    padding: Any,
    axis_name: str | None = None,
) -> Float[Array, "*batch height2 width2 channels"]:
    """Maxima over windows; nothing stands outside the grid."""
    if axis_name is None:
        return nnx.max_pool(x, size, strides, padding)
    height, width = x.shape[-3] * shard_count(axis_name), x.shape[-2]
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads((height, width), size, strides, padding)
    rows, columns = padding
    # a window that leaves the grid holds the edge already: repeating that changes no maximum
    x = split_pad(x, x.ndim - 3, axis_name, rows, size=size[0], stride=strides[0], boundary="edge")
    pads: Any = ((0, 0), columns)
    return nnx.max_pool(x, size, strides, pads)

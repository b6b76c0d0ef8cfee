"""Rotary positions of the projected queries and keys of `Attention`."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jaxattn import position


def learned_frequencies(rotary: bool | str | Callable[..., Any], heads: int, head_dim: int, rank: int, rngs, dtype):
    """The parameter of mixed rotary frequencies, which the query heads of one key head share; or no parameter."""
    if rotary != "mixed":
        return nnx.data(None)
    return nnx.Param(position.mixed_frequencies(rngs.params(), heads, head_dim, rank, dtype=dtype))


def rotated(
    x: Array,
    rotary: Callable[..., position.Rotary],
    frequencies: Array | None,
    grid: Sequence[int],
    stride: Sequence[int],
    offset: Sequence[Any],
) -> Array:
    """Queries or keys [*batch, *grid, heads, head_dim], or with the grid's tokens in a row, turned by `rotary`'s tables
    for their grid, at stride·i + offset."""
    heads, head_dim = x.shape[-2:]
    learned = {}
    if frequencies is not None:
        learned["frequencies"] = jnp.repeat(frequencies, heads // len(frequencies), axis=0)
    dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    tables = rotary(tuple(grid), head_dim, stride=stride, offset=offset, dtype=dtype, **learned)
    shape = x.shape
    if len(grid) > 1 and shape[-3] == math.prod(grid):
        x = x.reshape((*shape[:-3], *grid, heads, head_dim))
    return position.rotate(x, tables).reshape(shape)

"""The mean of each patch of a grid."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.einsum import einsum
from jaxattn.zoo.equations import sliding


def mean_pool(x, strides: Sequence[int]) -> jax.Array:
    """The mean over the `strides` tokens that begin at each multiple of them, of those that there are.

    `[*batch, *grid, features]` to `[*batch, *positions, features]`, ceil(n / stride) positions to an axis of n.

    >>> mean_pool(jnp.arange(5.0)[:, None], (2,))[:, 0]
    Array([0.5, 2.5, 4. ], dtype=float32)
    """
    x = jnp.asarray(x)
    if all(s == 1 for s in strides):
        return x
    rank = len(strides)
    sums, window, position = sliding(strides, (1,) * rank)
    grid = x.shape[-1 - rank : -1]
    padding = [(0, -n % s) for n, s in zip(grid, strides, strict=True)]
    sizes: dict[str, Any] = dict(zip(window.split(), strides, strict=True))
    total = einsum(f"... {sums} c -> ... {position} c", x, padding=padding, **sizes)
    counts = [np.minimum(s, n - s * np.arange(-(-n // s))) for n, s in zip(grid, strides, strict=True)]
    over = jnp.asarray(functools.reduce(np.multiply.outer, counts), x.dtype)
    return total / over.reshape((1,) * (x.ndim - 1 - rank) + over.shape + (1,))

"""Softmax over the axes of a window or of a grid."""

import jax

from jaxattn.kernels.problem import statistics_dtype


def softmax(scores: jax.Array, over: tuple[int, ...]) -> jax.Array:
    """Softmax over all of these axes at once, in float32 at least, in the dtype that came.

    >>> import jax.numpy as jnp
    >>> softmax(jnp.zeros((2, 2)), (0, 1))
    Array([[0.25, 0.25],
           [0.25, 0.25]], dtype=float32)
    """
    return jax.nn.softmax(scores.astype(statistics_dtype(scores.dtype)), axis=over).astype(scores.dtype)

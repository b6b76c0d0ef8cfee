"""Softmax over the axes of a window or of a grid, also of one that is split over devices."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn.kernels.operands import statistics_dtype


def softmax(scores: jax.Array, over: tuple[int, ...], axis_name: str | None = None) -> jax.Array:
    """Softmax over all of these axes at once, in float32 at least, in the dtype that came.

    >>> import jax.numpy as jnp
    >>> softmax(jnp.zeros((2, 2)), (0, 1))
    Array([[0.25, 0.25],
           [0.25, 0.25]], dtype=float32)
    """
    exponentials = jnp.exp(below_largest(scores.astype(statistics_dtype(scores.dtype)), over, axis_name))
    return (exponentials / everywhere(exponentials.sum(over, keepdims=True), axis_name)).astype(scores.dtype)


def below_largest(scores: jax.Array, over: tuple[int, ...], axis_name: str | None = None) -> jax.Array:
    """Scores less the largest of them over these axes, and over all shards: no exponential of them overflows."""
    largest = lax.stop_gradient(jnp.max(scores, axis=over, keepdims=True, initial=-jnp.inf))  # also of no token
    if axis_name is not None:  # pmax has no derivative, and none is asked for
        largest = jnp.max(lax.all_gather(largest, axis_name), axis=0)
    return scores - largest


def everywhere(sums: jax.Array, axis_name: str | None) -> jax.Array:
    """The sum over all shards of what each has summed."""
    return sums if axis_name is None else lax.psum(sums, axis_name)

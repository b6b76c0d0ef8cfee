"""The smallest training loop that an experiment can have."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx


def fit(model: nnx.Module, loss: Callable[[nnx.Module, jax.Array], jax.Array], rate: float, steps: int, seed: int):
    """Trains a model in place, `steps` times by Adam, on `loss(model, key)`, whose key is new at each step.

    Returns:
      the loss of each step.

    >>> from flax import nnx
    >>> model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    >>> losses = fit(model, lambda m, key: (m(jnp.ones((1, 1))) - 3).sum() ** 2, 0.1, 200, 0)
    >>> bool(losses[-1] < 1e-2 * losses[0])
    True
    """
    graph, weights, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.adam(rate)

    def step(carry, key):
        weights, moments = carry
        value, gradient = jax.value_and_grad(lambda w: loss(nnx.merge(graph, w, rest), key))(weights)
        updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(weights, updates), moments), value

    keys = jax.random.split(jax.random.key(seed), steps)
    (weights, _), losses = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))((weights, optimizer.init(weights)))
    nnx.update(model, weights)
    return jnp.asarray(losses)

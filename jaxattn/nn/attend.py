"""By what `Attention` attends: `jaxattn.attention` or the caller's function; and the weights, to be shown."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxattn.halo import split_attention
from jaxattn.nn import attention_checks as checks
from jaxattn.parts import attention_weights


def by_terms(layer: Any, query, key, value, terms: dict[str, Any], dropped) -> jax.Array:
    """By `jaxattn.attention`, with the terms that it knows by name; `dropped` is dropout's key, or None."""
    return split_attention(
        query,
        key,
        value,
        **terms,
        axis_name=layer.keys_axis_name,
        dropout_rate=0.0 if dropped is None else layer.dropout_rate,
        dropout_key=dropped,
        broadcast_dropout=layer.broadcast_dropout,
        precision=layer.precision,
        implementation=layer.implementation,
    )


def by_function(layer: Any, query, key, value, mask, dropped, **known: Any) -> jax.Array:
    """By the layer's `attention_fn`, as flax calls it."""
    return layer.attention_fn(
        query,
        key,
        value,
        mask=mask,
        dropout_rng=dropped,
        dropout_rate=layer.dropout_rate,
        broadcast_dropout=layer.broadcast_dropout,
        deterministic=dropped is None,
        dtype=layer.dtype,
        precision=layer.precision,
        **known,
    )


def weights(layer: Any, query, key, terms: dict[str, Any], shape: tuple[int, ...]) -> jax.Array:
    """`[*batch, *query_grid, heads, slots]`, of inputs of this shape."""
    terms = dict(terms)
    if terms.pop("grid_sizes") is not None:
        raise ValueError(f"{type(layer).__name__}: grid_sizes must be None where the weights are asked for")
    found = attention_weights(query, key, **terms, precision=layer.precision)
    before = query.shape[:-2] if layer.window is not None else shape[:-1]
    return found.reshape(*before, layer.num_heads, found.shape[-1])


def sow(layer: Any, query, key, terms: dict[str, Any], shape: tuple[int, ...]) -> None:
    """Store the weights as `nnx.Intermediate`; without a window, `[*batch, heads, T, S]`, as flax stores them."""
    checks.check_weights(layer, "sow_weights")
    found = weights(layer, query, key, terms, shape)
    if layer.window is None:
        found = jnp.swapaxes(found.reshape(*query.shape[:-1], found.shape[-1]), -2, -3)
    layer.sow(nnx.Intermediate, "attention_weights", found)

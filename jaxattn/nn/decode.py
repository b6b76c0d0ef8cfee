"""One token after another: the cache of `Attention`'s keys and values, by flax's convention.

Without a window the cache holds all tokens, each at its place. Under a sliding causal window it holds as many as a
window reaches, token i at place i mod length: a ring. What a query sees of it are the slots before it on a torus, which
is a window with the boundary "wrap" that ends at the query.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from jaxattn.window import Window


def check(layer: Any):
    """Raise where a layer cannot take one token after another."""
    where, window = type(layer).__name__, layer.window
    if window is None and layer.rank != 1:
        raise ValueError(
            f"{where}: rank (={layer.rank}) must be 1 with decode: tokens follow one another along one axis"
        )
    if layer.axis_name is not None:
        raise ValueError(f"{where}: axis_name (={layer.axis_name!r}) must be None with decode, whose grid is one token")
    if window is None:
        return
    along = window.along[0]
    fits = along.causal and along.stride == along.block == 1 and along.offset is None and along.boundary != "valid"
    if window.rank != 1 or not fits:
        raise ValueError(
            f"{where}: window (={window}) must be causal and of one axis with decode, without strides, blocks or an "
            f"offset, whatever its dilation and its boundary (but 'valid'): Window({along.size}, causal=True)"
        )


def init_cache(layer: Any, shape: tuple[int, ...], dtype: DTypeLike):
    """Give the layer an empty cache for `[*batch, max_length]` tokens."""
    check(layer)
    if not shape:
        raise ValueError(
            f"{type(layer).__name__}: input_shape must be [*batch, max_length, in_features], two or more ints"
        )
    *batch, length = shape
    if layer.window is not None:
        length = min(length, _reach(layer.window))
    full = (*batch, length, layer.num_kv_heads, layer.head_dim)
    layer.cached_key, layer.cached_value = (nnx.Cache(jnp.zeros(full, dtype)) for _ in range(2))
    layer.cache_index = nnx.Cache(jnp.array(0, jnp.int32))


def follow(
    layer: Any, key: jax.Array, value: jax.Array, mask: Any, segment_ids: Any, sow_weights: bool
) -> tuple[jax.Array, jax.Array, Any, dict[str, Any]]:
    """The cache with one more token: its keys and values, who is seen of them, and where the query stands."""
    where, window = type(layer).__name__, layer.window
    check(layer)
    if layer.cached_key is None:
        raise ValueError(f"{where}: decode (=True) must come after init_cache, which makes the cache")
    *batch, length, heads, dim = layer.cached_key.shape
    if key.shape != (*batch, 1, heads, dim):
        raise ValueError(
            f"{where}: inputs_k (={[*key.shape[:-2], layer.in_kv_features]}) must be one token with decode, "
            f"{[*batch, 1, layer.in_kv_features]}, for the cache that init_cache made"
        )
    if key.dtype != layer.cached_key.dtype:
        raise ValueError(
            f"{where}: the cache (={layer.cached_key.dtype}) must have the keys' dtype, {key.dtype}: "
            f"init_cache(input_shape, {key.dtype})"
        )
    if segment_ids is not None:
        raise ValueError(f"{where}: segment_ids must be None with decode, whose cache does not keep them: give a mask")
    if sow_weights and window is not None:
        raise ValueError(f"{where}: sow_weights (=True) must be False with decode and a window, whose keys are a ring")
    if isinstance(mask, tuple) and mask[0] is not None:
        raise ValueError(f"{where}: mask of keys must be None with decode: of the cached tokens, give a mask by slot")
    index = layer.cache_index[...]
    place = index % length if window is not None and length == _reach(window) else index
    for cache, new in ((layer.cached_key, key), (layer.cached_value, value)):
        cache[...] = lax.dynamic_update_slice_in_dim(cache[...], new, place, -3)
    layer.cache_index[...] += 1
    key, value, written = layer.cached_key[...], layer.cached_value[...], jnp.arange(length) <= index  # [length]
    by_slot = mask[1] if isinstance(mask, tuple) else mask
    if window is None:
        written = jnp.broadcast_to(written, (*batch, 1, 1, length))
        return key, value, written if by_slot is None else jnp.asarray(by_slot, bool) & written, {}
    along = window.along[0]
    if length < _reach(window):  # and so never full before its end
        window = dataclasses.replace(window, boundary="mask" if along.boundary == "shift" else along.boundary)
        return key, value, (None, by_slot), {"window": window, "query_offset": index}
    before = (along.size - 1) * along.dilation
    ring = Window(along.size, dilation=along.dilation, boundary="wrap", offset=-before)
    written = None if along.boundary == "zero" else written  # what is not yet there is zeros
    return key, value, (written, by_slot), {"window": ring, "query_offset": place}


def causal(layer: Any, query: jax.Array, key: jax.Array, mask: Any) -> Any:
    """The mask, and nothing that comes after a query."""
    if layer.window is not None:
        raise ValueError(
            f"{type(layer).__name__}: is_causal (=True) must be False with a window, which says so itself: "
            f"Window({layer.window.size}, causal=True)"
        )
    if isinstance(mask, tuple) and mask[0] is not None:
        raise ValueError(
            f"{type(layer).__name__}: mask of keys must be None with is_causal: give one by slot, [..., 1, 1, tokens]"
        )
    past = jnp.tril(jnp.ones((query.shape[-3], key.shape[-3]), bool))
    by_slot = mask[1] if isinstance(mask, tuple) else mask
    return past if by_slot is None else jnp.asarray(by_slot, bool) & past


def _reach(window: Window) -> int:
    """The tokens from the first that a window holds to the query, which is its last."""
    along = window.along[0]
    return (along.size - 1) * along.dilation + 1

"""What `Attention` depends on besides query, key and value: its tables, its other parameters, and what a call gives."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxattn import position
from jaxattn.window import Window

TABLES = ("relative_bias", "key_embedding")


def make(layer: Any, given: Mapping[str, Any]) -> None:
    """Give the layer the tables over a window's offsets that it is to learn, one for each of its windows, and sinks."""
    init, dtype, rngs = given["relative_init"], given["param_dtype"], given["rngs"]
    init = nnx.initializers.normal(layer.head_dim**-0.5) if init is None else init
    heads, kind = layer.num_heads // max(len(layer.windows), 1), given["key_embedding"]

    def table(*shape):
        return nnx.Param(init(rngs.params(), shape, dtype))

    def embedding(offsets):
        if kind in ("factorized", "decomposed"):
            dim = layer.head_dim // (len(offsets) if kind == "factorized" else 1)
            return nnx.List([table(heads, n, dim) for n in offsets])
        return table(1 if kind == "shared" else heads, *offsets, layer.head_dim)

    def of_windows(one):
        several = nnx.List if isinstance(layer.window, tuple) else lambda made: made[0]
        return several([one([2 * k - 1 for k in window.sizes]) for window in layer.windows])

    bias = lambda offsets: table(heads, *offsets)
    layer.relative_bias = of_windows(bias) if given["relative_bias"] else nnx.data(None)
    layer.key_embedding = of_windows(embedding) if kind else nnx.data(None)
    layer.sink_logits = nnx.Param(jnp.zeros(layer.num_heads, dtype)) if given["sinks"] else nnx.data(None)


def of_call(layer: Any, dtype, mask, bias, segment_ids, grid_sizes=None) -> dict[str, Any]:
    """By the names of `attention`'s arguments."""
    several = isinstance(layer.window, tuple)
    return {
        "window": layer.window,
        "mask": [_bools(one) for one in mask] if several and isinstance(mask, list) else _bools(mask),
        "bias": None if bias is None else jnp.asarray(bias, dtype),
        "segment_ids": segment_ids,
        "grid_sizes": grid_sizes,
        "sink_logits": None if layer.sink_logits is None else layer.sink_logits[...],
        "relative_bias": _values(layer.relative_bias, dtype, several),
        "key_embedding": _values(layer.key_embedding, dtype, several),
        "normalize": layer.normalize,
        "logits_soft_cap": layer.logits_soft_cap,
        "scale": layer.scale,
    }


def clipped(layer: Any, terms: dict[str, Any], key: jax.Array) -> dict[str, Any]:
    """The terms on this grid of keys, whose windows and tables `clip` makes no larger than the grid."""
    if not layer.clip:
        return terms
    grid = layer.whole_grid(key.shape[-2 - layer.rank : -2])
    windows = [window.clipped(grid) for window in layer.windows]
    if isinstance(layer.window, Window):
        cut = {n: position.crop(terms[n], layer.window, windows[0]) for n in TABLES if terms[n] is not None}
        return {**terms, **cut, "window": windows[0]}
    pairs = list(zip(layer.windows, windows, strict=True))
    cut = {
        name: [position.crop(table, *pair) for table, pair in zip(terms[name], pairs, strict=True)]
        for name in TABLES
        if terms[name] is not None
    }
    return {**terms, **cut, "window": windows}


def _values(tables: Any, dtype: Any, several: bool) -> Any:
    """The values of a parameter, or of a list of one for each axis of the window, or of `several` such."""
    if several and tables is not None:
        return [_values(table, dtype, False) for table in tables]
    if isinstance(tables, nnx.List):
        return tuple(jnp.asarray(table[...], dtype) for table in tables)
    return None if tables is None else jnp.asarray(tables[...], dtype)


def _bools(mask: Any) -> Any:
    """A mask, or a pair of them, of any numbers as bools."""
    if mask is None:
        return None
    return tuple(map(_bools, mask)) if isinstance(mask, tuple) else jnp.asarray(mask, bool)

"""What `Attention` refuses, by name."""

from collections.abc import Mapping
from typing import Any

from jaxattn.checked import shown
from jaxattn.nn import decode as decoding
from jaxattn.normalize import NORMALIZERS
from jaxattn.window import Window

KEY_EMBEDDINGS = (False, True, "shared", "factorized", "decomposed")


def check(layer: Any, given: Mapping[str, Any]) -> None:
    """Of a layer that knows its sizes, raise where what its constructor was given does not fit."""
    name = type(layer).__name__
    heads, kv_heads, features = layer.num_heads, layer.num_kv_heads, layer.qkv_features
    relative_bias, key_embedding, rate = given["relative_bias"], given["key_embedding"], given["dropout_rate"]
    if features % heads:
        raise ValueError(f"{name}: num_heads (={heads}) must divide qkv_features (={features})")
    if heads % kv_heads:
        raise ValueError(f"{name}: num_kv_heads (={kv_heads}) must divide num_heads (={heads})")
    if key_embedding not in KEY_EMBEDDINGS:
        raise ValueError(f"{name}: key_embedding (={key_embedding!r}) must be one of {KEY_EMBEDDINGS}")
    if layer.window is None and (relative_bias or key_embedding):
        raise ValueError(
            f"{name}: relative_bias (={relative_bias}) and key_embedding (={key_embedding!r}) need a window; "
            "for a global layer, give the grid"
        )
    if layer.clip and (layer.window is None or layer.grid is not None):
        raise ValueError(f"{name}: clip (=True) must be False without a window that may be larger than a grid")
    if layer.window is not None and key_embedding == "factorized" and features // heads % layer.rank:
        raise ValueError(
            f"{name}: with key_embedding='factorized', the window's {layer.rank} axes must divide "
            f"head_dim (={features // heads})"
        )
    if isinstance(layer.normalize, str) and layer.normalize not in NORMALIZERS:
        raise ValueError(f"{name}: normalize (={layer.normalize!r}) must be one of {tuple(NORMALIZERS)}, or a function")
    if given["sinks"] and layer.normalize != "softmax":
        raise ValueError(f"{name}: sinks (=True) must be False with normalize={layer.normalize!r}: 'softmax' has them")
    if not 0 <= rate < 1:
        raise ValueError(f"{name}: dropout_rate (={rate}) must be in [0, 1)")
    if layer.logits_soft_cap is not None and layer.logits_soft_cap <= 0:
        raise ValueError(f"{name}: logits_soft_cap (={layer.logits_soft_cap}) must be None or a number > 0")
    if not given["out_projection"] and layer.out_features != features:
        raise ValueError(
            f"{name}: without an output projection, out_features (={layer.out_features}) "
            f"must be qkv_features (={features})"
        )
    _check_groups(layer)
    _check_attention_fn(layer, given["sinks"])
    if layer.decode:
        check_one_window(layer, "decode (=True)")
        decoding.check(layer)


def check_call(layer: Any, input_positions: Any, out_sharding: Any, **ours: Any) -> None:
    """Raise where a call is given what only an `attention_fn`, or only `jaxattn.attention`, or nothing takes."""
    if out_sharding is not None and layer.out is None:
        raise ValueError(
            f"{type(layer).__name__}: out_sharding (={out_sharding}) must be None without an output projection"
        )
    _refuse_with_attention_fn(layer, **ours)
    if input_positions is not None and layer.attention_fn is None:
        raise ValueError(f"{type(layer).__name__}: input_positions must be None without an attention_fn")


def check_weights(layer: Any, what: str) -> None:
    """Raise where there are no weights to show: on a part of the grid, and of windows that differ in their slots."""
    check_one_window(layer, what)
    if layer.axis_name is not None:
        raise ValueError(
            f"{type(layer).__name__}: {what} needs the whole grid, and it is split over {layer.axis_name!r}"
        )


def check_one_window(layer: Any, what: str) -> None:
    """Raise where each group of heads has a window of its own."""
    if isinstance(layer.window, tuple):
        raise ValueError(
            f"{type(layer).__name__}: {what} must be left out where window is a list, of one for each of "
            f"{len(layer.window)} groups of heads: it needs one Window"
        )


def _check_groups(layer: Any) -> None:
    """Of a window for each group of heads."""
    windows: tuple[Window, ...] = layer.windows
    if not isinstance(layer.window, tuple):
        return
    given, heads = f"{type(layer).__name__}: window (={list(windows)}) must be", layer.num_heads
    if len({(window.rank, window.stride) for window in windows}) > 1:
        raise ValueError(f"{given} windows of one number of axes and one stride, for they share their queries")
    if heads % len(windows):
        raise ValueError(f"{given} as many as divide num_heads (={heads})")
    per, shared = heads // len(windows), heads // layer.num_kv_heads
    if per % shared and shared % per:
        raise ValueError(
            f"{type(layer).__name__}: num_kv_heads (={layer.num_kv_heads}) must divide the heads of each group "
            f"(={per}), of which each window has one, or be shared by some of the {len(windows)} groups"
        )


def _check_attention_fn(layer: Any, sinks: bool) -> None:
    """What is `jaxattn.attention`'s alone needs it."""
    plain = {"normalize": "softmax"}
    names = ("window", "logits_soft_cap", "scale", "implementation", "axis_name")
    ours = {name: getattr(layer, name) for name in (*names, *plain)}
    given = {name: x for name, x in ours.items() if x != plain.get(name)}
    _refuse_with_attention_fn(layer, **given, sinks=sinks or None)


def _refuse_with_attention_fn(layer: Any, **given: Any) -> None:
    for name, value in given.items():
        if layer.attention_fn is not None and value is not None:
            raise ValueError(
                f"{type(layer).__name__}: {name} (={shown(value)}) must be left out with an attention_fn "
                f"(={layer.attention_fn!r}), which does not know it"
            )

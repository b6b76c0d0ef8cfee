"""A window for each group of heads: `attention` on each group alone, so that each costs its own work."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.checked import shown
from jaxattn.window import Window

BY_KEY_HEAD = ("key", "value", "extra_key", "extra_value")
BY_GROUP = ("relative_bias", "key_embedding")  # their shapes are the window's: one for each group
MAYBE_BY_GROUP = ("bias", "mask")  # a list is one for each group, and anything else every group's


def attend(call: Callable[..., Any], windows: Sequence[Any], arguments: Mapping[str, Any]) -> Any:
    """What `call` (`attention`, or what takes its arguments) makes of each group of heads in its own window, joined."""
    found = [call(**given) for given in split(windows, arguments)]
    if len(found) == 1:
        return found[0]
    if not arguments.get("return_residuals"):
        return jnp.concatenate(found, axis=-2)
    outputs, lses = zip(*found, strict=True)
    return jnp.concatenate(outputs, axis=-2), jnp.concatenate(lses, axis=-1)


def split(windows: Sequence[Any], arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arguments of each group of heads in its own window; those that are checked after this may be of no shape."""
    if not isinstance(windows, list | tuple) or not windows or not all(isinstance(w, Window) for w in windows):
        raise ValueError(
            f"attention: window (={windows!r}) must be None, a jaxattn.Window, or a sequence of them, one for each "
            "group of heads"
        )
    groups = len(windows)
    if len({window.rank for window in windows}) > 1:
        raise ValueError(f"attention: window (={list(windows)}) must be windows of one number of axes")
    for name in BY_GROUP + MAYBE_BY_GROUP:
        if not _fits(name, arguments.get(name), groups):
            raise ValueError(
                f"attention: {name} (={shown(arguments[name])}) must be a list of {groups}, one for each window"
                f"{'; what serves every group is no list' if name in MAYBE_BY_GROUP else ''}"
            )
    heads, key_heads = (np.shape(arguments[name])[-2:-1] for name in ("query", "key"))
    if not heads or not key_heads:  # too few axes, which `attention` refuses
        return [{**arguments, "window": windows[0]}]
    (heads,), (key_heads,) = heads, key_heads
    per = heads // groups
    if heads % groups:
        raise ValueError(f"attention: window (={groups} windows) must be as many as divide the {heads} heads of query")
    shared = heads // max(key_heads, 1)  # query heads of one key head
    if key_heads * shared != heads or (per % shared and shared % per):
        raise ValueError(
            f"attention: key (of {key_heads} heads) must have heads that divide those of each group, {per}, or that "
            f"some of the {groups} groups share"
        )

    for name, count in {**dict.fromkeys(BY_KEY_HEAD, key_heads), "sink_logits": heads}.items():
        x, axis = arguments.get(name), -1 if name == "sink_logits" else -2
        if x is not None and np.shape(x)[axis:][:1] != (count,):  # or a part of them would be taken
            raise ValueError(f"attention: {name} (={shown(x)}) must be of {count} heads, with {groups} windows")

    def of_group(n: int) -> dict[str, Any]:
        given = {**arguments, "window": windows[n], "query": _heads(arguments["query"], n * per, per)}
        for name in BY_KEY_HEAD:
            given[name] = _heads(arguments.get(name), n * per // shared, max(per // shared, 1))
        for name in BY_GROUP + MAYBE_BY_GROUP:
            if isinstance(arguments.get(name), list) or name in BY_GROUP:
                given[name] = None if arguments.get(name) is None else arguments[name][n]
        if arguments.get("sink_logits") is not None:
            given["sink_logits"] = _heads(arguments["sink_logits"], n * per, per, axis=-1)
        if arguments.get("score_mod") is not None:
            given["score_mod"] = _of_heads_from(n * per, arguments["score_mod"])
        if isinstance(arguments.get("dropout_key"), jax.Array | np.ndarray):  # or all groups would drop alike
            given["dropout_key"] = jax.random.fold_in(arguments["dropout_key"], n)
        return given

    return [of_group(n) for n in range(groups)]


def _fits(name: str, value: Any, groups: int) -> bool:
    """Whether an argument is what groups can take: where it is one for each, as many."""
    several = isinstance(value, list) or (name in BY_GROUP and isinstance(value, tuple))
    return value is None or (len(value) == groups if several else name in MAYBE_BY_GROUP)


def _heads(x: Any, first: int, count: int, axis: int = -2) -> Any:
    """Some heads of an array, or of its description."""
    cut = lambda x: x[(..., slice(first, first + count), *[slice(None)] * (-1 - axis))]
    return jax.eval_shape(cut, x) if isinstance(x, jax.ShapeDtypeStruct) else None if x is None else cut(jnp.asarray(x))


def _of_heads_from(first: int, score_mod: Any) -> Any:
    """A `score_mod` of all heads, for those of a group: it is told their numbers among all."""
    if not callable(score_mod):
        return score_mod
    return lambda score, head, query, key: score_mod(score, head + first, query, key)

"""Parameters by name, whose shapes are checked against each other before anything is computed."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.einsum import einsum


def features(layer: str, x, rank: int) -> dict[str, int]:
    """The size of x's last axis by its name, for `named`, where x has room for a grid of this rank."""
    if np.ndim(x) < rank + 1:
        raise ValueError(
            f"{layer}: x has shape {list(np.shape(x))}; expected [*batch, *grid, features] with {rank} grid axes"
        )
    return {"features": np.shape(x)[-1]}


def named(layer: str, params: Mapping[str, Any], sizes: Mapping[str, int], **shapes: str) -> dict[str, jax.Array]:
    """The parameters that a layer takes, as arrays.

    Args:
      layer: the function, for its messages.
      params: arrays by name.
      sizes: sizes of axes that are known already.
      **shapes: each parameter's axes by name; a name is one size wherever it stands, and `*window` any number of axes
        that are the same wherever they stand. A "?" before them: the parameter may be missing.

    >>> sorted(named("layer", {"out": jnp.ones((2, 3))}, {"heads": 2}, out="heads out", out_bias="?out"))
    ['out']
    """
    check_names(layer, params, [name for name, axes in shapes.items() if not axes.startswith("?")], shapes)
    known: dict[str, tuple[int, ...]] = {axis: (size,) for axis, size in sizes.items()}
    for name, axes in shapes.items():
        if name in params:
            match(f"{layer}: params[{name!r}]", np.shape(params[name]), axes.lstrip("?").split(), known)
    return {name: jnp.asarray(x) for name, x in params.items()}


def check_names(layer: str, params: Mapping[str, Any], required: Sequence[str], allowed: Iterable[str]) -> None:
    """Raise where a parameter is missing, unknown, or the bias of one that is missing."""
    if missing := [name for name in required if name not in params]:
        raise ValueError(f"{layer}: params lack {', '.join(map(repr, missing))}; needed are {', '.join(required)}")
    if unknown := [name for name in params if name not in allowed]:
        raise ValueError(f"{layer}: params have {', '.join(map(repr, unknown))}; allowed are {', '.join(allowed)}")
    for name in params:
        owner = name.removesuffix("_bias")
        if owner in allowed and owner not in params:
            raise ValueError(f"{layer}: params have {name!r} and lack {owner!r}, which it belongs to")


def match(what: str, shape: tuple[int, ...], axes: list[str], known: dict[str, tuple[int, ...]]) -> None:
    """Find each axis's size in `shape` and add it to `known`, or raise where it is known to be another."""
    stars = [axis for axis in axes if axis.startswith("*") and axis not in known]
    free = len(shape) - sum(len(known.get(axis, (0,))) for axis in axes if axis not in stars)
    found, start = {}, 0
    for axis in axes:
        length = free // len(stars) if axis in stars else len(known.get(axis, (0,)))
        found.setdefault(axis, shape[start : start + length])
        start += length
    fits = start == len(shape) and all(found[axis] == known.get(axis, found[axis]) for axis in axes)
    repeated = [n for axis in axes for n in found[axis]] == list(shape)
    if not fits or not repeated or any(len(found[axis]) < 1 for axis in axes):
        sizes = [n for axis in axes for n in known.get(axis, (axis,))]
        raise ValueError(
            f"{what} has shape {list(shape)}; expected [{', '.join(axes)}] = [{', '.join(map(str, sizes))}]"
        )
    known |= found


def affine(equation: str, x: jax.Array, params: Mapping[str, jax.Array], name: str, precision) -> jax.Array:
    """`einsum(equation, x, params[name])`, and its bias added if there is one."""
    y = einsum(equation, x, params[name], precision=precision)
    return y + params[f"{name}_bias"] if f"{name}_bias" in params else y

"""Parameters by name, whose shapes are checked against each other before anything is computed.

In the line that a function has in the registry (`row`) are the axes of each parameter, by name:

    "heads head_dim"                 a name is one size wherever it stands; "heads|1" may be 1 instead
    "*window features"               any number of axes, the same wherever they stand
    "features -> heads head_dim"     a linear map, from what is summed; it may have a bias, "query_bias" for "query"
    "?heads"                         it may be missing
    "embedding_{axis}": "n_{axis}"   one for each axis of the grid
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.checked import REAL, allowed
from jaxattn.einsum import einsum
from jaxattn.zoo.registry import ROWS

Shapes = Mapping[str, str]


def parameters(
    layer: str, x, params: Mapping[str, Any], rank: int | None = None, **sizes: int | tuple[int, ...]
) -> tuple[dict[str, jax.Array], jax.Array, tuple[int, ...]]:
    """The parameters that a layer takes, as arrays, x as one, and its grid.

    Args:
      layer: the function, by its name in the registry.
      x: `[*batch, *grid, features]`.
      params: arrays by name.
      rank: the grid's; None: as the parameters say (`grid_rank`).
      **sizes: sizes of axes that are known already; of several, `*window`, a tuple.

    >>> given = {"reduce": jnp.ones((2, 1)), "span": jnp.ones((1, 3, 2))}
    >>> found, x, grid = parameters("involution", jnp.ones((5, 2)), given)
    >>> list(found), grid
    (['reduce', 'span'], (5,))
    """
    rank = grid_rank(layer, params) if rank is None else rank
    check_grid(layer, x, rank)
    *_, features = np.shape(x)
    grid = np.shape(x)[np.ndim(x) - 1 - rank : -1]
    return matched(layer, params, rank, features=features, grid=grid, **sizes), jnp.asarray(x), grid


def grid_rank(layer: str, params: Mapping[str, Any]) -> int:
    """How many axes the grid has: as many as the first parameter that has some for it, but one at least.

    >>> grid_rank("involution", {"span": jnp.ones((1, 3, 3, 2))}), grid_rank("sasa", {"embedding_0": jnp.ones((5, 4))})
    (2, 1)
    """
    for name, axes in ROWS[layer].shapes.items():
        if "{axis}" in name:
            return max(1, sum(given.startswith(name.removesuffix("{axis}")) for given in params))
        if stars := axes.count("*"):
            return max(1, (np.ndim(params.get(name, ())) + stars - len(before_and_after(axes))) // stars)
    return 1


def matched(layer: str, params: Mapping[str, Any], rank: int, **sizes: int | tuple[int, ...]) -> dict[str, jax.Array]:
    """The parameters that a layer takes, as arrays, whose shapes fit each other and the sizes that are known."""
    axes = spelled(ROWS[layer].shapes, rank)
    _check_names(layer, params, axes)
    known: dict[str, tuple[int, ...]] = {}
    for axis, size in sizes.items():
        many = isinstance(size, tuple)
        known |= {f"*{axis}": size} | {f"{axis}_{k}": (n,) for k, n in enumerate(size)} if many else {axis: (size,)}
    found = {}
    for name in axes:
        if name in params:
            what = name if tuple(ROWS[layer].shapes) == ("kernel",) else f"params[{name!r}]"
            found[name] = jnp.asarray(allowed(layer, what, params[name], REAL))
            _match(f"{layer}: {what}", found[name].shape, before_and_after(axes[name]), known)
    return {name: found[name] for name in params}


def check_grid(layer: str, x: Any, rank: int) -> None:
    """Raise where x has fewer axes than a grid of this rank and the features."""
    if np.ndim(x) < rank + 1:
        telling = [name for name, axes in ROWS[layer].shapes.items() if "*" in axes or "{axis}" in name]
        said = f", as many as {' and '.join(telling)} say" if telling else ""
        raise ValueError(
            f"{layer}: x (={list(np.shape(x))}) must be [*batch, *grid, features] with {rank} axes of a grid{said}"
        )


def spelled(shapes: Shapes, rank: int) -> dict[str, str]:
    """`shapes` with every bias, and with what there is for each axis of a grid.

    >>> spelled({"query": "features -> heads", "embedding_{axis}": "n_{axis}"}, 2)
    {'query': 'features -> heads', 'query_bias': '?heads', 'embedding_0': 'n_0', 'embedding_1': 'n_1'}
    """
    found = {}
    for name, axes in shapes.items():
        for axis in range(rank if "{axis}" in name else 1):
            found[name.format(axis=axis)] = axes.format(axis=axis)
        if " -> " in axes:
            found[f"{name}_bias"] = f"?{axes.partition(' -> ')[2]}"
    return found


def before_and_after(axes: str) -> list[str]:
    """The axes of a parameter, in order."""
    return axes.lstrip("?").replace(" -> ", " ").split()


def _check_names(layer: str, params: Mapping[str, Any], axes: Mapping[str, str]) -> None:
    """Raise where a parameter is missing, unknown, or the bias of one that is missing."""
    required = [name for name in axes if not axes[name].startswith("?")]
    if missing := [name for name in required if name not in params]:
        raise ValueError(
            f"{layer}: params (={list(params)}) must have {', '.join(map(repr, missing))}; needed are "
            f"{', '.join(required)}"
        )
    if unknown := [name for name in params if name not in axes]:
        raise ValueError(
            f"{layer}: params (={list(params)}) must not have {', '.join(map(repr, unknown))}; allowed are "
            f"{', '.join(axes)}"
        )
    for name in params:
        owner = name.removesuffix("_bias")
        if owner in axes and owner not in params:
            raise ValueError(f"{layer}: params (={list(params)}) must have {owner!r}, to which {name!r} belongs")


def _match(what: str, shape: tuple[int, ...], axes: list[str], known: dict[str, tuple[int, ...]]) -> None:
    """Find each axis's size in `shape` and add it to `known`, or raise where it is known to be another."""
    stars = [axis for axis in axes if axis.startswith("*") and axis not in known]
    free = len(shape) - sum(len(known.get(axis, (0,))) for axis in axes if axis not in stars)
    found, start = {}, 0
    for n, axis in enumerate(axes):
        length = free // len(stars) if axis in stars else len(known.get(axis, (0,)))
        size = shape[start : start + length]
        if axis.endswith("|1"):
            axes = [*axes[:n], "1" if size == (1,) else axis.removesuffix("|1"), *axes[n + 1 :]]
        found.setdefault(axes[n], size)
        start += length
    fits = start == len(shape) and all(found[axis] == known.get(axis, found[axis]) for axis in axes)
    repeated = [n for axis in axes for n in found[axis]] == list(shape)
    if not fits or not repeated or any(len(found[axis]) < 1 for axis in axes):
        sizes = [n for axis in axes for n in known.get(axis, (axis,))]
        raise ValueError(f"{what} (={list(shape)}) must be [{', '.join(axes)}] = [{', '.join(map(str, sizes))}]")
    known |= {axis: size for axis, size in found.items() if axis != "1"}


def affine(equation: str, x: jax.Array, params: Mapping[str, jax.Array], name: str, precision) -> jax.Array:
    """`einsum(equation, x, params[name])`, and its bias added if there is one."""
    return biased(einsum(equation, x, params[name], precision=precision), params, f"{name}_bias")


def biased(y: jax.Array, params: Mapping[str, jax.Array], name: str = "bias") -> jax.Array:
    """y and the parameter of this name, if there is one, whose axes are the last of y's."""
    if name not in params:
        return y
    return y + jnp.expand_dims(params[name], range(y.ndim - params[name].ndim))

"""Tables of one window or grid as those of another, as timm resizes them."""

import math

import jax
import numpy as np

from jaxattn.models.layout import Entry


def resize_flat_table(table: np.ndarray, entry: Entry) -> np.ndarray:
    """A relative bias `[offsets, heads]` of a square window for the window of ours, `[heads, *offsets]`.

    Where the offsets of the one window stand among those of the other is a geometric series from the middle, and
    between them values are interpolated linearly (BEiT, Bao et al. 2022, arXiv 2106.08254, with timm's interpolation).

    >>> from jaxattn.models.layout import layout
    >>> entry = Entry(["bias"], [(1, 5, 5)], [layout("head row column -> (row column) head")])
    >>> resize_flat_table(np.arange(9.0)[:, None], entry).reshape(5, 5)[2]
    array([3., 3., 4., 5., 5.])
    """
    heads, *sizes = entry.shapes[0]
    side = math.isqrt(len(table))
    if table.ndim != 2 or side * side != len(table) or side < 3 or table.shape[1] != heads:
        return table  # no square window's; what compares the shapes says so
    found = table.reshape(side, side, heads).astype(np.float64)
    for axis, size in enumerate(sizes):
        if size != side:
            places, offsets = _places(side, size), np.arange(size) - size // 2
            found = np.apply_along_axis(lambda values: np.interp(offsets, places, values), axis, found)  # noqa: B023
    return found.reshape(-1, heads).astype(table.dtype)


def resize_table(table: np.ndarray, entry: Entry) -> np.ndarray:
    """The same of a table `[heads, *offsets]`.

    >>> from jaxattn.models.layout import layout
    >>> entry = Entry(["bias"], [(1, 5, 5)], [layout("a b c -> a b c")])
    >>> resize_table(np.ones((1, 3, 3)), entry).shape
    (1, 5, 5)
    """
    if table.ndim != 3 or len(table) != entry.shapes[0][0] or table.shape[1] != table.shape[2]:
        return table
    flat = resize_flat_table(table.reshape(len(table), -1).T, entry)
    return flat.T.reshape(entry.shapes[0]) if flat.shape[0] * flat.shape[1] == math.prod(entry.shapes[0]) else table


def _places(size: int, other: int) -> np.ndarray:
    """Where `size` offsets stand on an axis of `other`: 0, ±1, ±(1 + q), ±(1 + q + q²) ..., out to the last of them."""
    low, high = 1.01, 1.5
    q = (low + high) / 2
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q ** (size // 2)) / (1 - q) > other // 2 else (q, high)
    half = np.cumsum(q ** np.arange(size // 2))
    return np.concatenate([-half[::-1], [0], half])


def resize_positions(position: np.ndarray, prefix: int, grid: tuple[int, int]) -> np.ndarray:
    """Learned positions `[1, prefix + n², features]` of a square grid for another: bicubic, with antialiasing.

    >>> resize_positions(np.ones((1, 1 + 4, 3)), 1, (3, 4)).shape
    (1, 13, 3)
    """
    before, table = np.split(position, [prefix], axis=-2)
    side = math.isqrt(table.shape[-2])
    if side * side != table.shape[-2]:
        return position  # no square grid's; what compares the shapes says so
    table = table.reshape(side, side, -1)
    wide = np.asarray(jax.image.resize(table, (*grid, table.shape[-1]), "cubic"))
    return np.concatenate([before, wide.reshape(*before.shape[:-2], -1, before.shape[-1])], axis=-2)


def resize_grid(position: np.ndarray, entry: Entry) -> np.ndarray:
    """Learned positions `[1, *grid, features]` for the grid of ours, as `resize_positions` has them.

    >>> from jaxattn.models.layout import layout
    >>> entry = Entry(["position"], [(3, 4, 2)], [layout("row column c -> 1 row column c")])
    >>> resize_grid(np.ones((1, 2, 2, 2)), entry).shape
    (1, 3, 4, 2)
    """
    if position.ndim != 4 or position.shape[::3] != entry.shape[::3]:
        return position  # what compares the shapes says so
    return np.asarray(jax.image.resize(position, entry.shape, "cubic"))


def resize_offsets(table: np.ndarray, entry: Entry) -> np.ndarray:
    """Embeddings of the offsets along one axis, `[offsets, features]`, for as many of ours: interpolated linearly, each
    as the middle of its share of the line (Li et al. 2022, MViTv2, arXiv 2112.01526).

    >>> from jaxattn.models.layout import layout
    >>> entry = Entry(["rows"], [(5, 1)], [layout("offset dim -> offset dim")])
    >>> resize_offsets(np.array([[0.0], [1.0], [2.0]]), entry).ravel().round(1)
    array([0. , 0.4, 1. , 1.6, 2. ])
    """
    if table.ndim != 2 or table.shape[1] != entry.shape[1]:
        return table
    old, new = len(table), entry.shape[0]
    places = (np.arange(new) + 0.5) * old / new - 0.5
    found = [np.interp(places, np.arange(old), column) for column in table.T.astype(np.float64)]
    return np.stack(found, axis=-1).astype(table.dtype)

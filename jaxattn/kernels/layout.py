"""How a loop walks a grid: arranged so that the queries of a step, and the keys of each of its tiles, are slices.

Along each axis a step takes `run` tiles at once. Queries are put in the order of their tiles; keys are put so that the
columns of a tile lie side by side: already so, mostly; regrouped by residue class under dilation; extended where the
boundary puts a key (or a zero) outside the grid.
"""

import math
from typing import NamedTuple

import numpy as np

from jaxattn.kernels.tiles import AxisTiles, cut
from jaxattn.window import Axis


class AxisLayout(NamedTuple):
    """One axis. Tile j of the run of step s is row s·run + j of `tiles`; a run ends in empty tiles if it must."""

    tiles: AxisTiles
    run: int
    steps: int
    queries: np.ndarray | None  # the query at each place of the tiles in order, -1 for none; None: as they are
    place: np.ndarray | None  # where each query stands in that order; None: as they are
    keys: np.ndarray | None  # the key at each place of the arrangement, -1 for a zero; None: as they are
    length: int  # the places of that arrangement
    start: np.ndarray  # [steps·run], where the columns of a tile begin in the arrangement
    band: np.ndarray  # [steps], where the keys of a whole run begin
    overlap: np.ndarray  # [kinds, length, n], which columns (tile·columns + column) meet at a place of it; -1 for none
    kind: np.ndarray  # [steps], which of these a step is: few differ
    ranges: np.ndarray  # [patterns, t, 2], the columns that a query sees, from and to: few tiles differ in that
    pattern: np.ndarray  # [steps·run], which of them a tile has
    axis: Axis

    @property
    def columns(self) -> int:
        """How many a tile has."""
        return self.tiles.keys.shape[1]

    @property
    def everyone(self) -> bool:
        """Whether every query of a tile sees all its columns."""
        return bool((self.ranges[..., 0] <= 0).all() and (self.ranges[..., 1] >= self.columns).all())

    @property
    def someone(self) -> bool:
        """Whether every query of a tile sees some column."""
        return bool((np.maximum(self.ranges[..., 0], 0) < np.minimum(self.ranges[..., 1], self.columns)).all())


def lay_out(axis: Axis, t: int, run: int) -> AxisLayout:
    """Arrange one axis for tiles of `t` queries, `run` of them at once."""
    tiles = cut(axis, t)
    count, columns = len(tiles.queries), tiles.keys.shape[1]
    first = tiles.start
    keys: np.ndarray | None = None
    if axis.dilation == 1 and axis.boundary in ("shift", "mask", "valid") and columns <= axis.length:
        start = np.clip(first, 0, axis.length - columns)  # nobody sees beyond the grid
        tiles = _moved(tiles, axis, start - first)
    else:
        keys, start = _arrange_keys(axis, first, columns)
    steps = math.ceil(count / run)
    empty = steps * run - count
    tiles = AxisTiles(*(np.concatenate([x, x[-1:].repeat(empty, 0)]) for x in tiles))
    start = np.concatenate([start, start[-1:].repeat(empty)])
    queries = _first_only(tiles.queries.ravel())
    n = len(axis.start)
    place = np.argsort(np.where(queries < 0, n, queries), kind="stable")[:n]
    as_they_are = np.array_equal(queries, np.arange(n))
    length = axis.length if keys is None else len(keys)
    band, overlap = _overlap(start.reshape(steps, run), columns, count, length)
    overlap, kind = np.unique(overlap, axis=0, return_inverse=True) if overlap.size else (overlap[:1], 0 * band)
    seen, pattern = np.unique(np.hstack([tiles.low, tiles.high]) + np.tile(tiles.shift, 2), axis=0, return_inverse=True)
    return AxisLayout(
        tiles=tiles,
        run=run,
        steps=steps,
        queries=None if as_they_are else queries,
        place=None if as_they_are else place,
        keys=keys,
        length=length,
        start=start,
        band=band,
        overlap=overlap,
        kind=kind.ravel(),
        ranges=np.stack(np.split(seen, 2, axis=1), -1),
        pattern=pattern.ravel(),
        axis=axis,
    )


def _moved(tiles: AxisTiles, axis: Axis, by: np.ndarray) -> AxisTiles:
    """The tiles, with their columns beginning `by` positions further on."""
    position = (tiles.start + by)[:, None] + np.arange(tiles.keys.shape[1])
    return tiles._replace(
        keys=axis.fold(position),
        named_keys=position,
        shift=tiles.shift - by[:, None],
        relative=tiles.relative + by[:, None],
        start=tiles.start + by,
    )


def _arrange_keys(axis: Axis, first: np.ndarray, columns: int) -> tuple[np.ndarray | None, np.ndarray]:
    """The residue classes that are needed, one after the other, each as far as its tiles reach."""
    residue = first % axis.dilation
    keys, start, length = [], np.zeros(len(first), int), 0
    for r in np.unique(residue):
        mine = residue == r
        low = first[mine].min()
        start[mine] = length + (first[mine] - low) // axis.dilation
        position = np.arange(low, first[mine].max() + axis.dilation * columns, axis.dilation)
        keys.append(axis.fold(position))
        length += len(position)
    arranged = np.concatenate(keys)
    return (None if np.array_equal(arranged, np.arange(axis.length)) else arranged), start


def _first_only(queries: np.ndarray) -> np.ndarray:
    """-1 where a query has come before."""
    once = np.full_like(queries, -1)
    place = np.unique(queries, return_index=True)[1]
    once[place] = queries[place]
    return once


def _overlap(start: np.ndarray, columns: int, count: int, keys: int) -> tuple[np.ndarray, np.ndarray]:
    """For each step: where its keys begin, and which columns of its run meet at each place from there on."""
    steps, run = start.shape
    band = start.min(1)
    if run == 1:  # nothing meets
        return band, np.zeros((steps, 0, 0), int)
    length = int((start.max(1) - band).max()) + columns
    band = np.minimum(band, keys - length)
    flat = np.arange(columns) + columns * np.arange(run)[:, None]
    step, place, column = (
        x.reshape(-1, columns)[:count].ravel()
        for x in np.broadcast_arrays(
            np.arange(steps)[:, None, None], (start - band[:, None])[..., None] + np.arange(columns), flat
        )
    )
    group = step * length + place
    order = np.argsort(group, kind="stable")
    group, column = group[order], column[order]
    rank = np.arange(len(group)) - np.searchsorted(group, group)  # how many have met there before
    overlap = np.full((steps * length, rank.max() + 1), -1)
    overlap[group, rank] = column
    return band, overlap.reshape(steps, length, -1)

"""How a grid is cut into tiles of queries, and which keys each tile needs. Static, per axis, for every kind of window.

A tile holds queries of one residue class modulo the dilation, so the keys it needs lie one dilation apart: its
*columns*. Slot u of query q is column u + shift[q]. That is all a kernel has to know: positions are not folded, so no
key is twice a slot of one query, and edge, reflect and wrap need nothing of their own.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxattn.window import Axis


class AxisTiles(NamedTuple):
    """One row for each tile along an axis; ragged tiles repeat their last query."""

    queries: np.ndarray  # [tiles, t]
    start: np.ndarray  # [tiles], the position of column 0
    keys: np.ndarray  # [tiles, columns], the key in each column; -1 for none
    named_keys: np.ndarray  # [tiles, columns], the same, with the position itself for none
    shift: np.ndarray  # [tiles, t], slot u is in column u + shift
    relative: np.ndarray  # [tiles, t], column c is entry c + relative of a table over the offsets
    low: np.ndarray  # [tiles, t], the first slot that the query sees
    high: np.ndarray  # [tiles, t], the slot after the last


def cut(axis: Axis, t: int) -> AxisTiles:
    """Cut the queries of an axis into tiles of `t`."""
    queries, first, columns = _spans(axis, t)
    start, low, high = axis.start[queries], axis.low[queries], axis.high[queries]
    position = first[:, None] + axis.dilation * np.arange(columns)
    keys = axis.fold(position)
    shift = (start - first[:, None]) // axis.dilation
    relative = (start - axis.query[queries]) // axis.dilation + axis.size - 1 - shift
    return AxisTiles(
        queries=queries,
        start=first,
        keys=keys,
        named_keys=np.where(keys < 0, position, keys),
        shift=shift,
        relative=relative,
        low=low,
        high=high,
    )


def rows_of(table: AxisTiles, tile: Any, axis: Axis) -> AxisTiles:
    """The rows of some tiles. Where the program decides which, it holds no more than it must: tiles differ from one
    another in few ways, but for where they begin; and keys are told from that."""
    if isinstance(tile, np.ndarray | int):
        return AxisTiles(*(x[tile] for x in table))
    start = jnp.asarray(table.start)[tile]
    position = start[..., None] + axis.dilation * jnp.arange(table.keys.shape[1])
    keys = axis.fold(position)
    found: dict[str, Any] = {"start": start, "keys": keys, "named_keys": jnp.where(keys < 0, position, keys)}
    found |= {name: look_up(x, tile) for name, x in table._asdict().items() if name not in found}
    return AxisTiles(**found)


def look_up(table: np.ndarray, tile: Any) -> Array:
    """`table[tile]`, of rows that are few but for their first number."""
    few, which = np.unique(table - table[:, :1], axis=0, return_inverse=True)
    if len(few) * few.shape[1] + 2 * len(table) >= table.size:
        return jnp.asarray(table)[tile]
    return jnp.asarray(few)[jnp.asarray(which.ravel())[tile]] + jnp.asarray(table[:, 0])[tile][..., None]


def reach(axis: Axis, t: int) -> int:
    """The keys that a tile of `t` queries needs along an axis."""
    return _spans(axis, t)[2]


def _spans(axis: Axis, t: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The queries of every tile, [tiles, t], the position of its first column, and the columns that each has."""
    residue = axis.query % axis.dilation
    rows = []
    for r in np.unique(residue):
        members = np.flatnonzero(residue == r)
        members = np.pad(members, (0, -len(members) % t), mode="edge")
        rows += list(members.reshape(-1, t))
    queries = np.stack(rows)
    start, low, high = axis.start[queries], axis.low[queries], axis.high[queries]
    seeing = low < high
    first = np.where(seeing, start + axis.dilation * low, np.iinfo(int).max).min(1)
    first = np.where(seeing.any(1), first, start[:, 0])
    last = np.where(seeing, start + axis.dilation * (high - 1), first[:, None]).max(1)
    return queries, first, int((last - first).max() // axis.dilation + 1)


def best_sizes(axes: Sequence[Axis], heads: int, dims: tuple[int, int], backend: str) -> tuple[int, ...]:
    """Queries per tile along each axis, multiples of the block: what costs least by the model of `_cost`, of what fits
    into a step, or is at most twice the size of the smallest tile where the keys of a window alone do not fit."""
    choices = []
    for axis in axes:
        longest = int(np.unique(axis.query % axis.dilation, return_counts=True)[1].max())
        few = {_blocks(min(2**n, longest), axis) for n in range(longest.bit_length() + 1) if 2**n <= 256}
        choices.append([(t, reach(axis, t)) for t in sorted(few)])
    found = []
    for choice in itertools.product(*choices):
        rows, columns = (math.prod(x[k] for x in choice) for k in (0, 1))
        places = math.prod(tile_count(axis, t) * t for axis, (t, _) in zip(axes, choice, strict=True))
        waste = places / math.prod(len(axis.start) for axis in axes)
        held = heads * tile_numbers(rows, columns, dims)
        found.append((_cost(rows, columns, sum(dims)) * waste, held, tuple(t for t, _ in choice)))
    limit = max(step_budget(backend), 2 * min(held for _, held, _ in found))
    return min((cost, sizes) for cost, held, sizes in found if held <= limit)[1]


def _cost(rows: int, columns: int, dims: int) -> float:
    """Of a query, for a tile of so many queries and columns: products (small ones are slower), exponentials, and the
    keys that are moved. About nanoseconds, on two cores."""
    return columns * (0.07 * dims * (1 + 4 / rows) + 1 + 1.2 * dims / rows)


def tile_numbers(rows: int, columns: int, dims: Sequence[int]) -> int:
    """The numbers that a tile holds for a head: scores, keys and values, queries."""
    return rows * columns + (rows + columns) * sum(dims)


def step_budget(backend: str) -> int:
    """The numbers that a step may hold: on a CPU what its caches do."""
    return 2**20 if backend == "cpu" else 2**24


def tile_count(axis: Axis, t: int) -> int:
    """How many tiles an axis is cut into."""
    return sum(-(-n // t) for n in np.unique(axis.query % axis.dilation, return_counts=True)[1].tolist())


def tiles_per_step(tiles: int, most: int) -> int:
    """About as many tiles as there may be in a step: what divides their number leaves nothing to pad."""
    divisors = [n for n in range(1, tiles + 1) if tiles % n == 0 and most <= 2 * n <= 3 * most]
    if divisors:
        return min(divisors, key=lambda n: abs(n - most))
    return tiles if tiles <= most else math.ceil(tiles / math.ceil(tiles / most))


def _blocks(t: int, axis: Axis) -> int:
    """`t` rounded up to whole blocks."""
    return math.ceil(t / axis.block) * axis.block

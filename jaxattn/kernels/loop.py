"""How a loop takes the tiles of a problem: what a step of the loop takes of every array, and how it leaves its results.

Arrays are arranged as [entries, chunks, *places, ...]: the batch in chunks where a step has no room for all of it (the
axis is absent where there is one), then the grid in the order of its tiles. A chunk is every so many entries, so that
a batch cut over devices is not gathered by the loop. A step takes queries as [tiles, entries, *queries, ...] and keys
as [tiles, entries, *columns, ...].
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxattn import machine
from jaxattn.kernels import tiles
from jaxattn.kernels.layout import AxisLayout, lay_out
from jaxattn.kernels.operands import Operands, Options
from jaxattn.kernels.tiles import AxisTiles
from jaxattn.sizes import Extent, is_symbolic, planned

Rows = tuple[AxisTiles, ...]  # an axis each, with a row for each tile of a step


class Loop(NamedTuple):
    """The steps of a loop: `chunks` of the batch times the steps of every axis."""

    axes: tuple[AxisLayout, ...]
    chunks: int

    @property
    def tables(self) -> Rows:
        """The tiles of every axis, all of them."""
        return tuple(axis.tiles for axis in self.axes)

    @property
    def whole(self) -> bool:
        """Whether every tile sees all keys: then they are the same in every step."""
        return all(axis.columns == axis.length for axis in self.axes)

    @property
    def steps(self) -> tuple[int, ...]:
        """How many there are: of chunks, and along each axis."""
        return (self.chunks, *(axis.steps for axis in self.axes))

    @property
    def runs(self) -> tuple[int, ...]:
        """The tiles of a step along each axis."""
        return tuple(axis.run for axis in self.axes)

    @property
    def lead(self) -> int:
        """The axes of an arranged array before its places."""
        return 1 + (self.chunks > 1)


class Step(NamedTuple):
    """Where the loop is: an int where there is nothing to loop, else traced."""

    chunk: Any
    axes: tuple[Any, ...]


def plan_loop(operands: Operands, options: Options) -> Loop:
    """Choose tiles, runs and chunks, from shapes, dtype and backend."""
    batch = math.prod(operands.query.shape[: -len(options.queries) - 2])
    heads, head_dim = operands.query.shape[-2:]
    dims = head_dim, operands.value.shape[-1]
    return _plan(options, batch, heads, dims, machine.backend(), machine.device_count())


@functools.lru_cache(maxsize=128)
def _plan(options: Options, batch: Extent, heads: int, dims: tuple[int, int], backend: str, devices: int) -> Loop:
    axes = options.axes
    sizes = options.tile or tiles.best_sizes(axes, heads, dims, backend)
    held = heads * tiles.tile_numbers(
        math.prod(sizes), math.prod(tiles.reach(a, t) for a, t in zip(axes, sizes, strict=True)), dims
    )
    room = max(1, tiles.step_budget(backend) // held)
    if is_symbolic(batch) or options.dropout_rate > 0:  # which has no divisors; whose bits are drawn at once
        entries, chunks = planned(batch), 1
    else:
        least = math.gcd(batch, devices)  # so that a batch that is cut over devices stays where it is
        entries = max(n for n in range(least, batch + 1, least) if batch % n == 0 and n <= max(room, least))
        chunks = batch // entries
    room, runs = max(1, room // entries), []
    for axis, t in zip(reversed(axes), reversed(sizes), strict=True):
        runs.insert(0, tiles.tiles_per_step(tiles.tile_count(axis, t), room))
        room = max(1, room // runs[0])
    layouts = tuple(lay_out(axis, t, run) for axis, t, run in zip(axes, sizes, runs, strict=True))
    return Loop(layouts, chunks)


# Arrangement


def chunked(x: Array, operands: Operands, loop: Loop) -> Array:
    """[*batch|1, ...] as [entries|1, chunks|1, ...]."""
    batch = operands.query.shape[: operands.query.ndim - len(loop.axes) - 2]
    rest = x.shape[len(batch) :]
    if math.prod(x.shape[: len(batch)]) == 1:
        return x.reshape(*[1] * loop.lead, *rest)
    x = jnp.broadcast_to(x, (*batch, *rest))
    return x.reshape(-1, *([loop.chunks] if loop.chunks > 1 else []), *rest)


def arrange_queries(x: Array, operands: Operands, loop: Loop) -> Array:
    """[*batch, *queries|1, ...] in the order of the tiles; zeros where a tile has no query. An axis of length one stays
    one where there are more queries along it."""
    x = chunked(x, operands, loop)
    same = [x.shape[a] < len(axis.axis.start) for a, axis in enumerate(loop.axes, loop.lead)]
    return _at_places(x, [None if one else axis.queries for one, axis in zip(same, loop.axes, strict=True)], loop)


def arrange_keys(x: Array, operands: Operands, loop: Loop) -> Array:
    """[*batch, *keys, ...], regrouped and extended, so that the columns of every tile are a slice."""
    return _at_places(chunked(x, operands, loop), [axis.keys for axis in loop.axes], loop)


def restore(x: Array, operands: Operands, loop: Loop) -> Array:
    """`arrange_queries`, undone."""
    for axis, layout in enumerate(loop.axes, loop.lead):
        place = layout.place
        if place is not None and np.array_equal(place, np.arange(len(place))):
            x = lax.slice_in_dim(x, 0, len(place), axis=axis)
        elif place is not None:
            x = jnp.take(x, place, axis=axis)
    return x.reshape(*operands.query.shape[: operands.query.ndim - len(loop.axes) - 2], *x.shape[loop.lead :])


def _at_places(x: Array, index: Sequence[np.ndarray | None], loop: Loop) -> Array:
    for axis, places in enumerate(index, loop.lead):
        x = x if places is None else take(x, places, axis)
    return x


def take(x: Array, index: np.ndarray | Array, axis: int) -> Array:
    """Along one axis, zeros where the index is -1."""
    n = x.shape[axis]
    if isinstance(index, np.ndarray) and np.array_equal(index, np.arange(n)):
        return x
    if n == 0:
        return jnp.zeros((*x.shape[:axis], len(index), *x.shape[axis + 1 :]), x.dtype)
    if isinstance(index, np.ndarray) and index.min() >= 0:
        return jnp.take(x, index, axis=axis, mode="clip")
    return jnp.take(x, jnp.where(index < 0, n, index), axis=axis, mode="fill", fill_value=0)


# The loop


def take_steps(body: Callable[[Step, Any], Any], carry: Any, loop: Loop) -> Any:
    """Take every step."""
    count = math.prod(loop.steps)
    if count == 1:
        return body(Step(0, (0,) * len(loop.axes)), carry)

    def take_step(i: Array, carry: Any) -> Any:
        at = []
        for steps in reversed(loop.steps):
            at.insert(0, 0 if steps == 1 else i % steps)
            i = i // steps
        return body(Step(at[0], tuple(at[1:])), carry)

    return lax.fori_loop(0, count, take_step, carry)


def rows(loop: Loop, step: Step) -> Rows:
    """The tables of the tiles of a step."""
    return tuple(tiles.rows_of(axis.tiles, _tiles(loop, step, a), axis.axis) for a, axis in enumerate(loop.axes))


def of_tiles(table: np.ndarray, loop: Loop, step: Step, a: int) -> Any:
    """The rows, for the tiles of a step, of a table with one for each tile along axis a."""
    tile = _tiles(loop, step, a)
    return table[tile] if isinstance(tile, np.ndarray) else jnp.asarray(table)[tile]


def _tiles(loop: Loop, step: Step, a: int) -> Any:
    """The tiles of a step, by their number along axis a."""
    tile = np.unravel_index(np.arange(math.prod(loop.runs)), loop.runs)[a]
    return tile if loop.axes[a].steps == 1 else step.axes[a] * loop.axes[a].run + tile


def take_chunk(x: Array, loop: Loop, step: Step) -> Array:
    """[entries, chunks, ...] as [entries, ...]."""
    if loop.chunks == 1:
        return x
    return x[:, 0] if x.shape[1] == 1 else lax.dynamic_index_in_dim(x, step.chunk, 1, keepdims=False)


def take_queries(x: Array, loop: Loop, step: Step) -> Array:
    """[entries, chunks, *places|1, ...] as [tiles, entries, *queries|1, ...]."""
    x, rank = take_chunk(x, loop, step), len(loop.axes)
    corner, sizes = _corner(loop, step)
    pairs = []
    for axis, (begin, run, t) in enumerate(zip(corner, loop.runs, sizes, strict=True), 1):
        if run * t < x.shape[axis]:
            x = lax.dynamic_slice_in_dim(x, begin, run * t, axis)
        pairs += [run, t] if run * t == x.shape[axis] else [1, 1]
    x = jnp.moveaxis(x.reshape(x.shape[0], *pairs, *x.shape[1 + rank :]), range(1, 1 + 2 * rank, 2), range(rank))
    x = jnp.broadcast_to(x, (*loop.runs, *x.shape[rank:]))
    return x.reshape(-1, *x.shape[rank:])


def put_queries(x: Array, tile: Array, loop: Loop, step: Step, add: bool = False) -> Array:
    """`take_queries`, undone: write, or add, in place."""
    rank = len(loop.axes)
    corner, _ = _corner(loop, step)
    tile = tile.reshape(*loop.runs, *tile.shape[1:])
    one = [x.shape[a] == 1 for a in range(loop.lead, loop.lead + rank)]
    tile = tile.sum(tuple(a for a in range(rank) if one[a]), keepdims=True)
    tile = jnp.moveaxis(tile, range(rank), range(1, 1 + 2 * rank, 2))
    places = [tile.shape[a] * tile.shape[a + 1] for a in range(1, 1 + 2 * rank, 2)]
    tile = tile.reshape(tile.shape[0], *places, *tile.shape[1 + 2 * rank :])
    return put(x, tile, tuple(0 if o else c for o, c in zip(one, corner, strict=True)), loop, step, add)


def take_columns(x: Array, loop: Loop, step: Step) -> Array:
    """[entries, chunks, *keys, ...] as [tiles, entries, *columns, ...]."""
    x, rank = take_chunk(x, loop, step), len(loop.axes)
    sizes = (x.shape[0], *(axis.columns for axis in loop.axes), *x.shape[1 + rank :])
    if sizes == x.shape:
        return jnp.broadcast_to(x, (math.prod(loop.runs), *x.shape))
    starts = [of_tiles(axis.start, loop, step, a) for a, axis in enumerate(loop.axes)]
    one = lambda *start: lax.dynamic_slice(x, (0, *start, *[0] * (x.ndim - 1 - rank)), sizes)
    return jax.vmap(one)(*(jnp.asarray(start) for start in starts))


def add_columns(x: Array, tile: Array, loop: Loop, step: Step) -> Array:
    """The transpose of `take_columns`: what the tiles of a step send to the keys that they share, added in place."""
    rank, begin = len(loop.axes), []
    tile = tile.reshape(*loop.runs, *tile.shape[1:])
    for a, axis in enumerate(loop.axes):
        tile = jnp.moveaxis(tile, 0, rank)  # [runs to come, entries, keys so far, run, columns, ...]
        tile = tile.reshape(*tile.shape[:rank], -1, *tile.shape[rank + 2 :])
        if axis.run == 1:
            begin.append(of_tiles(axis.start, loop, step, a)[0])
            continue
        place = slice(0, 1) if axis.steps == 1 else step.axes[a][None]
        table = lambda x, place=place, static=axis.steps == 1: (x if static else jnp.asarray(x))[place][0]
        begin.append(table(axis.band))
        kind = table(axis.kind)
        meeting = (axis.overlap if axis.steps == 1 else jnp.asarray(axis.overlap))[kind]  # [keys, n]
        terms = [take(tile, meeting[:, n], rank) for n in range(meeting.shape[1])]
        tile = functools.reduce(jnp.add, terms)
    return put(x, tile, tuple(begin), loop, step, add=True)


def put(x: Array, tile: Array, at: tuple, loop: Loop, step: Step, add: bool) -> Array:
    """Write, or add, [entries, ...] to the step's chunk of [entries, chunks, ...] in place; `at` is where, from axis 1
    of the tile on."""
    tile = tile.astype(x.dtype)
    if loop.chunks > 1:
        tile, at = tile[:, None], (0 if x.shape[1] == 1 else step.chunk, *at)
    if tile.shape == x.shape:
        return x + tile if add else tile
    at = (0, *at, *[0] * (x.ndim - 1 - len(at)))
    return lax.dynamic_update_slice(x, lax.dynamic_slice(x, at, tile.shape) + tile if add else tile, at)


def _corner(loop: Loop, step: Step) -> tuple[tuple, list[int]]:
    """The first place of a step, and the queries of a tile, along each axis."""
    sizes = [axis.tiles.queries.shape[1] for axis in loop.axes]
    return tuple(s * run * t for s, run, t in zip(step.axes, loop.runs, sizes, strict=True)), sizes


def zeros(shape: tuple[int, ...], dtype: Any, operands: Operands) -> Array:
    """Zeros that vary over the mesh axes that the operands vary over, as a loop under shard_map must be given."""
    zeros = jnp.zeros(shape, dtype)
    varying = tuple(jax.typeof(operands.query).manual_axis_type.varying)
    return lax.pcast(zeros, varying, to="varying") if varying else zeros

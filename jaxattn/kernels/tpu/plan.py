"""What a kernel is planned as, from shapes, dtype and chip alone: tiles, lanes, and the VMEM that they take.

A tile of T queries meets a box of M keys: along each axis a slice of the arranged keys. Along the last axis of a grid,
which lies across the sublanes of the vector registers, the slices of all tiles are static (or, in 1-D, begin at whole
registers); along the others a table says where they begin.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn import machine
from jaxattn.kernels.layout import lay_out
from jaxattn.kernels.tpu.strips import Strips, cut
from jaxattn.window import Axis

LANES, SUBLANES = 128, 8
MIB = 2**20
WIDE = ("v6e",)  # matrix units of 256 × 256 numbers, in the others 128 × 128
VMEM = {"v4": 16 * MIB, "v5e": 128 * MIB, "v5p": 64 * MIB, "v6e": 128 * MIB}  # of a core
KINDS = {"TPU v4": "v4", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v5 lite": "v5e", "TPU v5e": "v5e"}
KINDS |= {"TPU v6 lite": "v6e", "TPU v6e": "v6e"}
# A query sees a key where the product of their codes, of 128 numbers each, is MATCH; lane ANY is of keys that all see.
MATCH = ANY = 64


class Heads(NamedTuple):
    """How heads lie in lanes: blocks of `abreast` key heads, each block with `members` query heads to a key head."""

    dim: int  # of a head, padded
    abreast: int  # heads in the lanes of a block
    blocks: int
    members: int
    key_heads: int  # without padding
    itemsize: int

    @property
    def lanes(self) -> int:
        """Of a block."""
        return self.dim * self.abreast

    @property
    def packing(self) -> int:
        """Numbers in the 32 bits of a sublane: 2 in bfloat16."""
        return 4 // self.itemsize


class AxisPlan(NamedTuple):
    """One axis. Tile j holds the queries at the places from begin[j] on, and meets the keys from start[j] on.

    Tiles may overlap, as blocks of 7 must in registers of 8: then only some of a tile's queries are its own. The rest
    see nothing; they belong to the next tile, but for the first `before` ones, which belong to the one before.

    Queries and keys come filled up to `query_count` and `key_count`, and are put at these places by the kernel
    (`order`), or before it where it goes in strips (`Plan.outside`).
    """

    tile: int
    columns: int
    begin: np.ndarray  # [tiles]
    before: np.ndarray  # [tiles]
    start: np.ndarray  # [tiles]
    queries: np.ndarray | None  # the query at each place, -1 for none; None: as they are
    keys: np.ndarray | None  # the key at each place, -1 for a zero; None: as they are
    length: int  # the places of the keys
    pattern: np.ndarray  # [tiles], which row of the following it has
    low: np.ndarray  # [patterns, tile], the first column that a query sees
    high: np.ndarray  # [patterns, tile], the column after the last
    relative: np.ndarray  # [patterns, tile], column c is entry c + relative of a table over the offsets
    own: np.ndarray  # [patterns, tile], whether a query is one of the tile's own
    everyone_sees: bool  # whether every query sees a key in a tile of its own
    query_count: int
    key_count: int
    dilation: int

    @property
    def tiles(self) -> int:
        """How many there are."""
        return len(self.start)

    @property
    def places(self) -> int:
        """Of queries."""
        return int(self.begin[-1]) + self.tile

    @property
    def overlaps(self) -> bool:
        """Whether tiles hold queries that are not their own."""
        return self.places < self.tiles * self.tile

    @property
    def step(self) -> int:
        """Entries of such a table from one query to the next, which has the earlier one."""
        return int(-np.diff(self.relative, axis=1).min(initial=0))

    def offset(self, pattern: int) -> int:
        """How many entries later than the earliest pattern one begins."""
        return int(self.relative[pattern, 0] - self.relative[:, 0].min())


class Plan(NamedTuple):
    """The tiles of every axis; `rows` tile rows (of the axes but the last, if that is static) an iteration."""

    heads: Heads
    axes: tuple[AxisPlan, ...]
    extra: int  # tokens that every tile meets behind its box
    keys_first: bool = False  # scores are [keys, (head, query)], otherwise [head, query, keys]
    unit: int = LANES  # the width of a matrix unit
    rows: int = 1
    vmem: int = 0  # bytes that are planned with
    strips: Strips | None = None  # of the first axis; None: a step holds the whole grid
    # in strips, `queries` and `keys` of every axis: what stands at these places before the kernel, for no strip has all
    outside: tuple[tuple[np.ndarray | None, np.ndarray | None], ...] = ()

    @property
    def static(self) -> bool:
        """Whether the tiles along the last axis are written out."""
        return len(self.axes) > 1

    @property
    def across(self) -> AxisPlan | None:
        """The axis whose tiles are written out."""
        return self.axes[-1] if self.static else None

    @property
    def looped(self) -> tuple[AxisPlan, ...]:
        """The axes whose tiles are looped over."""
        return self.axes[:-1] if self.static else self.axes

    @property
    def tile_rows(self) -> int:
        """Of the axes that are looped over."""
        return math.prod(axis.tiles for axis in self.looped)

    @property
    def strip_count(self) -> int:
        """How many there are."""
        return 1 if self.strips is None else self.strips.number

    @property
    def step_rows(self) -> int:
        """Tile rows of a step: all, or those of a strip."""
        return self.tile_rows // self.strip_count

    @property
    def tile_columns(self) -> int:
        """Tiles in a row."""
        return self.axes[-1].tiles if self.static else 1

    @property
    def at_once(self) -> int:
        """Tiles in an iteration."""
        return self.rows * self.tile_columns

    @property
    def queries(self) -> int:
        """Of a tile."""
        return math.prod(axis.tile for axis in self.axes)

    @property
    def box(self) -> int:
        """Keys of a tile, around its queries."""
        return math.prod(axis.columns for axis in self.axes)

    @property
    def extra_places(self) -> int:
        """Of the extra tokens, in whole registers."""
        whole = SUBLANES * self.heads.packing
        return -(-self.extra // whole) * whole

    @property
    def keys(self) -> int:
        """All that a tile meets."""
        return self.box + self.extra_places

    @property
    def apart(self) -> int:
        """With keys first: how many heads' queries just fill the columns of a matrix unit, so that these heads' weights
        meet their values apart from the others'; 0 where it takes all heads, or where they don't."""
        abreast, queries = self.heads.abreast, self.queries
        few = max(1, self.unit // queries)
        return few if few < abreast and few * queries % self.unit == 0 else 0

    @property
    def array_lanes(self) -> int:
        """Of all key heads in an array: in whole blocks, but where a step can read beyond the last head, and take what
        it finds there for zeros."""
        heads = self.heads
        beyond = heads.blocks > 1 and heads.members == 1 and self.strips is None
        return heads.key_heads * heads.dim if beyond else heads.blocks * heads.lanes

    @property
    def patterns(self) -> int:
        """The combinations of every axis' patterns."""
        return math.prod(len(axis.low) for axis in self.axes)

    @property
    def everyone_sees(self) -> bool:
        """Whether, by the window alone, every query sees a key in a tile of its own."""
        return all(axis.everyone_sees for axis in self.axes)

    @property
    def overlaps(self) -> bool:
        """Whether tiles hold queries that are not their own, and that see nothing there."""
        return any(axis.overlaps for axis in self.axes)

    def table(self) -> np.ndarray:
        """[numbers, tile rows]: for each looped axis the first place of the queries and of the keys; then the pattern,
        counted over the looped axes. In strips the places along the first axis are those within the strip, and two more
        numbers say where its keys begin, and how many of them no later strip meets. The last are, for each looped axis,
        how many of a tile's queries are of the tile before."""
        at = np.unravel_index(np.arange(self.tile_rows), [axis.tiles for axis in self.looped])
        rows, pattern = [], np.zeros(self.tile_rows, int)
        for axis, j in zip(self.looped, at, strict=True):
            rows += [axis.begin[j], axis.start[j]]
            pattern = pattern * len(axis.low) + axis.pattern[j]
        rows.append(pattern)
        if (strips := self.strips) is not None:
            strip = at[0] // strips.tiles
            rows[0], rows[1] = rows[0] - strip * strips.queries, rows[1] - strips.begin[strip]
            rows += [strips.begin[strip], strips.done[strip]]
        rows += [axis.before[j] for axis, j in zip(self.looped, at, strict=True)]
        return np.stack(rows).astype(np.int32)

    def in_strips(self, count: int) -> "Plan":
        """The same, in so many strips, of which each has equally many tiles."""
        first = self.axes[0]
        axes = [x._replace(queries=None, keys=None, query_count=x.places, key_count=x.length) for x in self.axes]
        return self._replace(
            axes=tuple(axes),
            strips=cut(first.tile, first.columns, first.start, first.length, count),
            outside=tuple((axis.queries, axis.keys) for axis in self.axes),
        )


def chip() -> str | None:
    """The generation of the TPU that is traced for, or of this machine's; "v5e" where there is neither; None if it is
    not known."""
    if (said := machine.chip()) is not None:
        return said
    return KINDS.get(jax.devices()[0].device_kind) if jax.default_backend() == "tpu" else "v5e"


def lanes_of(heads: int, key_heads: int, dims: tuple[int, int], dtype: jnp.dtype, filled: bool = False) -> Heads:
    """Keys and values alike are padded to 16, 32, 64, 128 or 256 numbers a head, and key heads to whole blocks. Few
    heads, each with keys of its own, leave lanes of their one block empty, but where these are to be `filled`."""
    dim = next(n for n in (16, 32, 64, 128, 256) if max(dims) <= n)
    abreast = max(1, LANES // dim)
    abreast = abreast if filled or heads > key_heads else min(abreast, key_heads)
    return Heads(dim, abreast, -(-key_heads // abreast), heads // key_heads, key_heads, dtype.itemsize)


def plan_axis(axis: Axis, own: int, unit: int, align: int, tile: int = 0) -> AxisPlan:
    """Tiles of `own` queries, in `tile` places if those are more; boxes of whole `unit`s of keys. Both begin at
    multiples of `align`, of which `own` is one, or has room to. Both are 1 along an axis without registers."""
    layout, tile = lay_out(axis, own, 1), tile or own
    start = layout.start // align * align
    columns = -(-int((layout.start - start).max() + layout.tiles.keys.shape[1]) // unit) * unit
    length = max(-(-layout.length // align) * align, columns)
    start = np.minimum(start, length - columns)
    keys = np.arange(layout.length) if layout.keys is None else layout.keys
    keys = np.concatenate([keys, np.full(length - layout.length, -1)])
    first = own * np.arange(len(start))
    end = first[-1] + own
    begin = np.minimum(first // align * align, max(end + -end % align, tile) - tile)
    queries = np.arange(len(axis.query)) if layout.queries is None else layout.queries
    queries = np.concatenate([queries, np.full(begin[-1] + tile - len(queries), -1)])
    moved = (layout.start - start)[:, None]
    low, high = (x + layout.tiles.shift + moved for x in (layout.tiles.low, layout.tiles.high))
    relative = layout.tiles.relative - moved
    step = -np.diff(relative, axis=1).min(initial=0)
    at = np.arange(tile) - (first - begin)[:, None]  # among its own
    is_own = (at >= 0) & (at < own)
    within = lambda x: np.where(is_own, np.take_along_axis(x, np.clip(at, 0, own - 1), 1), 0)
    seen = np.stack([within(low), within(high), relative[:, :1] - step * at, is_own], 1)
    few, pattern = np.unique(seen, axis=0, return_inverse=True)
    few_low, few_high, few_relative, few_own = np.moveaxis(few, 1, 0)
    query_count, key_count = (n + -n % align for n in (len(axis.query), axis.length))
    return AxisPlan(
        tile=tile,
        columns=columns,
        begin=begin,
        before=first - begin,
        start=start,
        queries=None if len(queries) == query_count and is_filled_up(queries, len(axis.query)) else queries,
        keys=None if len(keys) == key_count and is_filled_up(keys, axis.length) else keys,
        length=length,
        pattern=pattern.ravel(),
        low=few_low,
        high=few_high,
        relative=few_relative,
        own=few_own.astype(bool),
        everyone_sees=bool((low < high).all()),
        query_count=query_count,
        key_count=key_count,
        dilation=axis.dilation,
    )


def is_filled_up(places: np.ndarray, real: int) -> bool:
    """Whether so many tokens stand where they stood, and nothing behind them."""
    return np.array_equal(places[:real], np.arange(real)) and bool((places[real:] < 0).all())

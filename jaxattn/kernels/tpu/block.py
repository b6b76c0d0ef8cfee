"""What both kernels do with the arrays of a step: find a tile, load it, and tell its heads apart.

Arrays are seen as 32-bit numbers, `packing` tokens in each: then a slice that begins between two registers is an
ordinary load. The heads of a block share the lanes, and lanes are never sliced: a head is told apart by zeros, in one
factor of a product, in the lanes of the others.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxattn.kernels.operands import hiding_score
from jaxattn.kernels.tpu.plan import ANY, LANES, MATCH, Heads, Plan

I32, F32 = jnp.int32, jnp.float32
LOG2E = math.log2(math.e)
BLOCK, ENTRY, STRIP, MEMBER = range(4)  # the axes of a kernel's grid
Places = tuple[Any, ...]  # an index along the axes of the grid


class Tile(NamedTuple):
    """Tile `j` of tile row `i` of a step, which may be traced; `at` counts the tiles of an iteration."""

    plan: Plan
    table: Any  # a reference to `plan.table()`
    first: Any  # tile row of the step
    i: Any
    j: int
    at: int

    @property
    def pattern(self) -> Any:
        """Which entry of the score table it has."""
        last, across = 2 * len(self.plan.looped), self.plan.across
        pattern = self.table[last, self.first + self.i]
        return pattern if across is None else pattern * len(across.low) + int(across.pattern[self.j])

    @property
    def before(self) -> list[Any]:
        """Along each axis, how many of its queries are of the tile before; None where none of any tile are."""
        looped, across = self.plan.looped, self.plan.across
        last = self.table.shape[0] - len(looped)
        found = [self.table[last + a, self.first + self.i] if x.overlaps else None for a, x in enumerate(looped)]
        return found if across is None else [*found, I32(before) if (before := across.before[self.j]) else None]

    def queries(self, packing: int = 1) -> Places:
        """Where its queries are, in an array that holds `packing` of them in a row."""
        across = self.plan.across
        sizes = [axis.tile for axis in self.plan.axes]
        return self._places(0, sizes, 0 if across is None else int(across.begin[self.j]), packing)

    def keys(self, packing: int = 1) -> Places:
        """Where its keys are."""
        across = self.plan.across
        sizes = [axis.columns for axis in self.plan.axes]
        return self._places(1, sizes, 0 if across is None else int(across.start[self.j]), packing)

    def _places(self, which: int, sizes: Sequence[int], across: int, packing: int) -> Places:
        begin = [self.table[2 * a + which, self.first + self.i] for a in range(len(self.plan.looped))]
        if not self.plan.static:  # one axis, whose slices begin at whole registers
            whole = 8 * self.plan.heads.packing // packing
            return (pl.ds(pl.multiple_of(lax.div(begin[0], I32(packing)), whole), sizes[0] // packing),)
        return *map(pl.ds, begin, sizes[:-1]), slice(across // packing, (across + sizes[-1]) // packing)


def first_row(plan: Plan) -> Any:
    """The first tile row of this step."""
    return I32(0) if plan.strips is None else pl.program_id(STRIP) * I32(plan.step_rows)


def lanes_of_heads(plan: Plan) -> jax.Array | None:
    """[1, lanes], all bits for a lane that is of a head, none for those beyond the last, in this step's block; None
    where no block has such."""
    heads = plan.heads
    if plan.array_lanes == heads.blocks * heads.lanes:
        return None
    lane = lax.broadcasted_iota(I32, (1, heads.lanes), 1) + pl.program_id(BLOCK) * I32(heads.lanes)
    return jnp.where(lane < plan.array_lanes, I32(-1), I32(0))


def tiles(plan: Plan, table: Any, of_step: Any, iteration: Any) -> list[Tile]:
    """The tiles of an iteration of a step, which has tile rows from this one on."""
    first, columns = iteration * I32(plan.rows), plan.tile_columns
    places = itertools.product(range(plan.rows), range(columns))
    return [Tile(plan, table, of_step, first + I32(r), j, r * columns + j) for r, j in places]


def by_turns(phases: Sequence[Callable[[Tile], None]], behind: Sequence[int], tiles: Sequence[Tile]) -> None:
    """Every phase of every tile, each phase so many tiles behind the first: so that the products of one tile are
    computed beside the softmax of another."""
    for i in range(len(tiles) + behind[-1]):
        for phase, late in zip(phases, behind, strict=True):
            if 0 <= i - late < len(tiles):
                phase(tiles[i - late])


def load(ref: Any, places: Places) -> jax.Array:
    """Tokens in 32 bits, [tokens / packing, lanes]."""
    x = ref[(0, *places, slice(None))]
    return x.reshape(-1, x.shape[-1])


def joined(ref: Any, extra: Any, places: Places) -> jax.Array:
    """Keys or values of a box, and the extra ones behind it."""
    x = load(ref, places)
    return x if extra is None else jnp.concatenate([x, load(extra, (slice(None),))], 0)


def put(ref: Any, tile: Tile, x: jax.Array, interpret: bool) -> None:
    """Write [queries, lanes] where the tile's queries are, but not over those of the tile before. The next tile writes
    over what is not this one's. Both are seen in 32 bits, but by the interpreter, which can't write to numbers so."""
    packing = 4 // np.dtype(ref.dtype).itemsize
    *rows, last = (axis.tile for axis in tile.plan.axes)
    x = pltpu.bitcast(x.astype(ref.dtype), I32).reshape(*rows, last // packing, x.shape[-1])
    words, places = ref.bitcast(I32), (0, *tile.queries(packing), slice(None))
    for a, before in enumerate(tile.before):
        if before is not None:
            x = _over(words[places], x, before, a, packing if a == len(rows) else 1)
    if interpret:
        ref[(0, *tile.queries(), slice(None))] = pltpu.bitcast(x, ref.dtype)
    else:
        words[places] = x


def _over(old: jax.Array, new: jax.Array, before: Any, axis: int, packing: int) -> jax.Array:
    """The new words, but the old numbers where they are the first along an axis, `packing` of them in a word."""
    at = lax.broadcasted_iota(I32, new.shape, axis) * I32(packing)
    if packing == 2:  # a word may be half of each
        new = jnp.where(at == before - 1, (old & I32(0xFFFF)) | (new & I32(-0x10000)), new)
    return jnp.where(at + I32(packing - 1) < before, old, new)


def by_head(x: jax.Array, heads: Heads, other: int = 0) -> list[jax.Array]:
    """Tokens in 32 bits once for each head of a block, with the bits `other` in the lanes of the other heads."""
    if heads.abreast == 1:
        return [x]
    lanes = _head_of_lane(x, heads)
    return [jnp.where(lanes == h, x, I32(other)) for h in range(heads.abreast)]


def own(parts: Sequence[jax.Array], heads: Heads) -> jax.Array:
    """One array from one for each head, of which each gives the lanes of its head; of fewer, in turns."""
    lanes, whole = _head_of_lane(parts[0], heads), parts[0]
    if len(parts) < heads.abreast:
        lanes = lax.rem(lanes, I32(len(parts)))
    for h, part in enumerate(parts[1:], 1):
        whole = jnp.where(lanes == h, part, whole)
    return whole


class Numbers(NamedTuple):
    """Where they stand among those that a kernel is given. Scores are in units of log 2, whose exponential is exp2."""

    scale: int = 0  # in such units
    plain_scale: int = 1
    cap: int = 2  # in such units
    inverse_cap: int = 3


def numbers(scale: jax.Array, soft_cap: jax.Array | None) -> jax.Array:
    """As `Numbers` has them."""
    scale, cap = (x.astype(F32) for x in (scale, jnp.ones_like(scale) if soft_cap is None else soft_cap))
    return jnp.stack([scale * LOG2E, scale, cap * LOG2E, 1 / (cap * LOG2E)])


def capped(scores: jax.Array, c: Any) -> tuple[jax.Array, jax.Array]:
    """cap·tanh(s / cap), but where a score hides; and its derivative."""
    bent = jnp.tanh(scores * c[Numbers().inverse_cap])
    hidden = scores <= hiding_score(F32) / 2
    return jnp.where(hidden, hiding_score(F32), c[Numbers().cap] * bent), 1 - bent * bent


def matched(queries: jax.Array | None, keys: jax.Array, count: int, extra: int, keys_first: bool) -> jax.Array:
    """Whether a query sees a key, by the codes of `arrange.codes`, [count, keys + extra] or the other way round.
    Without codes of queries, all of them are alike."""
    alike = lambda n, x: jnp.where(lax.broadcasted_iota(I32, (n, LANES), 1) == ANY, x, 0.0).astype(keys.dtype)
    queries = alike(count, 1.0) if queries is None else queries
    keys = jnp.concatenate([keys, alike(extra, MATCH)], 0) if extra else keys
    found = product(*((keys, queries) if keys_first else (queries, keys)), (1, 1), None)
    return found > MATCH - 1


def _head_of_lane(x: jax.Array, heads: Heads) -> jax.Array:
    return lax.div(lax.broadcasted_iota(I32, x.shape, x.ndim - 1), I32(heads.dim))


def product(x: jax.Array, y: jax.Array, contract: tuple[int, int], precision: Any) -> jax.Array:
    """A product of matrices, summed in float32."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    precision = precision if x.dtype == F32 else None
    return lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=F32)

"""What a step of a kernel reads, and how a tile's part of it comes into registers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from jaxattn.kernels.tpu.block import Tile, by_head, joined, load
from jaxattn.kernels.tpu.plan import Plan


class Inputs(NamedTuple):
    """References, of tokens as numbers of 32 bits; None for what is not there."""

    plan: Plan
    dtype: Any  # of tokens
    precision: Any
    numbers: Any  # as `block.Numbers` has them
    table: Any
    row: Any  # of the table
    query: Any
    key: Any
    value: Any
    query_codes: Any
    key_codes: Any
    extra_key: Any
    extra_value: Any
    interpret: bool
    lanes: Any  # the bits of a block's lanes that are of a head; None, where all are

    def keys(self, tile: Tile) -> jax.Array:
        """Of a tile's box, and the extra ones behind it, [keys, lanes]."""
        return self.number(self._of_heads(joined(self.key, self.extra_key, self._box(tile))))

    def values(self, tile: Tile) -> jax.Array:
        """Likewise."""
        return self.number(self.words_of_values(tile))

    def words_of_values(self, tile: Tile) -> jax.Array:
        """The same in 32 bits."""
        return self._of_heads(joined(self.value, self.extra_value, self._box(tile)))

    def codes(self, tile: Tile) -> tuple[jax.Array | None, jax.Array]:
        """Of queries, if they are not all alike, and of a tile's box of keys."""
        keys = self.number(load(self.key_codes, self._box(tile)))
        return None if self.query_codes is None else self.number(load(self.query_codes, self._own(tile))), keys

    def by_head(self, ref: Any, tile: Tile) -> list[jax.Array]:
        """Queries, or what is like them, of each head in its own lanes, [queries, lanes]."""
        return [self.number(x) for x in self._by_head(ref, tile)]

    def stacked(self, ref: Any, tile: Tile) -> jax.Array:
        """The same, one head after the other, [(head, query), lanes]."""
        return self.number(jnp.concatenate(self._by_head(ref, tile), 0))

    def number(self, x: jax.Array) -> jax.Array:
        """What numbers of 32 bits are."""
        return pltpu.bitcast(x, self.dtype)

    def _by_head(self, ref: Any, tile: Tile) -> list[jax.Array]:
        return by_head(self._of_heads(load(ref, self._own(tile))), self.plan.heads)

    def _of_heads(self, x: jax.Array) -> jax.Array:
        """With zeros where a block reads beyond the last head: anything may stand there."""
        return x if self.lanes is None else x & self.lanes

    def _own(self, tile: Tile) -> Any:
        return tile.queries(self.plan.heads.packing)

    def _box(self, tile: Tile) -> Any:
        return tile.keys(self.plan.heads.packing)

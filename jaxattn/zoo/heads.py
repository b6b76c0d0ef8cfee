"""What the attention layers share: queries, keys and values by heads, the way back, and the positions of these."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn.einsum import einsum
from jaxattn.zoo.parameters import affine, check_names, features, match

PROJECTIONS = ("query", "key", "value")
OPTIONAL = ("query_bias", "key_bias", "value_bias", "out", "out_bias")


def embeddings(rank: int) -> tuple[str, ...]:
    """The names of a layer's relative embeddings, one for each axis of the grid."""
    return tuple(f"embedding_{axis}" for axis in range(rank))


class Heads:
    """The parameters of one call, checked: their names at once, their shapes against each other as they are used.

    Args:
      layer: the function, for its messages.
      params: arrays by name: PROJECTIONS and `tables`, all of them but what is `optional`; and any of OPTIONAL.
      tables: the names that only this layer has.
      optional: which of those may be missing.
      precision: of the projections.
    """

    def __init__(
        self,
        layer: str,
        params: Mapping[str, Any],
        tables: Sequence[str] = (),
        *,
        optional: Sequence[str] = (),
        precision: lax.PrecisionLike = None,
    ):
        required = [name for name in (*PROJECTIONS, *tables) if name not in optional]
        check_names(layer, params, required, [*required, *optional, *OPTIONAL])
        self.layer, self.precision = layer, precision
        self.params = {name: jnp.asarray(x) for name, x in params.items()}
        self.known: dict[str, tuple[int, ...]] = {}

    def table(self, name: str, *axes: str | int) -> jax.Array:
        """`params[name]`, of these axes: sizes, or names that stand for one size wherever they are used."""
        self.known |= {str(axis): (axis,) for axis in axes if isinstance(axis, int)}
        match(f"{self.layer}: params[{name!r}]", self.params[name].shape, [str(axis) for axis in axes], self.known)
        return self.params[name]

    def grid(self, x, rank: int) -> tuple[int, ...]:
        """The last `rank` axes of x before its features."""
        features(self.layer, x, rank)
        return jnp.shape(x)[-1 - rank : -1]

    def project(self, x, rank: int) -> list[jax.Array]:
        """The query, key and value of every token of x `[*batch, *grid, features]`: `[*batch, *grid, heads, head_dim]`.

        Where there is no key among the parameters, the keys are zeros.
        """
        self.known |= {"features": (features(self.layer, x, rank)["features"],)}
        widths = {"query": "head_dim", "key": "head_dim", "value": "value_dim"}
        return [self._project(jnp.asarray(x), name, width) for name, width in widths.items()]

    def _project(self, x: jax.Array, name: str, width: str) -> jax.Array:
        if name not in self.params:
            return jnp.zeros((*x.shape[:-1], *self.known["heads"], *self.known[width]), x.dtype)
        self.table(name, "features", "heads", width)
        if f"{name}_bias" in self.params:
            self.table(f"{name}_bias", "heads", width)
        return affine("... c, c h d -> ... h d", x, self.params, name, self.precision)

    def embedding(self, size: Sequence[int]) -> tuple[jax.Array, ...]:
        """r as `attention` takes it, a table for each axis of a window of `size` k: `[heads or 1, 2k-1, head_dim]`, or
        all of head_dim / rank."""
        names, tables, (head_dim,) = embeddings(len(size)), [], self.known["head_dim"]
        shape = self.params[names[0]].shape
        added = shape[-1:] == (head_dim,) or head_dim % len(size) != 0
        for name, k in zip(names, size, strict=True):
            heads = 1 if shape[:1] == (1,) else "heads"
            tables.append(self.table(name, heads, 2 * k - 1, head_dim if added else head_dim // len(size)))
        return tuple(tables)

    def join(self, y: jax.Array) -> jax.Array:
        """`[*batch, *grid, out_features]` of `[*batch, *grid, heads, value_dim]`.

        Without an output projection, the heads stand one after the other.
        """
        if "out" not in self.params:
            return einsum("... h d -> ... (h d)", y)
        self.table("out", "heads", "value_dim", "out_features")
        if "out_bias" in self.params:
            self.table("out_bias", "out_features")
        return affine("... h d, h d o -> ... o", y, self.params, "out", self.precision)

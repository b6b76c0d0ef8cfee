"""What the attention layers share: queries, keys and values by heads, the way back, and parameters checked by name."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn.einsum import einsum
from jaxattn.position import spread

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
        self.layer, self.params, self.precision = layer, params, precision
        self.sizes: dict[str, int] = {}
        required = [name for name in (*PROJECTIONS, *tables) if name not in optional]
        for name in required:
            if name not in params:
                raise ValueError(f"{layer}: params lack {name!r}; they are {', '.join(required)}")
        known = (*required, *optional, *OPTIONAL)
        for name in params:
            if name not in known:
                raise ValueError(f"{layer}: params have {name!r}; allowed: {', '.join(known)}")
        for name in (*PROJECTIONS, "out"):
            if f"{name}_bias" in params and name not in params:
                raise ValueError(f"{layer}: params have '{name}_bias' and lack {name!r}, which it belongs to")

    def table(self, name: str, *axes: str | int) -> jax.Array:
        """`params[name]`, of these axes: sizes, or names that stand for one size wherever they are used."""
        shape = np.shape(self.params[name])
        expected = [self.sizes.get(axis, axis) if isinstance(axis, str) else axis for axis in axes]
        if len(shape) != len(axes) or any(n != e for n, e in zip(shape, expected, strict=True) if isinstance(e, int)):
            raise ValueError(
                f"{self.layer}: params[{name!r}] has shape {list(shape)}; expected [{', '.join(map(str, axes))}] = "
                f"[{', '.join(map(str, expected))}]"
            )
        self.sizes |= {axis: n for axis, n in zip(axes, shape, strict=True) if isinstance(axis, str)}
        return jnp.asarray(self.params[name])

    def grid(self, x, rank: int) -> tuple[int, ...]:
        """The last `rank` axes of x before its features."""
        shape = np.shape(x)
        if len(shape) < rank + 1:
            raise ValueError(
                f"{self.layer}: x has shape {list(shape)}; expected [*batch, *grid, features] with {rank} grid axes"
            )
        return shape[-1 - rank : -1]

    def project(self, x, rank: int) -> list[jax.Array]:
        """The query, key and value of every token of x `[*batch, *grid, features]`: `[*batch, *grid, heads, head_dim]`.

        Where there is no key among the parameters, the keys are zeros.
        """
        self.grid(x, rank)
        x = jnp.asarray(x)
        self.sizes["features"] = x.shape[-1]
        widths = {"query": "head_dim", "key": "head_dim", "value": "value_dim"}
        return [self._project(x, name, width) for name, width in widths.items()]

    def _project(self, x: jax.Array, name: str, width: str) -> jax.Array:
        if name not in self.params:
            return jnp.zeros((*x.shape[:-1], self.sizes["heads"], self.sizes[width]), x.dtype)
        kernel = self.table(name, "features", "heads", width)
        y = einsum("... c, c h d -> ... h d", x, kernel, precision=self.precision)
        return y + self.table(f"{name}_bias", "heads", width) if f"{name}_bias" in self.params else y

    def embedding(self, size: Sequence[int]) -> jax.Array:
        """r `[heads or 1, *(2k-1), head_dim]`, of a table for each axis of a window of `size` k.

        Tables of head_dim are added; narrower ones, of head_dim / rank, stand one after the other.
        """
        names, tables, head_dim = embeddings(len(size)), [], self.sizes["head_dim"]
        shape = np.shape(self.params[names[0]])
        added = shape[-1:] == (head_dim,) or head_dim % len(size) != 0
        for name, k in zip(names, size, strict=True):
            heads = 1 if shape[:1] == (1,) else "heads"
            tables.append(self.table(name, heads, 2 * k - 1, head_dim if added else head_dim // len(size)))
        return functools.reduce(jnp.add, spread(tables)) if added else jnp.concatenate(spread(tables), axis=-1)

    def join(self, y: jax.Array) -> jax.Array:
        """`[*batch, *grid, out_features]` of `[*batch, *grid, heads, value_dim]`.

        Without an output projection, the heads stand one after the other.
        """
        if "out" not in self.params:
            return einsum("... h d -> ... (h d)", y)
        kernel = self.table("out", "heads", "value_dim", "out_features")
        y = einsum("... h d, h d o -> ... o", y, kernel, precision=self.precision)
        return y + self.table("out_bias", "out_features") if "out_bias" in self.params else y

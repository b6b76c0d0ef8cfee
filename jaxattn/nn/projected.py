"""Queries, keys and values of `Attention`'s inputs: its sizes, its projections, and where its queries stand."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax

from jaxattn.checked import has_dtype, shown
from jaxattn.halo import shard_count
from jaxattn.nn.grid import GridModule
from jaxattn.nn.rotary import rotated
from jaxattn.nn.rows import RowLinear
from jaxattn.window import Window


class Projected(GridModule):
    """What `Attention` is before and after it attends. `given` is what its constructor takes, by name."""

    window: Window | tuple[Window, ...] | None
    grid: tuple[int, ...] | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    clip: bool
    dtype: Any
    rotary: Any
    rotary_frequencies: Any
    transform_qk: Any

    @property
    def windows(self) -> tuple[Window, ...]:
        """That of each group of heads; none without a window."""
        return () if self.window is None else (self.window,) if isinstance(self.window, Window) else self.window

    def set_heads(self, given: Mapping[str, Any]) -> None:
        """The heads and the features, and what None stands for."""
        default = lambda name, other: other if given[name] is None else given[name]
        self.num_heads, self.in_features = given["num_heads"], given["in_features"]
        self.num_kv_heads = default("num_kv_heads", self.num_heads)
        self.in_kv_features = default("in_kv_features", self.in_features)
        self.qkv_features = default("qkv_features", self.in_features)
        self.out_features = default("out_features", self.in_features if given["out_projection"] else self.qkv_features)

    def set_window(self, window: Any, grid: Any, rank: int | None) -> None:
        """The window, or one for each group of heads, and the rank of the grid."""
        where = type(self).__name__
        if window is not None and grid is not None:
            raise ValueError(f"{where}: window (={window}) must be None where grid (={grid}) is given, a window itself")
        several = window if isinstance(window, tuple) else (window,)
        self.grid = None if grid is None else self.sized("grid", grid, rank)
        if several and isinstance(several[0], Window):
            self.window, self.rank = window, several[0].rank
            if rank not in (None, self.rank):
                raise ValueError(f"{where}: rank (={rank}) must be None, or that of window (={window})")
        elif window is not None:
            self.window = Window(self.sized("window", window, rank))
        elif self.grid is not None:
            self.window = Window(self.grid)
        else:
            self.window, self.rank = None, rank or 1  # as nnx.MultiHeadAttention, with any batch axes

    def make_projections(self, given: Mapping[str, Any]) -> None:
        """Of inputs to query, key and value, perhaps with their norms, and of the heads' outputs."""
        self.head_dim = self.qkv_features // self.num_heads
        common = {name: given[name] for name in ("dtype", "param_dtype", "rngs")}
        linear: Any = nnx.LinearGeneral  # without a window, as `nnx.MultiHeadAttention` has it
        if self.window is not None:
            linear = partial(RowLinear, implementation=given["implementation"])
        linear = partial(linear, use_bias=given["use_bias"], precision=given["precision"], **common)
        names = ("kernel_init", "bias_init", "kernel_metadata", "bias_metadata")
        inner = {name: given[name] for name in names}
        outer = {name: given[f"out_{name}"] or given[name] for name in names}  # those of `out`, where it has its own
        for name in ("promote_dtype", "dot_general", "dot_general_cls"):
            inner[name], outer[name] = given[f"qkv_{name}"], given[f"out_{name}"]
        self.query = linear(self.in_features, (self.num_heads, self.head_dim), **inner)
        self.key = linear(self.in_kv_features, (self.num_kv_heads, self.head_dim), **inner)
        self.value = linear(self.in_kv_features, (self.num_kv_heads, self.head_dim), **inner)
        self.query_ln = self.key_ln = self.out = nnx.data(None)
        if given["normalize_qk"]:
            norm = partial(nnx.LayerNorm, use_bias=False, promote_dtype=given["ln_promote_dtype"], **common)
            self.query_ln, self.key_ln = (
                norm(self.head_dim, scale_metadata=given[f"{name}_ln_scale_metadata"]) for name in ("query", "key")
            )
        if given["out_projection"]:
            self.out = linear((self.num_heads, self.head_dim), self.out_features, axis=(-2, -1), **outer)

    def project(self, inputs_q, inputs_k, inputs_v, sharding=None, first=None):
        """Query, key and value, [*batch, *grid, heads, head_dim]; a token that follows others stands at `first`."""
        if inputs_k is None and inputs_v is not None:
            raise ValueError(f"{type(self).__name__}: inputs_v is given without inputs_k; give inputs_k alone for both")
        queries = self._standing(inputs_q) if inputs_k is None else inputs_q
        inputs_k = inputs_q if inputs_k is None else inputs_k
        inputs_v = inputs_k if inputs_v is None else inputs_v
        for name, x, features in (
            ("inputs_q", queries, self.in_features),
            ("inputs_k", inputs_k, self.in_kv_features),
            ("inputs_v", inputs_v, self.in_kv_features),
        ):
            self._check_input(name, x, features)
        grids = [jnp.shape(x)[-1 - self.rank : -1] for x in (queries, inputs_k)]
        queries, inputs_k, inputs_v = map(self._in_a_row, (queries, inputs_k, inputs_v))
        pairs = (self.query, queries), (self.key, inputs_k), (self.value, inputs_v)
        query, key, value = (project(x, out_sharding=sharding) for project, x in pairs)
        if self.query_ln is not None and self.key_ln is not None:
            query, key = self.query_ln(query), self.key_ln(key)
        query, key, value = dtypes.promote_dtype((query, key, value), dtype=self.dtype)
        return *self._placed(query, key, grids, first), value

    def project_back(self, y, shape: tuple[int, ...], sharding):
        """The heads' outputs as features; without a window, on the grid of inputs of this shape."""
        y = y.reshape(*y.shape[:-2], self.qkv_features) if self.out is None else self.out(y, out_sharding=sharding)
        return y if self.window is not None else y.reshape(*shape[:-1], self.out_features)

    def whole_grid(self, grid) -> tuple[int, ...]:
        """The grid of which this one is a shard."""
        first, *others = grid
        return (first * shard_count(self.axis_name), *others)

    def _placed(self, query, key, grids, first):
        """Queries and keys with what depends on where they stand: along the first axis, from `first` on."""
        offset: list[Any] = [0 if first is None else first, *[0] * (self.rank - 1)]
        if self.axis_name is not None:
            offset[0] = lax.axis_index(self.axis_name) * grids[1][0]
        if self.rotary is not None:
            learned, still = self.rotary_frequencies, (1,) * self.rank
            frequencies = None if learned is None else learned[...]
            stride: Any = self.windows[0].stride if self.windows else still
            query = rotated(query, self.rotary, frequencies, grids[0], stride, offset)
            key = rotated(key, self.rotary, frequencies, grids[1], still, offset)
        if self.transform_qk is None:
            return query, key
        found = self.transform_qk(query, key, tuple(offset))
        if not isinstance(found, tuple | list) or len(found) != 2 or not all(map(has_dtype, found)):
            raise ValueError(
                f"{type(self).__name__}: transform_qk must return the pair (query, key), and not {shown(found)}"
            )
        return found[0], found[1]

    def _in_a_row(self, x):
        """Without a window, the tokens of a grid one after the other."""
        if self.window is not None or self.rank == 1:
            return x
        *batch, features = *jnp.shape(x)[: -1 - self.rank], jnp.shape(x)[-1]
        return jnp.reshape(x, (*batch, math.prod(jnp.shape(x)[-1 - self.rank : -1]), features))

    def _standing(self, x):
        """The tokens at which a strided window's queries stand."""
        if not self.windows or self.grid is not None or jnp.ndim(x) < self.rank + 1:
            return x
        x, window = jnp.asarray(x), self.windows[0]
        whole = self.whole_grid(x.shape[-1 - self.rank : -1])
        queries, *grid = (window.clipped(whole) if self.clip else window).query_grid(whole)
        grid = (queries // shard_count(self.axis_name), *grid)
        strides: Any = window.stride
        steps = (slice(0, n * s, s) for n, s in zip(grid, strides, strict=True))
        return x[(..., *steps, slice(None))]

    def _check_input(self, name: str, x, features: int) -> None:
        grid = self.check_input(name, x, features)
        if self.grid is not None and self.whole_grid(grid) != self.grid:
            raise ValueError(
                f"{type(self).__name__}: {name} (={list(jnp.shape(x))}) must be [*batch, *grid, {features} features] "
                f"with grid (={self.grid})"
            )

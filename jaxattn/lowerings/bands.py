"""Queries, keys and a weight for every pair of them in a window, tile by tile, by dense products.

All of it is in one trilinear form,

    T(q, k, s) = Σ_{n, p, m, u, d} s[n, p, m, u] · q[n, p, m, d] · k[n, stride·p + dilation·u, m, d]

with positions p and slots u in any number of dimensions. The scores of q against k are ∂T/∂s, the mix of k by the
weights s is ∂T/∂q, and ∂T/∂k sends to the keys what they are due. Each is bilinear in the two arguments that are left,
and its transposes are the other two: one primitive, closed under derivatives of any order.

A tile of queries and the keys that it reaches, its columns, meet in one matrix [queries, columns]. Slot u of query i of
the tile is column stride·i + dilation·u, in every tile the same: a band of the matrix, read from it or written into it.
What is outside the band is computed and left, or is a zero that is multiplied: a weight of zero times a key that is
infinite, or not a number, is not a number.
"""

import functools
import math
import string
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jaxtyping import Array

from jaxattn import machine
from jaxattn.lowerings.trilinear import others, trilinear
from jaxattn.sizes import Extent, is_symbolic, planned

# Queries of a tile: more of them waste more of the matrix, fewer leave less to a product.
QUERIES = 16
# Elements of the matrices that a step makes: they stay in the cache.
STEP = 2**17


class BandAxis(NamedTuple):
    """One dimension: q has so many positions, s so many slots."""

    stride: int
    dilation: int
    positions: int
    slots: int

    def reach(self, positions: int) -> int:
        """The keys that so many positions see, from the first to the last."""
        return self.stride * (positions - 1) + self.dilation * (self.slots - 1) + 1


class _Tiling(NamedTuple):
    """How the loop goes: `chunks` of the entries of n, times the tiles of every axis."""

    axes: tuple[BandAxis, ...]
    sizes: tuple[int, ...]
    entries: int
    chunks: int

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(-(-a.positions // t) for a, t in zip(self.axes, self.sizes, strict=True))

    @property
    def letters(self) -> tuple[str, str]:
        """The axes of a tile's queries, and of its columns, in an einsum."""
        rank = len(self.axes)
        return string.ascii_uppercase[:rank], string.ascii_uppercase[rank : 2 * rank]

    @property
    def lead(self) -> int:
        """The axes of an arranged array before its grid."""
        return 1 + (self.chunks > 1)

    @property
    def columns(self) -> tuple[int, ...]:
        return tuple(a.reach(t) for a, t in zip(self.axes, self.sizes, strict=True))

    def arrange(self, x: Array) -> Array:
        """[n, *grid, ...] as [entries, chunks, *grid, ...]. A chunk is every so many entries, so that n cut over
        devices is not gathered by the loop; where it is all, the axis is absent: XLA would copy an array for it."""
        return x if self.chunks == 1 else x.reshape(self.entries, self.chunks, *x.shape[1:])

    def restore(self, x: Array) -> Array:
        """`arrange`, undone."""
        return x.reshape(-1, *x.shape[self.lead :])

    def places(self, step: Any) -> tuple[Any, list[tuple[Any, Any]]]:
        """The chunk of a step, and along each axis where its tile begins and how many of its queries have come before:
        where tiles don't fill an axis the last begins early."""
        starts = []
        for a, t, count in reversed([*zip(self.axes, self.sizes, self.counts, strict=True)]):
            due = step % count * t
            begin = due if a.positions % t == 0 else jnp.minimum(due, a.positions - t)
            starts.insert(0, (begin, due - begin))
            step = step // count
        return step, starts

    def corner(self, name: str, step: Any, ndim: int) -> tuple[list, list[int]]:
        """Where the tile of a step begins in an arranged array, and its size along the grid."""
        chunk, starts = self.places(step)
        strides = [a.stride if name == "k" else 1 for a in self.axes]
        begin = [0, *[chunk][: self.lead - 1], *(i * s for (i, _), s in zip(starts, strides, strict=True))]
        return begin + [0] * (ndim - len(begin)), list(self.columns if name == "k" else self.sizes)

    def once(self, x: Array, step: Any) -> Array:
        """A tile [entries, m, *queries, ...] with zeros for the queries that have come before."""
        for dim, (a, t, (_, before)) in enumerate(zip(self.axes, self.sizes, self.places(step)[1], strict=True), 2):
            if a.positions % t:
                x = jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, dim) >= before, x, jnp.zeros((), x.dtype))
        return x

    def take(self, name: str, x: Array, step: Any) -> Array:
        """The tile [entries, m, *grid, ...] of a step."""
        begin, sizes = self.corner(name, step, x.ndim)
        rest = x.shape[self.lead + len(sizes) :]
        tile = lax.dynamic_slice(x, begin, [self.entries, *[1] * (self.lead - 1), *sizes, *rest])
        return jnp.moveaxis(lax.squeeze(tile, range(1, self.lead)), 1 + len(sizes), 1)

    def put(self, name: str, x: Array, tile: Array, step: Any) -> Array:
        """Write the tile of a step; keys are of several tiles, which add up."""
        begin, sizes = self.corner(name, step, x.ndim)
        tile = lax.expand_dims(jnp.moveaxis(tile, 1, 1 + len(sizes)), range(1, self.lead))
        if name == "k":
            tile += lax.dynamic_slice(x, begin, tile.shape)
        return lax.dynamic_update_slice(x, tile, begin)


def tile_sizes(axes: Sequence[BandAxis]) -> tuple[int, ...]:
    """The queries of a tile along each axis."""
    sizes = []
    for k, axis in enumerate(axes):
        left = QUERIES // math.prod(sizes)
        most = max(round(left ** (1 / (len(axes) - k))), 1)
        sizes.append(-(-axis.positions // -(-axis.positions // most)))
    return tuple(sizes)


def matrix_elements(axes: Sequence[BandAxis]) -> int:
    """The elements of the matrix of one tile."""
    sizes = tile_sizes(axes)
    return math.prod(sizes) * math.prod(a.reach(t) for a, t in zip(axes, sizes, strict=True))


@functools.lru_cache(maxsize=1024)
def _tile(axes: tuple[BandAxis, ...], n: Extent, m: Extent, devices: int) -> _Tiling:
    if is_symbolic(n):
        return _Tiling(axes, tile_sizes(axes), n, 1)
    least = math.gcd(n, devices)  # so that what is cut over devices stays where it is
    room = STEP // (planned(m) * matrix_elements(axes))
    entries = max(e for e in range(least, n + 1, least) if n % e == 0 and e <= max(room, least))
    return _Tiling(axes, tile_sizes(axes), entries, n // entries)


def _evaluate(first: Array, second: Array, *, wrt: str, axes: tuple[BandAxis, ...], precision: Any) -> Array:
    tiling = _tile(axes, first.shape[0], first.shape[1 + len(axes)], machine.device_count())
    zeros = jnp.zeros_like(_alike(first, second, wrt=wrt, axes=axes))  # sharded as the result is
    given = {name: tiling.arrange(x) for name, x in zip(others("qks", wrt), (first, second), strict=True)}

    def step(i: Array, y: Array) -> Array:
        tiles = [tiling.take(name, x, i) for name, x in given.items()]
        if wrt == "k":
            tiles[0] = tiling.once(tiles[0], i)
        return tiling.put(wrt, y, _DERIVATIVES[wrt](*tiles, tiling, precision), i)

    y = lax.fori_loop(0, tiling.chunks * math.prod(tiling.counts), step, tiling.arrange(zeros))
    return tiling.restore(y)


def _by_weights(q: Array, k: Array, tiling: _Tiling, precision: Any) -> Array:
    """∂T/∂s in one tile, the scores."""
    rows, columns = tiling.letters
    return _read(jnp.einsum(f"nm{rows}d,nm{columns}d->nm{rows}{columns}", q, k, precision=precision), tiling)


def _by_query(k: Array, s: Array, tiling: _Tiling, precision: Any) -> Array:
    """∂T/∂q in one tile, the mix."""
    rows, columns = tiling.letters
    return jnp.einsum(f"nm{rows}{columns},nm{columns}d->nm{rows}d", _written(s, tiling), k, precision=precision)


def _by_key(q: Array, s: Array, tiling: _Tiling, precision: Any) -> Array:
    """∂T/∂k in one tile."""
    rows, columns = tiling.letters
    return jnp.einsum(f"nm{rows}{columns},nm{rows}d->nm{columns}d", _written(s, tiling), q, precision=precision)


def _read(matrix: Array, tiling: _Tiling) -> Array:
    """[n, m, *queries, *slots] of [n, m, *queries, *columns]: a slice for every query of an axis."""
    rank = len(tiling.axes)
    for dim, (a, t) in enumerate(zip(tiling.axes, tiling.sizes, strict=True), 2):
        rows = []
        for i in range(t):
            row = lax.slice_in_dim(matrix, i, i + 1, axis=dim)
            rows.append(lax.slice_in_dim(row, a.stride * i, a.stride * i + a.reach(1), a.dilation, axis=dim + rank))
        matrix = lax.concatenate(rows, dim)
    return matrix


def _written(s: Array, tiling: _Tiling) -> Array:
    """[n, m, *queries, *columns] of [n, m, *queries, *slots]: the transpose of `_read`, zeros around each query."""
    rank, zero = len(tiling.axes), jnp.zeros((), s.dtype)
    for dim, (a, t) in enumerate(zip(tiling.axes, tiling.sizes, strict=True), 2):
        rows = []
        for i in range(t):
            pads = [(0, 0, 0)] * s.ndim
            pads[dim + rank] = (a.stride * i, a.stride * (t - 1 - i), a.dilation - 1)
            rows.append(lax.pad(lax.slice_in_dim(s, i, i + 1, axis=dim), zero, pads))
        s = lax.concatenate(rows, dim)
    return s


_DERIVATIVES = {"q": _by_query, "k": _by_key, "s": _by_weights}


def _alike(first: Array, second: Array, *, wrt: str, axes: tuple[BandAxis, ...], precision: Any = None) -> Array:
    """Anything of the shape, the dtype, the sharding and the varying mesh axes of ∂T/∂`wrt`."""
    m = 1 + len(axes)
    grid = [a.reach(a.positions) if wrt == "k" else a.positions for a in axes]
    last = [a.slots for a in axes] if wrt == "s" else [first.shape[-1]]  # d, of what comes before s
    y = sum(z.sum([*range(1, m), *range(m + 1, z.ndim)]) for z in (first, second))  # [n, m]
    y = lax.expand_dims(y, [*range(1, m), *range(m + 1, m + 1 + len(last))])
    return jnp.broadcast_to(y, (y.shape[0], *grid, y.shape[m], *last))


def _batch(primitive: Primitive, arrays: Sequence[Array], dims: Sequence[int | None], **params: Any) -> tuple:
    """A `vmap` is more of n."""
    size = next(z.shape[dim] for z, dim in zip(arrays, dims, strict=True) if dim is not None)
    merged = []
    for z, dim in zip(arrays, dims, strict=True):
        z = jnp.broadcast_to(z, (size, *z.shape)) if dim is None else jnp.moveaxis(z, dim, 0)
        merged.append(z.reshape(-1, *z.shape[2:]))
    y = primitive.bind(*merged, **params)
    return y.reshape(size, -1, *y.shape[1:]), 0


_partial = trilinear("local_product", "qks", _evaluate, _alike, _batch)


def partial(wrt: str, first: Array, second: Array, axes: Sequence[BandAxis], precision: Any = None) -> Array:
    """∂T/∂`wrt`, given the other two, in this order, of q `[n, *positions, m, d]`, k `[n, *keys, m, d]` and
    s `[n, *positions, m, *slots]`. There are as many keys as the positions reach."""
    return _partial(wrt, first, second, axes=tuple(axes), precision=precision)

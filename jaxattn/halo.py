"""Windows over a grid whose first axis is split over devices: each shard borrows from its neighbours what it sees.

For use inside `jax.shard_map`. Every shard holds as many tokens as the others, in order.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn import head_groups
from jaxattn.attention import attention
from jaxattn.boundary import BOUNDARIES, fold
from jaxattn.window import FOLDING, Axis, Window


def shard_count(axis_name: str | None) -> int:
    """Over how many shards an axis is split: 1 for None, where it is whole."""
    return 1 if axis_name is None else lax.axis_size(axis_name)


def halo(x, axis: int, axis_name: str, before: int, after: int, boundary: str = "zero") -> jax.Array:
    """A shard's tokens with `before` of those that precede them on the whole grid, and `after` of those that follow.

        y[t] = whole[fold(index·n - before + t)],   t = 0 .. before + n + after - 1,   n = x.shape[axis]

    Slices travel by `ppermute`, from as far as needed: a halo may be longer than a shard. Its adjoint sends the
    cotangents of borrowed tokens home.

    Args:
      x: any dtype and shape.
      axis: the axis that is split.
      axis_name: the mesh axis over which it is split.
      before, after: how many tokens; a negative number takes away as many of the shard's own (or of the other side's).
      boundary: what stands outside the whole grid: "zero", "edge", "reflect" or "wrap", as in `einsum`.

    Returns:
      `x` with before + n + after tokens along `axis`.

    Raises:
      ValueError: `boundary` is none of these, or nothing would be left.

    >>> from jax.sharding import PartitionSpec as P
    >>> mesh = jax.sharding.Mesh(jax.devices()[:1], "space")
    >>> wider = jax.shard_map(lambda x: halo(x, 0, "space", 2, 1, "wrap"), mesh=mesh, in_specs=P("space"),
    ...                       out_specs=P("space"))
    >>> wider(jnp.arange(4))
    Array([2, 3, 0, 1, 2, 3, 0], dtype=int...)
    """
    if boundary not in BOUNDARIES:
        raise ValueError(f"halo: boundary (={boundary!r}) must be one of {', '.join(BOUNDARIES)}")
    x = jnp.asarray(x)
    axis, length = axis % x.ndim, x.shape[axis]
    if before + length + after < 1:
        raise ValueError(
            f"halo: before (={before}) and after (={after}) must leave some of the {length} tokens of a shard"
        )
    low, high = max(before, 0), max(after, 0)
    if boundary in ("zero", "wrap"):
        sides = [_borrowed(x, axis, axis_name, count, boundary) for count in (-low, high)]
    else:
        sides = _folded(x, axis, axis_name, low, high, boundary)
    wide = lax.concatenate([*sides[0], x, *sides[1]], axis)
    return lax.slice_in_dim(wide, low - before, low + length + after, axis=axis)


def _borrowed(x: jax.Array, axis: int, axis_name: str, count: int, boundary: str) -> list[jax.Array]:
    """The -count tokens before a shard, or the count after it, in order: a slice from each shard that holds some."""
    length, shards = x.shape[axis], shard_count(axis_name)
    slices = []
    for hop in range(1, -(-abs(count) // length) + 1):
        part = min(length, abs(count) - (hop - 1) * length)
        first, step = (length - part, hop) if count < 0 else (0, -hop)  # what precedes is sent upwards
        routes = [(source, source + step) for source in range(shards)]
        if boundary == "wrap":
            routes = [(source, target % shards) for source, target in routes]
        routes = [(source, target) for source, target in routes if 0 <= target < shards]
        own = lax.slice_in_dim(x, first, first + part, axis=axis)
        # a shard to which nothing is sent receives zeros
        slices.append(lax.ppermute(own, axis_name, routes) if routes else jnp.zeros_like(own))
    return slices[::-1] if count < 0 else slices


def _folded(x: jax.Array, axis: int, axis_name: str, low: int, high: int, boundary: str) -> list[list[jax.Array]]:
    """The halo before a shard and the one after it, where tokens of the grid stand outside it too."""
    length, shards = x.shape[axis], shard_count(axis_name)
    # what is reflected at an end of the grid stands as far inside as its image outside
    before, after = (max(low, high),) * 2 if boundary == "reflect" else (low, high)
    near = halo(x, axis, axis_name, before, after)
    start = length * np.arange(shards)[:, None]
    sides = []
    for place in (np.arange(-low, 0), np.arange(length, length + high)):
        sources = fold(start + place, shards * length, boundary) - (start - before)
        sides.append([jnp.take(near, jnp.asarray(sources)[lax.axis_index(axis_name)], axis, mode="clip")])
    return sides


def split_pad(
    x,
    axis: int,
    axis_name: str,
    pads: tuple[int, int],
    *,
    size: int,
    stride: int = 1,
    dilation: int = 1,
    boundary: str = "zero",
) -> jax.Array:
    """What padding is to a grid that is whole: a shard's tokens and around them all that its windows see.

    Without further padding, an `einsum`, a convolution or a pool whose windows have `size` taps `dilation` apart and
    stand at every `stride`-th token gives a shard of what it gives on the whole grid under the padding `pads`.

    Args:
      x: any dtype and shape.
      axis: the axis that is split.
      axis_name: the mesh axis over which it is split.
      pads: (low, high), the padding of the whole grid; negative numbers crop.
      size, stride, dilation: of the windows.
      boundary: "zero", "edge", "reflect" or "wrap".

    Returns:
      `x` with (positions - 1)·stride + (size - 1)·dilation + 1 tokens along `axis`.

    Raises:
      ValueError: the stride doesn't divide a shard's tokens, or the positions are not as many on every shard.

    >>> from jax.sharding import PartitionSpec as P
    >>> def convolve(x, kernel):
    ...     x = split_pad(x, 0, "space", (1, 1), size=3)
    ...     return jaxattn.einsum("i+r j+s c, r s c o -> i j o", x, kernel, padding=[(0, 0), (1, 1)])
    >>> mesh = jax.sharding.Mesh(jax.devices()[:1], "space")
    >>> whole = jax.shard_map(convolve, mesh=mesh, in_specs=(P("space"), P()), out_specs=P("space"))
    >>> whole(jnp.ones((8, 8, 3)), jnp.ones((3, 3, 3, 4))).shape
    (8, 8, 4)
    """
    x = jnp.asarray(x)
    length, shards, span = x.shape[axis], shard_count(axis_name), (size - 1) * dilation
    if length % stride:
        raise ValueError(
            f"split_pad: stride (={stride}) must divide the {length} tokens that each of {shards} shards over "
            f"{axis_name!r} holds"
        )
    low, high = pads
    positions = (shards * length + low + high - span - 1) // stride + 1
    if positions != shards * length // stride:
        raise ValueError(
            f"split_pad: pads (={low}, {high}) must give {shards * length // stride} positions, a shard's share each "
            f"over {axis_name!r}, and give {positions}: pad by (size - 1)·dilation (={span}) in all, as 'SAME' does"
        )
    return halo(x, axis, axis_name, low, span - low - stride + 1, boundary)


def split_attention(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    axis_name: str | None,
    window: Window | Sequence[Window] | None = None,
    relative_bias=None,
    key_embedding=None,
    **options: Any,
) -> Any:
    """`attention` on a grid whose first axis is split: a shard of what it gives on the whole grid.

    Queries stay where they are; keys and values come from as far as the windows reach, and without a window from
    everywhere. Where the boundary moves windows inwards ("shift"), or neighbours share one (`block`), a shard at an end
    of the grid has other windows than one in its middle: each runs its own of a few compiled programs.

    Args:
      query, key, value: as in `attention`, the grid's first axis being a shard of the whole one.
      bias: as in `attention`, for the shard's own queries.
      mask: with a window, a mask of keys `[*batch, *grid]`, split as they are; without one, as in `attention`, for the
        shard's own queries and all keys.
      axis_name: the mesh axis over which the first axis is split; None computes `attention` itself.
      window: every boundary along the split axis but "valid", whose shards would differ in length.
      relative_bias, key_embedding: as in `attention`.
      **options: the rest of `attention`'s, but score_mod, segment_ids, grid_sizes, extra_positions, query_offset and
        dropout, which need the whole grid.

    Returns:
      As `attention`, for the shard's own queries.

    Raises:
      ValueError: as `attention` does; and for what can't be split, saying what can.

    >>> from jax.sharding import PartitionSpec as P
    >>> attend = lambda x: split_attention(x, x, x, axis_name="space", window=Window(3))
    >>> mesh = jax.sharding.Mesh(jax.devices()[:1], "space")
    >>> jax.shard_map(attend, mesh=mesh, in_specs=P("space"), out_specs=P("space"))(jnp.ones((8, 2, 4))).shape
    (8, 2, 4)
    """
    tables = {"relative_bias": relative_bias, "key_embedding": key_embedding}
    if window is not None and not isinstance(window, Window):
        given = {"query": query, "key": key, "value": value, "bias": bias, "mask": mask, "axis_name": axis_name}
        return head_groups.attend(split_attention, window, {**given, **tables, **options})
    if axis_name is None:
        return attention(query, key, value, bias, mask, window=window, **tables, **options)
    _check_options(options, axis_name)
    if window is None:
        key, value = (lax.all_gather(x, axis_name, axis=x.ndim - 3, tiled=True) for x in (key, value))
        return attention(query, key, value, bias, mask, **tables, **options)
    place = _place(query, key, window, axis_name)
    mask = _key_mask(mask, key, place)
    split = _sliding if place.slides else _placed
    return split(query, key, value, bias, mask, place, tables, options)


# they count from the start of the whole grid
WHOLE = ("score_mod", "segment_ids", "grid_sizes", "extra_positions", "query_offset")


def _check_options(options: dict[str, Any], axis_name: str) -> None:
    given = [name for name in WHOLE if options.pop(name, None) is not None]
    options.pop("dropout_key", None)
    given += ["dropout_rate"] if options.pop("dropout_rate", 0.0) != 0 else []
    if given:
        raise ValueError(f"split_attention: {given[0]} must be left out over the split axis {axis_name!r}")


class _Place(NamedTuple):
    """A window over a split axis: the axis of the arrays, and the slots of all queries of the whole grid along it."""

    window: Window
    axis: int
    axis_name: str
    shards: int
    length: int  # of a shard
    stride: int
    grid: tuple[int, ...]  # the whole one
    whole: Axis

    @property
    def slides(self) -> bool:
        """Every query sees the same slots around it: only what stands outside the grid tells one from another."""
        whole = self.whole
        if whole.boundary == "shift" or whole.block > 1:
            return False
        return not self.window.along[0].causal or bool((whole.positions() <= whole.query[:, None]).all())

    @property
    def queries(self) -> int:
        """Of a shard."""
        return self.length // self.stride


def _place(query, key, window: Window, axis_name: str) -> _Place:
    axis = key.ndim - 2 - window.rank
    if axis < 0 or query.ndim != key.ndim:
        raise ValueError(
            f"split_attention: query (={query.shape}) and key (={key.shape}) must be [*batch, *grid, heads, head_dim] "
            f"with a grid of rank {window.rank}"
        )
    length, shards, stride = key.shape[axis], shard_count(axis_name), window.along[0].stride
    if window.along[0].boundary == "valid":
        raise ValueError(
            "split_attention: boundary (='valid') must be one of 'shift', 'mask', 'zero', 'edge', 'reflect', 'wrap' "
            f"along the axis split over {axis_name!r}, whose shards would differ in length"
        )
    if length % stride or query.shape[axis] != length // stride:
        raise ValueError(
            f"split_attention: stride (={stride}) must divide the {length} keys of a shard over {axis_name!r}, and "
            f"leave as many as there are queries, {query.shape[axis]}"
        )
    grid = (shards * length, *key.shape[axis + 1 : -2])
    return _Place(
        window=window,
        axis=axis,
        axis_name=axis_name,
        shards=shards,
        length=length,
        stride=stride,
        grid=grid,
        whole=window.axes(grid)[0],
    )


def _key_mask(mask, key, place: _Place):
    """`mask` with every axis of the keys; `attention` could read it in two ways."""
    if mask is None:
        return None
    if isinstance(mask, tuple):  # (of keys, by slot)
        mask, by_slot = mask
        if by_slot is not None:
            raise ValueError(
                "split_attention: mask[1] must be None over a split axis: a mask of keys is split as they are"
            )
        return _key_mask(mask, key, place)
    mask, grid = jnp.asarray(mask), key.shape[place.axis : -2]
    if mask.shape[-len(grid) :] != grid or mask.ndim > key.ndim - 2:
        raise ValueError(f"split_attention: mask (={mask.shape}) must be of keys, {key.shape[:-2]}, over a split axis")
    return mask.reshape((1,) * (key.ndim - 2 - mask.ndim) + mask.shape)


def _sliding(query, key, value, bias, mask, place: _Place, tables, options):
    """Keys with their halo, over which windows without a boundary begin at every stride-th."""
    window, whole = place.window, place.whole
    offset = int(whole.start[0] - whole.query[0])
    span = (whole.size - 1) * whole.dilation + 1 + (place.queries - 1) * place.stride
    boundary = whole.boundary if whole.boundary in FOLDING else "zero"

    def wide(x):
        return halo(x, place.axis, place.axis_name, -offset, span + offset - place.length, boundary)

    mask = None if mask is None else wide(mask)
    if whole.boundary in ("mask", "zero"):
        position = lax.axis_index(place.axis_name) * place.length + offset + np.arange(span)
        inside = ((position >= 0) & (position < whole.length)).reshape(span, *(1,) * (window.rank - 1))
        mask = _inside_too(mask, inside, (*(1,) * place.axis, span, *place.grid[1:]), whole.boundary)
    tables = {name: _recentered(table, whole) for name, table in tables.items()}
    valid = {"boundary": "valid", "offset": None, "causal": False}
    ours = {name: (first, *getattr(window, name)[1:]) for name, first in valid.items()}
    beginning = dataclasses.replace(window, **ours)
    return attention(query, wide(key), wide(value), bias, (mask, None), window=beginning, **tables, **options)


def _inside_too(mask, inside: jax.Array, shape: tuple[int, ...], boundary: str):
    """A mask of keys that knows what stands outside the grid: under "zero" it takes part, under "mask" it does not."""
    if boundary == "zero":
        return None if mask is None else mask | ~inside
    return jnp.broadcast_to(inside, shape) if mask is None else mask & inside


def _recentered(table, whole: Axis):
    """A relative table, or one for each axis, for windows that begin at their query."""
    if table is None:
        return None
    if isinstance(table, tuple | list):
        return tuple(_recentered(t, whole) if a == 0 else t for a, t in enumerate(table))
    return jnp.roll(jnp.asarray(table), whole.size - 1 - int(whole.relative()[0]), axis=1)


def _placed(query, key, value, bias, mask, place: _Place, tables, options):
    """Each shard on the part of the grid that its queries see, which ends where the grid does."""
    parts = _parts(place)
    before, after = (max(reach) for reach in zip(*parts, strict=True))

    def near(x):
        return None if x is None else halo(x, place.axis, place.axis_name, before, after)

    distinct = sorted(set(parts))
    branches = [_on_part(place, low, high, before, tables, options) for low, high in distinct]
    case = jnp.asarray([distinct.index(part) for part in parts])[lax.axis_index(place.axis_name)]
    # without remat the residuals of every branch would be held, and one of them is needed
    choose = jax.checkpoint(lambda *operands: lax.switch(case, branches, *operands))
    return choose(query, near(key), near(value), bias, near(mask))


def _parts(place: _Place) -> list[tuple[int, int]]:
    """How many tokens the part of each shard has before and after its own: what its queries see is among them."""
    whole, n = place.whole, place.length
    keys = _seen(whole).reshape(place.shards, -1)
    start = np.arange(place.shards) * n
    before = (start - np.where(keys < 0, whole.length, keys).min(1)).max()
    after = (keys.max(1) - (start + n - 1)).max()
    # a window that shifts inwards needs room
    least = whole.size * whole.dilation - n if whole.boundary == "shift" else 0
    before, after = (max(int(reach), least, 0) for reach in (before, after))
    # blocks and residue classes are the whole grid's in a part that begins and ends at a multiple of both
    unit, parts = math.lcm(whole.block * whole.dilation, place.stride), []
    for low in map(int, start):
        first = max(low - before, 0) // unit * unit
        end = min(-(-(low + n + after) // unit) * unit, whole.length)
        parts.append((low - first, end - low - n))
        _check_part(place, low, *parts[-1])
    return parts


def _check_part(place: _Place, start: int, low: int, high: int) -> None:
    """A shard's queries see on their part of the grid what they see on the whole one."""
    part = place.window.axes((low + place.length + high, *place.grid[1:]))[0]
    ours = slice(low // place.stride, low // place.stride + place.queries)
    theirs = slice(start // place.stride, start // place.stride + place.queries)
    seen, expected = _seen(part)[ours], _seen(place.whole)[theirs]
    if not np.array_equal(np.where(seen < 0, seen, seen + start - low), expected):
        raise ValueError(
            f"split_attention: block·dilation (={place.whole.block * place.whole.dilation}) must divide the "
            f"{place.length} tokens of a shard over {place.axis_name!r}, where {place.window} would fall on other keys "
            "than on the whole grid"
        )


def _seen(axis: Axis) -> np.ndarray:
    """The key in each slot, [queries, size]; -1 for a zero vector that takes part, -2 where nothing is seen."""
    return np.where(axis.visible(), axis.keys(), -2)


def _on_part(place: _Place, low: int, high: int, before: int, tables, options) -> Callable[..., Any]:
    """Attention of a shard's queries on its part of the grid, given the keys of the widest part."""
    offset = (low // place.stride, *(0,) * (place.window.rank - 1))

    def attend(query, key, value, bias, mask):
        ours = slice(before - low, before + place.length + high)

        def part(x):
            return None if x is None else lax.slice_in_dim(x, ours.start, ours.stop, axis=place.axis)

        keys = [part(key), part(value), bias, (part(mask), None)]
        return attention(query, *keys, window=place.window, query_offset=offset, **tables, **options)

    return attend

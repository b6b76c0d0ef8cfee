"""The window: which keys each query sees. Static geometry in NumPy, validated here and nowhere else."""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxattn.boundary import fold
from jaxattn.sizes import Size, is_sequence

BOUNDARIES = ("shift", "mask", "zero", "edge", "reflect", "wrap", "valid")
FOLDING = ("edge", "reflect", "wrap")


class Along(NamedTuple):
    """What a window is along one axis; the fields are `Window`'s arguments."""

    size: int
    stride: int
    dilation: int
    block: int
    causal: bool
    boundary: str
    offset: int | None


@dataclasses.dataclass(frozen=True)
class Window:
    """Which keys each query of a grid sees; every argument may differ per axis, and one value serves all of them.

    Along one axis of n keys, query i stands at key x = stride·i and has k = size slots. Slot u is the key at
    ``start(x) + dilation·u``, also where causality or the border excludes it (then it is masked). With
    g = x % dilation, j = x // dilation, s = block, and m = ceil((n - g) / dilation) keys in x's residue class:

        boundary                 lead                           start
        shift                    min((j//s)·s + s//2, m-1)      clamp(lead - k//2, 0, m-k)·dilation + g
        shift, causal            min((j//s)·s + s-1, m-1)       max(lead - k + 1, 0)·dilation + g
        mask, zero and the rest  (j//s)·s + s//2                (lead - k//2)·dilation + g
        the same, causal         (j//s)·s + s-1                 (lead - k + 1)·dilation + g
        ... with an offset       as above                       lead·dilation + g + offset
        valid                    j                              x

    Args:
        size: k, the tokens per axis. An int is one axis: a 2-D window is ``Window((7, 7))``.
        stride: query i stands at key stride·i, as in a convolution; the query grid is ceil(n / stride).
        dilation: the step between the keys of a window.
        block: this many neighbouring queries (of one residue class) share one window, placed for the middle one, or the
            last where causal; at most `size`, and 1 where the stride is not 1. 1 slides, `size` is Swin's partition.
        causal: a query sees itself and what came before it. With "valid", whose windows begin at the query, that
            leaves the query alone.
        boundary: what happens where a window leaves the grid:

            - "shift": it moves inward and holds k tokens; needs size·dilation <= n (NATTEN).
            - "mask": as if the grid went on; tokens outside are left out.
            - "zero": tokens outside are zero vectors that take part: `mask` is True there and `indices` -1.
            - "edge", "reflect", "wrap": NumPy's paddings (reflecting again where needed); not on a causal axis.
            - "valid": queries only where the whole window fits, (n - dilation·(k-1) - 1)//stride + 1 of them.
        offset: slot u of the query at x sees key x + offset + dilation·u; a convolution's SAME is offset = -low.
            None is -(k//2)·dilation, or -(k-1)·dilation where causal. Not with "shift"; with "valid", 0.

    Raises:
        ValueError: for an argument that is none of these, naming the argument, the axis, what came and what is allowed.

    References:
        Ramachandran et al. 2019 (arXiv 1906.05909); Liu et al. 2021, Swin (2103.14030); Vaswani et al. 2021, HaloNet
        (2103.12731); Hassani et al. 2023, NATTEN (2204.07143, 2504.16922).

    Example:
        >>> window = Window(3)
        >>> window.indices((5,))[..., 0]
        array([[0, 1, 2],
               [0, 1, 2],
               [1, 2, 3],
               [2, 3, 4],
               [2, 3, 4]])
        >>> Window(3, boundary="mask", stride=2).indices((5,))[..., 0]
        array([[-1,  0,  1],
               [ 1,  2,  3],
               [ 3,  4, -1]])
    """

    size: Size
    _: dataclasses.KW_ONLY
    stride: Size = 1
    dilation: Size = 1
    block: Size = 1
    causal: bool | Sequence[bool] = False
    boundary: str | Sequence[str] = "shift"
    offset: int | Sequence[int | None] | None = None

    def __post_init__(self) -> None:
        size: Any = self.size if is_sequence(self.size) else (self.size,)
        if len(size) == 0:
            raise ValueError(f"Window: size (={self.size}) must have at least one axis")
        for name in ("size", "stride", "dilation", "block"):
            values = _per_axis(name, getattr(self, name), len(size))
            object.__setattr__(self, name, tuple(_positive(name, axis, value) for axis, value in enumerate(values)))
        for name, check in (("causal", _boolean), ("boundary", _boundary), ("offset", _offset)):
            values = _per_axis(name, getattr(self, name), len(size))
            object.__setattr__(self, name, tuple(check(axis, value) for axis, value in enumerate(values)))
        for axis, along in enumerate(self.along):
            _check_together(axis, along)

    @functools.cached_property
    def along(self) -> tuple[Along, ...]:
        """What the window is along each axis.

        >>> Window((7, 7), causal=(True, False)).along[0].causal
        True
        """
        arguments: list[Any] = [getattr(self, name) for name in Along._fields]  # tuples, once the window is made
        return tuple(map(Along._make, zip(*arguments, strict=True)))

    @property
    def rank(self) -> int:
        """The number of axes."""
        return len(self.along)

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """The slots along each axis."""
        return tuple(along.size for along in self.along)

    def axes(self, shape: Sequence[int]) -> tuple["Axis", ...]:
        """The slots of every query along each axis of a grid of keys."""
        return tuple(_axis(self, axis, length) for axis, length in enumerate(self._lengths(shape)))

    def _lengths(self, shape: Size) -> tuple[int, ...]:
        lengths: Any = shape if is_sequence(shape) else (shape,)
        shape = tuple(_integer("grid", axis, n, "an integer") for axis, n in enumerate(lengths))
        if len(shape) != self.rank:
            raise ValueError(f"Window: {_rank_advice(self.sizes, shape)}")
        return shape

    def query_grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The grid of queries that a grid of keys gives.

        >>> Window((3, 3), stride=2).query_grid((7, 8))
        (4, 4)
        """
        return tuple(len(axis.start) for axis in self.axes(shape))

    def clipped(self, shape: Size) -> "Window":
        """The largest window, no larger than this one, that fits a grid of keys: itself, where it fits.

        Along an axis of n keys, in steps of d = dilation:

            shift    d at most n, size at most n // d, and block at most size. Where d is 1, a query then sees all that
                     there is to see; otherwise as many tokens of its residue class as every class has.
            valid    size at most m = ceil(n / d): the windows that leave at least one query.
            mask     fits any grid. Slots that no query sees are left out, which changes no value: size at most 2m - 1,
                     or m where causal. With a block or an offset it stays as it is.
            others   fit any grid, and stay as they are: each slot outside takes part.

        `position.crop` cuts relative tables to match.

        >>> Window((7, 7)).clipped((4, 14)).sizes
        (4, 7)
        >>> Window(7, dilation=3).clipped(8).sizes
        (2,)
        """
        clipped = [_clipped(*pair) for pair in zip(self.along, self._lengths(shape), strict=True)]
        return Window(**{name: tuple(getattr(along, name) for along in clipped) for name in Along._fields})

    def indices(self, shape: Sequence[int]) -> np.ndarray:
        """The key in each slot, int [*query_grid, *size, rank]; -1 throughout where the slot is outside the grid.

        A slot that only causality excludes keeps its key here, and is False in `mask`. Slots outside the grid under
        "zero" are -1 here and True in `mask`: they hold a zero vector.
        """
        axes = self.axes(shape)
        keys = np.stack(outer([axis.keys() for axis in axes]), axis=-1)
        return np.where((keys >= 0).all(-1, keepdims=True), keys, -1)

    def mask(self, shape: Sequence[int]) -> np.ndarray:
        """Whether each slot takes part, bool [*query_grid, *size].

        >>> Window(3, boundary="mask").mask((3,))
        array([[False,  True,  True],
               [ True,  True,  True],
               [ True,  True, False]])
        """
        return np.logical_and.reduce(outer([axis.visible() for axis in self.axes(shape)]))


class Axis(NamedTuple):
    """The slots of every query along one axis: slot u of query i is at ``start[i] + dilation·u``, a *position*.

    Positions go on beyond the grid; `fold` says which key stands there. What a query sees is a run of slots, from
    `low[i]` up to, not including, `high[i]`.
    """

    size: int
    dilation: int
    length: int
    boundary: str
    block: int
    query: np.ndarray  # [queries], the position where each query stands
    start: np.ndarray  # [queries]
    low: np.ndarray  # [queries]
    high: np.ndarray  # [queries]

    @classmethod
    def everything(cls, queries: int, keys: int) -> "Axis":
        """Every query sees every key: attention without a window."""
        zeros = np.zeros(queries, int)
        return cls(
            size=keys,
            dilation=1,
            length=keys,
            boundary="mask",
            block=1,
            query=np.arange(queries),
            start=zeros,
            low=zeros,
            high=np.full(queries, keys),
        )

    def rows(self, first: int, count: int) -> "Axis":
        """The slots of `count` queries from `first` on."""
        ours = slice(first, first + count)
        cut = {name: getattr(self, name)[ours] for name in ("query", "start", "low", "high")}
        return self._replace(**cut)

    def positions(self) -> np.ndarray:
        """[queries, size]"""
        return self.start[:, None] + self.dilation * np.arange(self.size)

    def keys(self) -> np.ndarray:
        """The key in each slot, [queries, size]; -1 outside."""
        return self.fold(self.positions())

    def named_keys(self) -> np.ndarray:
        """`keys`, with the position itself outside."""
        return np.where(self.keys() < 0, self.positions(), self.keys())

    def fold(self, position: Any) -> Any:
        """The key that stands at each position; -1 for none."""
        return fold(position, self.length, self.boundary if self.boundary in FOLDING else "zero")

    def visible(self) -> np.ndarray:
        """[queries, size]"""
        slot = np.arange(self.size)
        return (self.low[:, None] <= slot) & (slot < self.high[:, None])

    def relative(self) -> np.ndarray:
        """Each query's first slot in a table over the offsets -(k-1) .. k-1, [queries]; slot u is u further."""
        first, rest = np.divmod(self.start - self.query, self.dilation)
        first = first + self.size - 1
        if rest.any() or first.min(initial=0) < 0 or first.max(initial=0) > self.size - 1:
            low, high = -(self.size - 1) * self.dilation, 0
            raise ValueError(
                f"Window: offset (={self.start[0] - self.query[0]}) must be a multiple of dilation (={self.dilation}) "
                f"from {low} to {high} with relative_bias or key_embedding, whose tables have 2·{self.size}-1 entries"
            )
        return first


@functools.lru_cache(maxsize=256)
def _axis(window: Window, axis: int, length: int) -> Axis:
    """Place the windows along one axis."""
    along = window.along[axis]
    k, stride, d, boundary = along.size, along.stride, along.dilation, along.boundary
    _check_length(axis, length, k, d, boundary)
    queries = (length - d * (k - 1) - 1) // stride + 1 if boundary == "valid" else -(-length // stride)
    x = stride * np.arange(queries)
    start, low, high = place(along, x, length)
    return Axis(
        size=k,
        dilation=d,
        length=length,
        boundary=boundary,
        block=along.block,
        query=x,
        start=start,
        low=low,
        high=np.maximum(low, high),
    )


def place(along: Along, x: Any, length: Any, xp: Any = np, fit: bool = False) -> tuple[Any, Any, Any]:
    """Where the windows of the queries at x start, and the slots that they see, from and to: the table in Window's
    docstring, line by line. With `xp=jnp` the length may be traced, and an array of many, to be broadcast against x.
    `fit` takes the largest window that fits."""
    k, d, s = along.size, along.dilation, along.block
    if fit:
        k = xp.clip(length // d, 1, k)
        s = xp.minimum(s, k)
    causal, boundary, offset = along.causal, along.boundary, along.offset
    j, g = x // d, x % d
    lead = j // s * s + (s - 1 if causal else s // 2)
    if boundary == "shift":
        members = -((g - length) // d)  # ceil((length - g) / d)
        lead = xp.minimum(lead, members - 1)
        first = xp.maximum(lead - k + 1, 0) if causal else xp.clip(lead - k // 2, 0, members - k)
        start = first * d + g
    elif boundary == "valid":
        start = x
    else:
        default = -(k - 1) * d if causal else -(k // 2) * d
        start = lead * d + g + (default if offset is None else offset)
    low, high = 0 * start, 0 * start + k
    if boundary in ("shift", "mask", "valid"):  # the grid ends: positions in [0, length)
        low, high = xp.clip(-(start // d), 0, k), xp.clip(-((start - length) // d), 0, k)
    if causal:  # positions up to x
        high = xp.clip((x - start) // d + 1, 0, high)
    return start, low, high


def _clipped(along: Along, length: int) -> Along:
    """What is left of a window along one axis of so many keys: the table in `Window.clipped`, line by line."""
    size, dilation = along.size, along.dilation
    members = max(-(-length // dilation), 1)  # of the largest residue class
    if along.boundary == "shift":
        dilation = min(dilation, max(length, 1))
        size = min(size, max(length // dilation, 1))
    elif along.boundary == "valid":
        size = min(size, members)
    elif along.boundary == "mask" and along.block == 1 and along.offset is None:
        size = min(size, members if along.causal else 2 * members - 1)
    return along._replace(size=size, dilation=dilation, block=min(along.block, size))


def outer(tables: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Per-axis [queries, size] tables, each broadcast to [*queries, *size]."""
    rank = len(tables)
    spread = []
    for axis, table in enumerate(tables):
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = table.shape
        spread.append(table.reshape(shape))
    return list(np.broadcast_arrays(*spread))


def _rank_advice(size: tuple[int, ...], shape: tuple[int, ...]) -> str:
    advice = f"size (={size}) must have as many axes as the grid (={shape})"
    if len(set(size)) == 1 and len(shape) > 0:
        return f"{advice}: for this size along every axis, write Window({(size[0],) * len(shape)})"
    return advice


def _per_axis(name: str, value: Any, rank: int) -> tuple:
    if not is_sequence(value):
        return (value,) * rank
    if len(value) != rank:
        raise ValueError(f"Window: {name} (={tuple(value)}) must be one value or {rank}, as many as size has axes")
    return tuple(value)


def _integer(name: str, axis: int, value: Any, allowed: str) -> int:
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"Window: {name} (={value!r}) must be {allowed} on axis {axis}") from None


def _positive(name: str, axis: int, value: Any) -> int:
    number = _integer(name, axis, value, "an integer >= 1")
    if number < 1:
        raise ValueError(f"Window: {name} (={number}) must be an integer >= 1 on axis {axis}")
    return number


def _boolean(axis: int, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"Window: causal (={value!r}) must be True or False on axis {axis}")
    return bool(value)


def _boundary(axis: int, value: Any) -> str:
    if not isinstance(value, str) or value not in BOUNDARIES:
        raise ValueError(
            f"Window: boundary (={value!r}) must be one of {', '.join(map(repr, BOUNDARIES))} on axis {axis}"
        )
    return value


def _offset(axis: int, value: Any) -> int | None:
    return None if value is None else _integer("offset", axis, value, "an integer or None")


def _check_together(axis: int, along: Along) -> None:
    size, stride, block, boundary, offset = along.size, along.stride, along.block, along.boundary, along.offset

    def refuse(what: str) -> None:
        raise ValueError(f"Window: {what} on axis {axis}")

    if block > size:
        refuse(f"block (={block}) must be at most size (={size})")
    if block > 1 and stride > 1:
        refuse(f"block (={block}) must be 1 where stride (={stride}) is above 1")
    if block > 1 and boundary == "valid":
        refuse(f"block (={block}) must be 1 with boundary 'valid'")
    if along.causal and boundary in FOLDING:
        refuse(f"boundary (={boundary!r}) must be one of 'shift', 'mask', 'zero', 'valid' with causal=True")
    if offset is not None and boundary == "shift":
        refuse(f"offset (={offset}) must be None with boundary 'shift', which places the window itself")
    if offset and boundary == "valid":
        refuse(f"offset (={offset}) must be None or 0 with boundary 'valid', whose windows begin at the query")


def _check_length(axis: int, length: int, size: int, dilation: int, boundary: str) -> None:
    def refuse(what: str) -> None:
        raise ValueError(f"Window: the grid (={length} along axis {axis}) must have {what}")

    span = dilation * (size - 1) + 1
    if length < 1:
        refuse("at least one token")
    if boundary == "shift" and size * dilation > length:
        refuse(f"size (={size}) · dilation (={dilation}) = {size * dilation} tokens or more with boundary 'shift'")
    if boundary == "valid" and span > length:
        refuse(f"the {span} tokens that size (={size}) with dilation (={dilation}) spans with boundary 'valid'")

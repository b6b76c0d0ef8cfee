"""The text of an equation that slides, in any rank, and a convolution's arguments spelled out for it."""

from collections.abc import Sequence
from typing import Annotated, Any

import jax

from jaxattn.einsum import einsum
from jaxattn.halo import shard_count, split_pad
from jaxattn.sizes import Size, is_int, is_sequence

Padding = Annotated[str | Size | Sequence[Size], "read_padding"]


def sliding(strides: Sequence[int], dilation: Sequence[int]) -> tuple[str, str, str]:
    """The tokens of a window, the axes of the window and those of its positions.

    >>> sliding((2, 2), (1, 3))
    ('2*i0+1*r0 2*i1+3*r1', 'r0 r1', 'i0 i1')
    """
    sums = [f"{s}*i{k}+{d}*r{k}" for k, (s, d) in enumerate(zip(strides, dilation, strict=True))]
    return " ".join(sums), axes("r", len(sums)), axes("i", len(sums))


def axes(name: str, rank: int) -> str:
    """One axis of this name for each of the grid's.

    >>> axes("r", 2)
    'r0 r1'
    """
    return " ".join(f"{name}{k}" for k in range(rank))


def same(size: Sequence[int], dilation: Sequence[int], causal: bool = False) -> list[tuple[int, int]]:
    """The padding (low, high) of each axis under which a window of `size` gives as many positions as it slides over.

    Centred as "SAME" of a convolution is; causal, a position sees what comes before it, and itself last.
    """
    spans = [d * (k - 1) for k, d in zip(size, dilation, strict=True)]
    return [(span, 0) if causal else (span // 2, span - span // 2) for span in spans]


def divided(where: str, name: str, groups: int, size: int, of: str = "the features of x") -> int:
    """size / groups, or an error where so many features can't be split into so many groups."""
    if groups < 1 or size % groups:
        raise ValueError(f"{where}: {name} (={groups}) must divide {of} (={size})")
    return size // groups


def read_padding(where: str, padding: Any, rank: int, words: Sequence[str] = ("SAME", "VALID")) -> Any:
    """One of the `words`, in capitals, or a pair (low, high) for each axis.

    >>> read_padding("layer", "same", 2), read_padding("layer", [1, (0, 2)], 2)
    ('SAME', ((1, 1), (0, 2)))
    """
    if isinstance(padding, str) and padding.upper() in words:
        return padding.upper()
    entries = tuple(padding) if is_sequence(padding) else (padding,) * rank
    pairs = tuple(tuple(p) if is_sequence(p) else (p, p) for p in entries)
    if len(pairs) != rank or not all(len(pair) == 2 and all(map(is_int, pair)) for pair in pairs):
        raise ValueError(
            f"{where}: padding (={padding!r}) must be {', '.join(map(repr, words))}, an int, or an int or a pair "
            f"(low, high) for each of the {rank} axes"
        )
    return tuple((int(low), int(high)) for low, high in pairs)


def pads(padding: Any, grid: Sequence[int], size: Sequence[int], strides: Sequence[int], dilation: Sequence[int]):
    """What `read_padding` returns ("SAME", "SAME_LOWER", "VALID", or pairs) as a pair for each axis of a grid.

    >>> pads("SAME", (9, 8), (3, 3), (2, 2), (1, 1))
    ((1, 1), (0, 1))
    """
    if not isinstance(padding, str):
        return tuple(padding)
    pairs = []
    for n, k, s, d in zip(grid, size, strides, dilation, strict=True):
        total = 0 if padding == "VALID" else max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
        low = -(-total // 2) if padding == "SAME_LOWER" else total // 2
        pairs.append((low, total - low))
    return tuple(pairs)


def with_neighbours(
    x: jax.Array, axis_name: str | None, padding: Any, size: Sequence[int], strides, dilation, boundary: Any = None
) -> tuple[jax.Array, Any]:
    """x `[*batch, *grid, features]` and its padding; where the grid's first axis is split over `axis_name`, a shard
    with the neighbours' tokens that its windows see, and no padding along that axis."""
    if axis_name is None:
        return x, padding
    first = x.ndim - 1 - len(size)
    grid = (x.shape[first] * shard_count(axis_name), *x.shape[first + 1 : -1])
    along, *others = pads(padding, grid, size, strides, dilation)
    outside = boundary[0] if is_sequence(boundary) else boundary
    x = split_pad(
        x, first, axis_name, along, size=size[0], stride=strides[0], dilation=dilation[0], boundary=outside or "zero"
    )
    return x, [(0, 0), *others]


def slid(
    equation: str,
    x: jax.Array,
    weights: jax.Array,
    size: Sequence[int],
    strides: Sequence[int] | None = None,
    dilation: Sequence[int] | None = None,
    *,
    padding: Any = None,
    boundary: Any = None,
    axis_name: str | None = None,
    **options: Any,
) -> jax.Array:
    """The `einsum` of x `[*batch, *grid, features]`, over whose grid a window slides, and weights.

    In the equation, {sums} are the tokens that a window sees, {r} the axes of the window, and {i} its positions. The
    padding gives as many positions as the window slides over (`same`) unless it is given. The grid's first axis may be
    split over `axis_name`.

    >>> import jax.numpy as jnp
    >>> slid("{sums} c, {r} -> {i} c", jnp.arange(4.0)[:, None], jnp.ones(3), (3,))[:, 0]
    Array([1., 3., 6., 5.], dtype=float32)
    """
    strides, dilation = (step or (1,) * len(size) for step in (strides, dilation))
    padding = same(size, dilation) if padding is None else padding
    x, padding = with_neighbours(x, axis_name, padding, size, strides, dilation, boundary)
    sums, window, position = sliding(strides, dilation)
    equation = equation.format(sums=sums, r=window, i=position)
    return einsum(equation, x, weights, padding=padding, boundary=boundary, **options)

"""The text of an equation that slides, in any rank, and a convolution's arguments spelled out for it."""

import numbers
from collections.abc import Sequence
from typing import Any

Padding = str | int | Sequence[int | Sequence[int]]


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


def is_int(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def per_axis(layer: str, name: str, value, rank: int) -> tuple[int, ...]:
    """A positive int for each spatial axis."""
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,) * rank
    if len(values) != rank or not all(is_int(v) and int(v) >= 1 for v in values):
        raise ValueError(
            f"{layer}: {name}={value!r} must be a positive int, or one for each of the {rank} spatial axes"
        )
    return tuple(map(int, values))


def divided(layer: str, name: str, groups: int, size: int, of: str = "features of x") -> None:
    """Raise where so many features can't be split into so many groups."""
    if groups < 1 or size % groups:
        raise ValueError(f"{layer}: the {name} (={groups}) must divide the {of} (={size})")


def pads(layer: str, padding: Padding | None, rank: int) -> Any:
    """`padding` with ints of a sequence spelled out as pairs, which `einsum` would read as one pair for all."""
    if padding is None or isinstance(padding, str) or is_int(padding):
        return padding
    if isinstance(padding, Sequence) and len(padding) == rank:
        entries = [(p, p) if is_int(p) else p for p in padding]
        if all(isinstance(p, Sequence) and len(p) == 2 and all(map(is_int, p)) for p in entries):
            return entries
    raise ValueError(
        f"{layer}: padding={padding!r} must be 'SAME', 'VALID', an int, or an int or pair for each of the "
        f"{rank} spatial axes"
    )

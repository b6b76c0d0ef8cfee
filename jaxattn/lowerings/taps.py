"""One spatial dimension of a convolution, and what of it takes part."""

from typing import NamedTuple


class TapAxis(NamedTuple):
    """Tap q of position p stands on the token `stride·p + dilation·q - low`; outside of 0..`length`-1 stands zero."""

    stride: int
    dilation: int
    low: int
    length: int
    positions: int
    taps: int

    @property
    def least_high(self) -> int:
        """How far the last tap of the last position stands beyond the last token; negative where it stands before."""
        reach = self.stride * (self.positions - 1) + self.dilation * (self.taps - 1)
        return reach - self.low - (self.length - 1)


class Trim(NamedTuple):
    """The tokens, positions and taps, each as `(start, stop)`, beyond which there are only products with zeros; and
    the axis of these alone."""

    tokens: tuple[int, int]
    positions: tuple[int, int]
    taps: tuple[int, int]
    axis: TapAxis


def trim(axis: TapAxis) -> Trim | None:
    """What of an axis takes part; None where nothing does.

    Afterwards `0 <= low` and neither side is padded by more than the taps or the positions reach. So no padding that
    JAX makes of it is negative at the low end, in derivatives of any order: there XLA:CPU reads outside its input.
    At the high end fewer tokens than a stride may be left that nobody reads.
    """
    x0, x1, p0, p1, q0, q1 = 0, axis.length, 0, axis.positions, 0, axis.taps
    a, b, low = axis.stride, axis.dilation, axis.low
    before = None
    while before != (before := (x0, x1, p0, p1, q0, q1)):
        if x0 >= x1 or p0 >= p1 or q0 >= q1:
            return None
        p0 = max(p0, -((b * (q1 - 1) - low - x0) // a))  # the first whose last tap is not before the tokens
        p1 = min(p1, (x1 - 1 + low - b * q0) // a + 1)
        q0 = max(q0, -((a * (p1 - 1) - low - x0) // b))
        q1 = min(q1, (x1 - 1 + low - a * p0) // b + 1)
        x0 = max(x0, a * p0 + b * q0 - low)
        end = a * (p1 - 1) + b * (q1 - 1) - low + 1
        x1 = end if x1 - end >= a else x1
    low -= a * p0 + b * q0 - x0
    b = b if q1 - q0 > 1 else 1  # of one tap it says nothing, and may be larger than lax takes
    return Trim((x0, x1), (p0, p1), (q0, q1), TapAxis(a, b, low, x1 - x0, p1 - p0, q1 - q0))

"""An array of PyTorch's as some of ours, one after the other: an equation says how each lies in it."""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]
Resize = Callable[[np.ndarray, "Entry"], np.ndarray]


class Layout(NamedTuple):
    """One of our arrays as (a part of) one of theirs; `layout` makes it of an equation."""

    names: list[str]  # our axes
    flips: tuple[int, ...]  # those that are reversed
    units: list[list[str]]  # which of ours each of theirs is made of, row-major; none: an axis of one
    joint: int  # the unit along which parts stand one after the other
    merged: list[int]  # how many units each axis of theirs has: more than one where parts join within it

    def sizes(self, shape: Shape) -> list[int]:
        """Of the units."""
        by_name = dict(zip(self.names, shape, strict=True))
        return [math.prod(by_name[name] for name in unit) for unit in self.units]

    def order(self) -> list[int]:
        """Our axes as theirs come."""
        return [self.names.index(name) for unit in self.units for name in unit]


@functools.cache
def layout(equation: str) -> Layout:
    """A rearrangement of our array into theirs, as an equation: `"i head dim -> (head dim) i"`.

    Ours is on the left, an axis a name. On the right, parentheses make one axis of several, and 1 adds one. A minus
    before a name on the left reverses its axis. A plus on the right says along which axis the parts stand one after the
    other, where several parameters of ours are one of theirs: `+(head dim)`, or within an axis, `(head +dim)`. Without
    one, they do along the first.

    >>> layout("row -column -> 1 (row column)").units
    [[], ['row', 'column']]
    """
    left, _, right = equation.partition("->")
    units, merged, joint = [], [], 0
    for plus, group in re.findall(r"(\+?)(\([^)]*\)|\w+)", right):
        tokens = group.strip("()").split()
        # an axis within which parts join stays apart until they have
        apart = any(token.startswith("+") for token in tokens)
        found = [[token.lstrip("+")] for token in tokens] if apart else [[token for token in tokens if token != "1"]]
        if plus or apart:
            joint = len(units) + next((n for n, token in enumerate(tokens) if token.startswith("+")), 0)
        units += found
        merged.append(len(found))
    names = left.split()
    flips = tuple(axis for axis, name in enumerate(names) if name.startswith("-"))
    return Layout([name.lstrip("-") for name in names], flips, units, joint, merged)


class Entry(NamedTuple):
    """One array of theirs: our parameters in it, in their order, and how it is made of these.

    >>> entry = Entry(["q", "k"], [(2, 1), (2, 1)], [layout("-i o -> +o i")] * 2)
    >>> entry.write([np.array([[1], [2]]), np.array([[3], [4]])])
    array([[2, 1],
           [4, 3]])
    >>> entry.read(np.array([[2, 1], [4, 3]]))[1]
    array([[3],
           [4]])
    """

    ours: list[str]
    shapes: list[Shape]
    layouts: list[Layout]
    resize: Resize | None = None

    @property
    def _units(self) -> list[int]:
        """The sizes of the units of their array."""
        parts = [part.sizes(shape) for part, shape in zip(self.layouts, self.shapes, strict=True)]
        whole = list(parts[0])
        whole[self.layouts[0].joint] = sum(part[self.layouts[0].joint] for part in parts)
        return whole

    @property
    def shape(self) -> Shape:
        """Of their array."""
        sizes = iter(self._units)
        return tuple(math.prod(next(sizes) for _ in range(count)) for count in self.layouts[0].merged)

    def write(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Their array, of our parts."""
        moved = [
            np.flip(part, how.flips).transpose(how.order()).reshape(how.sizes(part.shape))
            for part, how in zip(parts, self.layouts, strict=True)
        ]
        return np.concatenate(moved, self.layouts[0].joint).reshape(self.shape)

    def read(self, array: np.ndarray) -> list[np.ndarray]:
        """Our parts, of their array."""
        joint = self.layouts[0].joint
        counts = [how.sizes(shape)[joint] for how, shape in zip(self.layouts, self.shapes, strict=True)]
        parts = np.split(array.reshape(self._units), np.cumsum(counts)[:-1], joint)
        found = []
        for part, how, shape in zip(parts, self.layouts, self.shapes, strict=True):
            order = how.order()
            moved = part.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))
            found.append(np.flip(moved, how.flips))
        return found

"""Sizes as users give them: an int, or one for each axis; NumPy's too."""

import numbers
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np

# >= 1, but where another annotation of it says from where on, Annotated[Size, 0]
Size = Annotated[int | np.integer | np.ndarray | Sequence[int | np.integer], 1]
Extent = Any  # of a batch: an int, or one that `jax.export` leaves open
A_FEW = 8  # entries of a batch


def is_int(value: Any) -> bool:
    """Whether a value is a whole number: Python's or NumPy's, and no bool.

    >>> [is_int(value) for value in (3, np.int8(3), np.array(3), True, 3.0, "3")]
    [True, True, True, False, False, False]
    """
    if isinstance(value, np.ndarray):
        return value.ndim == 0 and value.dtype.kind in "iu"
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_symbolic(size: Any) -> bool:
    """Whether a size is one that `jax.export` leaves open, as of `symbolic_shape("batch, 28, 28")`."""
    return not isinstance(size, int | np.integer)


def planned(size: Any) -> int:
    """The size that plans are made for: of one that is left open, a few."""
    return A_FEW if is_symbolic(size) else size


def is_sequence(value: Any) -> bool:
    """Whether a value has an entry for each axis: a list, a tuple, or an array that is not one number."""
    return (
        value.ndim > 0 if isinstance(value, np.ndarray) else isinstance(value, Sequence) and not isinstance(value, str)
    )


def ints(where: str, name: str, value: Any, least: int = 1) -> tuple[int, ...]:
    """A size of as many axes as it has entries; an int is one axis.

    >>> ints("layer", "kernel_size", 3), ints("layer", "kernel_size", np.array([3, 5]))
    ((3,), (3, 5))
    """
    values = tuple(value) if is_sequence(value) else (value,)
    if not values or not all(is_int(v) and v >= least for v in values):
        raise ValueError(f"{where}: {name} (={value!r}) must be an int >= {least}, or one for each axis")
    return tuple(map(int, values))


def every_axis(where: str, name: str, value: Any, rank: int) -> tuple[int, ...]:
    """A size of as many axes as it has entries; an int is that of `rank` axes.

    >>> every_axis("layer", "window", 3, 2), every_axis("layer", "window", (3,), 2)
    ((3, 3), (3,))
    """
    sizes = ints(where, name, value)
    return sizes if is_sequence(value) else sizes * rank


def per_axis(where: str, name: str, value: Any, rank: int, least: int = 1) -> tuple[int, ...]:
    """An int for each of `rank` axes; one serves all.

    >>> per_axis("layer", "strides", 2, 3)
    (2, 2, 2)
    >>> per_axis("layer", "strides", True, 2)
    Traceback (most recent call last):
        ...
    ValueError: layer: strides (=True) must be an int >= 1, or one for each of the 2 axes
    """
    values = tuple(value) if is_sequence(value) else (value,) * rank
    if len(values) != rank or not all(is_int(v) and v >= least for v in values):
        raise ValueError(f"{where}: {name} (={value!r}) must be an int >= {least}, or one for each of the {rank} axes")
    return tuple(map(int, values))

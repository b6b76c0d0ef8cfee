"""What stands outside a grid: one rule for an index that falls off an axis."""

from typing import Any

import jax.numpy as jnp
import numpy as np

BOUNDARIES = ("zero", "edge", "reflect", "wrap")


def fold(index: Any, length: int, boundary: str) -> Any:
    """The token of an axis of `length` that stands at `index`, which may lie outside; -1 where nothing does.

    "zero": nothing stands outside. "edge": the nearest token. "reflect": NumPy's reflection, the edge not repeated,
    and again where one reflection is not enough. "wrap": floor modulo. An array of NumPy's stays one.

    >>> fold(np.arange(-3, 6), 3, "reflect")
    array([1, 2, 1, 0, 1, 2, 1, 0, 1])
    """
    xp = np if isinstance(index, np.ndarray) else jnp
    if boundary == "zero":
        return xp.where((index >= 0) & (index < length), index, -1)
    if boundary == "edge":
        return xp.clip(index, 0, length - 1)
    if boundary == "wrap":
        return index % length
    if boundary == "reflect":
        period = max(2 * (length - 1), 1)
        return xp.minimum(index % period, -index % period)
    raise ValueError(f"fold: boundary (={boundary!r}) must be one of {', '.join(BOUNDARIES)}")

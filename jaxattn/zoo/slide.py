"""How a window slides over a grid, in a convolution's words."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn.boundary import BOUNDARIES, fold
from jaxattn.sizes import Size, ints, per_axis
from jaxattn.window import Window
from jaxattn.zoo.equations import Padding, pads, read_padding

WORDS = ("SAME", "SAME_LOWER", "VALID")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Slide:
    """Which tokens an attention sees that slides as a convolution does: slot u of query i is the token

        strides·i + dilation·u - low,        u = 0 .. size-1,  (low, high) the padding

    along each axis. Hashable and static under `jax.jit`, so that it can stand among arrays in a mapping of parameters.

    Args:
      size: slots per axis; its length is the rank of the grid, and an int is one axis.
      strides, dilation: ints, or one per axis.
      padding: "SAME", "SAME_LOWER", "VALID", an int, or a sequence with an int or a pair `(low, high)` per axis;
        negative ones crop.
      boundary: what stands in the padding. "zero": zero tokens, which take part. "mask": nothing, so that the weights
        are normalised over the tokens inside. "edge", "reflect", "wrap": the grid's own tokens, as in `numpy.pad`.

    Raises:
      ValueError: an argument is none of these, by name.

    >>> import jax.numpy as jnp
    >>> tokens, inside, window = Slide((3, 3), strides=2).placed(jnp.ones((9, 8, 4)))
    >>> tokens.shape, window.query_grid(tokens.shape[:2])
    ((11, 9, 4), (5, 4))
    """

    size: Size
    strides: Size = 1
    padding: Padding = "SAME"
    dilation: Size = 1
    boundary: str = "zero"

    def __post_init__(self) -> None:
        size = ints("Slide", "size", self.size)
        if not isinstance(self.boundary, str) or self.boundary not in (*BOUNDARIES, "mask"):
            allowed = ", ".join(map(repr, (*BOUNDARIES, "mask")))
            raise ValueError(f"Slide: boundary (={self.boundary!r}) must be one of {allowed}")
        for name in ("size", "strides", "dilation"):
            object.__setattr__(self, name, per_axis("Slide", name, getattr(self, name), len(size)))
        object.__setattr__(self, "padding", read_padding("Slide", self.padding, len(size), WORDS))

    @property
    def rank(self) -> int:
        """The number of axes."""
        return self.window.rank

    @property
    def window(self) -> Window:
        """The window over the padded grid."""
        return Window(self.size, stride=self.strides, dilation=self.dilation, boundary="valid")

    def pads(self, grid: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """(low, high) of every axis of `grid`."""
        return pads(self.padding, grid, self.window.sizes, self.strides, self.dilation)  # pyright: ignore

    def placed(self, x: jax.Array) -> tuple[jax.Array, np.ndarray | None, Window]:
        """`x` `[*batch, *grid, features]` with its padding, which of its tokens take part, and the window over it."""
        rank = self.window.rank
        first, grid = x.ndim - 1 - rank, x.shape[-1 - rank : -1]
        around = self.pads(grid)
        boundary = "zero" if self.boundary == "mask" else self.boundary
        index = [fold(np.arange(-low, n + high), n, boundary) for n, (low, high) in zip(grid, around, strict=True)]
        if boundary != "zero":
            for axis, along in enumerate(index, first):
                x = jnp.take(x, along, axis=axis)
            return x, None, self.window
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0)] * first + [(*pad, 0) for pad in around] + [(0, 0, 0)])
        if self.boundary == "zero":
            return x, None, self.window
        inside = functools.reduce(np.multiply.outer, [along >= 0 for along in index])
        return x, inside.reshape((1,) * first + inside.shape), self.window

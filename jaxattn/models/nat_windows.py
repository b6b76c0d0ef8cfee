"""Swin's windows in the place of NAT's neighbourhoods, dilated ones too."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxattn.einsum import einsum
from jaxattn.models.nat import widened
from jaxattn.nn.grid import Splittable
from jaxattn.nn.shifted import ShiftedWindowAttention


class ShiftedWindows(Splittable):
    """`nn.ShiftedWindowAttention` on each of the dilation² grids of every dilation-th row and column, with the weights
    of `nat.Neighborhood`: an offset between two tokens that see each other has the same bias in both.

    A grid that is smaller than the dilated window ends in zeros, which take part, as it does there; what else it is
    padded by does not. There is no shift along an axis that one window covers.
    """

    def __init__(
        self, num_heads: int, width: int, window: tuple[int, ...], dilation: int, *, shifted: bool, **kwargs: Any
    ):
        self.sides, self.dilation = tuple(k * dilation for k in window), dilation
        shift = tuple(k // 2 if shifted else 0 for k in window)
        self.attention = ShiftedWindowAttention(num_heads, width, window=window, shift=shift, **kwargs)

    def __call__(self, x: Float[Array, "*batch height width features"], *, sow_weights: bool = False):
        rows, columns = x.shape[-3:-1]
        x = widened(x, self.sides, self.axis_name)
        d, grid = self.dilation, x.shape[-3:-1]
        pads = [(0, -n % d) for n in grid]
        if self.axis_name is not None and pads[0][1]:
            raise ValueError(
                f"NAT: dilation (={d}) must divide the {grid[0]} rows of a shard of the grid, which is split over "
                f"{self.axis_name!r}"
            )
        parts = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + pads + [(0, 0)])
        parts = einsum("... (i p) (j q) c -> ... p q i j c", parts, p=d, q=d)
        inside = None
        if any(map(any, pads)):
            held = np.pad(np.ones(grid, bool), pads).reshape(-1, d, parts.shape[-2], d).transpose(1, 3, 0, 2)
            inside = held.reshape((1,) * (x.ndim - 3) + held.shape)
        y = self.attention(parts, mask=inside, sow_weights=sow_weights)
        return einsum("... p q i j c -> ... (i p) (j q) c", y)[..., :rows, :columns, :]

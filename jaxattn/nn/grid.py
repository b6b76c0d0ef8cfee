"""What every layer knows of its grid: how many axes it has, and which inputs have them."""

from typing import Any, ClassVar

import numpy as np
from flax import nnx

from jaxattn.sizes import Size, every_axis, is_sequence, per_axis


class Splittable(nnx.Module):
    """A module that says whether it can be computed on a grid whose first axis is split over a mesh axis.

    `axis_name` is that mesh axis, inside `jax.shard_map`; None where the grid is whole. What can't be split says why in
    `needs_whole_grid`. `jaxattn.train.sharding.split_grid` asks, and sets it for every layer of a network.
    """

    axis_name: str | None = None
    needs_whole_grid: ClassVar[str | None] = None


class GridModule(Splittable):
    """A module whose input is `[*batch, *grid, in_features]`.

    A size (window, block, kernel_size or grid) has an int for each axis of the grid. One int is every axis's where
    `rank` says how many there are. Without `rank` it is of one axis, and so is a layer that has neither. Then an input
    has at most one batch axis: `[height, width]` before the features could be a grid that was meant.
    """

    in_features: int
    rank = 1
    rank_is_said = True

    def sized(self, name: str, size: Size, rank: int | None) -> tuple[int, ...]:
        """The size along each axis of the grid, whose rank is known from here on."""
        where, several = type(self).__name__, is_sequence(size)
        sizes = every_axis(where, name, size, rank or 1)
        if rank is not None and len(sizes) != rank:
            raise ValueError(f"{where}: {name} (={size}) must be an int, or one for each of the axes (rank={rank})")
        self.rank, self.rank_is_said = len(sizes), several or rank is not None
        return sizes

    def each(self, name: str, size: Size, least: int = 1) -> tuple[int, ...]:
        """An int for each axis of the grid, of which one serves all."""
        return per_axis(type(self).__name__, name, size, self.rank, least)

    def check_input(self, name: str, x: Any, features: int) -> tuple[int, ...]:
        """Raise where x is not `[*batch, *grid, features]`; otherwise its grid."""
        where, shape = f"{type(self).__name__}: {name} (={list(np.shape(x))})", np.shape(x)
        if len(shape) < self.rank + 1 or shape[-1] != features:
            axes = "" if self.rank == 0 else f"{self.rank} ax{'i' if self.rank == 1 else 'e'}s of a grid, "
            raise ValueError(f"{where} must be [*batch, {axes}{features} features]")
        if not self.rank_is_said and len(shape) > 3:
            raise ValueError(
                f"{where} must be [batch, tokens, features] where nothing says how many axes the grid has: give "
                f"rank={len(shape) - 2} to look along all of them, or rank=1 to look along the last"
            )
        return shape[len(shape) - 1 - self.rank : -1]

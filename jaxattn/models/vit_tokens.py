"""An image as a vision transformer's tokens: its patches, where they stand, and what joins them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxattn.halo import shard_count
from jaxattn.models.vit_blocks import small_init
from jaxattn.nn.conv import Conv
from jaxattn.nn.grid import Splittable


def sincos_2d(height: int, width: int, features: int) -> np.ndarray:
    """Where each token stands, `[height, width, features]`: of the column j and then of the row i, all sines and then
    all cosines of

        j ω_m, i ω_m,   ω_m = 10000^(-m / M),   m = 0 … M - 1,   M = features / 4

    (Chen, Xie & He 2021, MoCo v3, arXiv 2104.02057).

    >>> sincos_2d(1, 2, 4)[0, 1].round(4)  # sin 1, cos 1, sin 0, cos 0
    array([0.8415, 0.5403, 0.    , 1.    ])
    """
    omega = 10_000.0 ** -(np.arange(features // 4) / (features // 4))
    row, column = (index[..., None] * omega for index in np.indices((height, width)))
    return np.concatenate([np.sin(column), np.cos(column), np.sin(row), np.cos(row)], axis=-1)


def patch_grid(size: Sequence[int], patch_size: Sequence[int]) -> tuple[int, int]:
    """The grid of the patches of an image of `size` (height, width).

    >>> patch_grid((6, 8), (2, 2))
    (3, 4)
    """
    if any(n < 1 or n % p for n, p in zip(size, patch_size, strict=True)):
        raise ValueError(f"ViT: patch_size (={patch_size}) must divide the image's size (={tuple(size)})")
    rows, columns = (n // p for n, p in zip(size, patch_size, strict=True))
    return rows, columns


class Tokens(Splittable):
    """What a ViT has before its blocks, of which its arguments of the same names tell.

    The class token and the registers join the patches before block `joins`; a class token that joins first has a
    learned position of its own.
    """

    def __init__(
        self,
        image_size: tuple[int, ...],
        patch_size: tuple[int, ...],
        in_features: int,
        width: int,
        *,
        position: str,
        class_token: bool,
        class_position: bool,
        registers: int,
        joins: int,
        use_bias: bool,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        def table(*shape: int) -> nnx.Param:
            return nnx.Param(small_init(rngs.params(), (*shape, width), param_dtype))

        self.image_size, self.patch_size, self.in_features = image_size, patch_size, in_features
        self.position_kind, self.joins = position, joins
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.patches = Conv(in_features, width, patch_size, patch_size, padding="VALID", use_bias=use_bias, **kwargs)
        learned, first = position == "learned", class_token and class_position and joins == 0
        self.position = table(*patch_grid(image_size, patch_size)) if learned else nnx.data(None)
        self.class_token = table() if class_token else nnx.data(None)
        self.class_position = table() if learned and first else nnx.data(None)
        self.registers = table(registers) if registers else nnx.data(None)

    @property
    def first_patch(self) -> int:
        """How many tokens stand before the patches."""
        return 1 if self.registers is None else 1 + self.registers.shape[0]

    def placed(self, images: Array) -> Float[Array, "*batch height width features"]:
        """The patches, and where they stand."""
        self._check_images(images)
        x = self.patches(images)
        rows, columns, features = x.shape[-3:]
        if self.position is not None:
            position = self.position[...].astype(x.dtype)
        elif self.position_kind == "sincos2d":
            position = jnp.asarray(sincos_2d(rows * shard_count(self.axis_name), columns, features), x.dtype)
        else:
            return x
        if self.axis_name is not None:
            position = jax.lax.dynamic_slice_in_dim(position, jax.lax.axis_index(self.axis_name) * rows, rows)
        return x + position

    def joined(
        self, x: Float[Array, "*batch height width features"], token: Float[Array, "features"]
    ) -> Float[Array, "*batch tokens features"]:
        """The class token, the registers, and then all others."""
        token = token if self.class_position is None else token + self.class_position[...]
        tokens = token[None] if self.registers is None else jnp.concatenate([token[None], self.registers[...]])
        batch, features = x.shape[:-3], x.shape[-1]
        first = jnp.broadcast_to(tokens.astype(x.dtype), (*batch, *tokens.shape))
        return jnp.concatenate([first, x.reshape(*batch, -1, features)], axis=-2)

    def as_grid(
        self, x: Float[Array, "*batch tokens features"], size: tuple[int, ...]
    ) -> Float[Array, "*batch height width features"]:
        """The patches of an image of `size` as a grid again, without what joined them."""
        return x[..., self.first_patch :, :].reshape(*x.shape[:-2], *patch_grid(size, self.patch_size), x.shape[-1])

    def _check_images(self, images: Array):
        size = self.image_size if self.position_kind == "learned" else ("height", "width")
        fits = images.ndim >= 3 and images.shape[-1] == self.in_features
        whole = (images.shape[-3] * shard_count(self.axis_name), images.shape[-2]) if fits else ()
        if not fits or (self.position_kind == "learned" and whole != self.image_size):
            shape = f"[*batch, {size[0]}, {size[1]}, in_features (={self.in_features})]"
            raise ValueError(f"ViT: images (={images.shape}) must be {shape}")
        patch_grid(whole, self.patch_size)

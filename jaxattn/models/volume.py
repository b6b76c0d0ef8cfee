"""A network for volumes: local attention in three dimensions."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Num

from jaxattn.checked import checked
from jaxattn.models.residual import check_rates, check_rngs, depth_rates, run_block
from jaxattn.models.vit_blocks import Block, layer_norm, small_init, xavier_init
from jaxattn.nn.conv import Conv
from jaxattn.nn.grid import Splittable
from jaxattn.sizes import Size, per_axis


class VolumeNet(Splittable):
    """Patches of a volume, mixed by attention in windows of three dimensions, with a relative bias,

        x = patches W + b,   x ← x + attention(norm(x)),   x ← x + MLP(norm(x))   in each block,
        logits = mean(norm(x)) W_head + b_head,

    which is `ViT(mix="local")` (Hassani et al. 2022, arXiv 2204.07143) with a third axis: it knows no position but the
    heads' own. Every layer looks a window far, so the volume may be split over devices (`axis_name`).

    Args:
      in_features: channels of the volume.
      num_classes: size of the output.
      patch_size: the side of a patch, or one for each axis; it divides the volume's.
      width: features of a token.
      depth: blocks.
      num_heads: of each attention; it divides `width`.
      mlp_dim: features within each MLP.
      window: the side of the window, in patches, or one for each axis; at most the grid's.
      drop_path: rate of stochastic depth in the last block; it rises linearly with depth.
      remat: blocks are computed anew in the backward pass, which then keeps a block's input in place of all within.
      dtype: of the computation; the logits have the promoted dtype of `dtype` and `param_dtype`.
      param_dtype: of the parameters.
      rngs: `nnx.Rngs`; `params` is used.

    Raises:
      ValueError: an argument out of its range, or a volume whose shape does not fit, by name.

    >>> from flax import nnx
    >>> model = VolumeNet(in_features=1, num_classes=2, patch_size=(2, 2, 2), width=8, depth=1, rngs=nnx.Rngs(0))
    >>> nnx.eval_shape(lambda x: model(x), jnp.ones((3, 8, 8, 6, 1))).shape
    (3, 2)
    """

    @checked
    def __init__(
        self,
        *,
        in_features: int,
        num_classes: int,
        patch_size: Size = 4,
        width: int = 96,
        depth: int = 4,
        num_heads: int = 4,
        mlp_dim: int = 192,
        window: Size = 3,
        drop_path: float = 0.0,
        remat: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.in_features, self.patch_size = in_features, per_axis("VolumeNet", "patch_size", patch_size, 3)
        window = per_axis("VolumeNet", "window", window, 3)
        check_rates("VolumeNet", drop_path=drop_path)
        self.remat = remat
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.patches = Conv(in_features, width, self.patch_size, self.patch_size, padding="VALID", **kwargs)
        self.blocks = nnx.List(
            [
                Block(
                    width,
                    num_heads,
                    mlp_dim,
                    "local",
                    axes=3,
                    norm="pre",
                    window=window,
                    qkv_bias=True,
                    drop_path_rate=rate,
                    dropout=0.0,
                    kernel_init=xavier_init,
                    **kwargs,
                )
                for rate in depth_rates(drop_path, depth)
            ]
        )
        self.norm = layer_norm(width, **kwargs)
        self.head = nnx.Linear(width, num_classes, kernel_init=small_init, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self, volumes: Num[ArrayLike, "..."], *, sow_weights: bool = False, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "*batch classes"]:
        """Logits of `volumes` `[*batch, depth, height, width, in_features]`. `rngs` is for `drop_path`."""
        x = jnp.asarray(volumes)
        fits = x.ndim >= 4 and x.shape[-1] == self.in_features
        if not fits or any(n % p for n, p in zip(x.shape[-4:-1], self.patch_size, strict=True)):
            raise ValueError(
                f"VolumeNet: volumes (={x.shape}) must be [*batch, depth, height, width, in_features "
                f"(={self.in_features})] with sides that patch_size (={self.patch_size}) divides"
            )
        check_rngs("VolumeNet", rngs, drop_path=self.blocks[-1].drop_path)
        x = self.patches(x)
        for block in self.blocks:
            x = run_block(block, x, sow_weights=sow_weights, rngs=rngs, remat=self.remat)
        x = self.norm(x).mean(axis=(-4, -3, -2))
        return self.head(x if self.axis_name is None else jax.lax.pmean(x, self.axis_name))


def volume_small(**kwargs: Any) -> VolumeNet:
    """For volumes of 32 to 128 voxels a side: patches of 4³, four blocks of width 96, windows of 3³."""
    return VolumeNet(**{"in_features": 1, "num_classes": 10, **kwargs})

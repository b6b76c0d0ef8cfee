"""ConvMixer: patches, depthwise convolutions, and linear maps."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxattn.checked import Natural, checked
from jaxattn.models.backbone import Backbone, Stage, linear_head
from jaxattn.models.gelu import gelu
from jaxattn.models.residual import check_rates, depth_rates, drop_path
from jaxattn.models.resnet_blocks import batch_norm
from jaxattn.models.translation import Rule, Table, Translation
from jaxattn.nn.conv import Conv
from jaxattn.nn.grid import Splittable

ACTIVATIONS = {"gelu": gelu, "relu": jax.nn.relu}
TIMM: Table = {
    "patches": "stem.0", "patch_norm": "stem.2", "stages.0.blocks.*.depthwise": "blocks.*.0.fn.0",
    "stages.0.blocks.*.depthwise_norm": "blocks.*.0.fn.2",
    "stages.0.blocks.*.pointwise": Rule("blocks.*.1", {"kernel": "i o -> o i 1 1"}),
    "stages.0.blocks.*.pointwise_norm": "blocks.*.3",
}  # fmt: skip


class Block(Splittable):
    """x ← x + norm(φ(depthwise(x))), and then x ← norm(φ(W x + b)); the norms are BatchNorms."""

    def __init__(self, width: int, kernel_size: int, *, activation: str, drop_path_rate: float, **kwargs: Any):
        self.activation, size = ACTIVATIONS[activation], (kernel_size, kernel_size)
        self.depthwise = Conv(width, width, size, padding="SAME", feature_group_count=width, **kwargs)
        self.pointwise = nnx.Linear(width, width, **kwargs)
        self.depthwise_norm, self.pointwise_norm = (batch_norm(width, **kwargs) for _ in range(2))
        self.drop_path = drop_path(drop_path_rate, 3)

    def __call__(
        self,
        x: Float[Array, "*batch height width features"],
        *,
        sow_weights: bool = False,
        rngs: nnx.Rngs | None = None,
    ):
        y = self.depthwise_norm(self.activation(self.depthwise(x)))
        x = x + self.drop_path(y, rngs=rngs)
        return self.pointwise_norm(self.activation(self.pointwise(x)))


class ConvMixer(Backbone):
    """ConvMixer (Trockman & Kolter 2022, arXiv 2201.09792): patches, `Block`s on one grid, and the mean over it.

    Args:
      width: features of a token.
      depth: blocks.
      kernel_size, patch_size: sides of the depthwise convolutions' windows, and of a patch.
      activation: φ, "gelu" or "relu".
      num_classes, in_features, drop_path, remat, dtype, param_dtype, rngs: as in `ConvNeXt`.

    >>> from flax import nnx
    >>> model = nnx.eval_shape(lambda: ConvMixer(8, 2, kernel_size=5, num_classes=5, rngs=nnx.Rngs(0)))
    >>> [features.shape for features in nnx.eval_shape(lambda m, x: m.pyramid(x), model, jnp.ones((2, 28, 35, 3)))]
    [(2, 4, 5, 8)]
    """

    @checked
    def __init__(
        self,
        width: int,
        depth: int,
        *,
        kernel_size: int = 9,
        patch_size: int = 7,
        activation: Literal["gelu", "relu"] = "gelu",
        num_classes: Natural = 1000,
        in_features: int = 3,
        drop_path: float = 0.0,
        remat: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_rates("ConvMixer", drop_path=drop_path)
        self.in_features, self.remat, self.widths, self.strides = in_features, remat, (width,), (patch_size,)
        self.activation = ACTIVATIONS[activation]
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.patches = Conv(in_features, width, (patch_size, patch_size), patch_size, padding="VALID", **kwargs)
        self.patch_norm = batch_norm(width, **kwargs)
        kind = {"activation": activation, **kwargs}
        blocks = [Block(width, kernel_size, drop_path_rate=rate, **kind) for rate in depth_rates(drop_path, depth)]
        self.stages = nnx.List([Stage(None, blocks)])
        self.head = linear_head(width, num_classes, param_dtype=param_dtype, rngs=rngs)

    @property
    def translations(self) -> tuple[Translation, ...]:
        return (Translation("timm", TIMM),)

    def begin(self, images: Array) -> Float[Array, "*batch height width features"]:
        return self.patch_norm(self.activation(self.patches(images)))

    def finish(self, x: Array) -> Float[Array, "*batch features"]:
        return self.mean(x)


def convmixer_768_32(**kwargs: Any) -> ConvMixer:
    """21,110,248 parameters with 1,000 classes."""
    return ConvMixer(768, 32, **{"kernel_size": 7, "activation": "relu", **kwargs})


def convmixer_1024_20(**kwargs: Any) -> ConvMixer:
    """24,383,464 parameters, with patches of 14 × 14."""
    return ConvMixer(1024, 20, **{"patch_size": 14, **kwargs})


def convmixer_1536_20(**kwargs: Any) -> ConvMixer:
    """51,625,960 parameters."""
    return ConvMixer(1536, 20, **kwargs)

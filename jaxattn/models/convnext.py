"""ConvNeXt, version 1 and 2: depthwise convolutions of 7 × 7 in the place of attention."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxattn.checked import Natural, checked
from jaxattn.models.backbone import Backbone, Stage, layer_norm, linear_head, scale, scaled, small_init
from jaxattn.models.gelu import gelu
from jaxattn.models.residual import check_rates, depth_rates, drop_path
from jaxattn.models.translation import Rule, Table, Translation, below, under
from jaxattn.nn.conv import Conv
from jaxattn.nn.grid import Splittable

BLOCK: Table = {
    "depthwise": "conv_dw", "norm": "norm", "expand": "mlp.fc1", "contract": "mlp.fc2", "gamma": "gamma",
    "response.gamma": "mlp.grn.weight", "response.beta": "mlp.grn.bias",
}  # fmt: skip
TIMM: Table = {
    "patches": "stem.0", "patch_norm": "stem.1",
    "stages.*.down.norm": "stages.*.downsample.0", "stages.*.down.conv": "stages.*.downsample.1",
    **under("stages.*.blocks.*", "stages.*.blocks.*", BLOCK),
    "norm": "head.norm", "head": "head.fc",
}  # fmt: skip
# nano and smaller have 1 × 1 convolutions for the linear layers
POINTWISE: Table = {
    f"stages.*.blocks.*.{ours}": Rule(f"stages.*.blocks.*.mlp.{theirs}", {"kernel": "i o -> o i 1 1"})
    for ours, theirs in (("expand", "fc1"), ("contract", "fc2"))
}
FACEBOOK: Table = {
    "patches": "downsample_layers.0.0", "patch_norm": "downsample_layers.0.1",
    "stages.*.down.norm": "downsample_layers.*.0", "stages.*.down.conv": "downsample_layers.*.1",
    **under("stages.*.blocks.*", "stages.*.*", {
        "depthwise": "dwconv", "expand": "pwconv1", "contract": "pwconv2", "gamma": "gamma",
        "norm": "norm", "response.gamma": Rule("grn.gamma", "c -> 1 1 1 c"),
        "response.beta": Rule("grn.beta", "c -> 1 1 1 c"),
    }),
}  # fmt: skip
HUGGING_FACE: Table = {
    "patches": "embeddings.patch_embeddings", "patch_norm": "embeddings.layernorm",
    "stages.*.down.norm": "encoder.stages.*.downsampling_layer.0",
    "stages.*.down.conv": "encoder.stages.*.downsampling_layer.1",
    **under("stages.*.blocks.*", "encoder.stages.*.layers.*", {
        "depthwise": "dwconv", "norm": "layernorm", "expand": "pwconv1", "contract": "pwconv2",
        "gamma": "layer_scale_parameter", "response.gamma": Rule("grn.weight", "c -> 1 1 1 c"),
        "response.beta": Rule("grn.bias", "c -> 1 1 1 c"),
    }),
    "norm": "layernorm",
}  # fmt: skip


class ResponseNorm(Splittable):
    """Global response normalisation, over the grid and then over the features,

        y = x + β + γ x ‖x_c‖ / mean_c ‖x_c‖,   ‖x_c‖² = Σ_{i,j} x_ijc²

    (Woo et al. 2023, arXiv 2301.00808). γ and β begin at zero.
    """

    def __init__(self, width: int, *, param_dtype: Any):
        self.gamma, self.beta = (nnx.Param(jnp.zeros((width,), param_dtype)) for _ in range(2))

    def __call__(self, x: Float[Array, "*batch height width features"]):
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        squares = (wide * wide).sum(axis=(-3, -2), keepdims=True)
        squares = squares if self.axis_name is None else jax.lax.psum(squares, self.axis_name)
        # a feature that is zero everywhere has a norm of zero, and no derivative: it counts as none
        norm = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
        response = (norm / (norm.mean(axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)
        return x + self.beta[...].astype(x.dtype) + scaled(x * response, self.gamma)


class Block(Splittable):
    """x + γ W₂ gelu(W₁ norm(depthwise(x))); in version 2, `ResponseNorm` after the gelu, and no γ."""

    def __init__(self, width: int, *, layer_scale: float | None, response: bool, drop_path_rate: float, **kwargs: Any):
        self.depthwise = Conv(width, width, (7, 7), padding=3, feature_group_count=width, **kwargs)
        self.norm = layer_norm(width, 1e-6, **kwargs)
        self.expand = nnx.Linear(width, 4 * width, kernel_init=small_init, **kwargs)
        self.response = nnx.data(ResponseNorm(4 * width, param_dtype=kwargs["param_dtype"]) if response else None)
        self.contract = nnx.Linear(4 * width, width, kernel_init=small_init, **kwargs)
        self.gamma = scale(width, layer_scale, kwargs["param_dtype"])
        self.drop_path = drop_path(drop_path_rate, 3)

    def __call__(
        self,
        x: Float[Array, "*batch height width features"],
        *,
        sow_weights: bool = False,
        rngs: nnx.Rngs | None = None,
    ):
        y = gelu(self.expand(self.norm(self.depthwise(x))))
        y = self.contract(y if self.response is None else self.response(y))
        return x + self.drop_path(scaled(y, self.gamma), rngs=rngs)


class Downsample(Splittable):
    """A norm, and a 2 × 2 convolution of stride 2."""

    def __init__(self, in_features: int, features: int, **kwargs: Any):
        self.norm = layer_norm(in_features, 1e-6, **kwargs)
        self.conv = Conv(in_features, features, (2, 2), 2, padding="VALID", **kwargs)

    def __call__(self, x: Float[Array, "*batch height width channels"]):
        return self.conv(self.norm(x))


class ConvNeXt(Backbone):
    """ConvNeXt (Liu et al. 2022, arXiv 2201.03545) and, with `version=2`, ConvNeXt V2 (Woo et al. 2023, arXiv
    2301.00808): patches of 4 × 4, stages of `Block`s that halve the grid, and the norm of the mean over it.

    Args:
      depths: blocks of each stage.
      widths: features of a token of each stage.
      version: 1, or 2 for `ResponseNorm` in the place of γ.
      pointwise: whether files have 1 × 1 convolutions for the blocks' linear layers.
      num_classes: size of the output; 0 gives the pooled features.
      in_features: channels of the images, which may be of any size from 32.
      layer_scale: what γ begins at.
      drop_path: rate of stochastic depth in the last block; it rises linearly with depth.
      remat: blocks are computed anew in the backward pass, which then keeps a block's input in place of all within.
      dtype: of the computation; the logits have the promoted dtype of `dtype` and `param_dtype`.
      param_dtype: of the parameters.
      rngs: `nnx.Rngs`; `params` is used.

    >>> from flax import nnx
    >>> model = nnx.eval_shape(lambda: ConvNeXt((1, 1), (8, 16), num_classes=5, rngs=nnx.Rngs(0)))
    >>> [features.shape for features in nnx.eval_shape(lambda m, x: m.pyramid(x), model, jnp.ones((2, 32, 48, 3)))]
    [(2, 8, 12, 8), (2, 4, 6, 16)]
    """

    @checked
    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        *,
        version: int = 1,
        pointwise: bool = False,
        num_classes: Natural = 1000,
        in_features: int = 3,
        layer_scale: float = 1e-6,
        drop_path: float = 0.0,
        remat: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if version not in (1, 2):
            raise ValueError(f"ConvNeXt: version (={version}) must be 1 or 2")
        if len(depths) != len(widths) or not depths:
            raise ValueError(f"ConvNeXt: depths (={depths}) and widths (={widths}) must have one number for each stage")
        check_rates("ConvNeXt", drop_path=drop_path)
        self.in_features, self.widths, self.remat = in_features, tuple(widths), remat
        self.version, self.pointwise = version, pointwise
        self.strides = tuple(4 * 2**n for n in range(len(depths)))
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.patches = Conv(in_features, widths[0], (4, 4), 4, padding="VALID", **kwargs)
        self.patch_norm = layer_norm(widths[0], 1e-6, **kwargs)
        rates = iter(depth_rates(drop_path, sum(depths)))
        block = {"layer_scale": layer_scale if version == 1 else None, "response": version == 2, **kwargs}
        stages = []
        for n, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            down = Downsample(widths[n - 1], width, **kwargs) if n else None
            stages.append(Stage(down, [Block(width, drop_path_rate=next(rates), **block) for _ in range(depth)]))
        self.stages = nnx.List(stages)
        self.norm = layer_norm(widths[-1], 1e-6, **kwargs)
        self.head = linear_head(widths[-1], num_classes, param_dtype=param_dtype, rngs=rngs)

    @property
    def translations(self) -> tuple[Translation, ...]:
        body = "convnextv2" if self.version == 2 else "convnext"
        theirs = below(body, HUGGING_FACE) | {"head": "classifier"}
        timm = {**TIMM, **POINTWISE} if self.pointwise else TIMM
        return Translation("timm", timm), Translation("Facebook", FACEBOOK), Translation("Hugging Face", theirs)

    def begin(self, images: Array) -> Float[Array, "*batch height width features"]:
        return self.patch_norm(self.patches(images))

    def finish(self, x: Array) -> Float[Array, "*batch features"]:
        return self.norm(self.mean(x))


TINY, SMALL = (3, 3, 9, 3), (3, 3, 27, 3)


def _sized(depths: tuple[int, ...], width: int, kwargs: dict[str, Any]) -> ConvNeXt:
    return ConvNeXt(depths, [width * 2**n for n in range(len(depths))], **kwargs)


def convnext_atto(**kwargs: Any) -> ConvNeXt:
    """3,695,520 parameters with 1,000 classes; version 2 has 3,708,400."""
    return _sized((2, 2, 6, 2), 40, {"pointwise": True, **kwargs})


def convnext_femto(**kwargs: Any) -> ConvNeXt:
    """5,217,784 parameters with 1,000 classes; version 2 has 5,233,240."""
    return _sized((2, 2, 6, 2), 48, {"pointwise": True, **kwargs})


def convnext_pico(**kwargs: Any) -> ConvNeXt:
    """9,045,672 parameters with 1,000 classes; version 2 has 9,066,280."""
    return _sized((2, 2, 6, 2), 64, {"pointwise": True, **kwargs})


def convnext_nano(**kwargs: Any) -> ConvNeXt:
    """15,593,560 parameters with 1,000 classes; version 2 has 15,623,800."""
    return _sized((2, 2, 8, 2), 80, {"pointwise": True, **kwargs})


def convnext_tiny(**kwargs: Any) -> ConvNeXt:
    """28,589,128 parameters with 1,000 classes; version 2 has 28,635,496."""
    return _sized(TINY, 96, kwargs)


def convnext_small(**kwargs: Any) -> ConvNeXt:
    """50,223,688 parameters with 1,000 classes."""
    return _sized(SMALL, 96, kwargs)


def convnext_base(**kwargs: Any) -> ConvNeXt:
    """88,591,464 parameters with 1,000 classes; version 2 has 88,717,800."""
    return _sized(SMALL, 128, kwargs)


def convnext_large(**kwargs: Any) -> ConvNeXt:
    """197,767,336 parameters with 1,000 classes; version 2 has 197,956,840."""
    return _sized(SMALL, 192, kwargs)


def convnext_xlarge(**kwargs: Any) -> ConvNeXt:
    """350,196,968 parameters with 1,000 classes."""
    return _sized(SMALL, 256, kwargs)


def convnext_huge(**kwargs: Any) -> ConvNeXt:
    """660,289,640 parameters with 1,000 classes; of version 2."""
    return _sized(SMALL, 352, {"version": 2, **kwargs})

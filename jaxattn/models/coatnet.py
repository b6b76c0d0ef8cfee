"""CoAtNet: two stages of convolution, and two of attention over the whole grid."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxattn.checked import Natural, checked
from jaxattn.models.backbone import Backbone, Stage, layer_norm, linear_head, small_init
from jaxattn.models.gelu import gelu
from jaxattn.models.mbconv import MBCONV, POINTWISE, STEM, MBConv, average_pool, squeeze
from jaxattn.models.residual import check_rates, depth_rates, drop_path
from jaxattn.models.resize import resize_flat_table
from jaxattn.models.translation import Rule, Table, Translation, under
from jaxattn.nn.configured import CoAtNetAttention
from jaxattn.nn.conv import Conv
from jaxattn.nn.grid import Splittable
from jaxattn.sizes import Size, per_axis

HEAD_DIM = 32
# a head's query, key and value stand together there, and the table is by query less key
FUSED = {"kernel": "i head dim -> (head +dim) i 1 1", "bias": "head dim -> (head +dim)"}
BLOCK: Table = {
    "shortcut": Rule("shortcut.expand", POINTWISE), "norm2": "norm2",
    "attention.query|key|value": Rule("attn.qkv", FUSED),
    "attention.out": Rule("attn.proj", {"kernel": "head dim o -> o (head dim) 1 1"}),
    "attention.relative_bias": Rule(
        "attn.rel_pos.relative_position_bias_table", "head -row -column -> (row column) head", resize_flat_table
    ),
    "expand": Rule("mlp.fc1", POINTWISE), "contract": Rule("mlp.fc2", POINTWISE),
}  # fmt: skip


class Block(Splittable):
    """x + attention(norm₁(x)) of all tokens, with a bias for each offset, and then x + W₂ gelu(W₁ norm₂(x)). With a
    stride, 2 × 2 means are taken of x and of norm₁(x), and x goes through a linear map."""

    def __init__(
        self, in_features: int, width: int, stride: int, grid: tuple[int, ...], *, bias: bool, drop_path_rate: float,
        **kwargs: Any,
    ):  # fmt: skip
        self.strided = stride == 2
        linear = nnx.Linear(in_features, width, use_bias=bias, **kwargs) if in_features != width else None
        self.shortcut = nnx.data(linear)
        self.norm1, self.norm2 = layer_norm(in_features, 1e-6, **kwargs), layer_norm(width, 1e-6, **kwargs)
        self.attention = CoAtNetAttention(
            in_features // HEAD_DIM, in_features, None, width, grid=grid, kernel_init=small_init, **kwargs
        )
        self.expand = nnx.Linear(width, 4 * width, kernel_init=small_init, **kwargs)
        self.contract = nnx.Linear(4 * width, width, kernel_init=small_init, **kwargs)
        self.drop_path = drop_path(drop_path_rate, 3)

    def __call__(
        self,
        x: Float[Array, "*batch height width features"],
        *,
        sow_weights: bool = False,
        rngs: nnx.Rngs | None = None,
    ):
        y = self.norm1(x)
        x, y = (average_pool(x), average_pool(y)) if self.strided else (x, y)
        x = x if self.shortcut is None else self.shortcut(x)
        x = x + self.drop_path(self.attention(y, sow_weights=sow_weights), rngs=rngs)
        return x + self.drop_path(self.contract(gelu(self.expand(self.norm2(x)))), rngs=rngs)


class CoAtNet(Backbone):
    """CoAtNet (Dai et al. 2021, arXiv 2106.04803) as timm trained it ("rw"): a stem of two 3 × 3 convolutions, two
    stages of `MBConv` and two of `Block`, each of which halves the grid, and the mean of the norm.

    Args:
      depths: blocks of each of four stages.
      widths: features of a token of each stage; all but the first multiples of 32, which a head has.
      stem: features of the stem's two convolutions.
      image_size: an int or (height, width), multiples of 32, which all images have: each offset on the grid has a bias.
      pool: whether a convolutional block takes its stride by a mean, or by its depthwise convolution.
      early: whether squeeze-and-excitation comes before the second norm.
      squeeze_activation: of it, "relu" or "silu".
      bias: whether the shortcuts of the blocks with attention have biases.
      num_classes, in_features, drop_path, remat, dtype, param_dtype, rngs: as in `ConvNeXt`.

    >>> from flax import nnx
    >>> sizes = dict(widths=(8, 32, 32, 64), stem=(4, 8), image_size=64)
    >>> model = nnx.eval_shape(lambda: CoAtNet((1, 1, 1, 1), **sizes, rngs=nnx.Rngs(0)))
    >>> [features.shape for features in nnx.eval_shape(lambda m, x: m.pyramid(x), model, jnp.ones((2, 64, 64, 3)))][2:]
    [(2, 4, 4, 32), (2, 2, 2, 64)]
    """

    @checked
    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        *,
        stem: Sequence[int] = (32, 64),
        image_size: Size = 224,
        pool: bool = True,
        early: bool = True,
        squeeze_activation: Literal["relu", "silu"] = "relu",
        bias: bool = False,
        num_classes: Natural = 1000,
        in_features: int = 3,
        drop_path: float = 0.0,
        remat: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        sides = per_axis("CoAtNet", "image_size", image_size, 2)
        # an attention's heads divide what comes into its block
        if len(depths) != 4 or len(widths) != 4 or any(width % HEAD_DIM for width in widths[1:]):
            raise ValueError(
                f"CoAtNet: depths (={depths}) and widths (={widths}) must be four, and all widths but the first "
                f"multiples of {HEAD_DIM}"
            )
        if len(stem) != 2:
            raise ValueError(f"CoAtNet: stem (={stem}) must be two ints >= 1")
        if any(n % 32 for n in sides):
            raise ValueError(f"CoAtNet: image_size (={image_size}) must be of multiples of 32")
        check_rates("CoAtNet", drop_path=drop_path)
        self.in_features, self.remat, self.widths, self.early = in_features, remat, tuple(widths), early
        self.strides = (4, 8, 16, 32)
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.stem1 = Conv(in_features, stem[0], (3, 3), 2, padding=1, use_bias=False, **kwargs)
        self.stem_norm = nnx.BatchNorm(stem[0], momentum=0.9, epsilon=1e-5, **kwargs)
        self.stem2 = Conv(stem[0], stem[1], (3, 3), padding=1, use_bias=False, **kwargs)
        activations = {"relu": jax.nn.relu, "silu": jax.nn.silu}
        convolution = {
            "activation": jax.nn.silu, "squeeze_activation": activations[squeeze_activation], "early": early,
            "first_activation": True, "pool": pool, "use_bias": False, "padding": 1, "epsilon": 1e-5, **kwargs,
        }  # fmt: skip
        rates, stages, before = iter(depth_rates(drop_path, sum(depths))), [], stem[1]
        for depth, width, stride in zip(depths, widths, self.strides, strict=True):
            grid, blocks = tuple(n // stride for n in sides), []
            for n in range(depth):
                step, rate = 1 if n else 2, next(rates)
                if stride <= 8:
                    squeezed = {"hidden": 4 * before, "squeeze_features": before, "drop_path_rate": rate}
                    blocks.append(MBConv(before, width, step, **squeezed, **convolution))
                else:
                    blocks.append(Block(before, width, step, grid, bias=bias, drop_path_rate=rate, **kwargs))
                before = width
            stages.append(Stage(None, blocks))
        self.stages = nnx.List(stages)
        self.norm = layer_norm(before, 1e-6, **kwargs)
        self.head = linear_head(before, num_classes, param_dtype=param_dtype, rngs=rngs)

    @property
    def translations(self) -> tuple[Translation, ...]:
        convolution = {**MBCONV, **squeeze("se_early" if self.early else "se")}
        table: dict[str, str | Rule] = {**STEM, "head": "head.fc"}
        for n in range(4):
            part = convolution if n < 2 else {**BLOCK, "norm1": "norm1"}
            # where the block has a stride, the norm stands beside it in a sequence
            table |= {f"stages.{n}.blocks.0.norm1": f"stages.{n}.blocks.0.norm1.norm"} if n >= 2 else {}
            table |= under(f"stages.{n}.blocks.*", f"stages.{n}.blocks.*", part)
        return (Translation("timm", table, derived=("relative_position_index",)),)

    def begin(self, images: Array) -> Float[Array, "*batch height width features"]:
        return self.stem2(jax.nn.silu(self.stem_norm(self.stem1(images))))

    def finish(self, x: Array) -> Float[Array, "*batch features"]:
        return self.mean(self.norm(x))


def coatnet_0(**kwargs: Any) -> CoAtNet:
    """timm's `coatnet_0_rw`: 27,435,562 parameters with 1,000 classes, for images of 224 × 224."""
    return CoAtNet((2, 3, 7, 2), (96, 192, 384, 768), **kwargs)


def coatnet_1(**kwargs: Any) -> CoAtNet:
    """timm's `coatnet_1_rw`: 41,721,502 parameters."""
    return CoAtNet((2, 6, 14, 2), (96, 192, 384, 768), **{"pool": False, **kwargs})


def coatnet_2(**kwargs: Any) -> CoAtNet:
    """timm's `coatnet_2_rw`: 73,868,400 parameters."""
    settings = {"stem": (64, 128), "pool": False, "early": False, "squeeze_activation": "silu", "bias": True}
    return CoAtNet((2, 6, 14, 2), (128, 256, 512, 1024), **{**settings, **kwargs})

"""MaxViT: convolution, attention within blocks, and attention across the grid."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxattn.checked import Natural, checked
from jaxattn.einsum import einsum
from jaxattn.models.backbone import Backbone, MixBlock, Stage, layer_norm, linear_head, small_init
from jaxattn.models.mbconv import MBCONV, STEM, MBConv, gelu_tanh, squeeze
from jaxattn.models.residual import check_rates, depth_rates
from jaxattn.models.resize import resize_table
from jaxattn.models.translation import FUSED, OUT, Rule, Table, Translation, under
from jaxattn.nn.attention import Attention
from jaxattn.nn.conv import Conv
from jaxattn.nn.grid import Splittable
from jaxattn.sizes import Size, per_axis
from jaxattn.window import Window

ATTENTION: Table = {
    "norm1": "norm1", "norm2": "norm2", "expand": "mlp.fc1", "contract": "mlp.fc2",
    "mix.attention.query|key|value": Rule("attn.qkv", FUSED), "mix.attention.out": Rule("attn.proj", OUT),
    "mix.attention.relative_bias": Rule("attn.rel_pos.relative_position_bias_table", resize=resize_table),
}  # fmt: skip
TIMM: Table = {
    **STEM,
    **under("stages.*.blocks.*.conv", "stages.*.blocks.*.conv", {**MBCONV, **squeeze("se")}),
    **under("stages.*.blocks.*.local", "stages.*.blocks.*.attn_block", ATTENTION),
    **under("stages.*.blocks.*.across", "stages.*.blocks.*.attn_grid", ATTENTION),
    "norm": "head.norm", "hidden": "head.pre_logits.fc", "head": "head.fc",
}  # fmt: skip


class Partition(Splittable):
    """Attention of k × k tokens that stand together ("block") or as far apart as there are windows ("grid"),

    N(i) = {j: ⌊j / k⌋ = ⌊i / k⌋},   or   N(i) = {j: j ≡ i mod n / k}   along each axis of n tokens.
    """

    def __init__(self, num_heads: int, width: int, window: tuple[int, ...], across: bool, **kwargs: Any):
        self.window, self.across = window, across
        self.attention = Attention(
            num_heads, width, window=Window(window, block=window), relative_bias=True, kernel_init=small_init, **kwargs
        )

    def __call__(self, x: Float[Array, "*batch height width features"], *, sow_weights: bool = False):
        grid: tuple[int, ...] = x.shape[-3:-1]
        sides: dict[str, Any] = dict(zip("pq", self.window, strict=True))
        if any(n % k for n, k in zip(grid, self.window, strict=True)):
            raise ValueError(f"MaxViT: window (={self.window}) must divide each stage's grid, and one is {grid}")
        if not self.across:
            return self.attention(x, sow_weights=sow_weights)
        if self.axis_name is not None:
            raise ValueError(
                f"MaxViT: axis_name (={self.axis_name!r}) must be None for the grid's attention, which sees all of it"
            )
        # what stands apart is brought together: the same windows then
        x = einsum("... (p i) (q j) c -> ... (i p) (j q) c", x, **sides)
        y = self.attention(x, sow_weights=sow_weights)
        return einsum("... (i p) (j q) c -> ... (p i) (q j) c", y, **sides)


class Block(Splittable):
    """MBConv, attention in blocks, and attention across the grid, the two with an MLP each."""

    def __init__(self, in_features: int, width: int, stride: int, window: tuple[int, ...], rate: float, **kwargs: Any):
        self.conv = MBConv(
            in_features, width, stride, hidden=4 * width, activation=gelu_tanh, squeeze_activation=jax.nn.silu,
            squeeze_features=width // 4, early=False, first_activation=False, pool=False, use_bias=True, padding="SAME",
            epsilon=1e-3, drop_path_rate=rate, **kwargs,
        )  # fmt: skip
        self.local, self.across = (
            MixBlock(
                width, 4 * width, Partition(width // HEAD_DIM, width, window, across, **kwargs), activation=gelu_tanh,
                drop_path_rate=rate, **kwargs,
            )
            for across in (False, True)
        )  # fmt: skip

    @property
    def drop_path(self) -> nnx.Dropout:
        return self.conv.drop_path

    def __call__(self, x: Float[Array, "..."], *, sow_weights: bool = False, rngs: nnx.Rngs | None = None):
        for layer in (self.conv, self.local, self.across):
            x = layer(x, sow_weights=sow_weights, rngs=rngs)
        return x


HEAD_DIM = 32


class MaxViT(Backbone):
    """MaxViT (Tu et al. 2022, arXiv 2204.01697) as its authors trained it: a stem of two 3 × 3 convolutions, stages of
    `Block`s that halve the grid, and tanh(W norm(mean) + b) before the logits. Padding is "SAME".

    Args:
      depths: blocks of each stage.
      widths: features of a token of each stage, multiples of 32, which a head has.
      stem: features of the stem.
      image_size: an int or (height, width); a 32nd of it is the window. Images may be of any size whose grids the
        window divides: of multiples of it.
      num_classes, in_features, drop_path, remat, dtype, param_dtype, rngs: as in `ConvNeXt`.

    >>> from flax import nnx
    >>> model = nnx.eval_shape(lambda: MaxViT((1, 1), (32, 64), stem=8, image_size=64, rngs=nnx.Rngs(0)))
    >>> [features.shape for features in nnx.eval_shape(lambda m, x: m.pyramid(x), model, jnp.ones((2, 64, 96, 3)))]
    [(2, 16, 24, 32), (2, 8, 12, 64)]
    """

    @checked
    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        *,
        stem: int = 64,
        image_size: Size = 224,
        num_classes: Natural = 1000,
        in_features: int = 3,
        drop_path: float = 0.0,
        remat: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if len(depths) != len(widths) or any(width % HEAD_DIM for width in widths):
            raise ValueError(
                f"MaxViT: widths (={widths}) must be multiples of {HEAD_DIM}, one for each of depths (={depths})"
            )
        window = tuple(n // 32 for n in per_axis("MaxViT", "image_size", image_size, 2, least=32))
        check_rates("MaxViT", drop_path=drop_path)
        self.in_features, self.remat, self.widths = in_features, remat, tuple(widths)
        self.strides = tuple(4 * 2**n for n in range(len(depths)))
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.stem1 = Conv(in_features, stem, (3, 3), 2, **kwargs)
        self.stem_norm = nnx.BatchNorm(stem, momentum=0.9, epsilon=1e-3, **kwargs)
        self.stem2 = Conv(stem, stem, (3, 3), **kwargs)
        rates, stages, before = iter(depth_rates(drop_path, sum(depths))), [], stem
        for depth, width in zip(depths, widths, strict=True):
            sizes = [(before, 2), *[(width, 1)] * (depth - 1)]
            blocks = [Block(features, width, stride, window, next(rates), **kwargs) for features, stride in sizes]
            stages.append(Stage(None, blocks))
            before = width
        self.stages = nnx.List(stages)
        self.norm = layer_norm(before, 1e-5, **kwargs)
        self.hidden = nnx.Linear(before, before, **kwargs)
        self.head = linear_head(before, num_classes, param_dtype=param_dtype, rngs=rngs)

    @property
    def translations(self) -> tuple[Translation, ...]:
        return (Translation("timm", TIMM, derived=("relative_position_index", "height_lookup", "width_lookup")),)

    def begin(self, images: Array) -> Float[Array, "*batch height width features"]:
        return self.stem2(gelu_tanh(self.stem_norm(self.stem1(images))))

    def finish(self, x: Array) -> Float[Array, "*batch features"]:
        return jnp.tanh(self.hidden(self.norm(self.mean(x))))


def maxvit_tiny(**kwargs: Any) -> MaxViT:
    """30,916,528 parameters with 1,000 classes, for images of 224 × 224."""
    return MaxViT((2, 2, 5, 2), (64, 128, 256, 512), **kwargs)


def maxvit_small(**kwargs: Any) -> MaxViT:
    """68,927,956 parameters."""
    return MaxViT((2, 2, 5, 2), (96, 192, 384, 768), **kwargs)


def maxvit_base(**kwargs: Any) -> MaxViT:
    """119,467,708 parameters."""
    return MaxViT((2, 6, 14, 2), (96, 192, 384, 768), **kwargs)


def maxvit_large(**kwargs: Any) -> MaxViT:
    """211,785,560 parameters."""
    return MaxViT((2, 6, 14, 2), (128, 256, 512, 1024), **{"stem": 128, **kwargs})

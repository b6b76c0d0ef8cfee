"""BoTNet, HaloNet and LambdaResNet, as timm has them: bottlenecks, in some of which another layer stands for the 3 × 3
convolution."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxattn.checked import Natural, checked
from jaxattn.models.backbone import Backbone, Stage, linear_head
from jaxattn.models.botnet_mixers import BOTNET, HALO, LAMBDA, LambdaMixer, PositionAttention
from jaxattn.models.pooling import max_pool
from jaxattn.models.residual import check_rates, depth_rates, drop_path
from jaxattn.models.resnet_blocks import batch_norm, he_init
from jaxattn.models.translation import Table, Translation, under
from jaxattn.nn.conv import Conv
from jaxattn.nn.grid import Splittable
from jaxattn.sizes import Size, per_axis

MIXERS: dict[str, Table] = {"botnet": BOTNET, "halo": HALO, "lambda": LAMBDA}
CONV: Table = {"mix": "conv2_kxk.conv", "mix_norm": "conv2_kxk.bn"}
BLOCK: Table = {
    "expand": "conv1_1x1.conv", "expand_norm": "conv1_1x1.bn", "contract": "conv3_1x1.conv",
    "contract_norm": "conv3_1x1.bn", "shortcut": "shortcut.conv", "shortcut_norm": "shortcut.bn",
}  # fmt: skip
ACTIVATIONS = {"relu": jax.nn.relu, "silu": jax.nn.silu}


class Bottleneck(Splittable):
    """φ(shortcut(x) + norm(W₃ φ(norm(mix(φ(norm(W₁ x)))))), where mix takes the stride; the shortcut is a linear map
    with a norm, where the shape changes."""

    def __init__(
        self, in_features: int, features: int, stride: int, mix: Any, *, activation: str, drop_path_rate: float,
        **kwargs: Any,
    ):  # fmt: skip
        def pointwise(before, after, stride=1):
            return Conv(before, after, (1, 1), stride, padding="VALID", use_bias=False, kernel_init=he_init, **kwargs)

        hidden = features // 4
        self.activation = ACTIVATIONS[activation]
        self.expand, self.expand_norm = pointwise(in_features, hidden), batch_norm(hidden, **kwargs)
        self.mix, self.mix_norm = mix, batch_norm(hidden, **kwargs)
        self.contract, self.contract_norm = pointwise(hidden, features), batch_norm(features, **kwargs)
        self.shortcut = self.shortcut_norm = nnx.data(None)
        if stride != 1 or in_features != features:
            self.shortcut = pointwise(in_features, features, stride)
            self.shortcut_norm = batch_norm(features, **kwargs)
        self.drop_path = drop_path(drop_path_rate, 3)

    def __call__(self, x: Float[Array, "..."], *, sow_weights: bool = False, rngs: nnx.Rngs | None = None):
        y = self.activation(self.expand_norm(self.expand(x)))
        y = self.mix(y) if isinstance(self.mix, Conv) else self.mix(y, sow_weights=sow_weights)
        y = self.contract_norm(self.contract(self.activation(self.mix_norm(y))))
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = self.shortcut_norm(self.shortcut(x))
        return self.activation(x + self.drop_path(y, rngs=rngs))


class BoTNet(Backbone):
    """Bottleneck transformers (Srinivas et al. 2021, arXiv 2101.11605), and with other mixers HaloNet (Vaswani et al.
    2021, arXiv 2103.12731) and LambdaResNet (Bello 2021, arXiv 2102.08602), as timm trained them: a stem of three 3 × 3
    convolutions and a max pool, stages of `Bottleneck`s that halve the grid, and the mean over it.

    Args:
      depths: blocks of each stage.
      widths: features of a token of each stage; a quarter of them within its blocks.
      mix: "botnet", "halo" (see `PositionAttention`) or "lambda" (see `LambdaMixer`).
      mixed: in each stage, the blocks that have it, by number; the others have 3 × 3 convolutions.
      num_heads: of the mixers of each stage.
      stem: features of the stem's last convolution.
      image_size: an int or (height, width), which "botnet" is for; the others take images of any size that 32 divides,
        and "halo" where a block divides its stages' grids. A file's tables of another size are resized to it, as
        `SAMViT`'s are; timm does not.
      window: the side of the block of "halo", and of the window of "lambda".
      halo: tokens around a block.
      activation: φ, "relu" or "silu".
      num_classes, in_features, drop_path, remat, dtype, param_dtype, rngs: as in `ConvNeXt`.

    >>> from flax import nnx
    >>> sizes = dict(depths=(1, 1), widths=(16, 32), mixed=((), (0,)), num_heads=(1, 2), stem=8, image_size=32)
    >>> model = nnx.eval_shape(lambda: BoTNet(**sizes, num_classes=5, rngs=nnx.Rngs(0)))
    >>> [features.shape for features in nnx.eval_shape(lambda m, x: m.pyramid(x), model, jnp.ones((2, 32, 32, 3)))]
    [(2, 8, 8, 16), (2, 4, 4, 32)]
    """

    @checked
    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        *,
        mix: Literal["botnet", "halo", "lambda"] = "botnet",
        mixed: Sequence[Sequence[Natural]],
        num_heads: Sequence[int],
        stem: int = 64,
        image_size: Size = 256,
        window: int = 8,
        halo: Natural = 3,
        activation: Literal["relu", "silu"] = "relu",
        num_classes: Natural = 1000,
        in_features: int = 3,
        drop_path: float = 0.0,
        remat: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if not len(depths) == len(widths) == len(mixed) == len(num_heads) or not depths:
            raise ValueError(
                f"BoTNet: depths (={depths}), widths (={widths}), mixed (={mixed}) and num_heads (={num_heads}) must "
                "have one for each stage"
            )
        for width, heads, blocks in zip(widths, num_heads, mixed, strict=True):
            if width % 4 or (blocks and width // 4 % heads):
                raise ValueError(f"BoTNet: widths (={widths}) must be multiples of 4 · num_heads (={num_heads})")
        check_rates("BoTNet", drop_path=drop_path)
        self.in_features, self.remat, self.widths, self.mix = in_features, remat, tuple(widths), mix
        self.mixed, self.activation = tuple(map(tuple, mixed)), ACTIVATIONS[activation]
        self.strides = tuple(4 * 2**n for n in range(len(depths)))
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        tiers = (in_features, 3 * stem // 8, stem // 2, stem)
        conv3 = {"padding": 1, "use_bias": False, "kernel_init": he_init, **kwargs}
        self.stem = nnx.List([Conv(tiers[n], tiers[n + 1], (3, 3), 1 if n else 2, **conv3) for n in range(3)])
        self.stem_norms = nnx.List([batch_norm(width, **kwargs) for width in tiers[1:]])
        grid = [-(-n // 4) for n in per_axis("BoTNet", "image_size", image_size, 2)]
        rates, stages, before = iter(depth_rates(drop_path, sum(depths))), [], stem
        for n, (depth, width, heads) in enumerate(zip(depths, widths, num_heads, strict=True)):
            blocks = []
            for m in range(depth):
                stride, hidden = (2 if n and not m else 1), width // 4
                if m not in self.mixed[n]:
                    layer = Conv(hidden, hidden, (3, 3), stride, **conv3)
                elif mix == "lambda":
                    layer = LambdaMixer(hidden, heads, stride, window, **kwargs)
                else:
                    place = (grid[0], grid[1]) if mix == "botnet" else (window, window)
                    layer = PositionAttention(hidden, heads, stride, place, None if mix == "botnet" else halo, **kwargs)
                rate = next(rates)
                blocks.append(
                    Bottleneck(before, width, stride, layer, activation=activation, drop_path_rate=rate, **kwargs)
                )
                before, grid = width, [-(-side // stride) for side in grid]
            stages.append(Stage(None, blocks))
        self.stages = nnx.List(stages)
        self.head = linear_head(before, num_classes, param_dtype=param_dtype, rngs=rngs)

    @property
    def translations(self) -> tuple[Translation, ...]:
        table: dict[str, Any] = {"head": "head.fc"}
        for n in range(3):
            table |= {f"stem.{n}": f"stem.conv{n + 1}.conv", f"stem_norms.{n}": f"stem.conv{n + 1}.bn"}
        mixer = {**under("mix", "self_attn", MIXERS[self.mix]), "mix_norm": "post_attn"}
        for n, stage in enumerate(self.stages):
            for m in range(len(stage.blocks)):
                block = {**BLOCK, **(mixer if m in self.mixed[n] else CONV)}
                table |= under(f"stages.{n}.blocks.{m}", f"stages.{n}.{m}", block)
        return (Translation("timm", table),)

    def begin(self, images: Array) -> Float[Array, "*batch height width features"]:
        x = images
        for conv, norm in zip(self.stem, self.stem_norms, strict=True):
            x = self.activation(norm(conv(x)))
        return max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)), self.axis_name)

    def finish(self, x: Array) -> Float[Array, "*batch features"]:
        return self.mean(x)


WIDTHS = (256, 512, 1024, 2048)


def _sized26(num_heads: int, kwargs: dict[str, Any]) -> BoTNet:
    return BoTNet((2, 2, 2, 2), WIDTHS, **{"mixed": ((), (), (1,), (0, 1)), "num_heads": (num_heads,) * 4, **kwargs})


def _sized50(num_heads: Sequence[int], kwargs: dict[str, Any]) -> BoTNet:
    mixed = ((), (3,), (1, 3, 5), (1,))
    settings = {"mixed": mixed, "num_heads": num_heads, "activation": "silu", **kwargs}
    return BoTNet((3, 4, 6, 3), WIDTHS, **settings)


def botnet26t(**kwargs: Any) -> BoTNet:
    """12,488,672 parameters with 1,000 classes, for images of 256 × 256."""
    return _sized26(4, kwargs)


def halonet26t(**kwargs: Any) -> BoTNet:
    """12,480,288 parameters, for images of 256 × 256 and other multiples of it."""
    return _sized26(8, {"mix": "halo", "halo": 2, **kwargs})


def halonet50ts(**kwargs: Any) -> BoTNet:
    """22,733,280 parameters."""
    return _sized50((8, 4, 8, 8), {"mix": "halo", **kwargs})


def lambda_resnet26t(**kwargs: Any) -> BoTNet:
    """10,958,272 parameters, for images of 256 × 256 and others."""
    return _sized26(4, {"mix": "lambda", "window": 9, **kwargs})


def lambda_resnet50ts(**kwargs: Any) -> BoTNet:
    """21,536,832 parameters."""
    return _sized50((4,) * 4, {"mix": "lambda", "window": 9, **kwargs})

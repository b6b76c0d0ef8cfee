"""EfficientNet-Lite: inverted residuals of 1 × 1 and depthwise convolutions."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Num

from jaxattn.checked import checked
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
      num_classes: size of the output.
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
        num_classes: int = 1000,
        in_features: int = 3,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.in_features = in_features
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.stem, self.stem_norm = _conv(in_features, STEM, 3, 2, **kwargs), _batch_norm(STEM, **kwargs)
        blocks, width = [], STEM
        stages = [ints("EfficientNet", "stages", stage) for stage in stages] if is_sequence(stages) else ()
        if not stages or any(len(stage) != 5 for stage in stages):
            raise ValueError("EfficientNet: stages must be some tuples of five ints >= 1, one for each stage")
        for count, size, stride, expansion, features in stages:
            for n in range(count):
                blocks.append(InvertedResidual(width, features, size, stride if n == 0 else 1, expansion, **kwargs))
                width = features
        self.blocks = nnx.List(blocks)
        self.head, self.head_norm = _conv(width, HEAD, **kwargs), _batch_norm(HEAD, **kwargs)
        # dtype is left to promotion: bfloat16 features and float32 weights make float32 logits, as a loss wants them
        self.classifier = nnx.Linear(HEAD, num_classes, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, images: Num[ArrayLike, "..."]) -> Float[Array, "*batch classes"]:
        """Logits of `images` `[*batch, height, width, in_features]`."""
        x = jnp.asarray(images)
        if x.ndim < 3 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"EfficientNet: images (={x.shape}) must be [*batch, height, width, in_features (={self.in_features})]"
            )
        x = jax.nn.relu6(self.stem_norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        x = jax.nn.relu6(self.head_norm(self.head(x)))
        return self.classifier(x.mean(axis=(-3, -2)))


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

"""MBConv, the convolutional block of CoAtNet and MaxViT."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from jaxattn.einsum import einsum
from jaxattn.models.residual import drop_path
from jaxattn.models.translation import Rule, Table
from jaxattn.nn.conv import Conv
from jaxattn.nn.grid import Splittable
from jaxattn.sizes import Size

POINTWISE = {"kernel": "i o -> o i 1 1"}
STEM: Table = {"stem1": "stem.conv1", "stem_norm": "stem.norm1", "stem2": "stem.conv2"}
MBCONV: Table = {
    "shortcut": Rule("shortcut.expand", POINTWISE), "norm": "pre_norm", "expand": Rule("conv1_1x1", POINTWISE),
    "expand_norm": "norm1", "depthwise": "conv2_kxk", "depthwise_norm": "norm2",
    "contract": Rule("conv3_1x1", POINTWISE),
}  # fmt: skip


def squeeze(name: str) -> dict[str, str | Rule]:
    """The table of `SqueezeExcite`, which is called `name` in PyTorch.

    >>> squeeze("se")["squeeze.first"].name
    'se.fc1'
    """
    pairs = (("first", "fc1"), ("second", "fc2"))
    return {f"squeeze.{ours}": Rule(f"{name}.{theirs}", POINTWISE) for ours, theirs in pairs}


def average_pool(x: Float[Array, "*batch height width features"]) -> Float[Array, "*batch height2 width2 features"]:
    """2 × 2 means, stride 2; an odd edge is left out.

    >>> average_pool(jnp.arange(4.0).reshape(2, 2, 1)).ravel()
    Array([1.5], dtype=float32)
    """
    rows, columns = (n - n % 2 for n in x.shape[-3:-1])
    return einsum("... (i p) (j q) c -> ... i j c", x[..., :rows, :columns, :], p=2, q=2) / 4


def gelu_tanh(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The gelu's approximation by tanh, as TensorFlow's networks have it.

    >>> gelu_tanh(jnp.array(1.0)).round(4)
    Array(0.8412, dtype=float32)
    """
    return jax.nn.gelu(x, approximate=True)


class SqueezeExcite(Splittable):
    """x σ(W₂ φ(W₁ mean(x) + b₁) + b₂), the mean being over the grid (Hu et al. 2018, arXiv 1709.01507)."""

    def __init__(self, width: int, hidden: int, activation: Callable[[Array], Array], **kwargs: Any):
        self.first, self.second = nnx.Linear(width, hidden, **kwargs), nnx.Linear(hidden, width, **kwargs)
        self.activation = activation

    def __call__(self, x: Float[Array, "*batch height width features"]):
        mean = x.mean(axis=(-3, -2), keepdims=True)
        mean = mean if self.axis_name is None else jax.lax.pmean(mean, self.axis_name)
        return x * jax.nn.sigmoid(self.second(self.activation(self.first(mean))))


class MBConv(Splittable):
    """An inverted residual with the norm before it: x + W₃ · squeeze(φ(norm(depthwise(φ(norm(W₁ norm(x))))))), where
    W₁ expands, and a stride is taken by the depthwise convolution or by a mean before W₁; x itself by a mean and a
    linear map.

    Args:
      in_features, features, stride: of the block.
      hidden: features within it.
      activation, squeeze_activation: φ, and the same in `SqueezeExcite`.
      squeeze_features: within `SqueezeExcite`.
      early: whether that comes before the second norm.
      first_activation: whether φ follows the first norm too.
      pool: whether the stride is taken by a mean.
      use_bias: whether W₃ and the shortcut's map have biases.
      padding: of the depthwise convolution.
      epsilon: of the norms, BatchNorms.
    """

    def __init__(
        self, in_features: int, features: int, stride: int, *, hidden: int, activation: Callable[[Array], Array],
        squeeze_activation: Callable[[Array], Array], squeeze_features: int, early: bool, first_activation: bool,
        pool: bool, use_bias: bool, padding: str | Size, epsilon: float, drop_path_rate: float, **kwargs: Any,
    ):  # fmt: skip
        def norm(width):
            return nnx.BatchNorm(width, momentum=0.9, epsilon=epsilon, **kwargs)

        self.activation, self.early, self.first_activation = activation, early, first_activation
        self.pooled, self.strided = pool and stride == 2, stride == 2
        linear = nnx.Linear(in_features, features, use_bias=use_bias, **kwargs) if in_features != features else None
        self.shortcut = nnx.data(linear)
        self.norm, self.expand = norm(in_features), nnx.Linear(in_features, hidden, use_bias=False, **kwargs)
        self.depthwise = Conv(
            hidden, hidden, (3, 3), 1 if pool else stride, padding=padding, feature_group_count=hidden, use_bias=False,
            **kwargs,
        )  # fmt: skip
        self.expand_norm, self.depthwise_norm = norm(hidden), norm(hidden)
        self.squeeze = SqueezeExcite(hidden, squeeze_features, squeeze_activation, **kwargs)
        self.contract = nnx.Linear(hidden, features, use_bias=use_bias, **kwargs)
        self.drop_path = drop_path(drop_path_rate, 3)

    def __call__(
        self,
        x: Float[Array, "*batch height width features"],
        *,
        sow_weights: bool = False,
        rngs: nnx.Rngs | None = None,
    ):
        y = self.norm(x)
        y = self.activation(y) if self.first_activation else y
        y = self.activation(self.expand_norm(self.expand(average_pool(y) if self.pooled else y)))
        y = self.depthwise(y)
        y = self.squeeze(y) if self.early else y
        y = self.activation(self.depthwise_norm(y))
        y = self.contract(y if self.early else self.squeeze(y))
        x = average_pool(x) if self.strided else x
        x = x if self.shortcut is None else self.shortcut(x)
        return x + self.drop_path(y, rngs=rngs)

"""A residual block whose spatial mixing is convolution or local attention."""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Num

from jaxattn.models.pooling import average_pool
from jaxattn.models.residual import drop_path
from jaxattn.nn.attention import Attention
from jaxattn.nn.conv import Conv
from jaxattn.nn.grid import Splittable
from jaxattn.window import Window

MIXES = ("conv", "attention")
EXPANSION = {"basic": 1, "bottleneck": 4}
he_init = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


class GridMixer(Splittable):
    """A block's spatial mixing: a 3 × 3 convolution, or local attention as in SASA; either with a stride.

    The attention is Ramachandran et al.'s: relative embeddings factorised into row and column, no bias, no output
    projection, tokens beyond the border left out, and a 2 × 2 average pool where the convolution would have a stride.
    Their q·k has no 1/√head_dim; here it has, which is the same layer with W_K scaled, and starts with small scores.
    """

    def __init__(
        self, in_features: int, features: int, stride: int, mix: str, *, window: int, num_heads: int, **kwargs: Any
    ):
        self.pool = mix == "attention" and stride == 2
        if mix == "conv":
            self.layer = Conv(
                in_features, features, (3, 3), stride, padding=1, use_bias=False, kernel_init=he_init, **kwargs
            )
        else:
            self.layer = Attention(
                num_heads,
                in_features,
                features,
                window=Window((window, window), boundary="mask"),
                key_embedding="factorized",
                use_bias=False,
                out_projection=False,
                **kwargs,
            )

    def __call__(self, x: Num[Array, "*batch height width channels"], *, sow_weights: bool = False):
        y = self.layer(x, sow_weights=sow_weights) if isinstance(self.layer, Attention) else self.layer(x)
        return average_pool(y, self.axis_name) if self.pool else y


class Block(Splittable):
    """A residual block: relu(shortcut(x) + branch(x)), each convolution or attention followed by BatchNorm. In training
    the branch is left out at random (stochastic depth).

    "basic": two mixers. "bottleneck": 1 × 1, mixer, 1 × 1 to four times the features. The stride is the (first)
    mixer's (v1.5, as torchvision), and the shortcut is a 1 × 1 projection where the shape changes.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        stride: int,
        *,
        block: str,
        mix: str,
        window: int,
        num_heads: int,
        zero_init_residual: bool,
        drop_path_rate: float,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        out_features = features * EXPANSION[block]

        def pointwise(in_features, features, stride=1):
            # pads none: a 1 × 1 kernel stands at every stride-th token
            return Conv(
                in_features, features, (1, 1), stride, padding="VALID", use_bias=False, kernel_init=he_init, **kwargs
            )

        def mixer(in_features, stride):
            return GridMixer(in_features, features, stride, mix, window=window, num_heads=num_heads, **kwargs)

        if block == "basic":
            layers = [mixer(in_features, stride), mixer(features, 1)]
        else:
            layers = [pointwise(in_features, features), mixer(features, stride), pointwise(features, out_features)]
        self.layers = nnx.List(layers)
        self.norms = nnx.List([batch_norm(features, **kwargs) for _ in layers[:-1]])
        scale_init = nnx.initializers.zeros if zero_init_residual else nnx.initializers.ones
        self.norms.append(batch_norm(out_features, scale_init=scale_init, **kwargs))
        self.shortcut = self.shortcut_norm = nnx.data(None)
        if stride != 1 or in_features != out_features:
            self.shortcut = pointwise(in_features, out_features, stride)
            self.shortcut_norm = batch_norm(out_features, **kwargs)
        self.drop_path = drop_path(drop_path_rate, 3)

    def __call__(
        self,
        x: Num[Array, "*batch height width channels"],
        *,
        sow_weights: bool = False,
        rngs: nnx.Rngs | None = None,
    ):
        y = x
        for n, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True), 1):
            y = norm(layer(y, sow_weights=sow_weights) if isinstance(layer, GridMixer) else layer(y))
            y = y if n == len(self.layers) else jax.nn.relu(y)
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = self.shortcut_norm(self.shortcut(x))
        return jax.nn.relu(x + self.drop_path(y, rngs=rngs))


def batch_norm(features: int, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs, **kwargs: Any) -> nnx.BatchNorm:
    """Running statistics keep 0.9 of their past at each step (PyTorch's momentum of 0.1)."""
    return nnx.BatchNorm(
        features, momentum=0.9, epsilon=1e-5, dtype=dtype, param_dtype=param_dtype, rngs=rngs, **kwargs
    )

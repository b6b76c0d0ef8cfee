"""What the mixers of `MetaFormer` are, and its norms and activation."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxattn.einsum import einsum
from jaxattn.halo import split_pad
from jaxattn.models.backbone import small_init
from jaxattn.models.translation import Rule, Table
from jaxattn.nn.attention import Attention
from jaxattn.nn.conv import Conv
from jaxattn.nn.grid import Splittable

CHANNELS = {"kernel": "i o -> o i 1 1"}
LINEAR = {"kernel": "i o -> o i"}
MIXERS: dict[str, Table] = {
    "pool": {},
    "conv": {
        "expand": Rule("pwconv1", CHANNELS), "star.gain": "act1.scale", "star.bias": "act1.bias",
        "depthwise": "dwconv", "contract": Rule("pwconv2", CHANNELS),
    },
    "attention": {
        "layer.query|key|value": Rule("qkv", {"kernel": "i head dim -> +(head dim) i"}),
        "out": Rule("proj", LINEAR),
    },
}  # fmt: skip
HEAD_DIM = 32


class StarReLU(Splittable):
    """s relu(x)² + b, with two numbers that are learned (Yu et al. 2024, arXiv 2210.13452)."""

    def __init__(self, param_dtype: Any):
        self.gain, self.bias = nnx.Param(jnp.ones(1, param_dtype)), nnx.Param(jnp.zeros(1, param_dtype))

    def __call__(self, x: Float[Array, "*shape"]):
        return self.gain[...].astype(x.dtype) * jnp.square(jax.nn.relu(x)) + self.bias[...].astype(x.dtype)


class GridNorm(Splittable):
    """A norm over the grid and the features: a group norm of one group."""

    def __init__(self, width: int, use_bias: bool, epsilon: float, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        self.dtype, self.epsilon, self.scale = dtype, epsilon, nnx.Param(jnp.ones(width, param_dtype))
        self.bias = nnx.Param(jnp.zeros(width, param_dtype)) if use_bias else nnx.data(None)

    def __call__(self, x: Float[Array, "*batch height width features"]):
        def mean(x):
            y = x.mean(axis=(-3, -2, -1), keepdims=True)
            return y if self.axis_name is None else jax.lax.pmean(y, self.axis_name)

        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        wide = wide - mean(wide)
        y = wide * jax.lax.rsqrt(mean(wide * wide) + self.epsilon) * self.scale[...]
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype if self.dtype is None else self.dtype)


class Pool(Splittable):
    """The mean of the 3 × 3 tokens around each, of those that there are, less the token itself."""

    def __call__(self, x: Float[Array, "*batch height width features"], *, sow_weights: bool = False):
        def sums(x):
            rows = (1, 1)
            if self.axis_name is not None:
                x, rows = split_pad(x, x.ndim - 3, self.axis_name, rows, size=3), (0, 0)
            x = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [rows, (1, 1), (0, 0)])
            return einsum("... i+r j+s c, r s -> ... i j c", x, jnp.ones((3, 3), x.dtype))

        return sums(x) / sums(jnp.ones_like(x[..., :1])) - x


class SeparableConv(Splittable):
    """W₂ depthwise(star(W₁ x)), with windows of 7 × 7 and twice the features within."""

    def __init__(self, width: int, **kwargs: Any):
        self.expand = nnx.Linear(width, 2 * width, use_bias=False, kernel_init=small_init, **kwargs)
        self.star = StarReLU(kwargs["param_dtype"])
        self.depthwise = Conv(
            2 * width, 2 * width, (7, 7), padding=3, feature_group_count=2 * width, use_bias=False, **kwargs
        )
        self.contract = nnx.Linear(2 * width, width, use_bias=False, kernel_init=small_init, **kwargs)

    def __call__(self, x: Float[Array, "*batch height width features"], *, sow_weights: bool = False):
        return self.contract(self.depthwise(self.star(self.expand(x))))


class GlobalAttention(Splittable):
    """Attention of all tokens, with no bias."""

    def __init__(self, width: int, **kwargs: Any):
        if width % HEAD_DIM:
            raise ValueError(f"MetaFormer: widths (={width}) must be multiples of {HEAD_DIM} where mix is 'attention'")
        self.layer = Attention(
            width // HEAD_DIM, width, use_bias=False, out_projection=False, kernel_init=small_init, keep_rngs=False,
            rank=1, **kwargs,
        )  # fmt: skip
        self.out = nnx.Linear(width, width, use_bias=False, kernel_init=small_init, **kwargs)

    def __call__(self, x: Float[Array, "*batch height width features"], *, sow_weights: bool = False):
        tokens = x.reshape(*x.shape[:-3], -1, x.shape[-1])
        return self.out(self.layer(tokens, sow_weights=sow_weights)).reshape(x.shape)


def mixer(kind: str, width: int, **kwargs: Any) -> Any:
    """ "pool": `Pool`. "conv": `SeparableConv`. "attention": `GlobalAttention`."""
    if kind == "pool":
        return Pool()
    return SeparableConv(width, **kwargs) if kind == "conv" else GlobalAttention(width, **kwargs)

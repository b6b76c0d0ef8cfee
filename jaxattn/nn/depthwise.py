"""Modules of depthwise convolution: learned weights by offset, each channel or head its own."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Num

from jaxattn import zoo
from jaxattn.nn.layer import operands
from jaxattn.nn.weights import default_bias_init, default_kernel_init, divided, frozen, ints

glorot_init = nnx.initializers.xavier_uniform()


class DepthwiseConv(nnx.Module):
    """A convolution in which each channel sees itself alone: `jaxattn.zoo.depthwise_conv` with its parameters.

    The values are those of `nnx.Conv` with as many groups as features, from the same `rngs`; its kernel has an axis of
    one more. (Chollet 2017, arXiv 1610.02357; ConvNeXt, Liu et al. 2022, arXiv 2201.03545.)

    Args:
      in_features: size of the input's last axis.
      kernel_size: an int for one dimension, else one int per axis of the grid.
      multiplier: outputs of each feature.
      strides, dilation: ints, or one per axis.
      padding: "SAME", "VALID", an int, or an int or a (low, high) pair per axis.
      use_bias: whether a bias is added.
      dtype: of the computation. None promotes the input's and the parameters' dtypes.
      param_dtype: of the parameters.
      precision: as in `jax.lax.dot_general`.
      kernel_init: initialiser of `kernel`, `[*kernel_size, in_features · multiplier]`.
      bias_init: initialiser of `bias`, `[in_features · multiplier]`.
      rngs: `nnx.Rngs`; `params` is used.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> DepthwiseConv(8, (7, 7), rngs=nnx.Rngs(0))(jnp.ones((2, 14, 14, 8))).shape
    (2, 14, 14, 8)
    """

    def __init__(
        self,
        in_features: int,
        kernel_size: int | Sequence[int],
        multiplier: int = 1,
        *,
        strides: int | Sequence[int] = 1,
        padding: str | int | Sequence[int | Sequence[int]] = "SAME",
        dilation: int | Sequence[int] = 1,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Callable[..., Any] = default_kernel_init,
        bias_init: Callable[..., Any] = default_bias_init,
        rngs: nnx.Rngs,
    ):
        if in_features < 1 or multiplier < 1:
            raise ValueError(
                f"DepthwiseConv: in_features (={in_features}) and multiplier (={multiplier}) must be positive"
            )
        self.strides, self.padding, self.dilation = frozen(strides), frozen(padding), frozen(dilation)
        self.in_features, self.out_features = in_features, in_features * multiplier
        self.dtype, self.precision = dtype, precision
        self.kernel = window_weight(kernel_init, rngs, kernel_size, in_features * multiplier, param_dtype)
        self.bias = nnx.data(None)
        if use_bias:
            self.bias = nnx.Param(bias_init(rngs.params(), (in_features * multiplier,), param_dtype))

    def __call__(self, inputs: Num[ArrayLike, "..."]) -> Float[Array, "..."]:
        """`[*batch, *positions, in_features · multiplier]` of `[*batch, *grid, in_features]`."""
        x, params = operands(self, inputs, dtype=self.dtype)
        geometry: dict[str, Any] = {"strides": self.strides, "padding": self.padding, "dilation": self.dilation}
        y = zoo.depthwise_conv(x, params["kernel"], **geometry, precision=self.precision)
        return y if self.bias is None else y + params["bias"]


class LightConv(nnx.Module):
    """A depthwise convolution whose weights a softmax makes sum to one: `jaxattn.zoo.light_conv` with its parameter.

    The convolution alone, without the linear maps and the gate around it. (Wu et al. 2019, arXiv 1901.10430.)

    Args:
      num_heads: heads, which share their weights; they divide `in_features`.
      in_features: size of the input's last axis.
      kernel_size: an int for one dimension, else one int per axis of the grid.
      dilation: an int, or one per axis.
      causal: a position sees what comes before it, and itself last.
      dtype: of the computation. None promotes the input's and the parameters' dtypes.
      param_dtype: of the parameters.
      precision: as in `jax.lax.dot_general`.
      kernel_init: initialiser of `kernel`, `[*kernel_size, num_heads]`.
      rngs: `nnx.Rngs`; `params` is used.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> LightConv(4, 8, 7, causal=True, rngs=nnx.Rngs(0))(jnp.ones((2, 20, 8))).shape
    (2, 20, 8)
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        kernel_size: int | Sequence[int],
        *,
        dilation: int | Sequence[int] = 1,
        causal: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Callable[..., Any] = glorot_init,
        rngs: nnx.Rngs,
    ):
        divided(self, "num_heads", num_heads, in_features)
        self.dilation, self.causal, self.dtype, self.precision = frozen(dilation), causal, dtype, precision
        self.kernel = window_weight(kernel_init, rngs, kernel_size, num_heads, param_dtype)

    def __call__(self, inputs: Num[ArrayLike, "..."]) -> Float[Array, "..."]:
        """`[*batch, *grid, in_features]`, as the input."""
        x, params = operands(self, inputs, dtype=self.dtype)
        geometry: dict[str, Any] = {"dilation": self.dilation, "causal": self.causal}
        return zoo.light_conv(x, params["kernel"], **geometry, precision=self.precision)


def window_weight(
    init: Callable[..., Any], rngs: nnx.Rngs, size: int | Sequence[int], features: int, dtype: Any
) -> nnx.Param:
    """A parameter `[*size, features]`, drawn as a convolution's kernel of one input, so that its fan is the window."""
    kernel = init(rngs.params(), (*ints(size), 1, features), dtype)
    return nnx.Param(kernel[..., 0, :])

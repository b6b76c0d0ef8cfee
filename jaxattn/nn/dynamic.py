"""Modules of convolutions whose weights are made from the data."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Num

from jaxattn import zoo
from jaxattn.nn.layer import operands
from jaxattn.nn.weights import default_kernel_init, divided, frozen, ints, linear, weight

glorot_init = nnx.initializers.xavier_uniform()


class DynamicConv(nnx.Module):
    """`LightConv` whose kernel each position makes of its own features: `jaxattn.zoo.dynamic_conv` with its parameter.

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
      kernel_init: initialiser of `kernel`, `[in_features, *kernel_size, num_heads]`.
      rngs: `nnx.Rngs`; `params` is used.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> DynamicConv(4, 8, 7, causal=True, rngs=nnx.Rngs(0))(jnp.ones((2, 20, 8))).shape
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
        self.kernel = weight(kernel_init, rngs, (in_features,), (*ints(kernel_size), num_heads), param_dtype)

    def __call__(self, inputs: Num[ArrayLike, "..."]) -> Float[Array, "..."]:
        """`[*batch, *grid, in_features]`, as the input."""
        x, params = operands(self, inputs, dtype=self.dtype)
        geometry: dict[str, Any] = {"dilation": self.dilation, "causal": self.causal}
        return zoo.dynamic_conv(x, params["kernel"], **geometry, precision=self.precision)


class Involution(nnx.Module):
    """Weights from the centre, shared by the channels of a group: `jaxattn.zoo.involution` with its parameters.

    (Li et al. 2021, arXiv 2103.06255.) The paper normalises the bottleneck by batch: give `activation` for that.

    Args:
      in_features: size of the input's last axis.
      kernel_size: an int for one dimension, else one int per axis of the grid.
      groups: groups of channels; they divide `in_features`.
      reduction: `in_features` over the size of the bottleneck.
      strides, dilation: ints, or one per axis.
      activation: of the bottleneck; a module's parameters are learned too.
      dtype: of the computation. None promotes the input's and the parameters' dtypes.
      param_dtype: of the parameters.
      precision: as in `jax.lax.dot_general`.
      kernel_init: initialiser of `reduce` and `span`; their biases begin at zero.
      rngs: `nnx.Rngs`; `params` is used.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> Involution(8, (7, 7), groups=2, rngs=nnx.Rngs(0))(jnp.ones((2, 14, 14, 8))).shape
    (2, 14, 14, 8)
    """

    def __init__(
        self,
        in_features: int,
        kernel_size: int | Sequence[int],
        *,
        groups: int = 1,
        reduction: int = 4,
        strides: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Callable[..., Any] = default_kernel_init,
        rngs: nnx.Rngs,
    ):
        divided(self, "groups", groups, in_features)
        reduced = divided(self, "reduction", reduction, in_features)
        self.strides, self.dilation, self.activation = frozen(strides), frozen(dilation), activation
        self.dtype, self.precision = dtype, precision
        how: dict[str, Any] = {"bias": True, "init": kernel_init, "rngs": rngs, "dtype": param_dtype}
        linear(self, "reduce", (in_features,), (reduced,), **how)
        linear(self, "span", (reduced,), (*ints(kernel_size), groups), **how)

    def __call__(self, inputs: Num[ArrayLike, "..."]) -> Float[Array, "..."]:
        """`[*batch, *positions, in_features]` of `[*batch, *grid, in_features]`."""
        x, params = operands(self, inputs, dtype=self.dtype)
        params.pop("activation", None)  # a module's parameters are its own affair
        geometry: dict[str, Any] = {"strides": self.strides, "dilation": self.dilation}
        return zoo.involution(x, params, **geometry, activation=self.activation, precision=self.precision)


class DynamicDepthwiseConv(nnx.Module):
    """A depthwise convolution with a kernel made of the image's mean: `jaxattn.zoo.dynamic_depthwise_conv`.

    (Han et al. 2022, arXiv 2106.04263.) The paper normalises the bottleneck by batch: give `activation` for that.

    Args:
      in_features: size of the input's last axis.
      kernel_size: an int for one dimension, else one int per axis of the grid.
      reduction: `in_features` over the size of the bottleneck.
      dilation: an int, or one per axis.
      activation: of the bottleneck; a module's parameters are learned too.
      dtype: of the computation. None promotes the input's and the parameters' dtypes.
      param_dtype: of the parameters.
      precision: as in `jax.lax.dot_general`.
      kernel_init: initialiser of `reduce` and `span`; their biases begin at zero.
      rngs: `nnx.Rngs`; `params` is used.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> DynamicDepthwiseConv(8, (7, 7), rngs=nnx.Rngs(0))(jnp.ones((2, 14, 14, 8))).shape
    (2, 14, 14, 8)
    """

    def __init__(
        self,
        in_features: int,
        kernel_size: int | Sequence[int],
        *,
        reduction: int = 4,
        dilation: int | Sequence[int] = 1,
        activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Callable[..., Any] = default_kernel_init,
        rngs: nnx.Rngs,
    ):
        reduced = divided(self, "reduction", reduction, in_features)
        self.dilation, self.activation, self.dtype, self.precision = frozen(dilation), activation, dtype, precision
        how: dict[str, Any] = {"bias": True, "init": kernel_init, "rngs": rngs, "dtype": param_dtype}
        linear(self, "reduce", (in_features,), (reduced,), **how)
        linear(self, "span", (reduced,), (*ints(kernel_size), in_features), **how)

    def __call__(self, inputs: Num[ArrayLike, "..."]) -> Float[Array, "..."]:
        """`[*batch, *grid, in_features]`, as the input."""
        x, params = operands(self, inputs, dtype=self.dtype)
        params.pop("activation", None)  # a module's parameters are its own affair
        return zoo.dynamic_depthwise_conv(
            x, params, dilation=self.dilation, activation=self.activation, precision=self.precision
        )

"""Modules of depthwise convolution: learned weights by offset, each channel or head its own."""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from jaxattn import zoo
from jaxattn.checked import checked
from jaxattn.nn.layer import Init, Layer, default_bias_init, default_kernel_init, glorot_init, of_kernel, of_window
from jaxattn.sizes import Size
from jaxattn.zoo.equations import Padding, divided, read_padding


class DepthwiseConv(Layer):
    """A convolution in which each channel sees itself alone: `jaxattn.zoo.depthwise_conv` with its parameters.

    The values are those of `nnx.Conv` with as many groups as features, from the same `rngs`; its kernel has an axis of
    one more. (Chollet 2017, arXiv 1610.02357; ConvNeXt, Liu et al. 2022, arXiv 2201.03545.)

    Args:
      in_features: size of the input's last axis.
      kernel_size: an int, or one for each axis of the grid.
      multiplier: outputs of each feature.
      strides, dilation: ints, or one per axis.
      padding: "SAME", "VALID", an int, or an int or a (low, high) pair per axis.
      use_bias: whether a bias is added.
      kernel_init: initialiser of `kernel`, `[*kernel_size, in_features · multiplier]`.
      bias_init: initialiser of `bias`, `[in_features · multiplier]`.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> DepthwiseConv(8, (7, 7), rngs=nnx.Rngs(0))(jnp.ones((2, 14, 14, 8))).shape
    (2, 14, 14, 8)
    """

    function = staticmethod(of_kernel(zoo.depthwise_conv))
    kernel: nnx.Param

    @checked
    def __init__(
        self,
        in_features: int,
        kernel_size: Size,
        multiplier: int = 1,
        *,
        rank: int | None = None,
        strides: Size = 1,
        padding: Padding = "SAME",
        dilation: Size = 1,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Init = default_kernel_init,
        bias_init: Init = default_bias_init,
        rngs: nnx.Rngs,
    ):
        given = locals()  # the arguments, by name
        window = self.sized("kernel_size", kernel_size, rank)
        self.strides, self.dilation = self.each("strides", strides), self.each("dilation", dilation)
        self.padding = read_padding("DepthwiseConv", padding, self.rank)
        self.out_features = in_features * multiplier
        sizes = {"features": in_features, "window": window, "features·m": self.out_features}
        self.draw(given, sizes, kernel=of_window(kernel_init))
        bias = nnx.Param(bias_init(rngs.params(), (self.out_features,), param_dtype)) if use_bias else None
        self.bias = nnx.data(bias)


class KernelOfHeads(Layer):
    """What `LightConv` and `DynamicConv` take: their kernels are a window's, for each head."""

    @checked
    def __init__(
        self,
        num_heads: int,
        in_features: int,
        kernel_size: Size,
        *,
        rank: int | None = None,
        dilation: Size = 1,
        causal: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Init = glorot_init,
        rngs: nnx.Rngs,
    ):
        given = locals()  # the arguments, by name
        divided(type(self).__name__, "num_heads", num_heads, in_features, "in_features")
        window = self.sized("kernel_size", kernel_size, rank)
        self.dilation, self.causal = self.each("dilation", dilation), causal
        sizes = {"features": in_features, "window": window, "heads": num_heads}
        self.draw(given, sizes, kernel=of_window(kernel_init))


class LightConv(KernelOfHeads):
    """A depthwise convolution whose weights a softmax makes sum to one: `jaxattn.zoo.light_conv` with its parameter.

    The convolution alone, without the linear maps and the gate around it. (Wu et al. 2019, arXiv 1901.10430.)

    Args:
      num_heads: heads, which share their weights; they divide `in_features`.
      in_features: size of the input's last axis.
      kernel_size: an int, or one for each axis of the grid.
      dilation: an int, or one per axis.
      causal: a position sees what comes before it, and itself last.
      kernel_init: initialiser of `kernel`, `[*kernel_size, num_heads]`.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> LightConv(4, 8, 7, causal=True, rngs=nnx.Rngs(0))(jnp.ones((2, 20, 8))).shape
    (2, 20, 8)
    """

    function = staticmethod(of_kernel(zoo.light_conv))

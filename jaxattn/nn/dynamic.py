"""Modules of convolutions whose weights are made from the data."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from jaxattn import zoo
from jaxattn.checked import checked
from jaxattn.nn.depthwise import KernelOfHeads
from jaxattn.nn.layer import Init, Layer, default_kernel_init, of_kernel
from jaxattn.sizes import Size
from jaxattn.zoo.equations import divided


class DynamicConv(KernelOfHeads):
    """`LightConv` whose kernel each position makes of its own features: `jaxattn.zoo.dynamic_conv` with its parameter.

    The convolution alone, without the linear maps and the gate around it. (Wu et al. 2019, arXiv 1901.10430.)

    Args:
      num_heads: heads, which share their weights; they divide `in_features`.
      in_features: size of the input's last axis.
      kernel_size: an int, or one for each axis of the grid.
      dilation: an int, or one per axis.
      causal: a position sees what comes before it, and itself last.
      kernel_init: initialiser of `kernel`, `[in_features, *kernel_size, num_heads]`.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> DynamicConv(4, 8, 7, causal=True, rngs=nnx.Rngs(0))(jnp.ones((2, 20, 8))).shape
    (2, 20, 8)
    """

    function = staticmethod(of_kernel(zoo.dynamic_conv))


class Involution(Layer):
    """Weights from the centre, shared by the channels of a group: `jaxattn.zoo.involution` with its parameters.

    (Li et al. 2021, arXiv 2103.06255.) The paper normalises the bottleneck by batch: give `activation` for that.

    Args:
      in_features: size of the input's last axis.
      kernel_size: an int, or one for each axis of the grid.
      groups: groups of channels; they divide `in_features`.
      reduction: `in_features` over the size of the bottleneck.
      strides, dilation: ints, or one per axis.
      activation: of the bottleneck; a module's parameters are learned too.
      kernel_init: initialiser of `reduce` and `span`; their biases begin at zero.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> Involution(8, (7, 7), groups=2, rngs=nnx.Rngs(0))(jnp.ones((2, 14, 14, 8))).shape
    (2, 14, 14, 8)
    """

    function = staticmethod(zoo.involution)

    @checked
    def __init__(
        self,
        in_features: int,
        kernel_size: Size,
        *,
        rank: int | None = None,
        groups: int = 1,
        reduction: int = 4,
        strides: Size = 1,
        dilation: Size = 1,
        activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Init = default_kernel_init,
        rngs: nnx.Rngs,
    ):
        given = locals()  # the arguments, by name
        divided("Involution", "groups", groups, in_features, "in_features")
        self.activation = activation
        reduced = divided("Involution", "reduction", reduction, in_features, "in_features")
        window = self.sized("kernel_size", kernel_size, rank)
        self.strides, self.dilation = self.each("strides", strides), self.each("dilation", dilation)
        sizes = {"features": in_features, "reduced": reduced, "window": window, "groups": groups}
        self.draw(given, sizes, biased=("reduce", "span"))


class DynamicDepthwiseConv(Layer):
    """A depthwise convolution with a kernel made of the image's mean: `jaxattn.zoo.dynamic_depthwise_conv`.

    (Han et al. 2022, arXiv 2106.04263.) The paper normalises the bottleneck by batch: give `activation` for that.

    Args:
      in_features: size of the input's last axis.
      kernel_size: an int, or one for each axis of the grid.
      reduction: `in_features` over the size of the bottleneck.
      dilation: an int, or one per axis.
      activation: of the bottleneck; a module's parameters are learned too.
      kernel_init: initialiser of `reduce` and `span`; their biases begin at zero.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> DynamicDepthwiseConv(8, (7, 7), rngs=nnx.Rngs(0))(jnp.ones((2, 14, 14, 8))).shape
    (2, 14, 14, 8)
    """

    function = staticmethod(zoo.dynamic_depthwise_conv)

    @checked
    def __init__(
        self,
        in_features: int,
        kernel_size: Size,
        *,
        rank: int | None = None,
        reduction: int = 4,
        dilation: Size = 1,
        activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Init = default_kernel_init,
        rngs: nnx.Rngs,
    ):
        given = locals()  # the arguments, by name
        self.activation = activation
        reduced = divided("DynamicDepthwiseConv", "reduction", reduction, in_features, "in_features")
        window = self.sized("kernel_size", kernel_size, rank)
        self.dilation = self.each("dilation", dilation)
        sizes = {"features": in_features, "reduced": reduced, "window": window}
        self.draw(given, sizes, biased=("reduce", "span"))

"""Transposed convolution as a Flax module."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from jaxattn import zoo
from jaxattn.checked import checked
from jaxattn.nn.layer import Layer, default_bias_init, default_kernel_init, of_kernel
from jaxattn.sizes import Size
from jaxattn.zoo.equations import Padding, read_padding


class ConvTranspose(Layer):
    """Transposed convolution in any number of dimensions: `jaxattn.zoo.conv_transpose` with its parameters.

    A drop-in for `flax.nnx.ConvTranspose` but for its padding "CIRCULAR" and its `mask`: the same parameters (names,
    shapes, and initial values from the same `rngs`), the same results from the same parameters. (Zeiler et al. 2010.)

    Args:
      in_features: size of the input's last axis.
      out_features: size of the output's last axis.
      kernel_size: an int, or one for each axis of the grid.
      strides: how far apart neighbours of the input are written, an int or one per axis; None means 1.
      padding: "SAME", "VALID", an int, or an int or a (low, high) pair per axis; see the function.
      kernel_dilation: the step between the taps, an int or one per axis; None means 1.
      use_bias: whether a bias is added.
      kernel_init: initialiser of `kernel`.
      bias_init: initialiser of `bias`, `[out_features]`.
      transpose_kernel: False: `kernel` is `[*kernel_size, in_features, out_features]`, and flipped where it is written.
        True: `[*kernel_size, out_features, in_features]`, that of the convolution whose adjoint this is.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> ConvTranspose(8, 4, (2, 2), strides=2, rngs=nnx.Rngs(0))(jnp.ones((2, 7, 7, 8))).shape
    (2, 14, 14, 4)
    """

    function = staticmethod(of_kernel(zoo.conv_transpose))
    needs_whole_grid = "it writes to its neighbours' outputs, also across the border of a shard"

    @checked
    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Size,
        strides: Size | None = None,
        *,
        rank: int | None = None,
        padding: Padding = "SAME",
        kernel_dilation: Size | None = None,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Callable[..., Any] = default_kernel_init,
        bias_init: Callable[..., Any] = default_bias_init,
        transpose_kernel: bool = False,
        rngs: nnx.Rngs,
    ):
        shape = self.sized("kernel_size", kernel_size, rank)
        self.strides = self.each("strides", 1 if strides is None else strides)
        self.dilation = self.each("kernel_dilation", 1 if kernel_dilation is None else kernel_dilation)
        self.padding = read_padding("ConvTranspose", padding, self.rank)
        self.in_features, self.transpose_kernel = in_features, transpose_kernel
        self.dtype, self.precision = dtype, precision
        shape += (out_features, in_features) if transpose_kernel else (in_features, out_features)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
        bias = nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype)) if use_bias else None
        self.bias = nnx.data(bias)

"""Transposed convolution as a Flax module."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Num, Real

from jaxattn import zoo
from jaxattn.checked import checked
from jaxattn.nn.conv import kernel_mask
from jaxattn.nn.grid import GridModule
from jaxattn.nn.layer import Init, default_bias_init, default_kernel_init
from jaxattn.sizes import Size
from jaxattn.zoo.equations import Padding, read_padding
from jaxattn.zoo.parameters import biased
from jaxattn.zoo.transposed import PADDINGS


class ConvTranspose(GridModule):
    """Transposed convolution in any number of dimensions: `jaxattn.zoo.conv_transpose` with its parameters.

    A drop-in for `flax.nnx.ConvTranspose`: the same arguments, the same parameters (names, shapes, and initial values
    from the same `rngs`), the same results from the same parameters. (Zeiler et al. 2010.)

    Args:
      in_features: size of the input's last axis.
      out_features: size of the output's last axis.
      kernel_size: an int, or one for each axis of the grid.
      strides: how far apart neighbours of the input are written, an int or one per axis; None means 1.
      padding: "SAME", "VALID", "CIRCULAR", an int, or an int or a (low, high) pair per axis; see the function.
      kernel_dilation: the step between the taps, an int or one per axis; None means 1.
      use_bias: whether a bias is added.
      mask: multiplies the kernel; of its shape.
      kernel_init: initialiser of `kernel`.
      bias_init: initialiser of `bias`, `[out_features]`.
      transpose_kernel: False: `kernel` is `[*kernel_size, in_features, out_features]`, and flipped where it is written.
        True: `[*kernel_size, out_features, in_features]`, that of the convolution whose adjoint this is.
      promote_dtype, preferred_element_type, kernel_metadata, bias_metadata: as in `Conv`.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> ConvTranspose(8, 4, (2, 2), strides=2, rngs=nnx.Rngs(0))(jnp.ones((2, 7, 7, 8))).shape
    (2, 14, 14, 4)
    """

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
        mask: Real[ArrayLike, "*kernel_shape"] | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Init = default_kernel_init,
        bias_init: Init = default_bias_init,
        transpose_kernel: bool = False,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        preferred_element_type: DTypeLike | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        self.kernel_size = self.sized("kernel_size", kernel_size, rank)
        self.strides = self.each("strides", 1 if strides is None else strides)
        self.kernel_dilation = self.each("kernel_dilation", 1 if kernel_dilation is None else kernel_dilation)
        self.padding = read_padding("ConvTranspose", padding, self.rank, PADDINGS)
        self.in_features, self.out_features, self.transpose_kernel = in_features, out_features, transpose_kernel
        self.dtype, self.param_dtype, self.promote_dtype = dtype, param_dtype, promote_dtype
        self.precision, self.preferred_element_type = precision, preferred_element_type
        channels = (out_features, in_features) if transpose_kernel else (in_features, out_features)
        self.kernel_shape = (*self.kernel_size, *channels)
        self.use_bias, self.mask = use_bias, kernel_mask("ConvTranspose", mask, self.kernel_shape)
        self.kernel = nnx.Param(kernel_init(rngs.params(), self.kernel_shape, param_dtype), **kernel_metadata)
        self.bias = nnx.data(None)
        if use_bias:
            self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype), **bias_metadata)

    @checked
    def __call__(
        self, inputs: Num[ArrayLike, "*batch_and_spatial in_features"]
    ) -> Float[Array, "*batch_and_new_spatial out_features"]:
        """`[*batch, *new_spatial, out_features]` of `[*batch, *spatial, in_features]`."""
        self.check_input("inputs", inputs, self.in_features)
        kernel = self.kernel[...] if self.mask is None else self.kernel[...] * self.mask
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = self.promote_dtype((inputs, kernel, bias), dtype=self.dtype)
        y = zoo.conv_transpose(
            x,
            kernel,
            strides=self.strides,
            padding=self.padding,
            dilation=self.kernel_dilation,
            transpose_kernel=self.transpose_kernel,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )
        return y if bias is None else biased(y, {"bias": bias})

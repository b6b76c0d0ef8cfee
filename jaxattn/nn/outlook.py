"""Outlook attention as a Flax module."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Num

from jaxattn import zoo
from jaxattn.nn.layer import operands
from jaxattn.nn.weights import divided, frozen, ints, linear, small_init


class OutlookAttention(nnx.Module):
    """The centre of a window makes all the weights within it: `jaxattn.zoo.outlook_attention` with its parameters.

    (Yuan et al. 2021, VOLO, arXiv 2106.13112.)

    Args:
      num_heads: heads; they divide `in_features`.
      in_features: size of the input's last axis.
      kernel_size: an int for one dimension, else one int per axis of the grid.
      out_features: size of the output's last axis; None means `in_features`.
      strides: of the windows, an int or one per axis; the paper's is 2, and the output keeps the input's grid.
      scale: of the scores; None means head_dim ** -0.5.
      use_bias: whether the value has a bias; the weights and the output do.
      dtype: of the computation. None promotes the input's and the parameters' dtypes.
      param_dtype: of the parameters.
      precision: as in `jax.lax.dot_general`.
      kernel_init: initialiser of `value`, `attention` and `out`; the biases begin at zero.
      rngs: `nnx.Rngs`; `params` is used.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> OutlookAttention(2, 8, (3, 3), strides=2, rngs=nnx.Rngs(0))(jnp.ones((2, 14, 14, 8))).shape
    (2, 14, 14, 8)
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        kernel_size: int | Sequence[int],
        out_features: int | None = None,
        *,
        strides: int | Sequence[int] = 1,
        scale: float | None = None,
        use_bias: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Callable[..., Any] = small_init,
        rngs: nnx.Rngs,
    ):
        heads = (num_heads, divided(self, "num_heads", num_heads, in_features))
        window, out = ints(kernel_size), in_features if out_features is None else out_features
        self.strides, self.scale, self.dtype, self.precision = frozen(strides), scale, dtype, precision
        how: dict[str, Any] = {"init": kernel_init, "rngs": rngs, "dtype": param_dtype}
        linear(self, "value", (in_features,), heads, bias=use_bias, **how)
        linear(self, "attention", (in_features,), (num_heads, *window, *window), bias=True, **how)
        linear(self, "out", heads, (out,), bias=True, **how)

    def __call__(self, inputs: Num[ArrayLike, "..."]) -> Float[Array, "..."]:
        """`[*batch, *grid, out_features]` of `[*batch, *grid, in_features]`."""
        x, params = operands(self, inputs, dtype=self.dtype)
        return zoo.outlook_attention(x, params, strides=self.strides, scale=self.scale, precision=self.precision)

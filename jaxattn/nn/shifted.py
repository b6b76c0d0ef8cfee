"""Swin's module: windows that part the grid, shifted in every other layer."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxattn import zoo
from jaxattn.nn.layer import Layer, frozen, head_sizes, small_init
from jaxattn.sizes import Size, ints
from jaxattn.zoo.heads import offsets


class ShiftedWindowAttention(Layer):
    """The grid parted into windows, shifted or not: `jaxattn.zoo.shifted_window_attention` with its parameters.

    (Liu et al. 2021, Swin, arXiv 2103.14030.)

    Args:
      num_heads, in_features, qkv_features, out_features: as in `Attention`.
      window: tokens along each side of a window, an int for one dimension, or one for each axis.
      shift: from 0 to window - 1, an int, or one for each axis; the paper's layers alternate between 0 and window // 2.
      use_bias: whether the projections have biases.
      dtype, param_dtype, precision: as in `Attention`.
      kernel_init: initialiser of the projections.
      relative_init: initialiser of the relative bias.
      rngs: `nnx.Rngs`; `params` is used.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> ShiftedWindowAttention(4, 32, window=(7, 7), shift=3, rngs=nnx.Rngs(0))(jnp.ones((2, 14, 14, 32))).shape
    (2, 14, 14, 32)
    """

    function = staticmethod(zoo.shifted_window_attention)
    axis_name: str | None = None

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        window: Size,
        shift: Size = 0,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Callable[..., Any] = small_init,
        relative_init: Callable[..., Any] = small_init,
        rngs: nnx.Rngs,
    ):
        self.window = ints("ShiftedWindowAttention", "window", window)
        self.shift, self.dtype, self.precision = frozen(shift), dtype, precision
        sizes = head_sizes(self, num_heads, in_features, qkv_features, out_features)
        self.draw(
            sizes | {"offsets": offsets(self.window)}, kernel_init=kernel_init, use_bias=use_bias,
            relative_bias=relative_init, rngs=rngs, dtype=param_dtype,
        )  # fmt: skip

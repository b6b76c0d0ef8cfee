"""Swin's module: windows that part the grid, shifted in every other layer."""

from collections.abc import Callable
from typing import Annotated, Any

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from jaxattn import zoo
from jaxattn.checked import checked
from jaxattn.nn.layer import Layer, head_sizes, small_init
from jaxattn.sizes import Size
from jaxattn.zoo.heads import offsets
from jaxattn.zoo.shifted import shifts_below


class ShiftedWindowAttention(Layer):
    """The grid parted into windows, shifted or not: `jaxattn.zoo.shifted_window_attention` with its parameters.

    (Liu et al. 2021, Swin, arXiv 2103.14030.)

    Args:
      num_heads, in_features, qkv_features, out_features: as in `Attention`.
      window: tokens along each side of a window, an int, or one for each axis.
      shift: from 0 to window - 1, an int, or one for each axis; the paper's layers alternate between 0 and window // 2.
      shift_whole: whether to shift along an axis that one window covers too; the published networks do not.
      scale: None means head_dim ** -0.5.
      use_bias: whether the projections have biases.
      kernel_init: initialiser of the projections.
      relative_init: initialiser of the relative bias.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> ShiftedWindowAttention(4, 32, window=(7, 7), shift=3, rngs=nnx.Rngs(0))(jnp.ones((2, 14, 14, 32))).shape
    (2, 14, 14, 32)
    """

    function = staticmethod(zoo.shifted_window_attention)

    @checked
    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        rank: int | None = None,
        window: Size,
        shift: Annotated[Size, 0] = 0,
        shift_whole: bool = False,
        scale: float | None = None,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Callable[..., Any] = small_init,
        relative_init: Callable[..., Any] = small_init,
        rngs: nnx.Rngs,
    ):
        self.window = self.sized("window", window, rank)
        self.shift = shifts_below("ShiftedWindowAttention", shift, self.window)
        self.shift_whole, self.scale, self.dtype, self.precision = shift_whole, scale, dtype, precision
        sizes = head_sizes(self, num_heads, in_features, qkv_features, out_features)
        self.draw(
            sizes | {"offsets": offsets(self.window)}, kernel_init=kernel_init, use_bias=use_bias,
            relative_bias=relative_init, rngs=rngs, dtype=param_dtype,
        )  # fmt: skip

"""Outlook attention as a Flax module."""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from jaxattn import zoo
from jaxattn.checked import checked
from jaxattn.nn.layer import Init, Layer, head_sizes, small_init
from jaxattn.sizes import Size
from jaxattn.zoo.equations import divided


class OutlookAttention(Layer):
    """The centre of a window makes all the weights within it: `jaxattn.zoo.outlook_attention` with its parameters.

    (Yuan et al. 2021, VOLO, arXiv 2106.13112.)

    Args:
      num_heads: heads; they divide `in_features`.
      in_features: size of the input's last axis.
      kernel_size: an int, or one for each axis of the grid.
      out_features: size of the output's last axis; None means `in_features`.
      strides: of the windows, an int or one per axis; the paper's is 2, and the output keeps the input's grid.
      scale: of the scores; None means head_dim ** -0.5.
      use_bias: whether the value has a bias; the weights and the output do.
      kernel_init: initialiser of `value`, `attention` and `out`; the biases begin at zero.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> OutlookAttention(2, 8, (3, 3), strides=2, rngs=nnx.Rngs(0))(jnp.ones((2, 14, 14, 8))).shape
    (2, 14, 14, 8)
    """

    function = staticmethod(zoo.outlook_attention)
    needs_whole_grid = "a window adds to its neighbours' outputs, also across the border of a shard"

    @checked
    def __init__(
        self,
        num_heads: int,
        in_features: int,
        kernel_size: Size,
        out_features: int | None = None,
        *,
        rank: int | None = None,
        strides: Size = 1,
        scale: float | None = None,
        use_bias: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Init = small_init,
        rngs: nnx.Rngs,
    ):
        given = locals()  # the arguments, by name
        window = self.sized("kernel_size", kernel_size, rank)
        self.strides, self.scale = self.each("strides", strides), scale
        divided("OutlookAttention", "num_heads", num_heads, in_features, "in_features")
        self.draw(given, head_sizes(self, given) | {"window": window}, biased=("attention", "out"))

"""CvT's attention as a Flax module."""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from jaxattn import zoo
from jaxattn.checked import checked
from jaxattn.nn.layer import Init, Layer, default_kernel_init, head_sizes, of_window, small_init
from jaxattn.sizes import Size


class CvTAttention(Layer):
    """Attention between tokens that a depthwise convolution has made: `jaxattn.zoo.cvt_attention` with its parameters.

    (Wu et al. 2021, arXiv 2103.15808.) Without the paper's batch normalisation, which the parameters can hold.

    Args:
      num_heads: heads; they divide `qkv_features`.
      in_features: size of the input's last axis.
      kernel_size: of the convolutions, an int, or one for each axis of the grid.
      qkv_features: of query, key and value, all heads together; None means `in_features`.
      out_features: size of the output's last axis; None means `in_features`.
      strides: of the queries' convolution, an int or one per axis.
      kv_strides: of the keys' and values'; the paper's is 2.
      scale: None means head_dim ** -0.5.
      use_bias: whether the projections have biases.
      kernel_init: initialiser of the projections; the biases begin at zero.
      conv_init: initialiser of the convolutions, `[*kernel_size, in_features]`.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> CvTAttention(2, 8, (3, 3), kv_strides=2, rngs=nnx.Rngs(0))(jnp.ones((2, 7, 7, 8))).shape
    (2, 7, 7, 8)
    """

    function = staticmethod(zoo.cvt_attention)

    @checked
    def __init__(
        self,
        num_heads: int,
        in_features: int,
        kernel_size: Size,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        rank: int | None = None,
        strides: Size = 1,
        kv_strides: Size = 1,
        scale: float | None = None,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Init = small_init,
        conv_init: Init = default_kernel_init,
        rngs: nnx.Rngs,
    ):
        given = locals()  # the arguments, by name
        window = self.sized("kernel_size", kernel_size, rank)
        self.strides, self.kv_strides = self.each("strides", strides), self.each("kv_strides", kv_strides)
        self.scale, conv = scale, of_window(conv_init)
        sizes = head_sizes(self, given) | {"window": window}
        self.draw(given, sizes, query_kernel=conv, key_kernel=conv, value_kernel=conv)

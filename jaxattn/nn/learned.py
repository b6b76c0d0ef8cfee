"""Modules of attention in which one side of the pair is learned: the queries, or the keys."""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from jaxattn import zoo
from jaxattn.checked import checked
from jaxattn.nn.layer import Init, Layer, Normalize, default_bias_init, default_kernel_init, head_sizes
from jaxattn.sizes import Size

unit_init = nnx.initializers.normal(1.0)
short_init = nnx.initializers.variance_scaling(1.0, "fan_out", "normal")  # of length one: head_dim ** -0.5


class QnA(Layer):
    """Local attention whose queries are learned: `jaxattn.zoo.qna` with its parameters.

    (Arar et al. 2022, arXiv 2112.11435.)

    Args:
      num_heads: heads; they divide `qkv_features`.
      in_features: size of the input's last axis.
      kernel_size: the window, an int, or one for each axis of the grid.
      qkv_features: of query, key and value, all heads together; None means `in_features`.
      out_features: size of the output's last axis; None means `in_features`.
      strides: an int or one per axis.
      scale: None means head_dim ** -0.5.
      use_bias: whether the projections have biases.
      kernel_init: initialiser of the projections; their biases begin at zero.
      query_init: initialiser of `query`, `[num_heads, head_dim]`, which begins near length one.
      bias_init: initialiser of `bias`, `[num_heads, *kernel_size]`.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> QnA(2, 8, (3, 3), strides=2, rngs=nnx.Rngs(0))(jnp.ones((2, 14, 14, 8))).shape
    (2, 7, 7, 8)
    """

    function = staticmethod(zoo.qna)

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
        scale: float | None = None,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Init = default_kernel_init,
        query_init: Init = short_init,
        bias_init: Init = default_bias_init,
        rngs: nnx.Rngs,
    ):
        given = locals()  # the arguments, by name
        window = self.sized("kernel_size", kernel_size, rank)
        self.strides, self.scale = self.each("strides", strides), scale
        self.draw(given, head_sizes(self, given) | {"window": window})


class ParameterKeyAttention(Layer):
    """Attention to learned keys and values: `jaxattn.zoo.parameter_key_attention` with its parameters.

    (Persistent memory, Sukhbaatar et al. 2019, arXiv 1907.01470.)

    Args:
      num_heads: heads; they divide `qkv_features`.
      in_features: size of the input's last axis.
      num_keys: keys, and values, of each head.
      qkv_features: of query, key and value, all heads together; None means `in_features`.
      out_features: size of the output's last axis; None means `in_features`.
      normalize: as in `jaxattn.attention`: "softmax", "relu", "sigmoid", "sparsemax", "none", or a callable.
      scale: None means head_dim ** -0.5.
      use_bias: whether the projections of query and output have biases.
      kernel_init: initialiser of the projections; their biases begin at zero.
      key_init: initialiser of `key`, `[num_keys, num_heads, head_dim]`.
      value_init: initialiser of `value`, of the same shape.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> ParameterKeyAttention(2, 8, 100, rngs=nnx.Rngs(0))(jnp.ones((2, 7, 7, 8))).shape
    (2, 7, 7, 8)
    """

    function = staticmethod(zoo.parameter_key_attention)
    rank = 0  # each token by itself

    @checked
    def __init__(
        self,
        num_heads: int,
        in_features: int,
        num_keys: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        normalize: Normalize = "softmax",
        scale: float | None = None,
        use_bias: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Init = default_kernel_init,
        key_init: Init = unit_init,
        value_init: Init = unit_init,
        rngs: nnx.Rngs,
    ):
        given = locals()  # the arguments, by name
        self.normalize, self.scale = normalize, scale
        self.draw(given, head_sizes(self, given) | {"keys": num_keys})

"""Attention-augmented convolution as a Flax module."""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from jaxattn import zoo
from jaxattn.checked import checked
from jaxattn.nn.layer import Init, Layer, default_kernel_init
from jaxattn.sizes import Size
from jaxattn.zoo.equations import divided
from jaxattn.zoo.heads import offsets


class AugmentedConv(Layer):
    """A convolution beside attention over the whole grid: `jaxattn.zoo.augmented_conv` with its parameters.

    (Bello et al. 2019, arXiv 1904.09925.)

    Args:
      num_heads: heads; they divide `key_features` and `value_features`.
      in_features: size of the input's last axis.
      out_features: size of the output's last axis, of which the last `value_features` are the attention's.
      kernel_size: of the convolution, an int, or one for each axis of the grid.
      grid: the tokens along each axis of the input.
      key_features: of queries and keys, all heads together; None means twice `value_features`, as the paper has it.
      value_features: of values, all heads together, fewer than `out_features`.
      use_bias: whether the convolution and the projections have biases.
      kernel_init: initialiser of the convolution and the projections; the biases begin at zero, and the relative
        embeddings with the paper's deviation of head_dim ** -0.5.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> layer = AugmentedConv(2, 8, 16, (3, 3), grid=(5, 7), value_features=4, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 5, 7, 8))).shape
    (2, 5, 7, 16)
    """

    function = staticmethod(zoo.augmented_conv)

    @checked
    def __init__(
        self,
        num_heads: int,
        in_features: int,
        out_features: int,
        kernel_size: Size,
        *,
        rank: int | None = None,
        grid: Size,
        value_features: int,
        key_features: int | None = None,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Init = default_kernel_init,
        rngs: nnx.Rngs,
    ):
        given = locals()  # the arguments, by name
        grid, window = (self.sized(name, size, rank) for name, size in (("grid", grid), ("kernel_size", kernel_size)))
        key_features = 2 * value_features if key_features is None else key_features
        if len(grid) != len(window):
            raise ValueError(f"AugmentedConv: grid (={grid}) must have an axis for each of kernel_size (={window})")
        if value_features >= out_features:
            raise ValueError(
                f"AugmentedConv: value_features (={value_features}) must be below out_features (={out_features})"
            )
        dim = divided("AugmentedConv", "num_heads", num_heads, key_features, "key_features")
        sizes = {
            "window": window,
            "features": in_features,
            "conv_features": out_features - value_features,
            "heads": num_heads,
            "head_dim": dim,
            "value_dim": divided("AugmentedConv", "num_heads", num_heads, value_features, "value_features"),
            "attention_features": value_features,
            "offsets": offsets(grid),
        }
        self.draw(given, sizes, embedding=nnx.initializers.normal(dim**-0.5))

"""The lambda layer as a Flax module."""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from jaxattn import zoo
from jaxattn.checked import checked
from jaxattn.nn.layer import Init, Layer, default_kernel_init, small_init
from jaxattn.sizes import Size
from jaxattn.zoo.equations import divided


class LambdaLayer(Layer):
    """What a query sees is a linear map, made before it is asked: `jaxattn.zoo.lambda_layer` with its parameters.

    (Bello 2021, arXiv 2102.08602.) Without the paper's batch normalisation, which the parameters can hold with
    `use_bias`.

    Args:
      num_heads: heads, of queries; they divide `out_features`.
      in_features: size of the input's last axis.
      kernel_size: the window of the position lambdas, an int, or one for each axis of the grid;
        2n - 1 sees all of n tokens.
      out_features: size of the output's last axis, all heads together; None means `in_features`.
      key_dim: of each query and key.
      depth: keys and values that make each lambda, the paper's intra-depth.
      use_bias: whether the projections have biases.
      kernel_init: initialiser of the projections; the biases begin at zero.
      position_init: initialiser of `position`, `[*kernel_size, key_dim, depth]`.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> LambdaLayer(4, 8, (5, 5), rngs=nnx.Rngs(0))(jnp.ones((2, 7, 7, 8))).shape
    (2, 7, 7, 8)
    """

    function = staticmethod(zoo.lambda_layer)

    @checked
    def __init__(
        self,
        num_heads: int,
        in_features: int,
        kernel_size: Size,
        out_features: int | None = None,
        *,
        rank: int | None = None,
        key_dim: int = 16,
        depth: int = 1,
        use_bias: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Init = default_kernel_init,
        position_init: Init = small_init,
        rngs: nnx.Rngs,
    ):
        given = locals()  # the arguments, by name
        out_features = in_features if out_features is None else out_features
        width = divided("LambdaLayer", "num_heads", num_heads, out_features, "out_features")
        sizes = {"features": in_features, "heads": num_heads, "key_dim": key_dim, "depth": depth, "value_dim": width}
        self.draw(given, sizes | {"window": self.sized("kernel_size", kernel_size, rank)})

"""The attention-free transformer's layers as Flax modules."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from jaxattn import zoo
from jaxattn.checked import checked
from jaxattn.nn.layer import Init, Layer, default_kernel_init, small_init
from jaxattn.sizes import Size
from jaxattn.zoo.equations import divided


class AFT(Layer):
    """Weights from the key and from who stands where, channel by channel: `jaxattn.zoo.aft` with its parameters.

    AFT-full. (Zhai et al. 2021, arXiv 2105.14103.)

    Args:
      in_features: size of the input's last axis.
      hidden_features: of query, key and value; None means `in_features`.
      out_features: size of the output's last axis; None means `in_features`.
      grid: the tokens along each axis of the input.
      use_bias: whether the linear maps have biases.
      kernel_init: initialiser of the linear maps; the biases begin at zero.
      position_init: initialiser of `position`, `[*grid, *grid]`.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> AFT(8, grid=(5, 7), rngs=nnx.Rngs(0))(jnp.ones((2, 5, 7, 8))).shape
    (2, 5, 7, 8)
    """

    function = staticmethod(zoo.aft)
    needs_whole_grid = "each token has its own weight for each token of the whole grid"

    @checked
    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        *,
        rank: int | None = None,
        grid: Size,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Init = default_kernel_init,
        position_init: Init = small_init,
        rngs: nnx.Rngs,
    ):
        given = locals()  # the arguments, by name
        self.draw(given, _sizes(given) | {"grid": self.sized("grid", grid, rank)})


class AFTConv(Layer):
    """`AFT` whose position weights are a window's, the same everywhere: `jaxattn.zoo.aft_conv` with its parameters.

    (Zhai et al. 2021, arXiv 2105.14103.)

    Args:
      num_heads: heads, whose channels share their position weights; they divide `hidden_features`.
      in_features: size of the input's last axis.
      kernel_size: an int, or one for each axis of the grid.
      hidden_features: of query, key and value; None means `in_features`.
      out_features: size of the output's last axis; None means `in_features`.
      use_bias: whether the linear maps have biases.
      kernel_init: initialiser of the linear maps; the biases begin at zero.
      position_init: initialiser of `position`, `[*kernel_size, num_heads]`.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> AFTConv(4, 8, (7, 7), rngs=nnx.Rngs(0))(jnp.ones((2, 14, 14, 8))).shape
    (2, 14, 14, 8)
    """

    function = staticmethod(zoo.aft_conv)

    @checked
    def __init__(
        self,
        num_heads: int,
        in_features: int,
        kernel_size: Size,
        hidden_features: int | None = None,
        out_features: int | None = None,
        *,
        rank: int | None = None,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Init = default_kernel_init,
        position_init: Init = small_init,
        rngs: nnx.Rngs,
    ):
        given = locals()  # the arguments, by name
        sizes = _sizes(given)
        divided("AFTConv", "num_heads", num_heads, sizes["hidden"], "hidden_features")
        self.draw(given, sizes | {"window": self.sized("kernel_size", kernel_size, rank), "heads": num_heads})


def _sizes(given: Mapping[str, Any]) -> dict[str, Any]:
    """Of the linear maps; None is `in_features`."""
    features, hidden, out = given["in_features"], given["hidden_features"], given["out_features"]
    default = lambda size: features if size is None else size
    return {"features": features, "hidden": default(hidden), "out_features": default(out)}

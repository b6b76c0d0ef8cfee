"""How far one output sees: the gradient of a network's output at one place with respect to its input."""

from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxattn.checked import checked
from jaxattn.sizes import Size, ints


@checked
def effective_receptive_field(
    function: Callable[[Any], Any],
    x: Float[Array | np.ndarray, "batch *grid features"],
    position: Annotated[Size, 0] | None = None,
) -> Float[np.ndarray, "*grid"]:
    """How much one place of the output depends on each place of the input, `[*grid]`:

        R(j) = mean_n Σ_c |∂ (Σ_o y_{n,i,o}) / ∂ x_{n,j,c}|        where y = function(x)

    (Luo et al. 2016, arXiv 1701.04128: a gradient of one in every channel o of the output at i, and none elsewhere,
    carried back). It is exactly zero outside the theoretical receptive field; inside, for a stack of convolutions, it
    is about a Gaussian, which grows with the root of the depth. One backward pass, whatever the number of channels.

    Args:
      function: from `[batch, *grid, features]` to `[batch, *output_grid, out_features]`, of one rank: a network without
        its head, each image by itself. Batch norm must use running statistics, and dropout be off.
      x: `[batch, *grid, features]`, floating point: images, or noise. The gradient depends on them where the network
        isn't linear.
      position: i, an index of the output grid; None is its middle, n // 2 along each axis.

    Raises:
      ValueError: x has no grid or isn't floating point, the output has another rank, or the position is outside it.

    >>> import jax.numpy as jnp, jaxattn
    >>> kernel = jnp.ones((3, 1, 1))
    >>> twice = lambda x: jaxattn.conv(jaxattn.conv(x, kernel), kernel)
    >>> effective_receptive_field(twice, jnp.ones((1, 7, 1)))
    array([0., 1., 2., 3., 2., 1., 0.])
    """
    x = jnp.asarray(x)
    if x.ndim < 3:
        raise ValueError(
            f"effective_receptive_field: x (={list(x.shape)}) must be [batch, *grid, features] with a grid"
        )
    shape = jnp.shape(jax.eval_shape(function, x))
    if len(shape) != x.ndim or shape[0] != x.shape[0]:
        raise ValueError(
            f"effective_receptive_field: function (giving {list(shape)} for an x of {list(x.shape)}) must give "
            f"[{x.shape[0]}, {x.ndim - 2} axes of a grid, out_features]"
        )
    grid = shape[1:-1]
    at = tuple(n // 2 for n in grid) if position is None else ints("effective_receptive_field", "position", position, 0)
    if len(at) != len(grid) or not all(0 <= p < n for p, n in zip(at, grid, strict=True)):
        raise ValueError(
            f"effective_receptive_field: position (={position}) must be an index of the output grid {list(grid)}"
        )
    gradient = jax.jit(jax.grad(lambda x: function(x)[:, *at].sum()))(x)
    return np.abs(np.asarray(gradient, np.float64)).sum(-1).mean(0)

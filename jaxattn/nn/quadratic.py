"""Quadratic attention as a Flax module: heads that learn at which offset to look."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from jaxattn import zoo
from jaxattn.checked import checked
from jaxattn.nn.layer import Init, Layer, default_bias_init, default_kernel_init, drawn_as
from jaxattn.sizes import Size
from jaxattn.window import Window
from jaxattn.zoo.equations import divided

default_alpha_init = nnx.initializers.constant(0.5)
default_centre_init = nnx.initializers.normal(2**0.5)


class QuadraticAttention(Layer):
    """Attention by position alone, with centres and widths that are learned:

        y_i = bias + Σ_h Σ_δ softmax_δ(-α_h ‖δ - Δ_h‖²) x_{i+δ} V_h O_h

    which is `zoo.quadratic_attention` (Cordonnier, Loukas & Jaggi 2020, arXiv 1911.03584). As in the paper, the centres
    start from N(0, 2 I).

    Args:
      num_heads: heads; a K × K convolution takes K².
      in_features: size of the input's last axis.
      out_features: size of the output's last axis; None means `in_features`.
      rank: axes of the grid.
      window: the tokens that take part: None for all, a `zoo.Slide`, a `Window`, or its size, an int or one an axis.
      head_dim: values per head and group; None means a value matrix to `out_features` in each head, and no `out`.
      groups: features in and out are split among them.
      isotropic: a width for each head (`alpha`), or a matrix (`inverse_root`, the Σ^{-1/2} of the full form).
      use_bias: whether a bias is added.
      kernel_init: initialiser of `value` and `out`, as matrices from everything that is summed.
      bias_init: initialiser of `bias`, `[out_features]`.
      centre_init: initialiser of `centre`, `[num_heads, rank]`, in tokens.
      alpha_init: initialiser of `alpha`, `[num_heads]`. `inverse_root` starts as the identity, α = ½.
      implementation: as in `jaxattn.attention`.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> layer = QuadraticAttention(9, 16, 32, head_dim=8, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 14, 14, 16))).shape
    (2, 14, 14, 32)
    """

    function = staticmethod(zoo.quadratic_attention)
    centre: nnx.Param
    alpha: nnx.Param
    needs_whole_grid = "its heads look anywhere on the grid"

    @checked
    def __init__(
        self,
        num_heads: int,
        in_features: int,
        out_features: int | None = None,
        *,
        rank: int = 2,
        window: zoo.Slide | Window | Size | None = None,
        head_dim: int | None = None,
        groups: int = 1,
        isotropic: bool = True,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Init = default_kernel_init,
        bias_init: Init = default_bias_init,
        centre_init: Init = default_centre_init,
        alpha_init: Init = default_alpha_init,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        given = locals()  # the arguments, by name
        out_features = in_features if out_features is None else out_features
        self.num_heads, self.out_features, self.groups, self.rank = num_heads, out_features, groups, rank
        self.window = self.each("window", window) if isinstance(window, int | tuple) else window
        if isinstance(window, zoo.Slide | Window) and window.rank != rank:
            raise ValueError(f"QuadraticAttention: window (={window}) must have {rank} axes, as rank says")
        self.implementation = implementation
        part = divided("QuadraticAttention", "groups", groups, in_features, "in_features")
        out_part = divided("QuadraticAttention", "groups", groups, out_features, "out_features")
        columns = out_features if head_dim is None else groups * head_dim
        without = ("inverse_root" if isotropic else "alpha", *(() if use_bias else ("bias",)))
        self.draw(
            given, {
                "features": in_features, "heads": num_heads, "axes": rank, "features/groups": part,
                "groups·head_dim": columns, "out_features/groups": out_part, "out_features": out_features,
            },
            without=without if head_dim is not None else (*without, "out"),
            inverse_root=lambda key, shape, dtype: jnp.tile(jnp.eye(rank, dtype=dtype), (num_heads, 1, 1)),
            value=_matrix(kernel_init, out_features if head_dim is None else num_heads * columns),
            out=_matrix(kernel_init, out_features),
        )  # fmt: skip


def _matrix(init: Init, columns: int) -> Callable[..., Any]:
    """Draws a parameter as a matrix of so many columns, so that the fan in is all that is summed."""
    return drawn_as(init, lambda shape: (math.prod(shape) // columns, columns))

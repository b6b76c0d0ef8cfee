"""Quadratic attention as a Flax module: heads that learn at which offset to look."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Num

from jaxattn import zoo
from jaxattn.nn.layer import operands
from jaxattn.window import Window

default_kernel_init = nnx.initializers.lecun_normal()
default_bias_init = nnx.initializers.zeros_init()
default_alpha_init = nnx.initializers.constant(0.5)
default_centre_init = nnx.initializers.normal(2**0.5)


class QuadraticAttention(nnx.Module):
    """Attention by position alone, with centres and widths that are learned:

        y_i = bias + Σ_h Σ_δ softmax_δ(-α_h ‖δ - Δ_h‖²) x_{i+δ} V_h O_h

    which is `zoo.quadratic_attention` (Cordonnier, Loukas & Jaggi 2020, arXiv 1911.03584). As in the paper, the centres
    start from N(0, 2 I).

    Args:
      num_heads: heads; a K × K convolution takes K².
      in_features: size of the input's last axis.
      out_features: size of the output's last axis; None means `in_features`.
      rank: axes of the grid.
      window: the tokens that take part: None for all, a `zoo.Slide`, a `Window`, or its size.
      head_dim: values per head and group; None means a value matrix to `out_features` in each head, and no `out`.
      groups: features in and out are split among them.
      isotropic: a width for each head (`alpha`), or a matrix (`inverse_root`, the Σ^{-1/2} of the full form).
      use_bias: whether a bias is added.
      dtype: of the computation. None promotes the input's and the parameters' dtypes.
      param_dtype: of the parameters.
      precision: as in `jaxattn.attention`.
      kernel_init: initialiser of `value` and `out`, as matrices from everything that is summed.
      bias_init: initialiser of `bias`, `[out_features]`.
      centre_init: initialiser of `centre`, `[num_heads, rank]`, in tokens.
      alpha_init: initialiser of `alpha`, `[num_heads]`. `inverse_root` starts as the identity, α = ½.
      implementation: as in `jaxattn.attention`.
      rngs: `nnx.Rngs`; `params` is used.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> layer = QuadraticAttention(9, 16, 32, head_dim=8, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 14, 14, 16))).shape
    (2, 14, 14, 32)
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        out_features: int | None = None,
        *,
        rank: int = 2,
        window: zoo.Slide | Window | int | Sequence[int] | None = None,
        head_dim: int | None = None,
        groups: int = 1,
        isotropic: bool = True,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Callable[..., Any] = default_kernel_init,
        bias_init: Callable[..., Any] = default_bias_init,
        centre_init: Callable[..., Any] = default_centre_init,
        alpha_init: Callable[..., Any] = default_alpha_init,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        out_features = in_features if out_features is None else out_features
        _check(num_heads=num_heads, rank=rank, groups=groups, head_dim=1 if head_dim is None else head_dim)
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if size % groups:
                raise ValueError(f"QuadraticAttention: groups (={groups}) must divide {name} (={size})")
        self.num_heads, self.in_features, self.out_features = num_heads, in_features, out_features
        self.rank, self.window, self.groups = rank, window, groups
        self.dtype, self.precision, self.implementation = dtype, precision, implementation

        def draw(init, *shape):
            return nnx.Param(init(rngs.params(), shape, param_dtype))

        def kernel(shape, columns):
            """Drawn as a matrix, so that the fan in is all that is summed."""
            count = math.prod(shape)
            matrix = kernel_init(rngs.params(), (count // columns, columns), param_dtype)
            return nnx.Param(matrix.reshape(shape))

        self.centre = draw(centre_init, num_heads, rank)
        if isotropic:
            self.alpha = draw(alpha_init, num_heads)
        else:
            self.inverse_root = nnx.Param(jnp.tile(jnp.eye(rank, dtype=param_dtype), (num_heads, 1, 1)))
        if head_dim is None:
            self.value = kernel((in_features // groups, num_heads, out_features), out_features)
        else:
            self.value = kernel((in_features // groups, num_heads, groups * head_dim), num_heads * groups * head_dim)
            self.out = kernel((num_heads, groups * head_dim, out_features // groups), out_features)
        if use_bias:
            self.bias = draw(bias_init, out_features)

    def __call__(self, inputs: Num[ArrayLike, "..."]) -> Float[Array, "..."]:
        """Attends: `inputs` `[*batch, *grid, in_features]` to `[*batch, *queries, out_features]`."""
        if jnp.ndim(inputs) < self.rank + 1 or jnp.shape(inputs)[-1] != self.in_features:
            raise ValueError(
                f"QuadraticAttention: inputs must be [*batch, {self.rank} grid axes, in_features "
                f"(={self.in_features})], got {jnp.shape(inputs)}"
            )
        x, params = operands(self, inputs, dtype=self.dtype)
        return zoo.quadratic_attention(
            x, params, window=self.window, precision=self.precision, implementation=self.implementation
        )


def _check(**sizes: int):
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"QuadraticAttention: {name} must be at least 1, got {size}")

"""Modules of attention in windows that slide, token by token or block by block."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Num

from jaxattn import zoo
from jaxattn.nn.heads import (
    axis_width,
    default_kernel_init,
    make_embeddings,
    make_projections,
    offset_bias,
    small_init,
)
from jaxattn.nn.layer import operands
from jaxattn.nn.weights import frozen
from jaxattn.window import Window
from jaxattn.zoo.windows import halo_window


class SASA(nnx.Module):
    """Stand-alone self-attention in a window around each token: `jaxattn.zoo.sasa` with its parameters.

    The heads stand one after the other, unless there is an output projection. (Ramachandran et al. 2019, arXiv
    1906.05909.)

    Args:
      num_heads: heads; they divide `qkv_features`.
      in_features: size of the input's last axis.
      qkv_features: of query, key and value, all heads together; None means `in_features`.
      out_features: size of the output's last axis, with an output projection; None means `in_features`.
      window: a `Window`, or its size: 7 is `Window(7)` (one dimension), (7, 7) `Window((7, 7))` (two). Its axes divide
        head_dim, the embedding of an offset being its axes' embeddings one after the other.
      scale: of the query; None means head_dim ** -0.5.
      use_bias: whether the projections have biases.
      out_projection: whether there is an output projection.
      dtype: of the computation. None promotes the input's and the parameters' dtypes.
      param_dtype: of the parameters.
      precision: of the projections and the attention.
      kernel_init: initialiser of the projections.
      embedding_init: initialiser of the embeddings; small, so that training starts near content alone.
      rngs: `nnx.Rngs`; `params` is used.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> SASA(4, 32, window=(3, 3), rngs=nnx.Rngs(0))(jnp.ones((2, 9, 9, 32))).shape
    (2, 9, 9, 32)
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        window: Window | int | Sequence[int],
        scale: float | None = 1.0,
        use_bias: bool = False,
        out_projection: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Callable[..., Any] = default_kernel_init,
        embedding_init: Callable[..., Any] = small_init,
        rngs: nnx.Rngs,
    ):
        self.window = window if isinstance(window, Window) else Window(window)
        self.scale, self.dtype, self.precision = scale, dtype, precision
        head_dim = make_projections(
            self, num_heads, in_features, qkv_features, out_features, use_bias=use_bias, out_projection=out_projection,
            kernel_init=kernel_init, param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip
        width = axis_width(self, head_dim, self.window.rank)
        make_embeddings(self, num_heads, self.window.sizes, width, embedding_init, param_dtype, rngs)

    def __call__(self, inputs: Num[ArrayLike, "..."]) -> Float[Array, "..."]:
        """`[*batch, *query_grid, out_features]` of `[*batch, *grid, in_features]`."""
        x, params = operands(self, inputs, dtype=self.dtype)
        return zoo.sasa(x, params, window=self.window, scale=self.scale, precision=self.precision)


class HaloAttention(nnx.Module):
    """Blocks that attend to themselves and a halo around them: `jaxattn.zoo.halo_attention` with its parameters.

    The heads stand one after the other, unless there is an output projection. (Vaswani et al. 2021, HaloNet, arXiv
    2103.12731.)

    Args:
      num_heads: heads; they divide `qkv_features`.
      in_features: size of the input's last axis.
      qkv_features: of query, key and value, all heads together; None means `in_features`.
      out_features: size of the output's last axis, with an output projection; None means `in_features`.
      block: tokens along each side of a block: an int for one dimension, or one for each axis, whose number divides
        head_dim, the embedding of an offset being its axes' embeddings one after the other.
      halo: tokens on each side of it, an int, or one for each axis.
      boundary: what stands outside the grid, as in `zoo.halo_attention`.
      scale: of the query; None means head_dim ** -0.5.
      use_bias: whether the projections have biases.
      out_projection: whether there is an output projection.
      dtype: of the computation. None promotes the input's and the parameters' dtypes.
      param_dtype: of the parameters.
      precision: of the projections and the attention.
      kernel_init: initialiser of the projections.
      embedding_init: initialiser of the embeddings; None is normal, of standard deviation head_dim ** -0.5.
      rngs: `nnx.Rngs`; `params` is used.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> HaloAttention(4, 32, block=(4, 4), halo=1, rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8, 32))).shape
    (2, 8, 8, 32)
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        block: int | Sequence[int],
        halo: int | Sequence[int],
        boundary: str | Sequence[str] = "zero",
        scale: float | None = 1.0,
        use_bias: bool = False,
        out_projection: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Callable[..., Any] = default_kernel_init,
        embedding_init: Callable[..., Any] | None = None,
        rngs: nnx.Rngs,
    ):
        self.block, self.halo, self.boundary = frozen(block), frozen(halo), frozen(boundary)
        self.scale, self.dtype, self.precision = scale, dtype, precision
        sizes = halo_window(block, halo, boundary).sizes
        head_dim = make_projections(
            self, num_heads, in_features, qkv_features, out_features, use_bias=use_bias, out_projection=out_projection,
            kernel_init=kernel_init, param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip
        init = nnx.initializers.normal(head_dim**-0.5) if embedding_init is None else embedding_init
        width = axis_width(self, head_dim, len(sizes))
        make_embeddings(self, num_heads, sizes, width, init, param_dtype, rngs)

    def __call__(self, inputs: Num[ArrayLike, "..."]) -> Float[Array, "..."]:
        """`[*batch, *grid, out_features]` of `[*batch, *grid, in_features]`."""
        x, params = operands(self, inputs, dtype=self.dtype)
        return zoo.halo_attention(
            x, params, block=self.block, halo=self.halo, boundary=self.boundary, scale=self.scale,
            precision=self.precision,
        )  # fmt: skip


class NeighborhoodAttention(nnx.Module):
    """Each token attends to its nearest, with a bias by offset: `jaxattn.zoo.neighborhood_attention`.

    (Hassani et al. 2023, NAT, arXiv 2204.07143; dilated, Hassani & Shi 2022, DiNAT, arXiv 2209.15001.)

    Args:
      num_heads: heads; they divide `qkv_features`.
      in_features: size of the input's last axis.
      qkv_features: of query, key and value, all heads together; None means `in_features`.
      out_features: size of the output's last axis; None means `in_features`.
      window: a `Window`, or its size: 7 is `Window(7)` (one dimension), (7, 7) `Window((7, 7))` (two);
        `Window((7, 7), dilation=2)` is DiNAT's.
      relative_bias: whether there is a bias by offset.
      use_bias: whether the projections have biases.
      dtype: of the computation. None promotes the input's and the parameters' dtypes.
      param_dtype: of the parameters.
      precision: of the projections and the attention.
      kernel_init: initialiser of the projections.
      relative_init: initialiser of the relative bias.
      rngs: `nnx.Rngs`; `params` is used.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> NeighborhoodAttention(4, 32, window=(3, 3), rngs=nnx.Rngs(0))(jnp.ones((2, 9, 9, 32))).shape
    (2, 9, 9, 32)
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        window: Window | int | Sequence[int],
        relative_bias: bool = True,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Callable[..., Any] = small_init,
        relative_init: Callable[..., Any] = small_init,
        rngs: nnx.Rngs,
    ):
        self.window = window if isinstance(window, Window) else Window(window)
        self.dtype, self.precision = dtype, precision
        make_projections(
            self, num_heads, in_features, qkv_features, out_features, use_bias=use_bias, kernel_init=kernel_init,
            param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip
        if relative_bias:
            self.relative_bias = offset_bias(num_heads, self.window.sizes, relative_init, param_dtype, rngs)

    def __call__(self, inputs: Num[ArrayLike, "..."]) -> Float[Array, "..."]:
        """`[*batch, *query_grid, out_features]` of `[*batch, *grid, in_features]`."""
        x, params = operands(self, inputs, dtype=self.dtype)
        return zoo.neighborhood_attention(x, params, window=self.window, precision=self.precision)

"""Layers of the field that are `Attention` with settings."""

from collections.abc import Sequence
from typing import Annotated, Any

from flax import nnx

from jaxattn.checked import checked
from jaxattn.nn.attention import Attention
from jaxattn.nn.layer import Init, glorot_init, small_init
from jaxattn.sizes import Size
from jaxattn.window import Window
from jaxattn.zoo.sliding import halo_window


class GlobalAttention(Attention):
    """Attention of all tokens to all, as in a ViT: `jaxattn.zoo.global_attention` with its parameters,

        y_i = b_O + Σ_h W_O,h Σ_j softmax_j(scale · q_i·k_j) v_j.

    (Vaswani et al. 2017, arXiv 1706.03762; Dosovitskiy et al. 2021, arXiv 2010.11929.)

    Args:
      num_heads, in_features, qkv_features, out_features: as in `Attention`.
      kernel_init: initialiser of the projections, Glorot's.
      rngs: `nnx.Rngs`; `params` is used, and `dropout` if there is any.
      **settings: any other of `Attention`'s.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> GlobalAttention(4, 32, rank=2, rngs=nnx.Rngs(0))(jnp.ones((2, 7, 7, 32))).shape
    (2, 7, 7, 32)
    """

    @checked
    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        kernel_init: Init = glorot_init,
        rngs: nnx.Rngs,
        **settings: Any,
    ):
        super().__init__(
            num_heads, in_features, qkv_features, out_features, kernel_init=kernel_init, rngs=rngs, **settings,
        )  # fmt: skip
        self.rank_is_said = self.window is not None or settings.get("rank") is not None


class SASA(Attention):
    """Stand-alone self-attention in a window around each token: `jaxattn.zoo.sasa` with its parameters,

        y_i = Σ_{j in N(i)} softmax_j(scale · q_i·k_j + q_i·r_h[j-i]) v_j,

    where half of the dimensions of r[δ] embed δ1 and the other half δ2. The heads stand one after the other, unless
    there is an output projection. (Ramachandran et al. 2019, arXiv 1906.05909.)

    Args:
      num_heads, in_features, qkv_features, out_features: as in `Attention`.
      window, scale, use_bias, out_projection: as in `Attention`. The window's axes divide head_dim.
      rngs: `nnx.Rngs`; `params` is used, and `dropout` if there is any.
      **settings: any other of `Attention`'s.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> SASA(4, 32, window=(3, 3), rngs=nnx.Rngs(0))(jnp.ones((2, 9, 9, 32))).shape
    (2, 9, 9, 32)
    """

    @checked
    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        window: Window | Size,
        scale: float | None = 1.0,
        use_bias: bool = False,
        out_projection: bool = False,
        rngs: nnx.Rngs,
        **settings: Any,
    ):
        super().__init__(
            num_heads, in_features, qkv_features, out_features, window=window, key_embedding="factorized", scale=scale,
            use_bias=use_bias, out_projection=out_projection, rngs=rngs, **settings,
        )  # fmt: skip


class HaloAttention(Attention):
    """Blocks that attend to themselves and a halo around them: `jaxattn.zoo.halo_attention` with its parameters,

        y_i = Σ_{j in N(i)} softmax_j(scale · q_i·k_j + q_i·r_h[j-i]) v_j,    N(i) the block of i and its halo,

    otherwise as `SASA`. (Vaswani et al. 2021, HaloNet, arXiv 2103.12731.)

    Args:
      num_heads, in_features, qkv_features, out_features: as in `Attention`.
      block: tokens along each side of a block: an int, or one for each axis, whose number divides
        head_dim.
      halo: tokens on each side of it, an int, or one for each axis.
      boundary: what stands outside the grid, as in `zoo.halo_attention`.
      scale, use_bias, out_projection, relative_init: as in `Attention`.
      rngs: `nnx.Rngs`; `params` is used, and `dropout` if there is any.
      **settings: any other of `Attention`'s.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> HaloAttention(4, 32, block=(4, 4), halo=1, rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8, 32))).shape
    (2, 8, 8, 32)
    """

    @checked
    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        block: Size,
        halo: Annotated[Size, 0],
        boundary: str | Sequence[str] = "zero",
        rank: int | None = None,
        scale: float | None = 1.0,
        use_bias: bool = False,
        out_projection: bool = False,
        relative_init: Init | None = None,
        rngs: nnx.Rngs,
        **settings: Any,
    ):
        window = halo_window("HaloAttention", self.sized("block", block, rank), halo, boundary)
        super().__init__(
            num_heads, in_features, qkv_features, out_features, window=window,
            key_embedding="factorized", scale=scale, use_bias=use_bias, out_projection=out_projection,
            relative_init=relative_init, rngs=rngs, **settings,
        )  # fmt: skip


class NeighborhoodAttention(Attention):
    """Each token attends to its nearest, with a bias by offset: `jaxattn.zoo.neighborhood_attention`,

        y_i = b_O + Σ_h W_O,h Σ_{j in N(i)} softmax_j(scale · q_i·k_j + b_h[j-i]) v_j.

    (Hassani et al. 2023, NAT, arXiv 2204.07143; dilated, Hassani & Shi 2022, DiNAT, arXiv 2209.15001.)

    Args:
      num_heads, in_features, qkv_features, out_features: as in `Attention`.
      window, relative_bias, kernel_init: as in `Attention`. `Window((7, 7), dilation=2)` is DiNAT's.
      rngs: `nnx.Rngs`; `params` is used, and `dropout` if there is any.
      **settings: any other of `Attention`'s.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> NeighborhoodAttention(4, 32, window=(3, 3), rngs=nnx.Rngs(0))(jnp.ones((2, 9, 9, 32))).shape
    (2, 9, 9, 32)
    """

    @checked
    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        window: Window | Size,
        relative_bias: bool = True,
        kernel_init: Init = small_init,
        rngs: nnx.Rngs,
        **settings: Any,
    ):
        super().__init__(
            num_heads, in_features, qkv_features, out_features, window=window, relative_bias=relative_bias,
            kernel_init=kernel_init, rngs=rngs, **settings,
        )  # fmt: skip


class CoAtNetAttention(Attention):
    """Attention over a grid with a learned bias for each offset: `jaxattn.zoo.coatnet_attention` with its parameters,

        y_i = b_O + Σ_h W_O,h Σ_j softmax_j(scale · q_i·k_j + b_h[j-i]) v_j.

    (Dai et al. 2021, CoAtNet, arXiv 2106.04803.)

    Args:
      num_heads, in_features, qkv_features, out_features: as in `Attention`.
      grid, relative_bias: as in `Attention`.
      rngs: `nnx.Rngs`; `params` is used, and `dropout` if there is any.
      **settings: any other of `Attention`'s.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> CoAtNetAttention(4, 32, grid=(7, 7), rngs=nnx.Rngs(0))(jnp.ones((2, 7, 7, 32))).shape
    (2, 7, 7, 32)
    """

    @checked
    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        grid: Size,
        relative_bias: bool = True,
        rngs: nnx.Rngs,
        **settings: Any,
    ):
        super().__init__(
            num_heads, in_features, qkv_features, out_features, grid=grid, relative_bias=relative_bias, rngs=rngs,
            **settings,
        )  # fmt: skip

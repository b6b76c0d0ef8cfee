"""Vision transformers whose mixing layer is a setting, block by block."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Num

from jaxattn.checked import Natural, checked
from jaxattn.halo import shard_count
from jaxattn.models.backbone import linear_head
from jaxattn.models.gelu import gelu
from jaxattn.models.latent_pool import LatentPool
from jaxattn.models.residual import check_rates, check_rngs, depth_rates, run_block
from jaxattn.models.translation import Translation
from jaxattn.models.vit_blocks import (
    MIXES,
    Block,
    Mix,
    layer_norm,
    small_init,
    xavier_init,
)
from jaxattn.models.vit_names import translations_of
from jaxattn.nn.conv import Conv
from jaxattn.nn.gated import GPSA
from jaxattn.nn.grid import Splittable
from jaxattn.nn.quadratic import QuadraticAttention
from jaxattn.sizes import Size, per_axis

POOLS = ("token", "mean", "attention")
POSITIONS = ("learned", "sincos2d", "none")
NORMS = ("pre", "post")


def sincos_2d(height: int, width: int, features: int) -> np.ndarray:
    """Where each token stands, `[height, width, features]`: of the column j and then of the row i, all sines and then
    all cosines of

        j ω_m, i ω_m,   ω_m = 10000^(-m / M),   m = 0 … M - 1,   M = features / 4

    (Chen, Xie & He 2021, MoCo v3, arXiv 2104.02057).

    >>> sincos_2d(1, 2, 4)[0, 1].round(4)  # sin 1, cos 1, sin 0, cos 0
    array([0.8415, 0.5403, 0.    , 1.    ])
    """
    omega = 10_000.0 ** -(np.arange(features // 4) / (features // 4))
    row, column = (index[..., None] * omega for index in np.indices((height, width)))
    return np.concatenate([np.sin(column), np.cos(column), np.sin(row), np.cos(row)], axis=-1)


class ViT(Splittable):
    """A Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929), whose blocks mix tokens as `mix` says,

        x = patches W + b + position,   x ← x + mix(norm(x)),   x ← x + MLP(norm(x))   in each block,
        logits = pool(norm(x)) W_head + b_head.

    ConViT and the network of Cordonnier et al. are settings of it (`convit_s`, `cordonnier`). The tokens are a grid
    `[*batch, height, width, features]` until a class token joins them: then they are a sequence, whose first it is. It
    joins where the blocks that end the network in "global" begin: before the first block where all are.

    Args:
      image_size: of the images, in pixels: an int, or (height, width).
      patch_size: the side of a patch, or (height, width); it divides the image's.
      in_features: channels of the images.
      num_classes: size of the output; 0 leaves the last layer out, for pooled features.
      width: features of a token.
      depth: blocks.
      num_heads: of every mixing layer. "gpsa" takes a square, and all but "quadratic" one that divides `width`.
      mlp_dim: features within each MLP.
      mix: "global", "local", "quadratic", "gpsa" (see `TokenMixer`), a function that makes another layer, as
        `lambda width, **kwargs: nn.Conv(width, width, (3, 3), **kwargs)`, or one of these for each block.
      window: side of the window of "local", or (height, width); at most the grid's.
      class_token: whether there is one; the last block must then be "global", as the other layers need a grid.
      pool: "token", the class token's features; "mean", of all others; or "attention" without a class token, with a
        learned query and an MLP after it (`LatentPool`), as SigLIP has it. None: the token's, if there is one.
      position: what is added to the patches: "learned" (and for a class token that joins first, one of its own),
        "sincos2d" (see `sincos_2d`; 4 divides `width`), or "none".
      norm: "pre", before each layer and the head, or "post", after each sum, as BERT has it.
      norm_before: whether there is one more before the first block, and no bias in the patches, as CLIP has it.
      registers: tokens of no place that join with the class token, after it (Darcet et al. 2023, arXiv 2309.16588).
      class_position: whether a class token that joins first has a position, where these are learned.
      layer_scale: what a factor for each feature of each branch begins at (Touvron et al. 2021, arXiv 2103.17239);
        None: there are none.
      activation: of the MLPs; None is the gelu by erf.
      epsilon: of the norms.
      qkv_bias: whether query, key and value have biases.
      drop_path: rate of stochastic depth in the last block; it rises linearly with depth (`depth_rates`).
      dropout: after the position and every linear map but query, key and value, in training.
      remat: blocks are computed anew in the backward pass, which then keeps a block's input in place of all within.
      kernel_init: initialiser of the blocks' matrices. Patches start from LeCun's, the rest from N(0, 0.02²).
      dtype: of the computation; the logits have the promoted dtype of `dtype` and `param_dtype`.
      param_dtype: of the parameters.
      rngs: `nnx.Rngs`; `params` is used.

    `train()` (the state at first) and `eval()` switch what is random. A network with `drop_path` or `dropout` is called
    in training as `model(images, rngs=nnx.Rngs(dropout=key))`.

    Raises:
      ValueError: an argument out of its range, images whose shape does not fit, or no `rngs` where they are needed.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> sizes = dict(image_size=8, patch_size=2, in_features=1, num_classes=10, width=16, depth=2, num_heads=4)
    >>> model = ViT(**sizes, mlp_dim=32, mix=("local", "global"), window=3, rngs=nnx.Rngs(0))
    >>> nnx.eval_shape(lambda x: model(x), jnp.ones((2, 8, 8, 1))).shape
    (2, 10)
    """

    @checked
    def __init__(
        self,
        *,
        image_size: Size,
        patch_size: Size,
        in_features: int,
        num_classes: Natural,
        width: int,
        depth: int,
        num_heads: int,
        mlp_dim: int,
        mix: Mix | Sequence[Mix] = "global",
        window: Size = 7,
        class_token: bool = True,
        pool: str | None = None,
        position: str = "learned",
        norm: str = "pre",
        norm_before: bool = False,
        registers: Natural = 0,
        class_position: bool = True,
        layer_scale: float | None = None,
        activation: Callable[[Array], Array] | None = None,
        epsilon: float = 1e-6,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        remat: bool = False,
        kernel_init: Callable[..., Any] = xavier_init,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.image_size, self.patch_size = _pair("image_size", image_size), _pair("patch_size", patch_size)
        window = _pair("window", window)
        self.in_features, self.position_kind = in_features, position
        self.pool = ("token" if class_token else "mean") if pool is None else pool
        self.remat = remat
        mixes = (mix,) * depth if isinstance(mix, str) or callable(mix) else tuple(mix)
        check_rates("ViT", drop_path=drop_path, dropout=dropout)
        _check_names(self.pool, position, norm, class_token, width)
        if registers and not class_token:
            raise ValueError(f"ViT: registers (={registers}) must be 0 without a class token")
        if epsilon <= 0:
            raise ValueError(f"ViT: epsilon (={epsilon}) must be a number > 0")
        _check_mixes(mixes, depth, class_token, window, self._grid(self.image_size))
        self.joins = _joins(mixes) if class_token else depth

        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.strides, self.widths = (self.patch_size[0],), (width,)
        self.patches = Conv(
            in_features, width, self.patch_size, self.patch_size, padding="VALID", use_bias=not norm_before, **kwargs
        )
        self._make_tokens(class_token, class_position, registers, width, param_dtype, rngs)
        self.norm_before = layer_norm(width, epsilon, **kwargs) if norm_before else nnx.data(None)
        self.dropout = nnx.Dropout(dropout)
        make = partial(
            Block, width, num_heads, mlp_dim, norm=norm, window=window, qkv_bias=qkv_bias, dropout=dropout,
            kernel_init=kernel_init, layer_scale=layer_scale, activation=activation or gelu, epsilon=epsilon, **kwargs,
        )  # fmt: skip
        rates = depth_rates(drop_path, depth)
        self.blocks = nnx.List(
            [make(mix, axes=2 if n < self.joins else 1, drop_path_rate=rates[n]) for n, mix in enumerate(mixes)]
        )
        self.norm = layer_norm(width, epsilon, **kwargs) if norm == "pre" else nnx.data(None)
        self.latent_pool = nnx.data(None)
        if self.pool == "attention":
            settings = {"activation": activation or gelu, "epsilon": epsilon, "kernel_init": kernel_init, **kwargs}
            self.latent_pool = LatentPool(width, num_heads, mlp_dim, **settings)
        self.head = linear_head(width, num_classes, small_init, param_dtype=param_dtype, rngs=rngs)

    @property
    def translations(self) -> tuple[Translation, ...]:
        """timm's names, the authors' of DeiT III, and Hugging Face's of ViT, DINOv2 and SigLIP."""
        layers = [block.mix.layer for block in self.blocks]
        gated = {n: vars(layer)["gate"].shape[0] for n, layer in enumerate(layers) if isinstance(layer, GPSA)}
        return translations_of(gated)

    def _make_tokens(
        self, class_token: bool, class_position: bool, registers: int, width: int, dtype: Any, rngs: nnx.Rngs
    ):
        """The parameters that are added to the patches, or stand beside them."""

        def table(*shape):
            return nnx.Param(small_init(rngs.params(), (*shape, width), dtype))

        learned, first = self.position_kind == "learned", class_token and class_position and self.joins == 0
        self.position = table(*self._grid(self.image_size)) if learned else nnx.data(None)
        self.class_token = table() if class_token else nnx.data(None)
        self.class_position = table() if learned and first else nnx.data(None)
        self.registers = table(registers) if registers else nnx.data(None)

    def _grid(self, size: Sequence[int]) -> tuple[int, int]:
        """The grid of the patches of an image of `size` (height, width)."""
        if any(n < 1 or n % p for n, p in zip(size, self.patch_size, strict=True)):
            raise ValueError(f"ViT: patch_size (={self.patch_size}) must divide the image's size (={tuple(size)})")
        rows, columns = (n // p for n, p in zip(size, self.patch_size, strict=True))
        return rows, columns

    def _tokens(self, images: Array) -> Float[Array, "*batch height width features"]:
        """The patches, and where they stand."""
        x = self.patches(images)
        rows, columns, features = x.shape[-3:]
        if self.position is not None:
            position = self.position[...].astype(x.dtype)
        elif self.position_kind == "sincos2d":
            position = jnp.asarray(sincos_2d(rows * shard_count(self.axis_name), columns, features), x.dtype)
        else:
            return x
        if self.axis_name is not None:
            position = jax.lax.dynamic_slice_in_dim(position, jax.lax.axis_index(self.axis_name) * rows, rows)
        return x + position

    def _join(
        self, x: Float[Array, "*batch height width features"], token: Float[Array, "features"]
    ) -> Float[Array, "*batch tokens features"]:
        """The class token, the registers, and then all others."""
        token = token if self.class_position is None else token + self.class_position[...]
        tokens = token[None] if self.registers is None else jnp.concatenate([token[None], self.registers[...]])
        batch, features = x.shape[:-3], x.shape[-1]
        first = jnp.broadcast_to(tokens.astype(x.dtype), (*batch, *tokens.shape))
        return jnp.concatenate([first, x.reshape(*batch, -1, features)], axis=-2)

    def features(
        self, images: Num[ArrayLike, "..."], *, sow_weights: bool = False, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "..."]:
        """The last norm's output: a grid `[*batch, height, width, features]`, or with a class token a sequence
        `[*batch, 1 + registers + height · width, features]`."""
        images = jnp.asarray(images)
        self._check_images(images)
        if self.axis_name is not None and self.class_token is not None:
            raise ValueError(
                f"ViT: class_token (=True) must be False where the grid is split over {self.axis_name!r}: the token is "
                "on no shard"
            )
        if self.axis_name is not None and self.latent_pool is not None:
            raise ValueError(
                f"ViT: pool (='attention') must be 'mean' where the grid is split over {self.axis_name!r}: the query "
                "must see all of it"
            )
        check_rngs("ViT", rngs, drop_path=self.blocks[-1].drop_path, dropout=self.dropout)
        x = self._tokens(images)
        for n, block in enumerate(self.blocks):
            if self.class_token is not None and n == self.joins:
                x = self._join(x, self.class_token[...])
            # what joins first is dropped with the rest, after the position
            x = self.dropout(x, rngs=rngs) if n == 0 else x
            x = self.norm_before(x) if n == 0 and self.norm_before is not None else x
            x = run_block(block, x, sow_weights=sow_weights, rngs=rngs, remat=self.remat)
        return x if self.norm is None else self.norm(x)

    def __call__(
        self, images: Num[ArrayLike, "..."], *, sow_weights: bool = False, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "*batch classes"]:
        """Logits of `images` `[*batch, height, width, in_features]`; with `num_classes=0`, the pooled features.

        Args:
          images: of `image_size`; where the position is not learned, of any size that the patches divide.
          sow_weights: stores the weights of each "global" and "local" layer for `nnx.capture`:
            `logits, weights = nnx.capture(model, nnx.Intermediate)(images, sow_weights=True)`.
          rngs: for `drop_path` and `dropout`, in training: `nnx.Rngs(dropout=key)`.
        """
        x = self.features(images, sow_weights=sow_weights, rngs=rngs)
        if self.latent_pool is not None:
            x = self.latent_pool(x.reshape(*x.shape[:-3], -1, x.shape[-1]), sow_weights=sow_weights)
        elif self.class_token is None:
            x = x.mean(axis=(-3, -2))
            x = x if self.axis_name is None else jax.lax.pmean(x, self.axis_name)
        else:
            x = x[..., 0, :] if self.pool == "token" else x[..., self._first_patch :, :].mean(axis=-2)
        return x if self.head is None else self.head(x)

    def pyramid(
        self, images: Num[ArrayLike, "..."], *, sow_weights: bool = False, rngs: nnx.Rngs | None = None
    ) -> list[Float[Array, "..."]]:
        """The last norm's output as a grid, without the class token and registers: the one stage of `strides`."""
        x = self.features(images, sow_weights=sow_weights, rngs=rngs)
        if self.class_token is not None:
            rows, columns = self._grid(jnp.shape(images)[-3:-1])
            x = x[..., self._first_patch :, :].reshape(*x.shape[:-2], rows, columns, x.shape[-1])
        return [x]

    @property
    def _first_patch(self) -> int:
        """How many tokens stand before the patches."""
        return 1 if self.registers is None else 1 + self.registers.shape[0]

    def centers(self) -> Float[np.ndarray, "layers heads 2"]:
        """Where the heads of each "quadratic" layer look, in tokens: rows and columns away from the query."""
        return np.stack([np.asarray(layer.centre[...], np.float64) for layer in self._quadratic()])

    def spreads(self) -> Float[np.ndarray, "layers heads 2 2"]:
        """How widely they look: the covariance I / (2 α) of each head's Gaussian, for `plots.head_centers_on_grid`."""
        alpha = np.stack([np.asarray(layer.alpha[...], np.float64) for layer in self._quadratic()])
        return np.eye(2) / (2 * alpha[..., None, None])

    def _quadratic(self) -> list[QuadraticAttention]:
        layers = [block.mix.layer for block in self.blocks if isinstance(block.mix.layer, QuadraticAttention)]
        if not layers:
            raise ValueError("ViT: mix must be 'quadratic' in some block: only such heads have centres")
        return layers

    def _check_images(self, images: Array):
        size = self.image_size if self.position_kind == "learned" else ("height", "width")
        fits = images.ndim >= 3 and images.shape[-1] == self.in_features
        whole = (images.shape[-3] * shard_count(self.axis_name), images.shape[-2]) if fits else ()
        if not fits or (self.position_kind == "learned" and whole != self.image_size):
            shape = f"[*batch, {size[0]}, {size[1]}, in_features (={self.in_features})]"
            raise ValueError(f"ViT: images (={images.shape}) must be {shape}")
        self._grid(whole)


def _pair(name: str, size: Size) -> tuple[int, int]:
    height, width = per_axis("ViT", name, size, 2)
    return height, width


def _joins(mixes: Sequence[Mix]) -> int:
    """The first of the blocks that end the network in "global": from there on, no layer needs a grid."""
    return max((n + 1 for n, mix in enumerate(mixes) if mix != "global"), default=0)


def _check_names(pool: str, position: str, norm: str, class_token: bool, width: int):
    for name, value, allowed in (("pool", pool, POOLS), ("position", position, POSITIONS), ("norm", norm, NORMS)):
        if value not in allowed:
            raise ValueError(f"ViT: {name} (={value!r}) must be one of {', '.join(map(repr, allowed))}")
    if pool == "token" and not class_token:
        raise ValueError("ViT: class_token (=False) must be True with pool='token'; pool='mean' needs none")
    if pool == "attention" and class_token:
        raise ValueError("ViT: class_token (=True) must be False with pool='attention', whose query stands for it")
    if position == "sincos2d" and width % 4:
        raise ValueError(f"ViT: width (={width}) must be a multiple of 4 with position='sincos2d'")


def _check_mixes(mixes: Sequence[Mix], depth: int, class_token: bool, window: tuple[int, int], grid: tuple[int, int]):
    if len(mixes) != depth:
        raise ValueError(f"ViT: mix (={mixes!r}) must be a string, a function, or one per block ({depth})")
    for mix in mixes:
        if not callable(mix) and not (isinstance(mix, str) and mix in MIXES):
            raise ValueError(f"ViT: mix (={mix!r}) must be one of {', '.join(map(repr, MIXES))}, or a function")
    if class_token and mixes[-1] != "global":
        raise ValueError(
            f"ViT: class_token (=True) must be False (and pool 'mean') with mix={mixes[-1]!r}, which needs a grid; or "
            "give a mix that ends in 'global', where the token then joins"
        )
    if "local" in mixes and any(w > n for w, n in zip(window, grid, strict=True)):
        raise ValueError(f"ViT: window (={window}) must fit in the grid of the patches, {grid}")

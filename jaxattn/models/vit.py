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
from jaxattn.models.backbone import linear_head
from jaxattn.models.gelu import gelu
from jaxattn.models.latent_pool import LatentPool
from jaxattn.models.residual import check_rates, check_rngs, depth_rates, run_block
from jaxattn.models.translation import Translation
from jaxattn.models.vit_blocks import Block, Mix, layer_norm, small_init, xavier_init
from jaxattn.models.vit_checks import check_mixes, check_settings, check_split
from jaxattn.models.vit_names import translations_of
from jaxattn.models.vit_tokens import Tokens, patch_grid
from jaxattn.nn.gated import GPSA
from jaxattn.nn.quadratic import QuadraticAttention
from jaxattn.sizes import Size, per_axis


class ViT(Tokens):
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
        pool = ("token" if class_token else "mean") if pool is None else pool
        image_size, patch_size, window = (
            per_axis("ViT", name, size, 2)
            for name, size in (("image_size", image_size), ("patch_size", patch_size), ("window", window))
        )
        mixes = (mix,) * depth if isinstance(mix, str) or callable(mix) else tuple(mix)
        check_rates("ViT", drop_path=drop_path, dropout=dropout)
        check_settings(
            pool=pool, position=position, norm=norm, class_token=class_token, registers=registers, width=width,
            epsilon=epsilon,
        )  # fmt: skip
        check_mixes(mixes, depth, class_token, window, patch_grid(image_size, patch_size))

        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        super().__init__(
            image_size, patch_size, in_features, width, position=position, class_token=class_token,
            class_position=class_position, registers=registers, joins=_joins(mixes) if class_token else depth,
            use_bias=not norm_before, **kwargs,
        )  # fmt: skip
        self.pool, self.remat = pool, remat
        self.strides, self.widths = (patch_size[0],), (width,)
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

    def features(
        self, images: Num[ArrayLike, "..."], *, sow_weights: bool = False, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "..."]:
        """The last norm's output: a grid `[*batch, height, width, features]`, or with a class token a sequence
        `[*batch, 1 + registers + height · width, features]`."""
        check_split(self.axis_name, self.class_token, self.latent_pool)
        check_rngs("ViT", rngs, drop_path=self.blocks[-1].drop_path, dropout=self.dropout)
        x = self.placed(jnp.asarray(images))
        for n, block in enumerate(self.blocks):
            if self.class_token is not None and n == self.joins:
                x = self.joined(x, self.class_token[...])
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
            x = x[..., 0, :] if self.pool == "token" else x[..., self.first_patch :, :].mean(axis=-2)
        return x if self.head is None else self.head(x)

    def pyramid(
        self, images: Num[ArrayLike, "..."], *, sow_weights: bool = False, rngs: nnx.Rngs | None = None
    ) -> list[Float[Array, "..."]]:
        """The last norm's output as a grid, without the class token and registers: the one stage of `strides`."""
        x = self.features(images, sow_weights=sow_weights, rngs=rngs)
        return [x if self.class_token is None else self.as_grid(x, jnp.shape(images)[-3:-1])]

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


def _joins(mixes: Sequence[Mix]) -> int:
    """The first of the blocks that end the network in "global": from there on, no layer needs a grid."""
    return max((n + 1 for n, mix in enumerate(mixes) if mix != "global"), default=0)

"""What networks of stages share: the features of every stage, pooled features, and logits."""

import abc
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Num

from jaxattn.models.gelu import gelu
from jaxattn.models.residual import check_rngs, drop_path, run_block
from jaxattn.models.translation import Translation
from jaxattn.nn.grid import Splittable
from jaxattn.nn.rows import in_line

small_init = nnx.initializers.truncated_normal(0.02)


class Stage(Splittable):
    """Blocks on one grid, after what makes the grid coarser (None: nothing does)."""

    def __init__(self, down: nnx.Module | None, blocks: Sequence[nnx.Module]):
        self.down, self.blocks = nnx.data(down), nnx.List(blocks)

    def __call__(self, x: Float[Array, "..."], *, sow_weights: bool, rngs: nnx.Rngs | None, remat: bool):
        x = x if self.down is None else self.down(x)
        for block in self.blocks:
            x = run_block(block, x, sow_weights=sow_weights, rngs=rngs, remat=remat)
        return x


class Backbone(Splittable):
    """A stem, stages, and a linear layer over the mean of the last one's features.

    A network's constructor sets the attributes below, and it says how images begin (`begin`) and what is made of the
    last features (`finish`).

    Attributes:
      strides: pixels between the tokens of each stage.
      widths: features of a token of each stage.
    """

    in_features: int
    strides: tuple[int, ...]
    widths: tuple[int, ...]
    remat: bool
    stages: nnx.List
    head: Any

    @property
    @abc.abstractmethod
    def translations(self) -> tuple[Translation, ...]:
        """The names of the network's weights in PyTorch's files: timm's first, which are written."""

    @abc.abstractmethod
    def begin(self, images: Array) -> Float[Array, "*batch height width features"]:
        """What the first stage takes."""

    @abc.abstractmethod
    def finish(self, x: Array) -> Float[Array, "*batch features"]:
        """The last features, pooled."""

    def pyramid(
        self, images: Num[ArrayLike, "..."], *, sow_weights: bool = False, rngs: nnx.Rngs | None = None
    ) -> list[Float[Array, "..."]]:
        """The features of every stage, `[*batch, height / stride, width / stride, features]` with the sizes in
        `strides` and `widths`."""
        images, name = jnp.asarray(images), type(self).__name__
        if images.ndim < 3 or images.shape[-1] != self.in_features:
            raise ValueError(
                f"{name}: images (={images.shape}) must be [*batch, height, width, in_features (={self.in_features})]"
            )
        check_rngs(name, rngs, drop_path=self.stages[-1].blocks[-1].drop_path)
        x, features = self.begin(images), []
        for stage in self.stages:
            x = stage(x, sow_weights=sow_weights, rngs=rngs, remat=self.remat)
            features.append(x)
        return features

    def __call__(
        self, images: Num[ArrayLike, "..."], *, sow_weights: bool = False, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "*batch classes"]:
        """Logits of `images` `[*batch, height, width, in_features]`; with `num_classes=0`, the pooled features.

        With `sow_weights`, each attention's weights are stored for `nnx.capture`. `rngs` is for `drop_path`.
        """
        x = self.finish(self.pyramid(images, sow_weights=sow_weights, rngs=rngs)[-1])
        return x if self.head is None else self.head(x)

    def mean(self, x: Float[Array, "*batch height width features"]) -> Float[Array, "*batch features"]:
        """Over the grid, of which a device may hold a part."""
        x = x.mean(axis=(-3, -2))
        return x if self.axis_name is None else jax.lax.pmean(x, self.axis_name)


class MixBlock(Splittable):
    """x ← x + γ₁ mix(norm₁(x)), and then x ← x + γ₂ W₂ φ(W₁ norm₂(x)); or with the norm after each branch ("post").

    Args:
      width, hidden: features of a token, and within the MLP.
      mix: the layer that mixes tokens.
      layer_scale: what γ begins at, a number for each feature (Touvron et al. 2021, arXiv 2103.17239); None: γ is 1.
      post: whether the norm follows the branch (Liu et al. 2022, Swin v2, arXiv 2111.09883).
      activation: φ.
      epsilon: of the norms.
      axes: of tokens: 3 for a volume.
      drop_path_rate: of stochastic depth.
      by_kernels: whether the mix may be a TPU's kernels, around which the tokens then stand in one axis.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        mix: Any,
        *,
        layer_scale: float | None = None,
        post: bool = False,
        activation: Callable[[Array], Array] = gelu,
        epsilon: float = 1e-5,
        axes: int = 2,
        drop_path_rate: float = 0.0,
        by_kernels: bool = False,
        **kwargs: Any,
    ):
        self.post, self.activation, self.mix, self.by_kernels = post, activation, mix, by_kernels
        self.norm1, self.norm2 = (layer_norm(width, epsilon, **kwargs) for _ in range(2))
        self.gamma1, self.gamma2 = (scale(width, layer_scale, kwargs["param_dtype"]) for _ in range(2))
        self.expand = nnx.Linear(width, hidden, kernel_init=small_init, **kwargs)
        self.contract = nnx.Linear(hidden, width, kernel_init=small_init, **kwargs)
        self.drop_path = drop_path(drop_path_rate, axes + 1)

    def __call__(self, x: Float[Array, "..."], *, sow_weights: bool = False, rngs: nnx.Rngs | None = None):
        shape = x.shape
        if self.by_kernels and in_line(x):
            x = x.reshape(-1, shape[-1])

        def mix(x):
            return self.mix(x.reshape(shape), sow_weights=sow_weights).reshape(x.shape)

        def mlp(x):
            return self.contract(self.activation(self.expand(x)))

        for branch, norm, gamma in ((mix, self.norm1, self.gamma1), (mlp, self.norm2, self.gamma2)):
            y = norm(branch(x)) if self.post else branch(norm(x))
            x = x + self.drop_path(scaled(y, gamma).reshape(shape), rngs=rngs).reshape(x.shape)
        return x.reshape(shape)


def layer_norm(width: int, epsilon: float, **kwargs: Any) -> nnx.LayerNorm:
    """Its variance is the mean of squared distances: large activations lose none of it."""
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, **kwargs)


def scale(width: int, value: float | None, dtype: Any) -> Any:
    """A parameter of a number for each feature; None for None."""
    return nnx.data(None) if value is None else nnx.Param(jnp.full((width,), value, dtype))


def scaled(y: Float[Array, "..."], gamma: nnx.Param | None) -> Float[Array, "..."]:
    """γ y, in y's dtype."""
    return y if gamma is None else y * gamma[...].astype(y.dtype)


def linear_head(
    width: int, num_classes: int, kernel_init: Any = small_init, *, param_dtype: Any, rngs: nnx.Rngs
) -> Any:
    """The layer that makes logits, or None for no classes.

    Its dtype is left to promotion: bfloat16 features and float32 weights make float32 logits, as a loss wants them.
    """
    if num_classes == 0:
        return nnx.data(None)
    return nnx.Linear(width, num_classes, kernel_init=kernel_init, param_dtype=param_dtype, rngs=rngs)

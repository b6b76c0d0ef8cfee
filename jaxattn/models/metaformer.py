"""PoolFormer, ConvFormer and CAFormer: one block, whose mixer is a mean, a separable convolution, or attention."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxattn.checked import Natural, checked
from jaxattn.models.backbone import Backbone, Stage, layer_norm, linear_head, scale, scaled, small_init
from jaxattn.models.gelu import gelu
from jaxattn.models.metaformer_mixers import CHANNELS, LINEAR, MIXERS, GridNorm, StarReLU, mixer
from jaxattn.models.residual import check_rates, depth_rates, drop_path
from jaxattn.models.translation import Rule, Table, Translation, under
from jaxattn.nn.conv import Conv
from jaxattn.nn.grid import Splittable

BLOCK: Table = {
    "norm1": "norm1", "norm2": "norm2", "star.gain": "mlp.act.scale", "star.bias": "mlp.act.bias",
    "gamma1": "layer_scale1.scale",
    "gamma2": "layer_scale2.scale", "keep1": "res_scale1.scale", "keep2": "res_scale2.scale",
}  # fmt: skip
TIMM: Table = {
    "patches": "stem.conv", "patch_norm": "stem.norm", "stages.*.down.conv": "stages.*.downsample.conv",
    "stages.*.down.norm": "stages.*.downsample.norm", "norm": "head.norm",
}  # fmt: skip


class Block(Splittable):
    """x ← β₁ x + γ₁ mix(norm₁(x)), and then x ← β₂ x + γ₂ W₂ φ(W₁ norm₂(x)); β and γ are numbers a feature, or 1.

    Of version 1 (Yu et al. 2022, arXiv 2111.11418), φ is gelu, and there are biases and γ. Of version 2 (Yu et al.
    2024, arXiv 2210.13452), φ is `StarReLU`, nothing has a bias, and there is β in the last two stages.
    """

    def __init__(
        self, width: int, mix: str, *, version: int, layer_scale: float, keep: bool, drop_path_rate: float,
        **kwargs: Any,
    ):  # fmt: skip
        first = version == 1
        norms = [
            GridNorm(width, first, 1e-5 if first else 1e-6, **kwargs) if mix == "pool" else _norm(width, **kwargs)
            for _ in range(2)
        ]
        (self.norm1, self.norm2), self.mix = norms, mixer(mix, width, **kwargs)
        self.star = nnx.data(None if first else StarReLU(kwargs["param_dtype"]))
        self.expand = nnx.Linear(width, 4 * width, use_bias=first, kernel_init=small_init, **kwargs)
        self.contract = nnx.Linear(4 * width, width, use_bias=first, kernel_init=small_init, **kwargs)
        dtype = kwargs["param_dtype"]
        self.gamma1, self.gamma2 = (scale(width, layer_scale if first else None, dtype) for _ in range(2))
        self.keep1, self.keep2 = (scale(width, 1.0 if keep else None, dtype) for _ in range(2))
        self.drop_path = drop_path(drop_path_rate, 3)

    def __call__(self, x: Float[Array, "..."], *, sow_weights: bool = False, rngs: nnx.Rngs | None = None):
        y = self.mix(self.norm1(x), sow_weights=sow_weights)
        x = scaled(x, self.keep1) + self.drop_path(scaled(y, self.gamma1), rngs=rngs)
        y = self.expand(self.norm2(x))
        y = self.contract(gelu(y) if self.star is None else self.star(y))
        return scaled(x, self.keep2) + self.drop_path(scaled(y, self.gamma2), rngs=rngs)


def _norm(width: int, **kwargs: Any) -> nnx.LayerNorm:
    return layer_norm(width, 1e-6, use_bias=False, **kwargs)


class Downsample(Splittable):
    """A norm in version 2, and a 3 × 3 convolution of stride 2."""

    def __init__(self, in_features: int, features: int, *, version: int, **kwargs: Any):
        self.norm = nnx.data(None) if version == 1 else _norm(in_features, **kwargs)
        self.conv = Conv(in_features, features, (3, 3), 2, padding=1, **kwargs)

    def __call__(self, x: Float[Array, "*batch height width channels"]):
        return self.conv(x if self.norm is None else self.norm(x))


class MetaFormer(Backbone):
    """MetaFormer: patches of 7 × 7 in steps of 4, stages of `Block`s that halve the grid, and the norm of the mean over
    it. The logits are linear in that, or W₂ norm(relu(W₁ x)²).

    Args:
      depths: blocks of each stage.
      widths: features of a token of each stage.
      mix: "pool", "conv" or "attention" (see `mixer`), or one for each stage; "attention" has heads of 32 features.
      version: 1, PoolFormer, or 2.
      mlp_head: whether there is a hidden layer before the logits, whose features `num_classes=0` then gives.
      layer_scale: what γ begins at.
      num_classes, in_features, drop_path, remat, dtype, param_dtype, rngs: as in `ConvNeXt`.

    >>> from flax import nnx
    >>> model = nnx.eval_shape(lambda: MetaFormer((1, 1), (8, 32), mix=("conv", "attention"), rngs=nnx.Rngs(0)))
    >>> [features.shape for features in nnx.eval_shape(lambda m, x: m.pyramid(x), model, jnp.ones((2, 32, 48, 3)))]
    [(2, 8, 12, 8), (2, 4, 6, 32)]
    """

    @checked
    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        *,
        mix: str | Sequence[str] = "pool",
        version: int = 2,
        mlp_head: bool = False,
        layer_scale: float = 1e-5,
        num_classes: Natural = 1000,
        in_features: int = 3,
        drop_path: float = 0.0,
        remat: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        mixes = (mix,) * len(depths) if isinstance(mix, str) else tuple(mix)
        if version not in (1, 2):
            raise ValueError(f"MetaFormer: version (={version}) must be 1 or 2")
        if not len(depths) == len(widths) == len(mixes) or not depths:
            raise ValueError(
                f"MetaFormer: depths (={depths}), widths (={widths}) and mix (={mix!r}) must have one for each stage"
            )
        for each in mixes:
            if each not in MIXERS:
                raise ValueError(f"MetaFormer: mix (={each!r}) must be one of {', '.join(map(repr, MIXERS))}")
        check_rates("MetaFormer", drop_path=drop_path)
        self.in_features, self.remat, self.widths, self.mixes = in_features, remat, tuple(widths), mixes
        self.strides = tuple(4 * 2**n for n in range(len(depths)))
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.patches = Conv(in_features, widths[0], (7, 7), 4, padding=2, **kwargs)
        self.patch_norm = nnx.data(None) if version == 1 else _norm(widths[0], **kwargs)
        rates, stages, block = iter(depth_rates(drop_path, sum(depths))), [], {"version": version, **kwargs}
        for n, (depth, width, each) in enumerate(zip(depths, widths, mixes, strict=True)):
            # as timm has it, only where the widths differ
            down = Downsample(widths[n - 1], width, **block) if n else None
            kind = {"layer_scale": layer_scale, "keep": version == 2 and n >= 2, **block}
            stages.append(Stage(down, [Block(width, each, drop_path_rate=next(rates), **kind) for _ in range(depth)]))
        self.stages = nnx.List(stages)
        self.norm = layer_norm(widths[-1], 1e-6, **kwargs)
        self.hidden = self.hidden_norm = nnx.data(None)
        last = widths[-1]
        if mlp_head:
            last = 4 * widths[-1]
            self.hidden = nnx.Linear(widths[-1], last, kernel_init=small_init, **kwargs)
            self.hidden_norm = layer_norm(last, 1e-6, **kwargs)
        self.head = linear_head(last, num_classes, param_dtype=param_dtype, rngs=rngs)

    @property
    def translations(self) -> tuple[Translation, ...]:
        table = {**TIMM, "hidden": "head.fc.fc1", "hidden_norm": "head.fc.norm"}
        table["head"] = "head.fc" if self.hidden is None else "head.fc.fc2"
        for n, mix in enumerate(self.mixes):
            # attention's stages are sequences there, with linear layers; the others' are 1 × 1 convolutions
            linear = LINEAR if mix == "attention" else CHANNELS
            block = {"expand": Rule("mlp.fc1", linear), "contract": Rule("mlp.fc2", linear), **BLOCK}
            block |= under("mix", "token_mixer", MIXERS[mix])
            table |= under(f"stages.{n}.blocks.*", f"stages.{n}.blocks.*", block)
        return (Translation("timm", table),)

    def begin(self, images: Array) -> Float[Array, "*batch height width features"]:
        x = self.patches(images)
        return x if self.patch_norm is None else self.patch_norm(x)

    def finish(self, x: Array) -> Float[Array, "*batch features"]:
        x = self.norm(self.mean(x))
        if self.hidden is None or self.hidden_norm is None:
            return x
        return self.hidden_norm(jnp.square(jax.nn.relu(self.hidden(x))))


SMALL, MEDIUM, BASE = (64, 128, 320, 512), (96, 192, 384, 576), (128, 256, 512, 768)
D18, D36 = (3, 3, 9, 3), (3, 12, 18, 3)


def _poolformer(blocks: int, widths: Sequence[int], layer_scale: float, kwargs: dict[str, Any]) -> MetaFormer:
    depths = (blocks // 6, blocks // 6, blocks // 2, blocks // 6)
    return MetaFormer(depths, widths, **{"version": 1, "layer_scale": layer_scale, **kwargs})


def poolformer_s12(**kwargs: Any) -> MetaFormer:
    """11,915,176 parameters with 1,000 classes; version 2 has 11,891,712."""
    return _poolformer(12, SMALL, 1e-5, kwargs)


def poolformer_s24(**kwargs: Any) -> MetaFormer:
    """21,388,968 parameters; version 2 has 21,341,464."""
    return _poolformer(24, SMALL, 1e-5, kwargs)


def poolformer_s36(**kwargs: Any) -> MetaFormer:
    """30,862,760 parameters; version 2 has 30,791,216."""
    return _poolformer(36, SMALL, 1e-6, kwargs)


def poolformer_m36(**kwargs: Any) -> MetaFormer:
    """56,172,520 parameters; version 2 has 56,077,168."""
    return _poolformer(36, (96, 192, 384, 768), 1e-6, kwargs)


def poolformer_m48(**kwargs: Any) -> MetaFormer:
    """73,473,448 parameters; version 2 has 73,346,056."""
    return _poolformer(48, (96, 192, 384, 768), 1e-6, kwargs)


def _convformer(depths: Sequence[int], widths: Sequence[int], kwargs: dict[str, Any]) -> MetaFormer:
    return MetaFormer(depths, widths, **{"mix": "conv", "mlp_head": True, **kwargs})


def convformer_s18(**kwargs: Any) -> MetaFormer:
    """26,774,448 parameters with 1,000 classes."""
    return _convformer(D18, SMALL, kwargs)


def convformer_s36(**kwargs: Any) -> MetaFormer:
    """40,012,152 parameters."""
    return _convformer(D36, SMALL, kwargs)


def convformer_m36(**kwargs: Any) -> MetaFormer:
    """57,051,640 parameters."""
    return _convformer(D36, MEDIUM, kwargs)


def convformer_b36(**kwargs: Any) -> MetaFormer:
    """99,882,616 parameters."""
    return _convformer(D36, BASE, kwargs)


CA = {"mix": ("conv", "conv", "attention", "attention")}


def caformer_s18(**kwargs: Any) -> MetaFormer:
    """26,341,656 parameters with 1,000 classes."""
    return convformer_s18(**{**CA, **kwargs})


def caformer_s36(**kwargs: Any) -> MetaFormer:
    """39,297,102 parameters."""
    return convformer_s36(**{**CA, **kwargs})


def caformer_m36(**kwargs: Any) -> MetaFormer:
    """56,204,878 parameters."""
    return convformer_m36(**{**CA, **kwargs})


def caformer_b36(**kwargs: Any) -> MetaFormer:
    """98,753,614 parameters."""
    return convformer_b36(**{**CA, **kwargs})

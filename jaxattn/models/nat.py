"""NAT and DiNAT: each token attends to its nearest, or to its nearest at some distance from each other."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxattn.checked import Natural, checked
from jaxattn.halo import shard_count
from jaxattn.models.backbone import Backbone, MixBlock, Stage, layer_norm, linear_head
from jaxattn.models.residual import check_rates, depth_rates
from jaxattn.models.translation import BY_HEAD, FUSED, OUT, Rule, Table, Translation, below, under
from jaxattn.nn.configured import NeighborhoodAttention
from jaxattn.nn.conv import Conv
from jaxattn.nn.grid import Splittable
from jaxattn.window import Window

AUTHORS: Table = {
    "stem.0": "patch_embed.proj.0", "stem.1": "patch_embed.proj.1", "stem_norm": "patch_embed.norm",
    # they count what halves the grid with the stage before it
    "stages.*.down.conv": "levels.*-1.downsample.reduction", "stages.*.down.norm": "levels.*-1.downsample.norm",
    **under("stages.*.blocks.*", "levels.*.blocks.*", {
        "norm1": "norm1", "norm2": "norm2", "gamma1": "gamma1", "gamma2": "gamma2",
        "mix.attention.query|key|value": Rule("attn.qkv", FUSED), "mix.attention.out": Rule("attn.proj", OUT),
        "mix.attention.relative_bias": "attn.rpb", "expand": "mlp.fc1", "contract": "mlp.fc2",
    }),
}  # fmt: skip
HUGGING_FACE: Table = {
    "stem.0": "embeddings.patch_embeddings.projection.0", "stem.1": "embeddings.patch_embeddings.projection.1",
    "stem_norm": "embeddings.norm", "norm": "layernorm",
    "stages.*.down.conv": "encoder.levels.*-1.downsample.reduction",
    "stages.*.down.norm": "encoder.levels.*-1.downsample.norm",
    **under("stages.*.blocks.*", "encoder.levels.*.layers.*", {
        "norm1": "layernorm_before", "norm2": "layernorm_after",
        "gamma1|gamma2": Rule("layer_scale_parameters", "c -> +1 c"),
        "mix.attention.query": Rule("attention.self.query", BY_HEAD),
        "mix.attention.key": Rule("attention.self.key", BY_HEAD),
        "mix.attention.value": Rule("attention.self.value", BY_HEAD),
        "mix.attention.out": Rule("attention.output.dense", OUT),
        "mix.attention.relative_bias": "attention.self.rpb",
        "expand": "intermediate.dense", "contract": "output.dense",
    }),
}  # fmt: skip


class Neighborhood(Splittable):
    """`nn.NeighborhoodAttention`, on a grid that ends in zeros where it is smaller than the dilated window; these take
    part."""

    def __init__(self, num_heads: int, width: int, window: tuple[int, ...], dilation: int, **kwargs: Any):
        self.sides = tuple(k * dilation for k in window)
        sizes = Window(window, dilation=dilation)
        self.attention = NeighborhoodAttention(num_heads, width, window=sizes, **kwargs)

    def __call__(self, x: Float[Array, "*batch height width features"], *, sow_weights: bool = False):
        rows, columns = x.shape[-3:-1]
        return self.attention(widened(x, self.sides, self.axis_name), sow_weights=sow_weights)[..., :rows, :columns, :]


def widened(
    x: Float[Array, "*batch height width features"], sides: tuple[int, ...], axis_name: str | None
) -> Float[Array, "*batch height2 width2 features"]:
    """x on a grid that reaches `sides`, with zeros at its end where it does not."""
    whole = (x.shape[-3] * shard_count(axis_name), x.shape[-2])
    lacking = [max(side - n, 0) for side, n in zip(sides, whole, strict=True)]
    if lacking[0] and axis_name is not None:
        raise ValueError(
            f"NAT: window · dilation (={sides}) must be at most the grid's rows, where these are split over "
            f"{axis_name!r}"
        )
    return jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(0, n) for n in lacking] + [(0, 0)])


class Downsample(Splittable):
    """A 3 × 3 convolution of stride 2 to twice the features, and a norm."""

    def __init__(self, width: int, **kwargs: Any):
        self.conv = Conv(width, 2 * width, (3, 3), 2, padding=1, use_bias=False, **kwargs)
        self.norm = layer_norm(2 * width, 1e-5, **kwargs)

    def __call__(self, x: Float[Array, "*batch height width features"]):
        return self.norm(self.conv(x))


class NAT(Backbone):
    """NAT (Hassani et al. 2023, arXiv 2204.07143) and, with dilations, DiNAT (Hassani & Shi 2022, arXiv 2209.15001): a
    stem of two 3 × 3 convolutions of stride 2, stages of blocks whose tokens attend to their nearest,

        y_i = b_O + Σ_h W_O,h Σ_{j in N(i)} softmax_j(q_i·k_j / √d + b_h[j-i]) v_j,

    and the mean of the norm over the last grid.

    Args:
      depths: blocks of each stage.
      width: features of a token of the first stage, which the others double.
      num_heads: of each stage.
      mlp_ratio: features within each MLP, times those of a token.
      window: side of the neighbourhood.
      dilations: of every other block of each stage, from the second on; 1 in all others.
      layer_scale: what a factor for each feature of each branch begins at; None: there are none.
      num_classes, in_features, drop_path, remat, dtype, param_dtype, rngs: as in `ConvNeXt`. Images may be of any size.

    >>> from flax import nnx
    >>> model = nnx.eval_shape(lambda: NAT((2, 1), 8, (2, 4), window=3, dilations=(2, 1), rngs=nnx.Rngs(0)))
    >>> [features.shape for features in nnx.eval_shape(lambda m, x: m.pyramid(x), model, jnp.ones((2, 40, 32, 3)))]
    [(2, 10, 8, 8), (2, 5, 4, 16)]
    """

    @checked
    def __init__(
        self,
        depths: Sequence[int],
        width: int,
        num_heads: Sequence[int],
        *,
        mlp_ratio: int = 3,
        window: int = 7,
        dilations: Sequence[int] = (1, 1, 1, 1),
        layer_scale: float | None = None,
        num_classes: Natural = 1000,
        in_features: int = 3,
        drop_path: float = 0.0,
        remat: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if not len(depths) == len(num_heads) <= len(dilations):
            raise ValueError(
                f"NAT: depths (={depths}), num_heads (={num_heads}) and dilations (={dilations}) must have one for "
                "each stage"
            )
        check_rates("NAT", drop_path=drop_path)
        self.in_features, self.remat = in_features, remat
        self.strides = tuple(4 * 2**n for n in range(len(depths)))
        self.widths = tuple(width * 2**n for n in range(len(depths)))
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        stem = [(in_features, width // 2), (width // 2, width)]
        self.stem = nnx.List([Conv(before, after, (3, 3), 2, padding=1, **kwargs) for before, after in stem])
        self.stem_norm = layer_norm(width, 1e-5, **kwargs)
        rates, stages = iter(depth_rates(drop_path, sum(depths))), []
        for n, (depth, heads, wide) in enumerate(zip(depths, num_heads, self.widths, strict=True)):
            blocks = []
            for m in range(depth):
                mix = Neighborhood(heads, wide, (window, window), dilations[n] if m % 2 else 1, **kwargs)
                scales: dict[str, Any] = {"layer_scale": layer_scale, "drop_path_rate": next(rates)}
                blocks.append(MixBlock(wide, mlp_ratio * wide, mix, by_kernels=True, **scales, **kwargs))
            stages.append(Stage(Downsample(wide // 2, **kwargs) if n else None, blocks))
        self.stages = nnx.List(stages)
        self.norm = layer_norm(self.widths[-1], 1e-5, **kwargs)
        self.head = linear_head(self.widths[-1], num_classes, param_dtype=param_dtype, rngs=rngs)

    @property
    def translations(self) -> tuple[Translation, ...]:
        faces = (Translation("Hugging Face", {**below(name, HUGGING_FACE), "head": "classifier"}) for name in BODIES)
        return Translation("SHI-Labs", AUTHORS), *faces

    def begin(self, images: Array) -> Float[Array, "*batch height width features"]:
        for conv in self.stem:
            images = conv(images)
        return self.stem_norm(images)

    def finish(self, x: Array) -> Float[Array, "*batch features"]:
        return self.mean(self.norm(x))


BODIES = ("nat", "dinat")
DILATIONS = (8, 4, 2, 1)  # such that the window spans the grid of an image of 224 × 224
DEEP = (3, 4, 18, 5)


def nat_mini(**kwargs: Any) -> NAT:
    """19,984,174 parameters with 1,000 classes; with `dilations=(8, 4, 2, 1)`, it is `dinat_mini`."""
    return NAT((3, 4, 6, 5), 64, (2, 4, 8, 16), **kwargs)


def nat_tiny(**kwargs: Any) -> NAT:
    """27,901,582 parameters with 1,000 classes."""
    return NAT(DEEP, 64, (2, 4, 8, 16), **kwargs)


def nat_small(**kwargs: Any) -> NAT:
    """50,743,297 parameters with 1,000 classes."""
    return NAT(DEEP, 96, (3, 6, 12, 24), **{"mlp_ratio": 2, "layer_scale": 1e-5, **kwargs})


def nat_base(**kwargs: Any) -> NAT:
    """89,769,652 parameters with 1,000 classes."""
    return NAT(DEEP, 128, (4, 8, 16, 32), **{"mlp_ratio": 2, "layer_scale": 1e-5, **kwargs})


def dinat_mini(**kwargs: Any) -> NAT:
    """19,984,174 parameters with 1,000 classes."""
    return nat_mini(**{"dilations": DILATIONS, **kwargs})


def dinat_tiny(**kwargs: Any) -> NAT:
    """27,901,582 parameters with 1,000 classes."""
    return nat_tiny(**{"dilations": DILATIONS, **kwargs})


def dinat_small(**kwargs: Any) -> NAT:
    """50,719,681 parameters with 1,000 classes: NAT's without layer scales."""
    return nat_small(**{"dilations": DILATIONS, "layer_scale": None, **kwargs})


def dinat_base(**kwargs: Any) -> NAT:
    """89,738,164 parameters with 1,000 classes: NAT's without layer scales."""
    return nat_base(**{"dilations": DILATIONS, "layer_scale": None, **kwargs})


def dinat_large(**kwargs: Any) -> NAT:
    """200,943,514 parameters with 1,000 classes; for images of 384 × 384, `dilations=(13, 6, 3, 1)`, or `window=11`."""
    return NAT(DEEP, 192, (6, 12, 24, 48), **{"mlp_ratio": 2, "dilations": DILATIONS, **kwargs})

"""Swin, version 1 and 2: attention in windows that part the grid, shifted in every other block."""

from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxattn.checked import Natural, checked
from jaxattn.einsum import einsum
from jaxattn.models.backbone import Backbone, MixBlock, Stage, layer_norm, linear_head, small_init
from jaxattn.models.residual import check_rates, depth_rates
from jaxattn.models.resize import resize_flat_table
from jaxattn.models.swin_attention import WindowAttention
from jaxattn.models.translation import BY_HEAD, FUSED, OUT, Rule, Table, Translation, below, under
from jaxattn.nn.conv import Conv
from jaxattn.nn.grid import Splittable
from jaxattn.sizes import Size, per_axis

DERIVED = ("relative_position_index", "attn_mask", "relative_coords_table")
# theirs is by query less key, ours by key less query
BIAS = Rule("relative_position_bias_table", "head -row -column -> (row column) head", resize_flat_table)
SCALE = "head -> head 1 1"
BLOCK: Table = {
    "mix.attention.query|key|value": Rule("attn.qkv", FUSED), "mix.attention.out": Rule("attn.proj", OUT),
    "mix.attention.relative_bias": BIAS._replace(name=f"attn.{BIAS.name}"),
    "mix.scale": Rule("attn.logit_scale", SCALE), "mix.hidden": "attn.cpb_mlp.0", "mix.bias": "attn.cpb_mlp.2",
    "norm1": "norm1", "norm2": "norm2", "expand": "mlp.fc1", "contract": "mlp.fc2",
}  # fmt: skip
# in version 2, whose keys have none
BIASES: Table = {
    f"mix.attention.{part}.bias": Rule(f"attn.{part[0]}_bias", "head dim -> (head dim)") for part in ("query", "value")
}
TIMM: Table = {
    "patches": "patch_embed.proj", "patch_norm": "patch_embed.norm",
    "stages.*.down.norm": "layers.*.downsample.norm", "stages.*.down.reduce": "layers.*.downsample.reduction",
    "head": "head.fc",
}  # fmt: skip
# who count a merging with the stage before it
MICROSOFT: Table = {
    **TIMM, "head": "head",
    "stages.*.down.norm": "layers.*-1.downsample.norm", "stages.*.down.reduce": "layers.*-1.downsample.reduction",
}  # fmt: skip
HUGGING_FACE: Table = {
    "patches": "embeddings.patch_embeddings.projection", "patch_norm": "embeddings.norm",
    "stages.*.down.norm": "encoder.layers.*-1.downsample.norm",
    "stages.*.down.reduce": "encoder.layers.*-1.downsample.reduction",
    **under("stages.*.blocks.*", "encoder.layers.*.blocks.*", {
        "norm1": "layernorm_before", "norm2": "layernorm_after",
        "mix.attention.query": Rule("attention.self.query", BY_HEAD),
        "mix.attention.key": Rule("attention.self.key", BY_HEAD),
        "mix.attention.value": Rule("attention.self.value", BY_HEAD),
        "mix.attention.out": Rule("attention.output.dense", OUT),
        "mix.attention.relative_bias": BIAS._replace(name=f"attention.self.{BIAS.name}"),
        "mix.scale": Rule("attention.self.logit_scale", SCALE),
        "mix.hidden": "attention.self.continuous_position_bias_mlp.0",
        "mix.bias": "attention.self.continuous_position_bias_mlp.2",
        "expand": "intermediate.dense", "contract": "output.dense",
    }),
    "norm": "layernorm",
}  # fmt: skip


class PatchMerging(Splittable):
    """2 × 2 tokens to one of twice the features, column by column; the norm is before the linear map, or after it."""

    def __init__(self, width: int, *, version: int, **kwargs: Any):
        self.first = version == 1
        self.norm = layer_norm(4 * width if self.first else 2 * width, 1e-5, **kwargs)
        self.reduce = nnx.Linear(4 * width, 2 * width, use_bias=False, kernel_init=small_init, **kwargs)

    def __call__(self, x: Float[Array, "*batch height width features"]):
        rows, columns = (n % 2 for n in x.shape[-3:-1])
        if rows and self.axis_name is not None:
            raise ValueError(f"Swin: rows of a shard (={x.shape[-3]}) must be even where they are merged")
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(0, rows), (0, columns), (0, 0)])
        x = einsum("... (i p) (j q) c -> ... i j (q p c)", x, p=2, q=2)
        return self.reduce(self.norm(x)) if self.first else self.norm(self.reduce(x))


class Swin(Backbone):
    """Swin (Liu et al. 2021, arXiv 2103.14030), and with `version=2` Swin V2 (Liu et al. 2022, arXiv 2111.09883):
    patches of 4 × 4, stages of blocks with `WindowAttention` that halve the grid, and the mean of the norm over it.

    Args:
      depths: blocks of each stage.
      width: features of a token of the first stage, which the others double.
      num_heads: of each stage.
      window: side of a window, or (height, width). One that reaches a stage's whole grid, by `image_size`, is as large
        as the grid, and not shifted.
      image_size: what windows are chosen by, an int or (height, width). Images may be of any size.
      version: 1 or 2.
      padding: of ragged grids, "after" (timm), "before" (the authors, Hugging Face) or "mask"; see `WindowAttention`.
      pretrained_windows: of version 2, in each stage, the side of the window that the bias was trained with; 0 is ours.
      num_classes, in_features, drop_path, remat, dtype, param_dtype, rngs: as in `ConvNeXt`.

    >>> from flax import nnx
    >>> sizes = dict(depths=(2, 2), width=8, num_heads=(2, 4), window=4, image_size=32, num_classes=5)
    >>> model = nnx.eval_shape(lambda: Swin(**sizes, rngs=nnx.Rngs(0)))
    >>> nnx.eval_shape(lambda m, x: m(x), model, jnp.ones((2, 50, 41, 3))).shape
    (2, 5)
    """

    @checked
    def __init__(
        self,
        depths: Sequence[int],
        width: int,
        num_heads: Sequence[int],
        *,
        window: Size = 7,
        image_size: Size = 224,
        version: int = 1,
        padding: Literal["after", "before", "mask"] = "after",
        pretrained_windows: Sequence[Natural] = (0, 0, 0, 0),
        num_classes: Natural = 1000,
        in_features: int = 3,
        drop_path: float = 0.0,
        remat: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        sides = per_axis("Swin", "window", window, 2)
        grid = [-(-n // 4) for n in per_axis("Swin", "image_size", image_size, 2)]
        if version not in (1, 2):
            raise ValueError(f"Swin: version (={version}) must be 1 or 2")
        if not len(depths) == len(num_heads) <= len(pretrained_windows):
            raise ValueError(f"Swin: depths (={depths}) and num_heads (={num_heads}) must have one for each stage")
        check_rates("Swin", drop_path=drop_path)
        self.in_features, self.remat, self.version = in_features, remat, version
        self.strides = tuple(4 * 2**n for n in range(len(depths)))
        self.widths = tuple(width * 2**n for n in range(len(depths)))
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.patches = Conv(in_features, width, (4, 4), 4, padding="VALID", **kwargs)
        self.patch_norm = layer_norm(width, 1e-5, **kwargs)
        rates, stages = iter(depth_rates(drop_path, sum(depths))), []
        for n, (depth, heads, wide) in enumerate(zip(depths, num_heads, self.widths, strict=True)):
            grid = [-(-side // 2) for side in grid] if n else grid
            fitting = tuple(min(k, side) for k, side in zip(sides, grid, strict=True))
            shift = tuple(0 if side <= k else k // 2 for k, side in zip(fitting, grid, strict=True))
            shift = (0, 0) if padding == "before" and 0 in shift else shift  # as the authors have it, on both axes
            kind = {"padding": padding, "version": version, "pretrained": pretrained_windows[n], **kwargs}
            mixes = [WindowAttention(heads, wide, fitting, shift if m % 2 else (0, 0), **kind) for m in range(depth)]
            blocks = [
                MixBlock(wide, 4 * wide, mix, post=version == 2, drop_path_rate=next(rates), **kwargs) for mix in mixes
            ]
            stages.append(Stage(PatchMerging(wide // 2, version=version, **kwargs) if n else None, blocks))
        self.stages = nnx.List(stages)
        self.norm = layer_norm(self.widths[-1], 1e-5, **kwargs)
        self.head = linear_head(self.widths[-1], num_classes, param_dtype=param_dtype, rngs=rngs)

    @property
    def translations(self) -> tuple[Translation, ...]:
        block, body = ({**BIASES, **BLOCK}, "swinv2") if self.version == 2 else (BLOCK, "swin")
        blocks = under("stages.*.blocks.*", "layers.*.blocks.*", block)
        tables = {
            "timm": {**TIMM, **blocks},
            "Microsoft": {**MICROSOFT, **blocks},
            "Hugging Face": {**below(body, HUGGING_FACE), "head": "classifier"},
        }
        return tuple(Translation(publisher, table, derived=DERIVED) for publisher, table in tables.items())

    def begin(self, images: Array) -> Float[Array, "*batch height width features"]:
        """The patches; an image whose side 4 does not divide ends in zeros."""
        pads = [(0, 0)] * (images.ndim - 3) + [(0, -n % 4) for n in images.shape[-3:-1]] + [(0, 0)]
        return self.patch_norm(self.patches(jnp.pad(images, pads)))

    def finish(self, x: Array) -> Float[Array, "*batch features"]:
        return self.mean(self.norm(x))


def swin_tiny(**kwargs: Any) -> Swin:
    """28,288,354 parameters with 1,000 classes and its defaults, for images of 224 × 224."""
    return Swin((2, 2, 6, 2), 96, (3, 6, 12, 24), **kwargs)


def swin_small(**kwargs: Any) -> Swin:
    """49,606,258 parameters."""
    return Swin((2, 2, 18, 2), 96, (3, 6, 12, 24), **kwargs)


def swin_base(**kwargs: Any) -> Swin:
    """87,768,224 parameters; with `window=12, image_size=384`, 87,903,584."""
    return Swin((2, 2, 18, 2), 128, (4, 8, 16, 32), **kwargs)


def swin_large(**kwargs: Any) -> Swin:
    """196,532,476 parameters; with `window=12, image_size=384`, 196,735,516."""
    return Swin((2, 2, 18, 2), 192, (6, 12, 24, 48), **kwargs)


def swinv2_tiny(**kwargs: Any) -> Swin:
    """28,347,154 parameters with 1,000 classes and any window, for images of 256 × 256."""
    return swin_tiny(**{"version": 2, "window": 8, "image_size": 256, **kwargs})


def swinv2_small(**kwargs: Any) -> Swin:
    """49,728,418 parameters."""
    return swin_small(**{"version": 2, "window": 8, "image_size": 256, **kwargs})


def swinv2_base(**kwargs: Any) -> Swin:
    """87,918,816 parameters."""
    return swin_base(**{"version": 2, "window": 8, "image_size": 256, **kwargs})


def swinv2_large(**kwargs: Any) -> Swin:
    """196,745,308 parameters; the published ones were trained with 12² windows: `window=12, image_size=192`."""
    return swin_large(**{"version": 2, "window": 12, "image_size": 192, **kwargs})

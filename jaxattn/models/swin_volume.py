"""Swin in three dimensions: SwinUNETR's encoder, and a weather model's blocks, where longitude is a circle."""

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Num

from jaxattn.attention import attention
from jaxattn.checked import Natural, checked
from jaxattn.halo import shard_count
from jaxattn.models.backbone import MixBlock, Stage, layer_norm, linear_head, small_init
from jaxattn.models.residual import check_rates, check_rngs, depth_rates
from jaxattn.models.swin_attention import regions
from jaxattn.models.translation import FUSED, OUT, Rule, Table, Translation, below, under
from jaxattn.nn.attention import Attention
from jaxattn.nn.conv import Conv
from jaxattn.nn.grid import Splittable
from jaxattn.parts import attention_weights
from jaxattn.sizes import Size, per_axis
from jaxattn.window import Window
from jaxattn.zoo.shifted import Turn, cyclic_axes

BLOCK: Table = {
    "mix.attention.query|key|value": Rule("attn.qkv", FUSED), "mix.attention.out": Rule("attn.proj", OUT),
    # theirs is by query less key, ours by key less query
    "mix.attention.relative_bias": Rule(
        "attn.relative_position_bias_table", "head -depth -row -column -> (depth row column) head"
    ),
    "norm1": "norm1", "norm2": "norm2", "expand": "mlp.linear1", "contract": "mlp.linear2",
}  # fmt: skip
# the rest of SwinUNETR, which stands in the same file
UNET = ("encoder", "decoder", "out.")
# which of 2 × 2 × 2 tokens is which part of one: in order; as MONAI has had it; and as it had it before, some twice
CORNERS = {
    "mergingv2": tuple(itertools.product(range(2), repeat=3)),
    "merging": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)),
    "merging-1.3": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1)),
}


class VolumeAttention(Splittable):
    """`jaxattn.zoo.shifted_window_attention` of a volume, where a ragged grid is padded by zeros that take part.

    A window is no larger than the grid, and not shifted along an axis that it covers. The bias of a smaller window is
    MONAI's: it takes its tokens for the first of a whole window, one after the other.
    """

    def __init__(
        self, num_heads: int, width: int, window: tuple[int, ...], shift: tuple[int, ...],
        boundary: str | Sequence[str], **kwargs: Any,
    ):  # fmt: skip
        self.window, self.shift, self.boundary = window, shift, boundary
        self.attention = Attention(
            num_heads, width, window=Window(window, block=window), relative_bias=True, kernel_init=small_init, **kwargs
        )

    def __call__(self, x: Float[Array, "*batch depth height width features"], *, sow_weights: bool = False):
        layer: Any = self.attention
        rows = x.shape[-4]
        whole = (rows * shard_count(self.axis_name), *x.shape[-3:-1])
        window = tuple(min(k, n) for k, n in zip(self.window, whole, strict=True))
        turn = Turn.of("SwinVolume", x, window, self.shift, False, self.boundary, self.axis_name)
        x = turn.there(x, 1)
        cut = [0 if around else s for s, around in zip(turn.shifts, turn.cyclic, strict=True)]
        parts = jnp.asarray(regions(whole, window, cut, False))
        if self.axis_name is not None:
            parts = lax.dynamic_slice_in_dim(parts, lax.axis_index(self.axis_name) * rows, rows)
        query, key, value = layer.query(x), layer.key(x), layer.value(x)
        table = layer.relative_bias[...].astype(query.dtype)
        terms: dict[str, Any] = {"window": Window(window, block=window), "relative_bias": table}
        if window != self.window:
            del terms["relative_bias"]
            terms["bias"] = self._smaller(table, window, x.shape[-4:-1])
        terms["segment_ids"] = jnp.broadcast_to(parts, x.shape[:-1]) if any(cut) else None
        if sow_weights:
            self.sow(nnx.Intermediate, "attention_weights", attention_weights(query, key, **terms))
        return turn.back(layer.out(attention(query, key, value, **terms)), 1)

    def _smaller(self, table: Array, window: tuple[int, ...], grid: tuple[int, ...]) -> Array:
        """Of a smaller window, the bias of each token of the grid by slot."""
        place = np.stack(np.unravel_index(np.arange(np.prod(window)), self.window))
        offset = place[:, None] - place[:, :, None] + np.asarray(self.window)[:, None, None] - 1
        bias = jnp.moveaxis(table[:, *offset], 0, 1).reshape(*window, -1, *window)
        return jnp.tile(bias, [n // k for n, k in zip(grid, window, strict=True)] + [1] * 4)


class Merge(Splittable):
    """2 × 2 × 2 tokens, one after the other, with a norm, and a linear map to twice the features of one."""

    def __init__(self, width: int, corners: Sequence[tuple[int, int, int]], **kwargs: Any):
        self.corners = tuple(corners)
        self.norm = layer_norm(8 * width, 1e-5, **kwargs)
        self.reduce = nnx.Linear(8 * width, 2 * width, use_bias=False, kernel_init=small_init, **kwargs)

    def __call__(self, x: Float[Array, "*batch depth height width features"]):
        if self.axis_name is not None and x.shape[-4] % 2:
            raise ValueError(f"SwinVolume: planes of a shard (={x.shape[-4]}) must be even where they are merged")
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 4) + [(0, n % 2) for n in x.shape[-4:-1]] + [(0, 0)])
        parts = [x[..., i::2, j::2, k::2, :] for i, j, k in self.corners]
        return self.reduce(self.norm(jnp.concatenate(parts, axis=-1)))


class SwinVolume(Splittable):
    """Swin (Liu et al. 2021, arXiv 2103.14030) of a volume, as SwinUNETR's encoder has it (Hatamizadeh et al. 2022,
    arXiv 2201.01266): patches, stages of blocks with `VolumeAttention`, shifted in every other one, and after each a
    `Merge` that halves the grid and doubles the features. With a cyclic axis, as longitude is, its blocks are those of
    weather models (Bi et al. 2023, Pangu-Weather, arXiv 2211.02556, whose bias has more of its own).

    Attributes:
      strides, widths: of the patches and of what each stage ends with, as `pyramid` gives them.

    Args:
      depths: blocks of each stage.
      width: features of a token of the first stage.
      num_heads: of each stage.
      window: side of a window, or one for each axis.
      patch_size: side of a patch, or one for each axis.
      boundary: "mask", or "wrap" for a cyclic axis; one, or one for each axis.
      merging: in what order 8 tokens become one: "merging" or "mergingv2", as MONAI's `downsample`, or "merging-1.3",
        as "merging" was in its version 1.3, by which earlier weights were trained.
      num_classes: of the logits, linear in the mean of the last features; 0 leaves them out.
      in_features, drop_path, remat, dtype, param_dtype, rngs: as in `VolumeNet`.

    >>> from flax import nnx
    >>> sizes = dict(depths=(2, 2), width=8, num_heads=(2, 4), window=(2, 4, 4), boundary=("mask", "mask", "wrap"))
    >>> model = nnx.eval_shape(lambda: SwinVolume(**sizes, num_classes=0, in_features=5, rngs=nnx.Rngs(0)))
    >>> volumes = jnp.ones((1, 6, 20, 32, 5))
    >>> [features.shape for features in nnx.eval_shape(lambda m, x: m.pyramid(x), model, volumes)]
    [(1, 3, 10, 16, 8), (1, 2, 5, 8, 16), (1, 1, 3, 4, 32)]
    """

    @checked
    def __init__(
        self,
        depths: Sequence[int],
        width: int,
        num_heads: Sequence[int],
        *,
        window: Size = 7,
        patch_size: Size = 2,
        boundary: str | Sequence[str] = "mask",
        merging: Literal["merging", "mergingv2", "merging-1.3"] = "merging",
        num_classes: Natural,
        in_features: int,
        drop_path: float = 0.0,
        remat: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        sides, self.patch_size = (
            per_axis("SwinVolume", name, size, 3) for name, size in (("window", window), ("patch_size", patch_size))
        )
        if len(depths) != len(num_heads) or not depths:
            raise ValueError(
                f"SwinVolume: depths (={depths}) and num_heads (={num_heads}) must have one for each stage"
            )
        for n, heads in enumerate(num_heads):
            if width * 2**n % heads:
                raise ValueError(f"SwinVolume: num_heads (={num_heads}) must divide width (={width}) · 2ⁿ in stage n")
        self.cyclic = cyclic_axes("SwinVolume", boundary, 3)
        check_rates("SwinVolume", drop_path=drop_path)
        self.in_features, self.remat = in_features, remat
        scales = [2**n for n in range(len(depths) + 1)]
        self.strides, self.widths = tuple(self.patch_size[0] * n for n in scales), tuple(width * n for n in scales)
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.patches = Conv(in_features, width, self.patch_size, self.patch_size, padding="VALID", **kwargs)
        rates, stages, merges = iter(depth_rates(drop_path, sum(depths))), [], []
        for depth, heads, wide in zip(depths, num_heads, self.widths[:-1], strict=True):
            blocks = []
            for m in range(depth):
                shift = tuple(k // 2 if m % 2 else 0 for k in sides)
                mix = VolumeAttention(heads, wide, sides, shift, boundary, **kwargs)
                blocks.append(MixBlock(wide, 4 * wide, mix, axes=3, drop_path_rate=next(rates), **kwargs))
            stages.append(Stage(None, blocks))
            merges.append(Merge(wide, CORNERS[merging], **kwargs))
        self.stages, self.merges = nnx.List(stages), nnx.List(merges)
        free = {"use_bias": False, "use_scale": False, **kwargs}
        self.norms = nnx.List([layer_norm(wide, 1e-5, **free) for wide in self.widths])
        self.head = linear_head(self.widths[-1], num_classes, param_dtype=param_dtype, rngs=rngs)

    @property
    def translations(self) -> tuple[Translation, ...]:
        """MONAI's names, in a file of SwinUNETR or of the encoder's part of it."""
        table: dict[str, str | Rule] = {"patches": "patch_embed.proj"}
        for n in range(len(self.stages)):
            table |= under(f"stages.{n}.blocks.*", f"layers{n + 1}.0.blocks.*", BLOCK)
            table |= under(f"merges.{n}", f"layers{n + 1}.0.downsample", {"norm": "norm", "reduce": "reduction"})
        return (Translation("MONAI", below("swinViT", table), derived=("relative_position_index",), beside=UNET),)

    def pyramid(
        self, volumes: Num[ArrayLike, "..."], *, sow_weights: bool = False, rngs: nnx.Rngs | None = None
    ) -> list[Float[Array, "..."]]:
        """The patches and what each stage ends with, each token normalised, `[*batch, depth, height, width, features]`
        with the sizes in `strides` and `widths`. A volume that the patches do not divide ends in zeros."""
        x = jnp.asarray(volumes)
        if x.ndim < 4 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"SwinVolume: volumes (={x.shape}) must be [*batch, depth, height, width, in_features "
                f"(={self.in_features})]"
            )
        for axis, (n, p, around) in enumerate(zip(x.shape[-4:-1], self.patch_size, self.cyclic, strict=True)):
            if around and n % (unit := p * 2 ** len(self.stages)):
                raise ValueError(
                    f"SwinVolume: volumes (={x.shape}) must have a multiple of {unit} voxels along cyclic axis {axis}"
                )
        check_rngs("SwinVolume", rngs, drop_path=self.stages[-1].blocks[-1].drop_path)
        pads = [(0, -n % p) for n, p in zip(x.shape[-4:-1], self.patch_size, strict=True)]
        x = self.patches(jnp.pad(x, [(0, 0)] * (x.ndim - 4) + pads + [(0, 0)]))
        features = [x]
        for stage, merge in zip(self.stages, self.merges, strict=True):
            x = merge(stage(x, sow_weights=sow_weights, rngs=rngs, remat=self.remat))
            features.append(x)
        return [norm(each) for norm, each in zip(self.norms, features, strict=True)]

    def __call__(
        self, volumes: Num[ArrayLike, "..."], *, sow_weights: bool = False, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "*batch classes"]:
        """Logits of `volumes` `[*batch, depth, height, width, in_features]`; with `num_classes=0`, the mean of the last
        features. `rngs` is for `drop_path`."""
        x = self.pyramid(volumes, sow_weights=sow_weights, rngs=rngs)[-1].mean(axis=(-4, -3, -2))
        x = x if self.axis_name is None else jax.lax.pmean(x, self.axis_name)
        return x if self.head is None else self.head(x)


def swin_unetr_encoder(**kwargs: Any) -> SwinVolume:
    """SwinUNETR's encoder with its `feature_size` of 48: 8,062,002 parameters without a head, for volumes of 96³."""
    return SwinVolume((2,) * 4, 48, (3, 6, 12, 24), **{"num_classes": 0, "in_features": 1, **kwargs})

"""VOLO: outlook attention on a fine grid, attention on a coarser one, and a class token that looks at the end."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxattn.checked import Natural, checked
from jaxattn.models.backbone import Backbone, MixBlock, Stage, layer_norm, linear_head, small_init
from jaxattn.models.gelu import gelu
from jaxattn.models.residual import check_rates, depth_rates
from jaxattn.models.resize import resize_grid
from jaxattn.models.resnet_blocks import batch_norm
from jaxattn.models.translation import FUSED, OUT, Rule, Table, Translation, under
from jaxattn.models.vit_blocks import TokenMixer
from jaxattn.nn.attention import Attention
from jaxattn.nn.conv import Conv
from jaxattn.nn.grid import Splittable
from jaxattn.nn.outlook import OutlookAttention
from jaxattn.sizes import Size, per_axis

MLP: Table = {"norm1": "norm1", "norm2": "norm2", "expand": "mlp.fc1", "contract": "mlp.fc2"}
OUTLOOK: Table = {
    "mix.layer.value": Rule("attn.v.weight", "i head dim -> (head dim) i"),
    "mix.layer.attention": Rule("attn.attn.weight", "i head a b c d -> (head a b c d) i"),
    "mix.layer.attention_bias": Rule("attn.attn.bias", "head a b c d -> (head a b c d)"),
    "mix.layer.out": Rule("attn.proj.weight", "head dim o -> o (head dim)"),
    "mix.layer.out_bias": "attn.proj.bias", **MLP,
}  # fmt: skip
ATTENTION: Table = {
    "mix.layer.layer.query|key|value": Rule("attn.qkv", FUSED), "mix.layer.layer.out": Rule("attn.proj", OUT), **MLP,
}  # fmt: skip
CLASS: Table = {
    "attention.query": Rule("attn.q", {"kernel": "i head dim -> (head dim) i"}),
    "attention.key|value": Rule("attn.kv", FUSED), "out": "attn.proj", **MLP,
}  # fmt: skip
TIMM: Table = {
    **{f"stem.{n}": f"patch_embed.conv.{3 * n}" for n in range(3)},
    **{f"stem_norms.{n}": f"patch_embed.conv.{3 * n + 1}" for n in range(3)}, "patches": "patch_embed.proj",
    **under("stages.0.blocks.*", "network.0.*", OUTLOOK), "stages.1.down.conv": "network.1.proj",
    "stages.1.down.position": Rule("pos_embed", "row column c -> 1 row column c", resize_grid),
    "token": Rule("cls_token", "c -> 1 1 c"), **under("class_blocks.*", "post_network.*", CLASS),
    "head.token": "head", "head.tokens": "aux_head",
}  # fmt: skip


class Mix(Splittable):
    """`nn.OutlookAttention` in windows of 3 × 3 at every other token, or attention of all tokens."""

    def __init__(self, width: int, num_heads: int, outlook: bool, **kwargs: Any):
        if outlook:
            self.layer = OutlookAttention(num_heads, width, (3, 3), strides=2, **kwargs)
        else:
            self.layer = TokenMixer(
                width, num_heads, "global", window=(1, 1), qkv_bias=False, kernel_init=small_init, **kwargs
            )

    def __call__(self, x: Float[Array, "*batch height width features"], *, sow_weights: bool = False):
        if isinstance(self.layer, TokenMixer):
            return self.layer(x, axes=2, sow_weights=sow_weights)
        return self.layer(x)


class Downsample(Splittable):
    """A 2 × 2 convolution of stride 2, and a learned position."""

    def __init__(self, in_features: int, features: int, grid: Sequence[int], **kwargs: Any):
        self.conv = Conv(in_features, features, (2, 2), 2, padding="VALID", **kwargs)
        self.position = nnx.Param(small_init(kwargs["rngs"].params(), (*grid, features), kwargs["param_dtype"]))

    def __call__(self, x: Float[Array, "*batch height width channels"]):
        x, position = self.conv(x), self.position[...]
        if self.axis_name is not None or x.shape[-3:] != position.shape:
            raise ValueError(
                f"VOLO: images must be of image_size, whose coarser grid is {position.shape[:2]}, and on one device; "
                f"the grid is {x.shape[-3:-1]}"
            )
        return x + position.astype(x.dtype)


class ClassBlock(Splittable):
    """t ← t + attention(norm₁(t), norm₁([t, x])), and then t ← t + W₂ gelu(W₁ norm₂(t)), of a class token t
    (Touvron et al. 2021, CaiT, arXiv 2103.17239)."""

    def __init__(self, width: int, num_heads: int, hidden: int, **kwargs: Any):
        self.norm1, self.norm2 = (layer_norm(width, 1e-5, **kwargs) for _ in range(2))
        self.attention = Attention(
            num_heads, width, use_bias=False, out_projection=False, rank=1, keep_rngs=False, kernel_init=small_init,
            **kwargs,
        )  # fmt: skip
        self.out = nnx.Linear(width, width, kernel_init=small_init, **kwargs)
        self.expand = nnx.Linear(width, hidden, kernel_init=small_init, **kwargs)
        self.contract = nnx.Linear(hidden, width, kernel_init=small_init, **kwargs)

    def __call__(self, token: Float[Array, "*batch 1 features"], x: Float[Array, "*batch tokens features"]):
        seen = self.norm1(jnp.concatenate([token, x], axis=-2))
        token = token + self.out(self.attention(seen[..., :1, :], seen))
        return token + self.contract(gelu(self.expand(self.norm2(token))))


class TokenHead(Splittable):
    """W t + b for the class token t, and half the largest of V x + c over all others: their own classes."""

    def __init__(self, width: int, num_classes: int, **kwargs: Any):
        self.token, self.tokens = (linear_head(width, num_classes, **kwargs) for _ in range(2))

    def __call__(self, x: Float[Array, "*batch tokens features"]):
        return self.token(x[..., 0, :]) + self.tokens(x[..., 1:, :]).max(axis=-2) / 2


class VOLO(Backbone):
    """VOLO (Yuan et al. 2021, arXiv 2106.13112): a stem of three convolutions and patches of 8 × 8 pixels, blocks of
    outlook attention, then on half the grid blocks of attention, two `ClassBlock`s, and `TokenHead`.

    Args:
      depths: blocks of each stage, the first of which has outlook attention.
      widths: features of a token of each stage; all but the first are equal.
      num_heads: of each stage.
      mlp_ratio: hidden features of a block's MLP, in widths.
      stem: features of the stem.
      image_size: of the images, an int or (height, width), which 16 divides. A file's positions of another size are
        resized to it, as the authors do; timm does not.
      num_classes, in_features, drop_path, remat, dtype, param_dtype, rngs: as in `ConvNeXt`.

    >>> from flax import nnx
    >>> sizes = dict(depths=(1, 1), widths=(8, 16), num_heads=(2, 4), stem=4, image_size=(32, 48), num_classes=5)
    >>> model = nnx.eval_shape(lambda: VOLO(**sizes, rngs=nnx.Rngs(0)))
    >>> [features.shape for features in nnx.eval_shape(lambda m, x: m.pyramid(x), model, jnp.ones((2, 32, 48, 3)))]
    [(2, 4, 6, 8), (2, 2, 3, 16)]
    """

    @checked
    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        num_heads: Sequence[int],
        *,
        mlp_ratio: int = 3,
        stem: int = 64,
        image_size: Size = 224,
        num_classes: Natural = 1000,
        in_features: int = 3,
        drop_path: float = 0.0,
        remat: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if not 2 <= len(depths) == len(widths) == len(num_heads) or len({*widths[1:]}) > 1:
            raise ValueError(
                f"VOLO: depths (={depths}), widths (={widths}) and num_heads (={num_heads}) must have one for each of "
                "two stages or more, and all widths but the first must be equal"
            )
        for width, heads in zip(widths, num_heads, strict=True):
            if width % heads:
                raise ValueError(f"VOLO: num_heads (={num_heads}) must divide widths (={widths})")
        grid = tuple(n // 16 for n in per_axis("VOLO", "image_size", image_size, 2, least=16))
        check_rates("VOLO", drop_path=drop_path)
        self.in_features, self.remat, self.widths = in_features, remat, tuple(widths)
        self.strides = (8, *(16,) * (len(depths) - 1))
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        layers = [(in_features, 7, 2), (stem, 3, 1), (stem, 3, 1)]
        self.stem = nnx.List([Conv(n, stem, (k, k), s, padding=k // 2, use_bias=False, **kwargs) for n, k, s in layers])
        self.stem_norms = nnx.List([batch_norm(stem, **kwargs) for _ in layers])
        self.patches = Conv(stem, widths[0], (4, 4), 4, padding="VALID", **kwargs)
        rates, stages = iter(depth_rates(drop_path, sum(depths))), []
        for n, (depth, width, heads) in enumerate(zip(depths, widths, num_heads, strict=True)):
            mixes = [Mix(width, heads, n == 0, **kwargs) for _ in range(depth)]
            blocks = [MixBlock(width, mlp_ratio * width, mix, drop_path_rate=next(rates), **kwargs) for mix in mixes]
            stages.append(Stage(Downsample(widths[0], width, grid, **kwargs) if n == 1 else None, blocks))
        self.stages, last = nnx.List(stages), widths[-1]
        self.token = nnx.Param(small_init(rngs.params(), (last,), param_dtype))
        self.class_blocks = nnx.List([ClassBlock(last, num_heads[-1], mlp_ratio * last, **kwargs) for _ in range(2)])
        self.norm = layer_norm(last, 1e-5, **kwargs)
        self.head = nnx.data(None)
        if num_classes:
            self.head = TokenHead(last, num_classes, param_dtype=param_dtype, rngs=rngs)

    @property
    def translations(self) -> tuple[Translation, ...]:
        table = dict(TIMM)
        for n in range(1, len(self.stages)):
            table |= under(f"stages.{n}.blocks.*", f"network.{n + 1}.*", ATTENTION)
        return (Translation("timm", table),)

    def begin(self, images: Array) -> Float[Array, "*batch height width features"]:
        x = images
        for conv, norm in zip(self.stem, self.stem_norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return self.patches(x)

    def finish(self, x: Array) -> Float[Array, "..."]:
        """The class token; with a head, which sees the others too, all tokens."""
        x = x.reshape(*x.shape[:-3], -1, x.shape[-1])
        token = jnp.broadcast_to(self.token[...].astype(x.dtype), (*x.shape[:-2], 1, x.shape[-1]))
        for block in self.class_blocks:
            token = block(token, x)
        return self.norm(token)[..., 0, :] if self.head is None else self.norm(jnp.concatenate([token, x], axis=-2))


def _sized(depths: tuple[int, ...], width: int, heads: tuple[int, int], kwargs: dict[str, Any]) -> VOLO:
    return VOLO(depths, (width, *(2 * width,) * 3), (heads[0], *(heads[1],) * 3), **kwargs)


def volo_d1(**kwargs: Any) -> VOLO:
    """26,632,040 parameters with 1,000 classes, for images of 224 × 224."""
    return _sized((4, 4, 8, 2), 192, (6, 12), kwargs)


def volo_d2(**kwargs: Any) -> VOLO:
    """58,678,336 parameters."""
    return _sized((6, 4, 10, 4), 256, (8, 16), kwargs)


def volo_d3(**kwargs: Any) -> VOLO:
    """86,325,072 parameters."""
    return _sized((8, 8, 16, 4), 256, (8, 16), kwargs)


def volo_d4(**kwargs: Any) -> VOLO:
    """192,961,520 parameters."""
    return _sized((8, 8, 16, 4), 384, (12, 16), kwargs)


def volo_d5(**kwargs: Any) -> VOLO:
    """295,455,584 parameters."""
    return _sized((12, 12, 20, 4), 384, (12, 16), {"mlp_ratio": 4, "stem": 128, **kwargs})

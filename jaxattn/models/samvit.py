"""SAM's image encoder, ViTDet: attention in windows, and after every few such blocks, of the whole grid."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Num

from jaxattn.checked import Natural, checked
from jaxattn.halo import shard_count, split_attention
from jaxattn.models.backbone import Backbone, MixBlock, Stage, layer_norm, linear_head, small_init
from jaxattn.models.residual import check_rates, depth_rates
from jaxattn.models.resize import resize_grid, resize_offsets
from jaxattn.models.translation import FUSED, OUT, Rule, Table, Translation, below, under
from jaxattn.nn.attention import Attention
from jaxattn.nn.conv import Conv
from jaxattn.nn.grid import Splittable
from jaxattn.parts import attention_weights
from jaxattn.sizes import Size, per_axis
from jaxattn.window import Window

POSITION = Rule("pos_embed", "row column c -> 1 row column c", resize_grid)
# theirs are by query less key, ours by key less query
OFFSETS = "-offset dim -> offset dim"
MIX: Table = {
    "mix.layer.query|key|value": Rule("attn.qkv", FUSED), "mix.layer.out": Rule("attn.proj", OUT),
    "mix.rows": Rule("attn.rel_pos_h", OFFSETS, resize_offsets),
    "mix.columns": Rule("attn.rel_pos_w", OFFSETS, resize_offsets),
}  # fmt: skip
TIMM: Table = {
    "patches": "patch_embed.proj", "position": POSITION, "neck.reduce": "neck.0", "neck.norm1": "neck.1",
    "neck.conv": "neck.2", "neck.norm2": "neck.3", "head": "head.fc",
}  # fmt: skip
TIMM_BLOCK: Table = {
    **MIX, "norm1": "norm1", "norm2": "norm2", "expand": "mlp.fc1", "contract": "mlp.fc2",
}  # fmt: skip
FACEBOOK_BLOCK: Table = {**TIMM_BLOCK, "expand": "mlp.lin1", "contract": "mlp.lin2"}
HUGGING_FACE: Table = {
    "patches": "patch_embed.projection", "position": POSITION, "neck.reduce": "neck.conv1",
    "neck.norm1": "neck.layer_norm1", "neck.conv": "neck.conv2", "neck.norm2": "neck.layer_norm2",
}  # fmt: skip
HUGGING_FACE_BLOCK: Table = {**FACEBOOK_BLOCK, "norm1": "layer_norm1", "norm2": "layer_norm2"}
# the rest of SAM, which stands in the same file
DECODER = ("prompt_encoder.", "mask_decoder.", "shared_image_embedding.")


class AxisAttention(Splittable):
    """Attention with an embedding of rows and one of columns, which the heads share,

        y_i = W_O Σ_{j in N(i)} softmax_j(q_i·k_j / √d + q_i·(u[row_j - row_i] + v[column_j - column_i])) v_j + b_O

    over the whole grid, or in windows that part it (Li et al. 2022, MViTv2, arXiv 2112.01526).

    SAM pads a ragged grid by zeros that take part: their keys and values are the biases. That is the boundary "zero",
    where the bias of the keys is left out, which softmax does not see, and that of the values comes after the sum.

    Args:
      width, num_heads: of the layer.
      size: of the grid, or of a window.
      parted: whether it is of a window.
    """

    def __init__(self, width: int, num_heads: int, size: tuple[int, ...], parted: bool, **kwargs: Any):
        self.window = Window(size, block=size, boundary="zero") if parted else Window(size)
        self.layer = Attention(num_heads, width, window=self.window, kernel_init=small_init, keep_rngs=False, **kwargs)
        self.rows, self.columns = (
            nnx.Param(jnp.zeros((2 * n - 1, width // num_heads), kwargs["param_dtype"])) for n in size
        )

    def __call__(self, x: Float[Array, "*batch height width features"], *, sow_weights: bool = False):
        layer: Any = self.layer
        query, bias = layer.query(x), layer.value.bias[...]
        key, value = (part(x) - part.bias[...].astype(query.dtype) for part in (layer.key, layer.value))
        tables = tuple(table[...].astype(query.dtype)[None] for table in (self.rows, self.columns))
        terms: dict[str, Any] = {"window": self.window, "key_embedding": tables}
        if sow_weights:
            self.sow(nnx.Intermediate, "attention_weights", attention_weights(query, key, **terms))
        y = split_attention(query, key, value, axis_name=self.axis_name, **terms)
        return layer.out(y + bias.astype(y.dtype))


class Neck(Splittable):
    """norm(W₂ ∗ norm(W₁ x)), the second a 3 × 3 convolution."""

    def __init__(self, width: int, features: int, **kwargs: Any):
        self.reduce = Conv(width, features, (1, 1), use_bias=False, **kwargs)
        self.conv = Conv(features, features, (3, 3), padding=1, use_bias=False, **kwargs)
        self.norm1, self.norm2 = (layer_norm(features, 1e-6, **kwargs) for _ in range(2))

    def __call__(self, x: Float[Array, "*batch height width features"]):
        return self.norm2(self.conv(self.norm1(self.reduce(x))))


class SAMViT(Backbone):
    """The image encoder of Segment Anything (Kirillov et al. 2023, arXiv 2304.02643), a ViTDet (Li et al. 2022, arXiv
    2203.16527): patches and learned positions, stages of blocks with `AxisAttention` in windows, whose last attends to
    the whole grid, and a `Neck`. `pyramid` gives every stage's features, and last what SAM's decoder takes, the neck's;
    the logits are linear in the mean of those.

    Args:
      depths: blocks of each stage.
      width: features of a token.
      num_heads: of every attention.
      window: side of a window, or (height, width).
      patch_size: side of a patch, or (height, width).
      neck: features that the neck gives.
      image_size: of the images, an int or (height, width), which the patches divide.
      epsilon: of the blocks' norms. The weights were trained with 1e-6; timm has 1e-5.
      num_classes, in_features, drop_path, remat, dtype, param_dtype, rngs: as in `ConvNeXt`.

    >>> from flax import nnx
    >>> sizes = dict(depths=(2, 2), width=8, num_heads=2, window=3, neck=4, image_size=(64, 80), num_classes=5)
    >>> model = nnx.eval_shape(lambda: SAMViT(**sizes, rngs=nnx.Rngs(0)))
    >>> [features.shape for features in nnx.eval_shape(lambda m, x: m.pyramid(x), model, jnp.ones((2, 64, 80, 3)))]
    [(2, 4, 5, 8), (2, 4, 5, 8), (2, 4, 5, 4)]
    """

    @checked
    def __init__(
        self,
        depths: Sequence[int],
        width: int,
        num_heads: int,
        *,
        window: Size = 14,
        patch_size: Size = 16,
        neck: int = 256,
        image_size: Size = 1024,
        epsilon: float = 1e-6,
        num_classes: Natural = 1000,
        in_features: int = 3,
        drop_path: float = 0.0,
        remat: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        patch, windows = (
            per_axis("SAMViT", name, size, 2) for name, size in (("patch_size", patch_size), ("window", window))
        )
        self.image_size = per_axis("SAMViT", "image_size", image_size, 2)
        if not depths or width % num_heads:
            raise ValueError(
                f"SAMViT: depths (={depths}) must have one for each stage, and num_heads (={num_heads}) divide width "
                f"(={width})"
            )
        if any(n % p for n, p in zip(self.image_size, patch, strict=True)):
            raise ValueError(f"SAMViT: patch_size (={patch_size}) must divide image_size (={image_size})")
        if epsilon <= 0:
            raise ValueError(f"SAMViT: epsilon (={epsilon}) must be a number > 0")
        check_rates("SAMViT", drop_path=drop_path)
        grid = tuple(n // p for n, p in zip(self.image_size, patch, strict=True))
        self.in_features, self.remat = in_features, remat
        self.strides, self.widths = (patch[0],) * (len(depths) + 1), (*(width,) * len(depths), neck)
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.patches = Conv(in_features, width, patch, patch, padding="VALID", **kwargs)
        self.position = nnx.Param(small_init(rngs.params(), (*grid, width), param_dtype))
        rates, stages = iter(depth_rates(drop_path, sum(depths))), []
        for depth in depths:
            mixes = [AxisAttention(width, num_heads, windows, True, **kwargs) for _ in range(depth - 1)]
            mixes.append(AxisAttention(width, num_heads, grid, False, **kwargs))
            settings = {"epsilon": epsilon, **kwargs}
            blocks = [MixBlock(width, 4 * width, mix, drop_path_rate=next(rates), **settings) for mix in mixes]
            stages.append(Stage(None, blocks))
        self.stages, self.neck = nnx.List(stages), Neck(width, neck, **kwargs)
        self.head = linear_head(neck, num_classes, param_dtype=param_dtype, rngs=rngs)

    @property
    def translations(self) -> tuple[Translation, ...]:
        """timm's names, the authors', and Hugging Face's; theirs number the blocks through."""
        places = [f"stages.{n}.blocks.{m}" for n, stage in enumerate(self.stages) for m in range(len(stage.blocks))]

        def whole(table: Table, blocks: str, block: Table) -> Table:
            found = dict(table)
            for n, place in enumerate(places):
                found |= under(place, f"{blocks}.{n}", block)
            return found

        return (
            Translation("timm", whole(TIMM, "blocks", TIMM_BLOCK)),
            Translation("Facebook", below("image_encoder", whole(TIMM, "blocks", FACEBOOK_BLOCK)), beside=DECODER),
            Translation(
                "Hugging Face", below("vision_encoder", whole(HUGGING_FACE, "layers", HUGGING_FACE_BLOCK)),
                beside=DECODER,
            ),
        )  # fmt: skip

    def begin(self, images: Array) -> Float[Array, "*batch height width features"]:
        """The patches, and where they stand."""
        size = (images.shape[-3] * shard_count(self.axis_name), images.shape[-2])
        if size != self.image_size:
            raise ValueError(f"SAMViT: images (={images.shape}) must be of image_size (={self.image_size})")
        x, position = self.patches(images), self.position[...]
        if self.axis_name is not None:
            rows = x.shape[-3]
            position = jax.lax.dynamic_slice_in_dim(position, jax.lax.axis_index(self.axis_name) * rows, rows)
        return x + position.astype(x.dtype)

    def pyramid(
        self, images: Num[ArrayLike, "..."], *, sow_weights: bool = False, rngs: nnx.Rngs | None = None
    ) -> list[Float[Array, "..."]]:
        """The features of every stage, and the neck's."""
        features = super().pyramid(images, sow_weights=sow_weights, rngs=rngs)
        return [*features, self.neck(features[-1])]

    def finish(self, x: Array) -> Float[Array, "*batch features"]:
        return self.mean(x)


def samvit_base(**kwargs: Any) -> SAMViT:
    """89,670,912 parameters without a head, for images of 1024 × 1024, as all three. SAM has their longer side at 1024,
    and zeros below or to the right; `pretrained.preprocess` takes the square in the middle, as timm does."""
    return SAMViT((3,) * 4, 768, 12, **{"num_classes": 0, **kwargs})


def samvit_large(**kwargs: Any) -> SAMViT:
    """308,278,272 parameters."""
    return SAMViT((6,) * 4, 1024, 16, **{"num_classes": 0, **kwargs})


def samvit_huge(**kwargs: Any) -> SAMViT:
    """637,026,048 parameters."""
    return SAMViT((8,) * 4, 1280, 16, **{"num_classes": 0, **kwargs})

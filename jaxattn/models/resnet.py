"""Residual networks whose spatial mixing is convolution or local attention, stage by stage."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn import dtypes
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Num

from jaxattn.attention import merge_attentions
from jaxattn.checked import Natural, checked
from jaxattn.einsum import einsum
from jaxattn.halo import shard_count, split_attention, split_pad
from jaxattn.models.residual import check_rates, check_rngs, depth_rates, drop_path, run_block
from jaxattn.models.translation import Rule, Table, Translation, under
from jaxattn.nn.attention import Attention
from jaxattn.nn.conv import Conv
from jaxattn.nn.grid import Splittable
from jaxattn.sizes import Size, ints
from jaxattn.window import Window

MIXES = ("conv", "attention")
STEMS = ("cifar", "imagenet")
EXPANSION = {"basic": 1, "bottleneck": 4}
# a block's names in timm's and torchvision's files, which are the same; its layers are numbered from one
PYTORCH: Table = {
    **{f"layers.{n}": f"conv{n + 1}" for n in range(3)},
    **{f"layers.{n}.layer": f"conv{n + 1}" for n in range(3)},
    **{f"norms.{n}": f"bn{n + 1}" for n in range(3)},
    "shortcut": "downsample.0",
    "shortcut_norm": "downsample.1",
}
he_init = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


def average_pool(
    x: Float[Array, "*batch height width channels"], axis_name: str | None = None
) -> Float[Array, "*batch height2 width2 channels"]:
    """2 × 2 means, stride 2; an odd edge has nothing beyond it to average with, and repeating it says so."""
    quarter = jnp.full((2, 2), 0.25, x.dtype)
    if axis_name is not None:
        x = split_pad(x, x.ndim - 3, axis_name, (0, 0), size=2, stride=2)
    return einsum("... 2*i+r 2*j+s c, r s -> ... i j c", x, quarter, padding="SAME", boundary="edge")


def max_pool(
    x: Float[Array, "*batch height width channels"],
    size: tuple[int, int],
    strides: tuple[int, int],
    padding: Any,
    axis_name: str | None = None,
) -> Float[Array, "*batch height2 width2 channels"]:
    """Maxima over windows; nothing stands outside the grid."""
    if axis_name is None:
        return nnx.max_pool(x, size, strides, padding)
    height, width = x.shape[-3] * shard_count(axis_name), x.shape[-2]
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads((height, width), size, strides, padding)
    rows, columns = padding
    # a window that leaves the grid holds the edge already: repeating that changes no maximum
    x = split_pad(x, x.ndim - 3, axis_name, rows, size=size[0], stride=strides[0], boundary="edge")
    pads: Any = ((0, 0), columns)
    return nnx.max_pool(x, size, strides, pads)


class AttentionStem(Splittable):
    """SASA's stem: attention in 4 × 4 windows, whose values know where in the window they stand,

        y_i = Σ_{j in N(i)} softmax_j(q_i · k_j) Σ_m p_m[j-i] W_V,m x_j,   p_m[δ] = softmax_m((row[δ₁] + col[δ₂]) · ν_m)

    (Ramachandran et al. 2019, section 3.2). Since the p_m sum to one over m, the sum over m joins M attentions with the
    relative biases log p_m as `merge_attentions` joins partial ones, exactly.

    `[*batch, height, width, in_features]` to `[*batch, height, width, features]`.
    """

    size = (4, 4)

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        num_heads: int,
        mixtures: int = 4,
        dtype=None,
        param_dtype,
        rngs: nnx.Rngs,
    ):
        if features % num_heads:
            raise ValueError(f"AttentionStem: num_heads (={num_heads}) must divide features (={features})")
        head_dim = features // num_heads

        def linear(*out_features):
            return nnx.LinearGeneral(
                in_features, out_features, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

        def table(rows):
            return nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (rows, head_dim), param_dtype))

        self.query, self.key = linear(num_heads, head_dim), linear(num_heads, head_dim)
        self.value = linear(mixtures, num_heads, head_dim)
        # the logits of p are sums of head_dim products of which ν brings the 1/√head_dim: of order one at first
        self.row, self.column, self.mixture = table(self.size[0]), table(self.size[1]), table(mixtures)
        self.window = Window(self.size, boundary="mask")
        self.dtype = dtype

    def log_mixture(self) -> Float[Array, "mixtures height width"]:
        """log p_m[δ]: how a token's value is mixed at each slot of the window."""
        position = self.row[...][:, None] + self.column[...]
        nu = self.mixture[...] * self.mixture.shape[-1] ** -0.5
        return jax.nn.log_softmax(jnp.einsum("ijd,md->mij", position, nu), axis=0)

    def __call__(self, x: Num[Array, "*batch height width channels"]) -> Float[Array, "*batch height width features"]:
        query, key, values = dtypes.promote_dtype((self.query(x), self.key(x), self.value(x)), dtype=self.dtype)
        heads = query.shape[-2]
        # slot u of an even window is the offset u - k // 2, which the relative table keeps at k - 1 + u - k // 2
        pads = [(k - 1 - k // 2, k // 2) for k in self.size]
        tables = jnp.pad(self.log_mixture(), [(0, 0), *pads]).astype(query.dtype)
        parts = [
            split_attention(
                query,
                key,
                values[..., m, :, :],
                axis_name=self.axis_name,
                window=self.window,
                relative_bias=jnp.broadcast_to(table, (heads, *table.shape)),
                return_residuals=True,
            )
            for m, table in enumerate(tables)
        ]
        y = merge_attentions([out for out, _ in parts], [lse for _, lse in parts])
        return y.reshape(*x.shape[:-1], -1)


class GridMixer(Splittable):
    """A block's spatial mixing: a 3 × 3 convolution, or local attention as in SASA; either with a stride.

    The attention is Ramachandran et al.'s: relative embeddings factorised into row and column, no bias, no output
    projection, tokens beyond the border left out, and a 2 × 2 average pool where the convolution would have a stride.
    Their q·k has no 1/√head_dim; here it has, which is the same layer with W_K scaled, and starts with small scores.
    """

    def __init__(
        self, in_features: int, features: int, stride: int, mix: str, *, window: int, num_heads: int, **kwargs: Any
    ):
        self.pool = mix == "attention" and stride == 2
        if mix == "conv":
            self.layer = Conv(
                in_features, features, (3, 3), stride, padding=1, use_bias=False, kernel_init=he_init, **kwargs
            )
        else:
            self.layer = Attention(
                num_heads,
                in_features,
                features,
                window=Window((window, window), boundary="mask"),
                key_embedding="factorized",
                use_bias=False,
                out_projection=False,
                **kwargs,
            )

    def __call__(self, x: Num[Array, "*batch height width channels"], *, sow_weights: bool = False):
        y = self.layer(x, sow_weights=sow_weights) if isinstance(self.layer, Attention) else self.layer(x)
        return average_pool(y, self.axis_name) if self.pool else y


class Block(Splittable):
    """A residual block: relu(shortcut(x) + branch(x)), each convolution or attention followed by BatchNorm. In training
    the branch is left out at random (stochastic depth).

    "basic": two mixers. "bottleneck": 1 × 1, mixer, 1 × 1 to four times the features. The stride is the (first)
    mixer's (v1.5, as torchvision), and the shortcut is a 1 × 1 projection where the shape changes.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        stride: int,
        *,
        block: str,
        mix: str,
        window: int,
        num_heads: int,
        zero_init_residual: bool,
        drop_path_rate: float,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        out_features = features * EXPANSION[block]

        def pointwise(in_features, features, stride=1):
            # pads none: a 1 × 1 kernel stands at every stride-th token
            return Conv(
                in_features, features, (1, 1), stride, padding="VALID", use_bias=False, kernel_init=he_init, **kwargs
            )

        def mixer(in_features, stride):
            return GridMixer(in_features, features, stride, mix, window=window, num_heads=num_heads, **kwargs)

        if block == "basic":
            layers = [mixer(in_features, stride), mixer(features, 1)]
        else:
            layers = [pointwise(in_features, features), mixer(features, stride), pointwise(features, out_features)]
        self.layers = nnx.List(layers)
        self.norms = nnx.List([batch_norm(features, **kwargs) for _ in layers[:-1]])
        scale_init = nnx.initializers.zeros if zero_init_residual else nnx.initializers.ones
        self.norms.append(batch_norm(out_features, scale_init=scale_init, **kwargs))
        self.shortcut = self.shortcut_norm = nnx.data(None)
        if stride != 1 or in_features != out_features:
            self.shortcut = pointwise(in_features, out_features, stride)
            self.shortcut_norm = batch_norm(out_features, **kwargs)
        self.drop_path = drop_path(drop_path_rate, 3)

    def __call__(
        self,
        x: Num[Array, "*batch height width channels"],
        *,
        sow_weights: bool = False,
        rngs: nnx.Rngs | None = None,
    ):
        y = x
        for n, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True), 1):
            y = norm(layer(y, sow_weights=sow_weights) if isinstance(layer, GridMixer) else layer(y))
            y = y if n == len(self.layers) else jax.nn.relu(y)
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = self.shortcut_norm(self.shortcut(x))
        return jax.nn.relu(x + self.drop_path(y, rngs=rngs))


def batch_norm(features: int, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs, **kwargs: Any) -> nnx.BatchNorm:
    """Running statistics keep 0.9 of their past at each step (PyTorch's momentum of 0.1)."""
    return nnx.BatchNorm(
        features, momentum=0.9, epsilon=1e-5, dtype=dtype, param_dtype=param_dtype, rngs=rngs, **kwargs
    )


class ResNet(Splittable):
    """A residual network (He et al. 2015, arXiv 1512.03385) of convolutions, local attention (SASA, Ramachandran et
    al. 2019, arXiv 1906.05909), or both, a stage at a time.

    Args:
      stage_sizes: blocks per stage; stage n has width · 2ⁿ features, and each stage but the first halves the grid.
      block: "basic" (two 3 × 3) or "bottleneck" (1 × 1, 3 × 3, 1 × 1 to four times the features).
      num_classes: size of the output; 0 leaves the last layer out, for pooled features.
      in_features: channels of the images.
      width: features of the first stage.
      stem: "imagenet" (7 × 7 of stride 2, then a 3 × 3 max pool of stride 2) or "cifar" (3 × 3; for small images).
      stem_mix: "conv", or "attention" for `AttentionStem` (in "imagenet" followed by a 4 × 4 max pool).
      mix: what stands where a ResNet has its 3 × 3: "conv", "attention", or a tuple of one per stage.
      window: side of the attention windows.
      num_heads: of every attention; it divides the features of each stage that has one.
      zero_init_residual: each block's last BatchNorm scale starts at zero, so each block as the identity
        (Goyal et al. 2017, arXiv 1706.02677). False starts it at one (He et al.).
      drop_path: rate of stochastic depth in the last block; it rises linearly with depth (Huang et al. 2016, arXiv
        1603.09382).
      remat: blocks are computed anew in the backward pass, which then keeps a block's input in place of all within.
      dtype: of the computation; the logits have the promoted dtype of `dtype` and `param_dtype`.
      param_dtype: of the parameters. BatchNorm's statistics are in float32.
      rngs: `nnx.Rngs`; `params` is used.

    Convolutions start from He's normal initialisation (fan out). `train()` and `eval()` switch BatchNorm between the
    batch's statistics (the state at first) and the running ones. With `drop_path`, a call in training is
    `model(images, rngs=nnx.Rngs(dropout=key))`.

    Raises:
      ValueError: an argument out of its range, images whose shape does not fit, or no `rngs` where they are needed.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> model = ResNet((1, 1), block="basic", width=16, mix=("conv", "attention"), rngs=nnx.Rngs(0))
    >>> model(jnp.ones((2, 8, 8, 3))).shape
    (2, 10)
    """

    @checked
    def __init__(
        self,
        stage_sizes: Size,
        *,
        block: str = "bottleneck",
        num_classes: Natural = 10,
        in_features: int = 3,
        width: int = 64,
        stem: str = "cifar",
        stem_mix: str = "conv",
        mix: str | Sequence[str] = "conv",
        window: int = 7,
        num_heads: int = 8,
        zero_init_residual: bool = True,
        drop_path: float = 0.0,
        remat: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        stage_sizes = ints("ResNet", "stage_sizes", stage_sizes)
        mixes = (mix,) * len(stage_sizes) if isinstance(mix, str) else mix
        _one_of("block", block, tuple(EXPANSION))
        _one_of("stem", stem, STEMS)
        _one_of("stem_mix", stem_mix, MIXES)
        if len(mixes) != len(stage_sizes):
            raise ValueError(f"ResNet: mix (={mix!r}) must be a string or one per stage ({len(stage_sizes)})")
        for each in mixes:
            _one_of("mix", each, MIXES)
        check_rates("ResNet", drop_path=drop_path)
        self.in_features = in_features
        self.remat = remat
        first = 1 if stem == "cifar" else 4
        self.strides = tuple(first * 2**n for n in range(len(stage_sizes)))
        self.widths = tuple(width * 2**n * EXPANSION[block] for n in range(len(stage_sizes)))
        self.ends = tuple(int(n) for n in np.cumsum(stage_sizes))  # blocks before and in each stage
        rates = iter(depth_rates(drop_path, sum(stage_sizes)))
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.stem, self.stem_pool = _stem(stem, stem_mix, in_features, width, num_heads, **kwargs)
        self.stem_norm = batch_norm(width, **kwargs)
        blocks, features = [], width
        for stage, (size, stage_mix) in enumerate(zip(stage_sizes, mixes, strict=True)):
            for n in range(size):
                blocks.append(
                    Block(
                        features,
                        width * 2**stage,
                        stride=2 if stage > 0 and n == 0 else 1,
                        block=block,
                        mix=stage_mix,
                        window=window,
                        num_heads=num_heads,
                        zero_init_residual=zero_init_residual,
                        drop_path_rate=next(rates),
                        **kwargs,
                    )
                )
                features = width * 2**stage * EXPANSION[block]
        self.blocks = nnx.List(blocks)
        # dtype is left to promotion: bfloat16 features and float32 weights make float32 logits, as a loss wants them
        head = nnx.Linear(features, num_classes, param_dtype=param_dtype, rngs=rngs) if num_classes else None
        self.head = nnx.data(head)

    @property
    def translations(self) -> tuple[Translation, ...]:
        """timm's names and torchvision's, whose blocks are counted within their stages."""
        table: dict[str, str | Rule] = {"stem": "conv1", "stem_norm": "bn1", "head": "fc"}
        for stage, (start, end) in enumerate(zip((0, *self.ends[:-1]), self.ends, strict=True), 1):
            for n in range(start, end):
                table |= under(f"blocks.{n}", f"layer{stage}.{n - start}", PYTORCH)
        return (Translation("timm", table),)

    def pyramid(
        self, images: Num[ArrayLike, "..."], *, sow_weights: bool = False, rngs: nnx.Rngs | None = None
    ) -> list[Float[Array, "..."]]:
        """The features of every stage, `[*batch, height / stride, width / stride, features]` with the sizes in
        `strides` and `widths`."""
        images = jnp.asarray(images)
        if images.ndim < 3 or images.shape[-1] != self.in_features:
            raise ValueError(
                f"ResNet: images (={images.shape}) must be [*batch, height, width, in_features (={self.in_features})]"
            )
        check_rngs("ResNet", rngs, drop_path=self.blocks[-1].drop_path)
        x = jax.nn.relu(self.stem_norm(self.stem(images)))
        x = x if self.stem_pool is None else max_pool(x, *self.stem_pool, axis_name=self.axis_name)
        features = []
        for n, block in enumerate(self.blocks, 1):
            x = run_block(block, x, sow_weights=sow_weights, rngs=rngs, remat=self.remat)
            features += [x] if n in self.ends else []
        return features

    def features(
        self, images: Num[ArrayLike, "..."], *, sow_weights: bool = False, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "*batch height width features"]:
        """The last block's output, before the mean over the grid."""
        return self.pyramid(images, sow_weights=sow_weights, rngs=rngs)[-1]

    def __call__(
        self, images: Num[ArrayLike, "..."], *, sow_weights: bool = False, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "*batch classes"]:
        """Logits of `images` `[*batch, height, width, in_features]`; with `num_classes=0`, the pooled features.

        With `sow_weights`, each attention's weights are stored for `nnx.capture`:
        `logits, weights = nnx.capture(model, nnx.Intermediate)(images, sow_weights=True)`. `rngs` is for `drop_path`.
        """
        x = self.features(images, sow_weights=sow_weights, rngs=rngs).mean(axis=(-3, -2))
        x = x if self.axis_name is None else jax.lax.pmean(x, self.axis_name)
        return x if self.head is None else self.head(x)


def _stem(
    stem: str, mix: str, in_features: int, width: int, num_heads: int, **kwargs: Any
) -> tuple[Conv | AttentionStem, Any]:
    """The first layer, and the max pool after it: (window, strides, padding), or None."""
    if mix == "attention":
        pool = None if stem == "cifar" else ((4, 4), (4, 4), "SAME")
        return AttentionStem(in_features, width, num_heads=num_heads, **kwargs), pool
    size, stride = (3, 1) if stem == "cifar" else (7, 2)
    layer = Conv(
        in_features, width, (size, size), stride, padding=size // 2, use_bias=False, kernel_init=he_init, **kwargs
    )
    return layer, None if stem == "cifar" else ((3, 3), (2, 2), ((1, 1), (1, 1)))


def _one_of(name: str, value: str, allowed: tuple[str, ...]):
    if value not in allowed:
        raise ValueError(f"ResNet: {name} (={value!r}) must be one of {', '.join(map(repr, allowed))}")


def resnet18(**kwargs: Any) -> ResNet:
    """ResNet-18: 11,689,512 parameters with its defaults, the ImageNet stem and 1,000 classes.

    >>> import jax
    >>> from flax import nnx
    >>> model = nnx.eval_shape(lambda: resnet18(rngs=nnx.Rngs(0)))
    >>> sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    11689512
    """
    return _imagenet((2, 2, 2, 2), "basic", kwargs)


def resnet34(**kwargs: Any) -> ResNet:
    """ResNet-34: 21,797,672 parameters with its defaults, the ImageNet stem and 1,000 classes."""
    return _imagenet((3, 4, 6, 3), "basic", kwargs)


def resnet50(**kwargs: Any) -> ResNet:
    """ResNet-50: 25,557,032 parameters with its defaults, the ImageNet stem and 1,000 classes.

    `resnet50(mix="attention", stem_mix="attention", rngs=...)` is SASA's full attention network.
    """
    return _imagenet((3, 4, 6, 3), "bottleneck", kwargs)


def tiny(**kwargs: Any) -> ResNet:
    """A network of two basic blocks for 8 × 8 digits: one channel, width 32, windows of 5, 4 heads."""
    return ResNet((1, 1), **{"block": "basic", "in_features": 1, "width": 32, "window": 5, "num_heads": 4, **kwargs})


def _imagenet(stage_sizes: tuple[int, ...], block: str, kwargs: dict[str, Any]) -> ResNet:
    return ResNet(stage_sizes, **{"block": block, "num_classes": 1000, "stem": "imagenet", **kwargs})

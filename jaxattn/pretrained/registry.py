"""Which networks have published weights, where, by which licence, and what their images went through."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from jaxattn import models

Three = tuple[float, float, float]
IMAGENET: dict[str, Three] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALVES: dict[str, Three] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
CLIP: dict[str, Any] = {
    "crop": 0.9,
    "statistics": {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)},
}
NON_COMMERCIAL = "CC-BY-NC-4.0"
METHODS = {"bicubic": "cubic", "bilinear": "linear"}


class Preprocess(NamedTuple):
    """What a network's images went through: a call does it.

    >>> import numpy as np
    >>> step = Preprocess(size=4, crop=0.5, interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    >>> step(np.full((20, 10, 3), 255, np.uint8))[0, 0].round(3)
    Array([1., 1., 1.], dtype=float32)
    """

    size: int  # of the image's side, in pixels
    crop: float  # of the shorter side: the square in the middle that is taken
    interpolation: str
    mean: Three  # of pixels from 0 to 1: what is subtracted
    std: Three  # what it is divided by

    def __call__(self, image: ArrayLike) -> Float[Array, "size size 3"]:
        """The square in the middle of `image` `[height, width, 3]` (0 to 255), resized and normalised."""
        x = jnp.asarray(image, jnp.float32)
        if x.ndim != 3 or x.shape[-1] != 3:
            raise ValueError(f"Preprocess: image (={x.shape}) must be [height, width, 3]")
        height, width, _ = x.shape
        side = round(min(height, width) * self.crop)
        top, left = (height - side + 1) // 2, (width - side + 1) // 2
        square = x[top : top + side, left : left + side]
        square = jax.image.resize(square, (self.size, self.size, 3), METHODS[self.interpolation])
        return (jnp.clip(square, 0, 255) / 255 - jnp.array(self.mean, x.dtype)) / jnp.array(self.std, x.dtype)


class Published(NamedTuple):
    """A network with weights."""

    make: Callable[..., Any]  # its constructor
    source: str  # the repository of the weights that were compared, at Hugging Face
    licence: str  # theirs
    preprocess: Preprocess
    num_classes: int  # 0: features alone


def _row(
    make: Callable[..., Any], source: str, licence: str = "Apache-2.0", *, size: int = 224, crop: float = 0.875,
    interpolation: str = "bicubic", statistics: dict[str, Three] = IMAGENET, num_classes: int = 1000,
) -> Published:  # fmt: skip
    return Published(make, source, licence, Preprocess(size, crop, interpolation, **statistics), num_classes)


CONVNEXTS = {
    "atto": models.convnext_atto, "femto": models.convnext_femto, "pico": models.convnext_pico,
    "nano": models.convnext_nano, "tiny": models.convnext_tiny, "small": models.convnext_small,
    "base": models.convnext_base, "large": models.convnext_large, "xlarge": models.convnext_xlarge,
    "huge": models.convnext_huge,
}  # fmt: skip
PUBLISHED = {
    "resnet18": _row(models.resnet18, "timm/resnet18.a1_in1k", crop=0.95),
    "resnet34": _row(models.resnet34, "timm/resnet34.a1_in1k", crop=0.95),
    "resnet50": _row(models.resnet50, "timm/resnet50.a1_in1k", crop=0.95),
    "efficientnet_lite0": _row(
        models.efficientnet_lite0, "timm/tf_efficientnet_lite0.in1k", size=224, crop=0.875, interpolation="bicubic",
        statistics=HALVES,
    ),
    "efficientnet_lite1": _row(
        models.efficientnet_lite1, "timm/tf_efficientnet_lite1.in1k", size=240, crop=0.882, interpolation="bicubic",
        statistics=HALVES,
    ),
    "efficientnet_lite2": _row(
        models.efficientnet_lite2, "timm/tf_efficientnet_lite2.in1k", size=260, crop=0.89, interpolation="bicubic",
        statistics=HALVES,
    ),
    "efficientnet_lite3": _row(
        models.efficientnet_lite3, "timm/tf_efficientnet_lite3.in1k", size=300, crop=0.904, interpolation="bilinear",
        statistics=HALVES,
    ),
    "efficientnet_lite4": _row(
        models.efficientnet_lite4, "timm/tf_efficientnet_lite4.in1k", size=380, crop=0.92, interpolation="bilinear",
        statistics=HALVES,
    ),
    **{
        f"convnext_{size}": _row(
            CONVNEXTS[size], f"timm/convnext_{size}.{tag}", crop=0.95 if size == "nano" else 0.875
        )
        for tag, sizes in {
            "d2_in1k": ["atto"], "d1_in1k": ["femto", "pico"], "in12k_ft_in1k": ["nano"],
            "fb_in22k_ft_in1k": ["tiny", "small", "base", "large", "xlarge"],
        }.items()
        for size in sizes
    },
    **{
        f"convnextv2_{size}": _row(partial(make, version=2), f"timm/convnextv2_{size}.fcmae_ft_in1k", NON_COMMERCIAL)
        for size, make in CONVNEXTS.items()
        if size not in ("small", "xlarge")
    },
    "swin_tiny": _row(models.swin_tiny, "timm/swin_tiny_patch4_window7_224.ms_in22k_ft_in1k", "MIT", crop=0.9),
    "swin_small": _row(models.swin_small, "timm/swin_small_patch4_window7_224.ms_in22k_ft_in1k", "MIT", crop=0.9),
    "swin_base": _row(models.swin_base, "timm/swin_base_patch4_window7_224.ms_in22k_ft_in1k", "MIT", crop=0.9),
    "swin_base_384": _row(
        partial(models.swin_base, window=12, image_size=384), "timm/swin_base_patch4_window12_384.ms_in22k_ft_in1k",
        "MIT", size=384, crop=1.0,
    ),
    "swin_large": _row(models.swin_large, "timm/swin_large_patch4_window7_224.ms_in22k_ft_in1k", "MIT", crop=0.9),
    "swin_large_384": _row(
        partial(models.swin_large, window=12, image_size=384), "timm/swin_large_patch4_window12_384.ms_in22k_ft_in1k",
        "MIT", size=384, crop=1.0,
    ),
    "swinv2_tiny": _row(models.swinv2_tiny, "timm/swinv2_tiny_window8_256.ms_in1k", "MIT", size=256, crop=0.9),
    "swinv2_small": _row(models.swinv2_small, "timm/swinv2_small_window8_256.ms_in1k", "MIT", size=256, crop=0.9),
    "swinv2_base": _row(models.swinv2_base, "timm/swinv2_base_window8_256.ms_in1k", "MIT", size=256, crop=0.9),
    "swinv2_large": _row(
        models.swinv2_large, "timm/swinv2_large_window12_192.ms_in22k", "MIT", size=192, crop=0.9, num_classes=21841
    ),
    "nat_mini": _row(models.nat_mini, "shi-labs/nat-mini-in1k-224", "MIT"),
    "nat_tiny": _row(models.nat_tiny, "shi-labs/nat-tiny-in1k-224", "MIT"),
    "nat_small": _row(models.nat_small, "shi-labs/nat-small-in1k-224", "MIT"),
    "nat_base": _row(models.nat_base, "shi-labs/nat-base-in1k-224", "MIT"),
    "dinat_mini": _row(models.dinat_mini, "shi-labs/dinat-mini-in1k-224", "MIT"),
    "dinat_tiny": _row(models.dinat_tiny, "shi-labs/dinat-tiny-in1k-224", "MIT"),
    "dinat_small": _row(models.dinat_small, "shi-labs/dinat-small-in1k-224", "MIT"),
    "dinat_base": _row(models.dinat_base, "shi-labs/dinat-base-in1k-224", "MIT"),
    "dinat_large": _row(models.dinat_large, "shi-labs/dinat-large-in22k-in1k-224", "MIT"),
    "vit_ti": _row(models.vit_ti, "timm/deit_tiny_patch16_224.fb_in1k", crop=0.9),
    "vit_s": _row(models.vit_s, "timm/deit_small_patch16_224.fb_in1k", crop=0.9),
    "vit_b": _row(models.vit_b, "timm/deit_base_patch16_224.fb_in1k", crop=0.9),
    "convit_ti": _row(models.convit_ti, "timm/convit_tiny.fb_in1k"),
    "convit_s": _row(models.convit_s, "timm/convit_small.fb_in1k"),
    "deit3_small": _row(models.deit3_small, "timm/deit3_small_patch16_224.fb_in22k_ft_in1k", crop=1.0),
    "deit3_medium": _row(models.deit3_medium, "timm/deit3_medium_patch16_224.fb_in22k_ft_in1k", crop=1.0),
    "deit3_base": _row(models.deit3_base, "timm/deit3_base_patch16_224.fb_in22k_ft_in1k", crop=1.0),
    "deit3_large": _row(models.deit3_large, "timm/deit3_large_patch16_224.fb_in22k_ft_in1k", crop=1.0),
    "deit3_huge": _row(models.deit3_huge, "timm/deit3_huge_patch14_224.fb_in22k_ft_in1k", crop=1.0),
    **{
        f"dinov2_{size}{suffix}": _row(
            partial(make, registers=registers), f"timm/vit_{size}_patch14{infix}_dinov2.lvd142m", size=518, crop=1.0,
            num_classes=0,
        )
        for size, make in {
            "small": models.dinov2_small, "base": models.dinov2_base, "large": models.dinov2_large
        }.items()
        for registers, suffix, infix in ((0, "", ""), (4, "_reg4", "_reg4"))
    },
    "clip_b32": _row(models.clip_b32, "timm/vit_base_patch32_clip_224.openai", **CLIP, num_classes=512),
    "clip_b16": _row(models.clip_b16, "timm/vit_base_patch16_clip_224.openai", **CLIP, num_classes=512),
    "clip_l14": _row(
        models.clip_l14, "timm/vit_large_patch14_clip_224.openai", **{**CLIP, "crop": 1.0}, num_classes=768
    ),
    "siglip_b16": _row(
        models.siglip_b16, "timm/vit_base_patch16_siglip_224.webli", crop=0.9, statistics=HALVES, num_classes=0
    ),
    "siglip_l16": _row(
        models.siglip_l16, "timm/vit_large_patch16_siglip_256.webli", size=256, crop=0.9, statistics=HALVES,
        num_classes=0,
    ),
    "siglip_so400m": _row(
        models.siglip_so400m, "timm/vit_so400m_patch14_siglip_224.webli", crop=0.9, statistics=HALVES, num_classes=0
    ),
    "botnet26t": _row(models.botnet26t, "timm/botnet26t_256.c1_in1k", size=256, crop=0.95),
    "halonet26t": _row(models.halonet26t, "timm/halonet26t.a1h_in1k", size=256, crop=0.95),
    "halonet50ts": _row(models.halonet50ts, "timm/halonet50ts.a1h_in1k", size=256, crop=0.94),
    "lambda_resnet26t": _row(models.lambda_resnet26t, "timm/lambda_resnet26t.c1_in1k", size=256, crop=0.94),
    "lambda_resnet50ts": _row(models.lambda_resnet50ts, "timm/lambda_resnet50ts.a1h_in1k", size=256, crop=0.95),
    **{
        f"poolformer{infix}_{size}": _row(
            partial(make, version=2) if infix else make, f"timm/poolformer{infix}_{size}.sail_in1k",
            crop=1.0 if infix else 0.95 if size in ("m36", "m48") else 0.9,
        )
        for infix in ("", "v2")
        for size, make in {
            "s12": models.poolformer_s12, "s24": models.poolformer_s24, "s36": models.poolformer_s36,
            "m36": models.poolformer_m36, "m48": models.poolformer_m48,
        }.items()
    },
    **{
        make.__name__: _row(make, f"timm/{make.__name__}.sail_in22k_ft_in1k", crop=1.0)
        for make in (
            models.convformer_s18, models.convformer_s36, models.convformer_m36, models.convformer_b36,
            models.caformer_s18, models.caformer_s36, models.caformer_m36, models.caformer_b36,
        )
    },
    "convmixer_768_32": _row(models.convmixer_768_32, "timm/convmixer_768_32.in1k", "MIT", crop=0.96),
    "convmixer_1024_20": _row(models.convmixer_1024_20, "timm/convmixer_1024_20_ks9_p14.in1k", "MIT", crop=0.96),
    "convmixer_1536_20": _row(models.convmixer_1536_20, "timm/convmixer_1536_20.in1k", "MIT", crop=0.96),
    **{
        make.__name__: _row(make, f"timm/{make.__name__}_224.sail_in1k", crop=0.96)
        for make in (models.volo_d1, models.volo_d2, models.volo_d3, models.volo_d4, models.volo_d5)
    },
    **{
        make.__name__: _row(make, f"timm/{make.__name__}_patch16.sa1b", size=1024, crop=1.0, num_classes=0)
        for make in (models.samvit_base, models.samvit_large, models.samvit_huge)
    },
    "maxvit_tiny": _row(models.maxvit_tiny, "timm/maxvit_tiny_tf_224.in1k", crop=0.95),
    "maxvit_small": _row(models.maxvit_small, "timm/maxvit_small_tf_224.in1k", crop=0.95),
    "maxvit_base": _row(models.maxvit_base, "timm/maxvit_base_tf_224.in1k", crop=0.95),
    "maxvit_large": _row(models.maxvit_large, "timm/maxvit_large_tf_224.in1k", crop=0.95),
    "coatnet_0": _row(models.coatnet_0, "timm/coatnet_0_rw_224.sw_in1k", crop=0.95, statistics=HALVES),
    "coatnet_1": _row(models.coatnet_1, "timm/coatnet_1_rw_224.sw_in1k", crop=0.95, statistics=HALVES),
    "coatnet_2": _row(models.coatnet_2, "timm/coatnet_2_rw_224.sw_in12k_ft_in1k", crop=0.95, statistics=HALVES),
}  # fmt: skip


def names() -> tuple[str, ...]:
    """The names that `load` takes.

    >>> names()[:2]
    ('resnet18', 'resnet34')
    """
    return tuple(PUBLISHED)


def published(name: str) -> Published:
    """Where a network's weights are published, by which licence, and what its images go through.

    >>> published("resnet18").licence
    'Apache-2.0'
    """
    if name not in PUBLISHED:
        raise ValueError(f"published: name (={name!r}) must be one of {', '.join(PUBLISHED)}")
    return PUBLISHED[name]


def preprocess(name: str) -> Preprocess:
    """The size, crop, interpolation, mean and standard deviation of a network's images; a call applies them.

    >>> preprocess("resnet18").size
    224
    """
    return published(name).preprocess

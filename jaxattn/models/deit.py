"""Published networks that are `ViT` with settings: DeiT III, DINOv2, and the image towers of CLIP and SigLIP."""

from typing import Any

from jaxattn.models.vit import ViT
from jaxattn.models.vit_blocks import quick_gelu


def _vit(patch_size: int, width: int, depth: int, num_heads: int, kwargs: dict[str, Any]) -> ViT:
    sizes = {"image_size": 224, "patch_size": patch_size, "in_features": 3, "num_classes": 1000}
    layers = {"width": width, "depth": depth, "num_heads": num_heads, "mlp_dim": 4 * width}
    return ViT(**{**sizes, **layers, **kwargs})


def _deit3(patch_size: int, width: int, depth: int, num_heads: int, kwargs: dict[str, Any]) -> ViT:
    return _vit(patch_size, width, depth, num_heads, {"layer_scale": 1e-6, "class_position": False, **kwargs})


def deit3_small(**kwargs: Any) -> ViT:
    """DeiT III S/16 (Touvron et al. 2022, arXiv 2204.07118): 22,059,496 parameters. It has layer scales, and no
    position of the class token, as all DeiT III."""
    return _deit3(16, 384, 12, 6, kwargs)


def deit3_medium(**kwargs: Any) -> ViT:
    """DeiT III M/16: 38,849,512 parameters."""
    return _deit3(16, 512, 12, 8, kwargs)


def deit3_base(**kwargs: Any) -> ViT:
    """DeiT III B/16: 86,585,320 parameters."""
    return _deit3(16, 768, 12, 12, kwargs)


def deit3_large(**kwargs: Any) -> ViT:
    """DeiT III L/16: 304,374,760 parameters."""
    return _deit3(16, 1024, 24, 16, kwargs)


def deit3_huge(**kwargs: Any) -> ViT:
    """DeiT III H/14: 632,126,440 parameters."""
    return _deit3(14, 1280, 32, 16, kwargs)


def _dinov2(width: int, depth: int, num_heads: int, kwargs: dict[str, Any]) -> ViT:
    settings = {"image_size": 518, "num_classes": 0, "layer_scale": 1e-5, **kwargs}
    settings.setdefault("class_position", not settings.get("registers"))
    return _vit(14, width, depth, num_heads, settings)


def dinov2_small(**kwargs: Any) -> ViT:
    """DINOv2 S/14 (Oquab et al. 2023, arXiv 2304.07193) for images of 518 × 518, of features alone: 22,056,192
    parameters; with `registers=4` (Darcet et al. 2023, arXiv 2309.16588), 22,057,344.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> model = nnx.eval_shape(lambda: dinov2_small(image_size=224, registers=4, rngs=nnx.Rngs(0)))
    >>> nnx.eval_shape(lambda m, x: m.pyramid(x)[0], model, jnp.ones((1, 224, 224, 3))).shape
    (1, 16, 16, 384)
    """
    return _dinov2(384, 12, 6, kwargs)


def dinov2_base(**kwargs: Any) -> ViT:
    """DINOv2 B/14: 86,579,712 parameters; with `registers=4`, 86,582,016."""
    return _dinov2(768, 12, 12, kwargs)


def dinov2_large(**kwargs: Any) -> ViT:
    """DINOv2 L/14: 304,367,616 parameters; with `registers=4`, 304,370,688."""
    return _dinov2(1024, 24, 16, kwargs)


def _clip(patch_size: int, width: int, depth: int, num_heads: int, features: int, kwargs: dict[str, Any]) -> ViT:
    settings = {"num_classes": features, "norm_before": True, "epsilon": 1e-5, "activation": quick_gelu, **kwargs}
    return _vit(patch_size, width, depth, num_heads, settings)


def clip_b32(**kwargs: Any) -> ViT:
    """The image tower of OpenAI's CLIP B/32 (Radford et al. 2021, arXiv 2103.00020), whose head is the projection to
    512 features: 87,849,728 parameters, with a bias of zeros as timm has it."""
    return _clip(32, 768, 12, 12, 512, kwargs)


def clip_b16(**kwargs: Any) -> ViT:
    """The image tower of OpenAI's CLIP B/16, to 512 features: 86,193,152 parameters."""
    return _clip(16, 768, 12, 12, 512, kwargs)


def clip_l14(**kwargs: Any) -> ViT:
    """The image tower of OpenAI's CLIP L/14, to 768 features: 303,966,976 parameters."""
    return _clip(14, 1024, 24, 16, 768, kwargs)


def _siglip(patch_size: int, width: int, depth: int, num_heads: int, kwargs: dict[str, Any]) -> ViT:
    settings = {"num_classes": 0, "class_token": False, "pool": "attention", **kwargs}
    return _vit(patch_size, width, depth, num_heads, settings)


def siglip_b16(**kwargs: Any) -> ViT:
    """The image tower of SigLIP B/16 (Zhai et al. 2023, arXiv 2303.15343), whose features are what a learned query sees
    of the tokens: 92,884,224 parameters. Hugging Face computes its gelus by tanh: `activation=jax.nn.gelu`."""
    return _siglip(16, 768, 12, 12, kwargs)


def siglip_l16(**kwargs: Any) -> ViT:
    """The image tower of SigLIP L/16, for images of 256 × 256: 315,956,224 parameters."""
    return _siglip(16, 1024, 24, 16, {"image_size": 256, **kwargs})


def siglip_so400m(**kwargs: Any) -> ViT:
    """The image tower of SigLIP So400m/14 ("shape-optimized", Alabdulmohsin et al. 2023, arXiv 2305.13035): 427,680,704
    parameters."""
    return _siglip(14, 1152, 27, 16, {"mlp_dim": 4304, **kwargs})

"""Vision transformers of published sizes, and small ones for small images."""

from typing import Any

from jaxattn.models.vit import ViT
from jaxattn.models.vit_blocks import small_init, torch_init


def vit_ti(**kwargs: Any) -> ViT:
    """ViT-Ti/16, for images of 224 × 224: 5,717,416 parameters with its defaults (Touvron et al. 2021, DeiT, arXiv
    2012.12877)."""
    return _vit16(192, 3, kwargs)


def vit_s(**kwargs: Any) -> ViT:
    """ViT-S/16, for images of 224 × 224: 22,050,664 parameters with its defaults (Touvron et al. 2021, DeiT, arXiv
    2012.12877)."""
    return _vit16(384, 6, kwargs)


def vit_b(**kwargs: Any) -> ViT:
    """ViT-B/16, for images of 224 × 224: 86,567,656 parameters with its defaults (Dosovitskiy et al. 2021, arXiv
    2010.11929).

    >>> import jax
    >>> from flax import nnx
    >>> model = nnx.eval_shape(lambda: vit_b(rngs=nnx.Rngs(0)))
    >>> sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    86567656
    """
    return _vit16(768, 12, kwargs)


def convit_ti(**kwargs: Any) -> ViT:
    """ConViT-Ti, for images of 224 × 224: 5.7 M parameters (d'Ascoli et al. 2021, arXiv 2103.10697).

    Ten blocks of "gpsa", which start as a convolution does, and two of "global", which the class token joins.
    """
    return _convit(4, kwargs)


def convit_s(**kwargs: Any) -> ViT:
    """ConViT-S, for images of 224 × 224: 27.8 M parameters (d'Ascoli et al. 2021, arXiv 2103.10697).

    >>> from flax import nnx
    >>> model = nnx.eval_shape(lambda: convit_s(rngs=nnx.Rngs(0)))
    >>> model.joins  # blocks before the class token
    10
    """
    return _convit(9, kwargs)


def cordonnier(**kwargs: Any) -> ViT:
    """The fully attentional network of Cordonnier, Loukas & Jaggi (2020, arXiv 1911.03584) for CIFAR-10, with quadratic
    heads: 12.1 M parameters. Patches of 2 × 2 pixels, six blocks of nine heads with the norm after the sum, no position
    but the heads' own, and the mean of all tokens.

    Theirs also drops, at a rate of 0.1, attention weights and what the linear maps add to the sum.

    >>> from flax import nnx
    >>> model = cordonnier(width=8, depth=2, mlp_dim=8, rngs=nnx.Rngs(0))
    >>> model.centers().shape  # layers, heads, row and column
    (2, 9, 2)
    """
    sizes = {"image_size": 32, "patch_size": 2, "in_features": 3, "num_classes": 10}
    layers = {"width": 400, "depth": 6, "num_heads": 9, "mlp_dim": 512, "mix": "quadratic", "norm": "post"}
    ends = {"class_token": False, "position": "none", "kernel_init": torch_init}
    return ViT(**{**sizes, **layers, **ends, **kwargs})


def vit_tiny8(**kwargs: Any) -> ViT:
    """For 8 × 8 digits: patches of 2 × 2, four blocks of width 64, windows of 3, and no class token, so that every
    `mix` works."""
    sizes = {"image_size": 8, "patch_size": 2, "in_features": 1, "num_classes": 10, "window": 3}
    layers = {"width": 64, "depth": 4, "num_heads": 4, "mlp_dim": 128, "class_token": False}
    return ViT(**{**sizes, **layers, **kwargs})


def vit_small32(**kwargs: Any) -> ViT:
    """For images of 28 (`image_size=28`) or 32 pixels: patches of 4 × 4, six blocks of width 128, windows of 3, and no
    class token, so that every `mix` works."""
    sizes = {"image_size": 32, "patch_size": 4, "in_features": 3, "num_classes": 10, "window": 3}
    layers = {"width": 128, "depth": 6, "num_heads": 4, "mlp_dim": 256, "class_token": False}
    return ViT(**{**sizes, **layers, **kwargs})


def _vit16(width: int, num_heads: int, kwargs: dict[str, Any]) -> ViT:
    sizes = {"image_size": 224, "patch_size": 16, "in_features": 3, "num_classes": 1000}
    layers = {"width": width, "depth": 12, "num_heads": num_heads, "mlp_dim": 4 * width}
    return ViT(**{**sizes, **layers, **kwargs})


def _convit(num_heads: int, kwargs: dict[str, Any]) -> ViT:
    mix = {"mix": ("gpsa",) * 10 + ("global",) * 2, "qkv_bias": False, "kernel_init": small_init}
    return _vit16(48 * num_heads, num_heads, {**mix, **kwargs})

"""The network that a configuration names."""

import functools
import inspect
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx

from jaxattn import models
from jaxattn.errors import InputError
from jaxattn.pretrained.registry import published
from jaxattn.train.config import RESNETS, VITS, Config

FLAT = ("shift", "flip", "cutout", "cutmix", "erasing")  # augmentations that know two axes


def build(config: Config, image_shape: tuple[int, ...], num_classes: int) -> nnx.Module:
    """The untrained network that `config` names, for images of `image_shape`, `(height, width, channels)` or
    `(depth, height, width, channels)`."""
    config.check()
    *grid, channels = image_shape
    rank = 3 if config.model == "volume_small" else 2
    if len(grid) != rank:
        raise InputError(f"images (={image_shape}) must have {rank} axes and channels for model (={config.model!r})")
    flat = [f"{name} (={getattr(config, name)})" for name in FLAT if getattr(config, name)]
    if rank == 3 and flat:
        raise InputError(f"{' and '.join(flat)} must be off for volumes, by 0 or False: they need two axes")
    settings = {
        "num_classes": num_classes,
        "in_features": channels,
        "drop_path": config.drop_path,
        "remat": config.remat,
        # a network's own default is to compute in what it is given, which here is float32
        "dtype": None if config.dtype == "float32" else jnp.dtype(config.dtype),
        "rngs": nnx.Rngs(config.seed),
    }
    if config.model in RESNETS:
        settings |= {} if config.mix == "own" else {"mix": config.mix}
        # an ImageNet stem would leave an image of 28 pixels a grid of one
        settings["stem"] = "cifar" if max(grid) <= 64 else "imagenet"
    elif config.model in VITS:
        settings["image_size"] = tuple(grid)
        # ConViT ends in two blocks of global attention, whatever comes before
        if config.mix != "own" and not config.model.startswith("convit"):
            settings["mix"] = "local" if config.mix == "attention" else config.mix
    elif config.model != "volume_small":
        make = published(config.model).make
        takes = settings_of(make)
        for name in ("drop_path", "remat"):
            if name not in takes and (off := settings.pop(name)):
                raise InputError(f"{name} (={off}) must be off for the model {config.model}, which has none")
        return make(**settings, **({"image_size": tuple(grid)} if "image_size" in takes else {}))
    return getattr(models, config.model)(**settings)


def settings_of(make: Callable) -> tuple[str, ...]:
    """What the constructor of a published network takes.

    >>> "image_size" in settings_of(models.swin_tiny), "image_size" in settings_of(models.convnext_tiny)
    (True, False)
    """
    made = make.func if isinstance(make, functools.partial) else make
    return tuple(inspect.signature(inspect.signature(made).return_annotation.__init__).parameters)

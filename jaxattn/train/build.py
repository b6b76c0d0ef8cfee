"""The network that a configuration names."""

import jax.numpy as jnp
from flax import nnx

from jaxattn import models
from jaxattn.train.config import RESNETS, Config


def build(config: Config, image_shape: tuple[int, ...], num_classes: int) -> nnx.Module:
    """The untrained network that `config` names, for images of `image_shape` `(height, width, channels)`."""
    config.check()
    height, width, channels = image_shape
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
        settings["mix"] = config.mix
        # an ImageNet stem would leave an image of 28 pixels a grid of one
        settings["stem"] = "cifar" if max(height, width) <= 64 else "imagenet"
    else:
        settings["image_size"] = (height, width)
        if not config.model.startswith("convit"):  # which ends in two blocks of global attention, whatever comes before
            settings["mix"] = "local" if config.mix == "attention" else config.mix
    return getattr(models, config.model)(**settings)

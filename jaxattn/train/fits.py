"""Whether settings and data fit each other: said before a folder is made, and before anything compiles."""

from flax import nnx

from jaxattn.errors import InputError
from jaxattn.train import finetune
from jaxattn.train.build import build
from jaxattn.train.config import Config
from jaxattn.train.data import Dataset


def check_fits(config: Config, data: Dataset):
    """Raises for settings that these data cannot be trained with, or that would do nothing.

    Raises:
      ValueError: a batch of more images than there are; fewer steps than one update takes; images that are moved or
        blanked as a whole; pairs where a batch is a single image; a network that takes no such images.
    """
    config.check()
    images, grid = len(data.train), data.image_shape[:-1]
    if not data.train.endless and config.batch_size > images:
        raise InputError(f"batch_size (={config.batch_size}) must be at most the {images} training images")
    steps = config.epochs * (images // config.batch_size)
    if config.accumulate > steps:
        raise InputError(f"accumulate (={config.accumulate}) must be at most the {steps} steps of the run: no update")
    for name in ("shift", "cutout"):
        if getattr(config, name) >= min(grid):
            raise InputError(
                f"{name} (={getattr(config, name)}) must be less than the {min(grid)} pixels of the images"
            )
    for name in ("mixup", "cutmix"):
        if getattr(config, name) and config.batch_size == 1:
            raise InputError(
                f"{name} (={getattr(config, name)}) must be 0 for a batch of one image, which has no other"
            )
    model = nnx.eval_shape(lambda: build(config, data.image_shape, len(data.class_names)))
    finetune.learned(config, model)


def check_weights(config: Config, data: Dataset):
    """Raises if the file of weights that the settings name cannot be read, or does not fit the network.

    Raises:
      ValueError: with the file's name.
    """
    finetune.fill(config, nnx.eval_shape(lambda: build(config, data.image_shape, len(data.class_names))))

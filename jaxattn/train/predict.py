"""What a trained network says of image files: classes, probabilities, and a picture of where its attention looked."""

import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxattn import plots
from jaxattn.errors import InputError, needs_extra
from jaxattn.files import open_file, path_of, reason
from jaxattn.measure import attention_maps
from jaxattn.models.swin_attention import WindowAttention
from jaxattn.nn.attention import Attention
from jaxattn.train.augment import normalize
from jaxattn.train.classifier import Classifier, find
from jaxattn.train.data.folder import JUNK, legible
from jaxattn.train.data.images import Encoded, decode
from jaxattn.train.run import write_json
from jaxattn.window import Window

with needs_extra("train"):
    from tqdm import tqdm

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")  # of the images in a folder
BATCH = 16  # images at once
SHOWN = 8  # in a figure, at most


class Prediction(NamedTuple):
    """The likeliest classes of an image, the likeliest first."""

    path: str
    classes: list[int]
    probabilities: list[float]


def predict(text: str, paths: Sequence[str], top: int, json: Path | None, show: Path | None):
    """Prints the likeliest classes of images, and names those that cannot be read.

    Args:
      text: which network, as in `jaxattn.train.classifier.find`.
      paths: files, and folders, of which all images are taken, and those in the folders in them.
      top: how many classes.
      json: a file for the same, whole or not at all.
      show: a picture of the first images, with where the last attention looked, if the network has one.

    Raises:
      ValueError: no such network; or, when all else is said, there were images that cannot be read.
    """
    if top < 1:
        raise InputError(f"top (={top}) must be at least 1")
    for name, out in (("json", json), ("show", show)):
        if out is not None and (out.is_dir() or not out.parent.is_dir()):
            raise InputError(f"{name} (={out}) must be a file in a folder that is there")
    if show is not None and show.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"show (={show}) must end in .png, .svg or .pdf")
    files, faults = find_images(paths)
    network = find(text)
    run, found, pictures = classifies(network), [], []
    with tqdm(total=len(files), unit="image", disable=None, leave=False) as bar:
        for part, images, wrong in decoded(network, files):
            faults |= wrong
            if len(images):
                filled = np.pad(images, [(0, min(BATCH, len(files)) - len(images)), (0, 0), (0, 0), (0, 0)])
                found += likeliest(part, run(filled)[: len(images)], top)  # one program for every batch
                pictures += list(images[: max(0, SHOWN - len(pictures))])
            bar.update(len(part) + len(wrong))
    for each in found:
        print(described(each, network.classes))
    if json is not None:
        write_json(json, as_json(network, found, faults))
    if show is not None and found:
        draw(network, np.stack(pictures), found).savefig(show, dpi=160, facecolor="white")
    for path, why in faults.items():
        print(f"jaxattn: {path}: {why}", file=sys.stderr)
    if faults:
        raise InputError(f"{len(faults)} of {len(faults) + len(found)} could not be read, and are named above")


def find_images(paths: Sequence[str]) -> tuple[list[Path], dict[str, str]]:
    """The image files that the paths name, each once, and what is wrong with the other paths."""
    files, faults = {}, {}
    for text in paths:
        path = path_of(text)
        try:
            path.stat()
            inside = sorted(_images_in(path)) if path.is_dir() else [path]
            if not inside:
                faults[legible(text)] = f"has no images: {', '.join(ENDINGS)}"
            files |= dict.fromkeys(inside)
        except OSError as error:
            faults[legible(text)] = f"cannot be read: {reason(error)}"
    return list(files), faults


def _images_in(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name[0] == "." or path.name.lower() in JUNK:
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _images_in(path)
        elif path.suffix.lower() in ENDINGS:
            yield path


def decoded(network: Classifier, files: Sequence[Path]) -> Iterator[tuple[list[str], np.ndarray, dict[str, str]]]:
    """The images as the network takes them, some at a time: their names, uint8 `[n, *image_shape]`, and the faults of
    those that are none."""

    def read(path: Path) -> np.ndarray | str:
        return decode(
            Encoded(functools.partial(open_file, path), 0, str(path)),
            network.image_shape,
            network.crop,
            network.interpolation,
        )

    with ThreadPoolExecutor() as threads:
        for start in range(0, len(files), BATCH):
            part = files[start : start + BATCH]
            names, images, faults = [], [], {}
            for path, image in zip(part, threads.map(read, part), strict=True):
                name = legible(str(path))
                if isinstance(image, str):
                    faults[name] = image
                else:
                    names.append(name)
                    images.append(image)
            yield names, np.array(images, np.uint8), faults


def classifies(network: Classifier) -> Callable[[np.ndarray], np.ndarray]:
    """The function of images `[n, *image_shape]` that gives the probabilities of their classes, compiled once an n."""
    function, state = network.logits(), nnx.state(network.model)
    run = jax.jit(lambda state, images: jax.nn.softmax(function(state, images).astype(np.float32)))
    return lambda images: np.asarray(run(state, images))


def likeliest(names: Sequence[str], probabilities: np.ndarray, top: int) -> list[Prediction]:
    """The likeliest classes of some images, of the probabilities `[n, classes]`."""
    order = np.argsort(-probabilities, axis=-1, kind="stable")[:, :top]
    return [
        Prediction(name, list(map(int, classes)), [float(row[n]) for n in classes])
        for name, row, classes in zip(names, probabilities, order, strict=True)
    ]


def described(found: Prediction, classes: Sequence[str]) -> str:
    """What is printed of an image."""
    lines = [
        f"  {probability:6.1%}  {classes[n]}" for n, probability in zip(found.classes, found.probabilities, strict=True)
    ]
    return "\n".join([found.path, *lines])


def as_json(network: Classifier, found: Sequence[Prediction], faults: dict[str, str]) -> dict[str, Any]:
    """The same as values of JSON."""
    images = [
        {
            "path": each.path,
            "classes": [
                {"class": n, "name": network.classes[n], "probability": probability}
                for n, probability in zip(each.classes, each.probabilities, strict=True)
            ],
        }
        for each in found
    ]
    return {"network": network.name, "images": images, "not_read": faults}


def draw(network: Classifier, images: np.ndarray, found: Sequence[Prediction]) -> Any:
    """The figure of some images: each with its likeliest class, and below it what was attended to."""
    titles = [f"{network.classes[each.classes[0]]} {each.probabilities[0]:.0%}" for each in found]
    pictures = images.astype(np.float32) / 255
    return plots.predictions(pictures, titles[: len(images)], attended(network, images))


def attended(network: Classifier, images: np.ndarray) -> np.ndarray | None:
    """How much each token is attended to in the last attention whose weights stand on a grid, `[n, rows, columns]`: the
    mean over heads and queries, or over heads where a class token asks. None where there is no such attention."""
    model = network.model
    layers = [
        (path, layer) for path, layer in nnx.iter_modules(model) if isinstance(layer, Attention | WindowAttention)
    ]
    if not layers:
        return None
    graph, state = nnx.split(model)

    @jax.jit
    def forward(state, images):
        made = nnx.merge(graph, state, copy=True)
        _, sown = nnx.capture(made, nnx.Intermediate)(normalize(images, network.mean, network.std), sow_weights=True)
        return {path: each.get_value()[0] for path, each in nnx.to_flat_state(sown)}

    sown = {path: np.asarray(weights) for path, weights in forward(state, images).items()}
    for path, layer in sorted(layers, key=lambda pair: _order(pair[0]), reverse=True):
        weights = sown.get((*path, "attention_weights"))
        if weights is not None and len(weights) == len(images):
            stride = model.strides[path[1] if path[0] == "stages" else -1]
            maps = _by_key(layer, weights, [math.ceil(side / stride) for side in images.shape[1:3]])
            if maps is not None:
                return maps
    return None


def _order(path: tuple) -> tuple:
    """Of the layers in a network: blocks by their numbers, whatever comes between."""
    return tuple(part for part in path if isinstance(part, int))


def _by_key(layer: Any, weights: np.ndarray, grid: Sequence[int]) -> np.ndarray | None:
    """`attended` of one layer's weights: `[n, heads, queries, keys]` without a window, `[n, *grid, heads, slots]` with
    one."""
    inner = layer.attention if isinstance(layer, WindowAttention) else layer
    if inner.window is None:
        tokens, before = weights.shape[-1], weights.shape[-1] - math.prod(grid)
        if weights.ndim != 4 or before < 0 or weights.shape[-2] != tokens:
            return None
        asked = weights[:, :, 0] if before else weights.mean(2)
        return asked.mean(1)[:, before:].reshape(len(weights), *grid)
    if weights.ndim != 5 or not isinstance(inner.window, Window):
        return None
    shape = weights.shape[1:3]
    indices = inner.window.indices(shape)
    maps = np.stack([attention_maps(each, indices, shape).mean((0, 1, 2)) for each in weights])
    # the layer may have padded the grid; Swin's rolls it too, before that or after
    crop, shift = (slice(None), slice(grid[0]), slice(grid[1])), getattr(layer, "shift", (0, 0))
    if getattr(layer, "padding", "") == "after":
        return np.roll(maps[crop], shift, (1, 2))
    return np.roll(maps, shift, (1, 2))[crop]

"""Data sets as NumPy arrays: read strictly, split by seed, normalised by what was trained on."""

import dataclasses
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, Shaped, UInt8

from jaxattn.train.extras import InputError, needs_extra

FASHION_CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Three disjoint parts of one data set.

    Images are float32 `[N, height, width, channels]`, scaled to [0, 1] and then normalised by the mean and
    standard deviation of the training images; labels are int32 `[N]`, indices into `class_names`.
    """

    name: str
    class_names: tuple[str, ...]
    train_images: Float[np.ndarray, "train height width channels"]
    train_labels: Int[np.ndarray, "train"]
    validation_images: Float[np.ndarray, "validation height width channels"]
    validation_labels: Int[np.ndarray, "validation"]
    test_images: Float[np.ndarray, "test height width channels"]
    test_labels: Int[np.ndarray, "test"]


def load(name: str, seed: int = 0) -> Dataset:
    """Loads the data set that `--data` names.

    Args:
      name: `digits`, the 1,797 handwritten digits of 8×8 pixels that scikit-learn ships (Alpaydin and Kaynak, 1998),
        or `fashion-mnist:PATH`, the four idx files of Xiao et al. 2017 (arXiv 1708.07747) in the folder PATH, gzipped
        or not.
      seed: draws the validation images from the training images, stratified. The test images never depend on it:
        fashion-mnist has official ones, and of the digits the same 397, stratified, are kept aside for every seed,
        so that the accuracies of different seeds are comparable.

    Raises:
      ValueError: an unknown name, or a file that is missing or is not what its header says.

    >>> digits = load("digits")
    >>> digits.train_images.shape, len(digits.validation_labels), len(digits.test_labels)
    ((1200, 8, 8, 1), 200, 397)
    """
    kind, _, path = name.partition(":")
    if name == "digits":
        images, labels = _digits()
        rest, test = _split(labels, 397, seed=0)
        return _prepare(name, tuple("0123456789"), images[rest], labels[rest], images[test], labels[test], 200, seed)
    if kind == "fashion-mnist" and path:
        train, test = (_read_pair(Path(path), part) for part in ("train", "t10k"))
        if train[0].shape[1:3] != test[0].shape[1:3]:
            raise InputError(f"{path}: training images are {train[0].shape[1:3]}, test images {test[0].shape[1:3]}")
        return _prepare("fashion-mnist", FASHION_CLASSES, *train, *test, len(train[1]) // 12, seed)
    raise InputError(f"data (={name!r}) must be 'digits' or 'fashion-mnist:PATH', where PATH holds the idx files")


def batches(
    images: Shaped[np.ndarray, "n height width channels"],
    labels: Shaped[np.ndarray, "n"],
    batch_size: int,
    rng: np.random.Generator,
    shift: int = 0,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """One epoch in random order, in batches of one size; the last, incomplete one is left out.

    Every image is moved by up to `shift` pixels along each axis, its edge pixels repeated behind it.
    """
    height, width = images.shape[1:3]
    order = rng.permutation(len(images))
    for start in range(0, len(images) - batch_size + 1, batch_size):
        chosen = order[start : start + batch_size]
        batch = images[chosen]
        if shift:
            padded = np.pad(batch, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode="edge")
            crops = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
            row, column = rng.integers(0, 2 * shift + 1, size=(2, batch_size))
            batch = np.moveaxis(crops[np.arange(batch_size), row, column], 1, -1)  # [n, c, h, w] -> [n, h, w, c]
        yield batch, labels[chosen]


def read_idx(path: Path, ndim: int) -> UInt8[np.ndarray, "..."]:
    """Reads an idx file of bytes with `ndim` axes (the format of MNIST), gzipped if its name ends in `.gz`.

    The header is the bytes 0, 0, 8 (unsigned byte), ndim, then each size as a big-endian 32-bit integer.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if content[:4] != bytes([0, 0, 8, ndim]):
        raise InputError(
            f"{path}: starts with {content[:4].hex(' ') or 'nothing'}, expected 00 00 08 {ndim:02x} (idx, {ndim} axes)"
        )
    header = 4 + 4 * ndim
    if len(content) < header:
        raise InputError(f"{path}: {len(content)} bytes, too short for a header of {header}")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", ndim, 4))
    expected = header + int(np.prod(shape, dtype=object))
    if len(content) != expected:
        raise InputError(f"{path}: {len(content)} bytes, expected {expected} for the shape {shape} in its header")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _digits() -> tuple[np.ndarray, np.ndarray]:
    with needs_extra("train"):
        from sklearn.datasets import load_digits
    pixels, labels = load_digits(return_X_y=True)  # [1797, 64], in 0 to 16
    return np.reshape(pixels, (-1, 8, 8, 1)).astype(np.float32) / 16, np.asarray(labels)


def _read_pair(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    images = read_idx(_find(folder, f"{part}-images-idx3-ubyte"), 3)
    path = _find(folder, f"{part}-labels-idx1-ubyte")
    labels = read_idx(path, 1)
    if len(images) != len(labels):
        raise InputError(f"{path}: {len(labels)} labels for {len(images)} images")
    if labels.size and labels.max() >= len(FASHION_CLASSES):
        raise InputError(f"{path}: a label is {labels.max()}, expected 0 to {len(FASHION_CLASSES) - 1}")
    return images[..., None] / np.float32(255), labels


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise InputError(f"{folder}: has neither {name} nor {name}.gz")


def _split(labels: np.ndarray, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of what is left and of `size` examples taken out, with the classes in the same proportions in both."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # one class after the other, each in random order
    every = ((np.arange(size) + 0.5) * len(labels) / size).astype(int)  # evenly spaced, so each class gives its share
    return np.sort(np.delete(order, every)), np.sort(order[every])


def _prepare(name, class_names, images, labels, test_images, test_labels, validation_size, seed) -> Dataset:
    """Draws the validation part, and normalises all three by the training part."""
    train, validation = _split(labels, validation_size, seed)
    mean, std = images[train].mean(), images[train].std()
    normalise = lambda x: ((x - mean) / std).astype(np.float32)
    parts = [(images[train], labels[train]), (images[validation], labels[validation]), (test_images, test_labels)]
    arrays = [array for x, y in parts for array in (normalise(x), y.astype(np.int32))]
    return Dataset(name, class_names, *arrays)

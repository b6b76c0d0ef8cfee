"""From what a reader found to a data set: labels checked, the parts that are missing drawn from the training part."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int, Shaped

from jaxattn.errors import InputError
from jaxattn.train.data.dataset import Arrays, Dataset


class Examples(NamedTuple):
    """One part of a data set as it was read: `origin(i)` says where example i lies, for the errors."""

    images: np.ndarray
    labels: np.ndarray
    origin: Callable[[int], str]


class Found(NamedTuple):
    """What a reader returns. A part that the files lack is None; `skipped` lists the examples that were left out."""

    path: str
    class_names: tuple[str, ...]
    train: Examples
    validation: Examples | None = None
    test: Examples | None = None
    skipped: tuple[str, ...] = ()


def assemble(name: str, found: Found, seed: int, skip_bad: bool, validation_size: int | None = None) -> Dataset:
    """Checks what was read, and draws the parts that it lacks from the training images, stratified.

    The test images, a fifth, never depend on `seed`; the validation images, a twelfth of the rest, do.

    Raises:
      ValueError: a label out of range, a class without training images, parts of different shapes, no images left.
    """
    skipped = list(found.skipped)
    check = lambda part: _in_range(part, found.class_names, skip_bad, skipped)
    train, validation, test = check(found.train), found.validation, found.test
    for label in np.flatnonzero(np.bincount(train.labels, minlength=len(found.class_names)) == 0):
        message = f"{found.path}: class {found.class_names[label]!r} has no training image"
        if not skip_bad:
            raise InputError(message)
        skipped.append(message)
    if test is None:
        train, test = _take(train, max(1, len(train.labels) // 5), seed=0)
    if validation is None:
        size = max(1, len(train.labels) // 12) if validation_size is None else validation_size
        train, validation = _take(train, size, seed)
    test, validation = check(test), check(validation)
    for part, what in ((train, "training"), (validation, "validation"), (test, "test")):
        if not len(part.labels):
            raise InputError(f"{found.path}: no {what} images")
        if part.images.shape[1:] != train.images.shape[1:]:
            shapes = f"training images are {train.images.shape[1:]}, {what} images {part.images.shape[1:]}"
            raise InputError(f"{found.path}: {shapes}")
    sources = [Arrays(part.images, part.labels.astype(np.int32)) for part in (train, validation, test)]
    shape = train.images.shape[1:]
    return Dataset(name, found.class_names, shape, *statistics(train.images), *sources, skipped=tuple(skipped))


def statistics(
    images: Shaped[np.ndarray, "n height width channels"],
) -> tuple[Float32[np.ndarray, "channels"], Float32[np.ndarray, "channels"]]:
    """Mean and standard deviation of each channel in [0, 1]. A channel that never changes has deviation 1.

    >>> mean, std = statistics(np.array([0, 255], np.uint8).reshape(2, 1, 1, 1))
    >>> mean, std
    (array([0.5], dtype=float32), array([0.5], dtype=float32))
    """
    if images.dtype == np.uint8:  # counts of the 256 levels: exact, and no float copy of the images
        levels = np.arange(256) / 255
        counts = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[-1])])
        share = counts / counts.sum(1, keepdims=True)  # [channels, 256]
        mean = share @ levels
        variance = (share * (levels - mean[:, None]) ** 2).sum(1)
    else:
        mean, variance = (np.asarray(f(images, axis=(0, 1, 2), dtype=np.float64)) for f in (np.mean, np.var))
    return mean.astype(np.float32), np.where(variance > 0, np.sqrt(variance), 1).astype(np.float32)


def stratify(labels: Int[np.ndarray, "n"], size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of what is left and of `size` examples taken out, with the classes in the same proportions in both.

    >>> left, taken = stratify(np.array([0, 0, 0, 1, 1, 1]), 2, seed=0)
    >>> len(left), len(taken)
    (4, 2)
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # one class after the other, each in random order
    every = ((np.arange(size) + 0.5) * len(labels) / size).astype(int)  # evenly spaced, so each class gives its share
    return np.sort(np.delete(order, every)), np.sort(order[every])


def _in_range(part: Examples, class_names: tuple[str, ...], skip_bad: bool, skipped: list[str]) -> Examples:
    """Refuses the examples whose label names no class, or leaves them out."""
    good = (part.labels >= 0) & (part.labels < len(class_names))
    for i in np.flatnonzero(~good):
        message = f"{part.origin(int(i))}: a label is {part.labels[i]}, expected 0 to {len(class_names) - 1}"
        if not skip_bad:
            raise InputError(message)
        skipped.append(message)
    return part if good.all() else part._replace(images=part.images[good], labels=part.labels[good])


def _take(part: Examples, size: int, seed: int) -> tuple[Examples, Examples]:
    left, taken = (
        part._replace(images=part.images[chosen], labels=part.labels[chosen])
        for chosen in stratify(part.labels, min(size, len(part.labels)), seed)
    )
    return left, taken

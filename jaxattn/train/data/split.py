"""From what a reader found to a data set: labels checked, the parts that are missing drawn from the training part."""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int, Shaped

from jaxattn.errors import InputError
from jaxattn.train.data.dataset import Arrays, Dataset

# The words by which the files and folders of a part are known.
PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


class Examples(NamedTuple):
    """One part of a data set as it was read: `origin(i)` says where example i lies, for the errors."""

    images: np.ndarray
    labels: np.ndarray
    origin: Callable[[int], str]


class Found(NamedTuple):
    """What a reader returns. A part that the files lack is None; `skipped` lists the examples that were left out.

    Where `class_names` is None, the classes are the numbers up to the largest label.
    """

    path: str
    class_names: tuple[str, ...] | None
    train: Examples
    validation: Examples | None = None
    test: Examples | None = None
    skipped: tuple[str, ...] = ()


def words(path: str) -> list[str]:
    """The parts that the words of a path name.

    >>> words("data/train-00000-of-00002.parquet"), words("Dev/0.parquet"), words("trainer.parquet")
    (['train'], ['validation'], [])
    """
    return sorted({PARTS[word] for word in re.split("[^a-z]+", path.lower()) if word in PARTS})


def assemble(name: str, found: Found, seed: int, skip_bad: bool, validation_size: int | None = None) -> Dataset:
    """Checks what was read, and draws the parts that it lacks from the training images, stratified.

    The test images, a fifth, never depend on `seed`; the validation images, a twelfth of the rest, do. The last image
    of a class stays where it is.

    Raises:
      ValueError: a label out of range, a class without training images, a single class, parts of different shapes, no
        images left.
    """
    skipped = list(found.skipped)
    if found.class_names == ():
        raise InputError(f"{found.path}: the names of its classes are none, expected one for each")
    train, class_names = _classes(found, skip_bad, skipped)
    check = lambda part: _in_range(part, len(class_names), skip_bad, skipped)
    train, validation, test = check(train), *(part and check(part) for part in (found.validation, found.test))
    empty = np.flatnonzero(np.bincount(train.labels, minlength=len(class_names)) == 0)
    for label in empty:
        message = f"{found.path}: class {class_names[label]!r} has no training image"
        if not skip_bad:
            raise InputError(message)
        skipped.append(message)
    if len(empty):  # their outputs would be guesses
        kept = np.delete(np.arange(len(class_names)), empty)
        leave = lambda part: _renumber(part, kept, class_names, skipped)
        train, validation, test = leave(train), *(part and leave(part) for part in (validation, test))
        class_names = tuple(class_names[label] for label in kept)
    if test is None:
        train, test = _take(train, max(1, len(train.labels) // 5), seed=0)
    if validation is None:
        size = max(1, len(train.labels) // 12) if validation_size is None else validation_size
        train, validation = _take(train, size, seed)
    for part, what in ((train, "training"), (validation, "validation"), (test, "test")):
        if not len(part.labels):
            raise InputError(f"{found.path}: no {what} images")
        if part.images.shape[1:] != train.images.shape[1:]:
            shapes = f"training images are {train.images.shape[1:]}, {what} images {part.images.shape[1:]}"
            raise InputError(f"{found.path}: {shapes}")
    if len(class_names) < 2:
        raise InputError(
            f"{found.path}: has one class, {', '.join(map(repr, class_names))}: there is nothing to tell apart"
        )
    sources = [Arrays(part.images, part.labels.astype(np.int32)) for part in (train, validation, test)]
    shape = train.images.shape[1:]
    return Dataset(name, class_names, shape, *statistics(train.images), *sources, skipped=tuple(skipped))


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
    """Indices of what is left and of up to `size` examples taken out, with the classes in the same proportions in both.

    The last example of a class is left, so there may be fewer taken.

    >>> left, taken = stratify(np.array([0, 0, 0, 1, 1, 1]), 2, seed=0)
    >>> len(left), len(taken)
    (4, 2)
    >>> left, taken = stratify(np.array([0, 0, 0, 0, 1, 2]), 3, seed=0)
    >>> left.tolist()[-2:], len(taken)
    ([4, 5], 2)
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # one class after the other, each in random order
    every = ((np.arange(size) + 0.5) * len(labels) / size).astype(int)  # evenly spaced, so each class gives its share
    lost = np.setdiff1d(labels, labels[np.delete(order, every)])
    # a class that would have none left gets the first of what was taken of it back
    first = every[np.searchsorted(labels[order[every]], lost)]
    every = np.setdiff1d(every, first)
    return np.sort(np.delete(order, every)), np.sort(order[every])


def _classes(found: Found, skip_bad: bool, skipped: list[str]) -> tuple[Examples, tuple[str, ...]]:
    """The training images and the names of the classes.

    Where they are numbers there are no more than images: one wrong label would else ask for any number of outputs.
    """
    if found.class_names is not None:
        return found.train, found.class_names
    images, labels = len(found.train.labels), found.train.labels
    count = int(max(labels[labels < images], default=-1)) + 1
    train = _without(
        found.train, labels >= images, images, skip_bad, skipped, ": there are no more classes than images"
    )
    return train, tuple(map(str, range(count)))


def _in_range(part: Examples, count: int, skip_bad: bool, skipped: list[str]) -> Examples:
    """Refuses the examples whose label is not from 0 to below `count`, or leaves them out."""
    return _without(part, (part.labels < 0) | (part.labels >= count), count, skip_bad, skipped)


def _without(
    part: Examples, bad: np.ndarray, count: int, skip_bad: bool, skipped: list[str], why: str = ""
) -> Examples:
    expected = f"0 to {count - 1}" if count else "0 or more"
    for i in np.flatnonzero(bad):
        message = f"{part.origin(int(i))}: a label is {part.labels[i]}, expected {expected}{why}"
        if not skip_bad:
            raise InputError(message)
        skipped.append(message)
    return _only(part, ~bad)


def _renumber(part: Examples, kept: np.ndarray, class_names: tuple[str, ...], skipped: list[str]) -> Examples:
    """The examples of the classes that are kept, by their new numbers."""
    good = np.isin(part.labels, kept)
    for i in np.flatnonzero(~good):
        left_out = f"of class {class_names[part.labels[i]]!r}, which has no training image"
        skipped.append(f"{part.origin(int(i))}: {left_out}")
    part = _only(part, good)
    return part._replace(labels=np.searchsorted(kept, part.labels))


def _only(part: Examples, good: np.ndarray) -> Examples:
    """Some of the examples, with labels that can be counted."""
    if good.all():
        return part._replace(labels=part.labels.astype(np.int64))
    kept, origin = np.flatnonzero(good), part.origin
    return Examples(part.images[kept], part.labels[kept].astype(np.int64), lambda i: origin(int(kept[i])))


def _take(part: Examples, size: int, seed: int) -> tuple[Examples, Examples]:
    left, taken = (
        part._replace(images=part.images[chosen], labels=part.labels[chosen])
        for chosen in stratify(part.labels, min(size, len(part.labels)), seed)
    )
    return left, taken

"""NumPy's archive of arrays."""

import math
import zipfile
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from jaxattn.errors import InputError
from jaxattn.files import Room, open_file, reading, size_of
from jaxattn.train.data.split import Examples, Found

# what an array is called here, by MedMNIST, and by Keras
NAMES = {
    "train_images": ("train_images", "x_train"),
    "train_labels": ("train_labels", "y_train"),
    "test_images": ("test_images", "x_test"),
    "test_labels": ("test_labels", "y_test"),
    "val_images": ("val_images", "x_val"),
    "val_labels": ("val_labels", "y_val"),
    "class_names": ("class_names",),
}
NEEDED = ("train_images", "train_labels", "test_images", "test_labels")
HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read_npz(path: Path, limit: int | None = None) -> Found:
    """The arrays `train_images`, `train_labels`, `test_images`, `test_labels` and, if there, `class_names`.

    The validation part is `val_images` and `val_labels`, if they are there. Keras' names, `x_train` and `y_train` and
    the like, will do as well. Images are `[n, height, width]` or `[n, height, width, channels]`, uint8, or floating
    point in [0, 1]; labels are integers `[n]` or `[n, 1]`. Without `class_names` the classes are the numbers up to the
    largest label. No pickle is read.

    Raises:
      ValueError: a file that is missing, damaged, or has other arrays than these.
    """
    with reading(path, form=(b"PK", b"\x93NUMPY")), open_file(path) as file:
        arrays = _read(path, file, Room(path, size_of(file), limit))
    train, test = (_examples(path, part, arrays) for part in ("train", "test"))
    validation = _examples(path, "val", arrays) if {"val_images", "val_labels"} <= arrays.keys() else None
    names = None
    if "class_names" in arrays:
        if arrays["class_names"].ndim != 1:
            raise InputError(f"{path}: class_names has shape {arrays['class_names'].shape}, expected one axis")
        with reading(path, form=(b"PK",)):  # text that is no Unicode
            names = tuple(_text(name) for name in arrays["class_names"])
            "".join(names).encode()
    return Found(str(path), names, train, validation, test)


def _read(path: Path, file: IO[bytes], room: Room) -> dict[str, np.ndarray]:
    """The arrays of an archive by our names."""
    if file.read(6) == b"\x93NUMPY":
        raise InputError(f"{path}: one array; expected an archive of {', '.join(NEEDED)}")
    with zipfile.ZipFile(file) as archive:
        infos = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        found = {ours: [name for name in names if name in infos] for ours, names in NAMES.items()}
        missing = [name for name in NEEDED if not found[name]]
        if missing:
            raise InputError(f"{path}: has {', '.join(infos) or 'nothing'}, and lacks {', '.join(missing)}")
        twice = [names for names in found.values() if len(names) > 1]
        if twice:
            raise InputError(f"{path}: has both {' and '.join(twice[0])}; expected one of them")
        return {ours: _array(archive, infos[names[0]], names[0], room) for ours, names in found.items() if names}


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str, room: Room) -> np.ndarray:
    """One array, if its header says what its file holds, and there is room for it."""
    with archive.open(info) as stream:
        version = npy.read_magic(stream)
        if version not in HEADERS:
            raise ValueError(f"{name} is of npy's version {version}; allowed: {' or '.join(map(str, HEADERS))}")
        room.take(info.file_size, name)
        shape, fortran, dtype = HEADERS[version](stream)
        if dtype.hasobject:
            raise ValueError(f"Object arrays cannot be loaded: {name} is one")
        size = math.prod(shape) * dtype.itemsize
        if not dtype.itemsize or info.file_size - stream.tell() != size:
            raise ValueError(f"{name} of shape {shape} and {dtype} in {info.file_size} bytes")
        array = np.frombuffer(stream.read(size), dtype).reshape(shape, order="F" if fortran else "C")
    return array.astype(dtype.newbyteorder("="), copy=False)


def _text(name: np.generic) -> str:
    """A class's name, which NumPy has as bytes where it was made of them."""
    return name.decode("utf-8") if isinstance(name, bytes) else str(name)


def _examples(path: Path, part: str, arrays: dict[str, np.ndarray]) -> Examples:
    images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or 0 in images.shape:
        raise InputError(f"{path}: {part}_images has shape {images.shape}, expected [n, height, width, channels]")
    if images.shape[1] in (1, 3, 4) and images.shape[-1] > 4:
        raise InputError(
            f"{path}: {part}_images has shape {images.shape}, expected [n, height, width, channels]: this looks like "
            "[n, channels, height, width], of which np.moveaxis(images, 1, -1) makes what is expected"
        )
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"{path}: {part}_labels is {labels.dtype} of shape {labels.shape}, expected integers ({len(images)},)"
        )
    if images.dtype != np.uint8:
        if not np.issubdtype(images.dtype, np.floating):
            raise InputError(f"{path}: {part}_images is {images.dtype}, expected uint8, or floating point in [0, 1]")
        if not (images.min() >= 0 and images.max() <= 1):  # nor NaN
            raise InputError(f"{path}: {part}_images runs from {images.min()} to {images.max()}, expected 0 to 1")
        images = images.astype(np.float32)
    return Examples(images, labels, f"{path}: {part}_labels[{{}}]".format)

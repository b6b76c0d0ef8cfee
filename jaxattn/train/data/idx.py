"""The idx files of MNIST and Fashion-MNIST."""

import contextlib
import gzip
import math
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from jaxattn.errors import InputError
from jaxattn.files import Room, Unfolded, open_file, reading, size_of
from jaxattn.train.data.split import Examples, Found

FASHION_CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
DIGITS = tuple("0123456789")


def read_fashion(folder: Path, limit: int | None = None) -> Found:
    """The four files of Xiao et al. 2017 (arXiv 1708.07747) in a folder, gzipped or not."""
    return _read(folder, FASHION_CLASSES, limit)


def read_mnist(folder: Path, limit: int | None = None) -> Found:
    """The four files of LeCun et al. 1998 in a folder, gzipped or not."""
    return _read(folder, DIGITS, limit)


def read_idx(path: Path, ndim: int, limit: int | None = None) -> UInt8[np.ndarray, "..."]:
    """Reads an idx file of bytes with `ndim` axes, gzipped if its name ends in `.gz`.

    The header is the bytes 0, 0, 8 (unsigned byte), ndim, then each size as a big-endian 32-bit integer.

    Raises:
      ValueError: a file that is missing, truncated, or not what its header says.
    """
    with reading(path, form=(b"\x1f\x8b",) if path.suffix == ".gz" else ()), open_file(path) as file:
        room = Room(path, size_of(file), limit)
        unpack: Any = gzip.open if path.suffix == ".gz" else contextlib.nullcontext
        with unpack(file) as stream:
            return _array(path, Unfolded(stream, room, "its content"), ndim, room)


def _array(path: Path, stream: Unfolded, ndim: int, room: Room) -> np.ndarray:
    length = 4 + 4 * ndim
    header = stream.read(length)
    if header[:4] != bytes([0, 0, 8, ndim]):
        said = header[:4].hex(" ") or "nothing"
        raise InputError(f"{path}: starts with {said}, expected 00 00 08 {ndim:02x} (idx, {ndim} axes)")
    if len(header) < length:
        raise InputError(f"{path}: {len(header)} bytes, too short for a header of {length}")
    shape = tuple(int(size) for size in np.frombuffer(header, ">u4", ndim, 4))
    if 0 in shape:
        raise InputError(f"{path}: the shape {shape} in its header is of nothing")
    size = math.prod(shape)
    if size > room.left:
        room.take(size, f"the shape {shape} in its header")
    content = stream.read(size + 1)  # one more, if it is there
    if len(content) != size:
        more = " and more" if len(content) > size else ""
        raise InputError(
            f"{path}: {length + len(content)} bytes{more}, expected {length + size} for the shape {shape} in its header"
        )
    return np.frombuffer(content, np.uint8).reshape(shape)


def _read(folder: Path, class_names: tuple[str, ...], limit: int | None) -> Found:
    train, test = (_read_pair(folder, part, limit) for part in ("train", "t10k"))
    return Found(str(folder), class_names, train, test=test)


def _read_pair(folder: Path, part: str, limit: int | None) -> Examples:
    images = read_idx(_find(folder, f"{part}-images-idx3-ubyte"), 3, limit)
    path = _find(folder, f"{part}-labels-idx1-ubyte")
    labels = read_idx(path, 1, limit)
    if len(images) != len(labels):
        raise InputError(f"{path}: {len(labels)} labels for {len(images)} images")
    return Examples(images[..., None], labels.astype(np.int32), f"{path}: image {{}}".format)


def _find(folder: Path, name: str) -> Path:
    dotted = name.replace("-idx", ".idx")  # as Kaggle has them, some in a folder of the same name
    for inner in (name, dotted):
        for path in (folder / inner, folder / f"{inner}.gz", folder / inner / inner):
            if path.exists() and not path.is_dir():
                return path
    raise InputError(f"{folder}: has neither {name} nor {name}.gz")

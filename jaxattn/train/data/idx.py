"""The idx files of MNIST and Fashion-MNIST."""

import gzip
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from jaxattn.errors import InputError
from jaxattn.train.data.split import Examples, Found

FASHION_CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def read_fashion(folder: Path) -> Found:
    """The four files of Xiao et al. 2017 (arXiv 1708.07747) in a folder, gzipped or not."""
    return Found(str(folder), FASHION_CLASSES, _read_pair(folder, "train"), test=_read_pair(folder, "t10k"))


def read_idx(path: Path, ndim: int) -> UInt8[np.ndarray, "..."]:
    """Reads an idx file of bytes with `ndim` axes, gzipped if its name ends in `.gz`.

    The header is the bytes 0, 0, 8 (unsigned byte), ndim, then each size as a big-endian 32-bit integer.

    Raises:
      ValueError: a file that is missing, truncated, or not what its header says.
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


def _read_pair(folder: Path, part: str) -> Examples:
    images = read_idx(_find(folder, f"{part}-images-idx3-ubyte"), 3)
    path = _find(folder, f"{part}-labels-idx1-ubyte")
    labels = read_idx(path, 1)
    if len(images) != len(labels):
        raise InputError(f"{path}: {len(labels)} labels for {len(images)} images")
    return Examples(images[..., None], labels.astype(np.int32), f"{path}: image {{}}".format)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise InputError(f"{folder}: has neither {name} nor {name}.gz")

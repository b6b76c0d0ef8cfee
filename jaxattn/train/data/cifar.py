"""CIFAR-10 and CIFAR-100 in their two published forms: pickles, read without running what is in them, and records."""

import bz2
import gzip
import lzma
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np

from jaxattn.errors import InputError
from jaxattn.files import Room, Unfolded, open_file, reading, size_of
from jaxattn.train.data.safe_pickle import read_pickle
from jaxattn.train.data.split import Examples, Found


class _Layout(NamedTuple):
    """The names of the files in both forms, and of what is in them."""

    train: tuple[str, ...]
    test: str
    pickled_names: tuple[str, str]  # file, key
    binary_names: str
    label_key: str
    label_bytes: int  # of a record, of which the last is the label


TEN = _Layout(
    tuple(f"data_batch_{i}" for i in range(1, 6)),
    "test_batch",
    ("batches.meta", "label_names"),
    "batches.meta.txt",
    "labels",
    1,
)
PACKED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}  # by how the file begins
HUNDRED = _Layout(("train",), "test", ("meta", "fine_label_names"), "fine_label_names.txt", "fine_labels", 2)


def read_cifar10(path: Path, limit: int | None = None) -> Found:
    """60,000 images of 32×32 pixels in 10 classes (Krizhevsky 2009), from the archive or the folder in it."""
    return _read(path, TEN, limit)


def read_cifar100(path: Path, limit: int | None = None) -> Found:
    """60,000 images of 32×32 pixels in 100 classes (Krizhevsky 2009), from the archive or the folder in it."""
    return _read(path, HUNDRED, limit)


def _read(path: Path, layout: _Layout, limit: int | None) -> Found:
    train, test = layout.train, layout.test
    files = _contents(path, {*train, test, layout.pickled_names[0], layout.binary_names}, limit)
    if layout.test in files:
        read = lambda name: _pickled(f"{path}: {name}", _content(path, files, name), layout)
        where, key = layout.pickled_names
        names = _strings(f"{path}: {where}", _unpickle(f"{path}: {where}", _content(path, files, where)), key)
    else:
        train, test = tuple(f"{name}.bin" for name in train), f"{test}.bin"
        read = lambda name: _records(f"{path}: {name}", _content(path, files, name), layout.label_bytes)
        names = tuple(_content(path, files, layout.binary_names).decode("ascii", "replace").split())
    parts = [read(name) for name in train]
    sizes = [len(labels) for _, labels in parts]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))

    def origin(i: int) -> str:
        batch = int(np.searchsorted(np.cumsum(sizes), i, side="right"))
        return f"{path}: {train[batch]}: image {i - sum(sizes[:batch])}"

    tested = Examples(*read(test), f"{path}: {test}: image {{}}".format)
    return Found(str(path), names, Examples(images, labels, origin), test=tested)


def _contents(path: Path, names: set[str], limit: int | None) -> dict[str, bytes]:
    """The files of these names, with `.bin` or without, in a tar archive or in a folder or the one folder in that."""
    wanted = names | {f"{name}.bin" for name in names}
    with reading(path, form=tuple(PACKED)):
        if not path.is_dir():
            return _unpacked(path, wanted, limit)
        found = [file for pattern in ("*", "*/*") for file in sorted(path.glob(pattern)) if file.name in wanted]
        folders = {file.parent for file in found}
        if len(folders) > 1:
            raise InputError(f"{path}: more than one data set: name one of {', '.join(map(str, sorted(folders)))}")
        return {file.name: _whole(file, limit) for file in found if not file.is_dir()}


def _whole(path: Path, limit: int | None) -> bytes:
    with reading(path), open_file(path) as file:
        Room(path, size_of(file), limit).take(size_of(file), "it")
        return file.read()


def _unpacked(path: Path, wanted: set[str], limit: int | None) -> dict[str, bytes]:
    """The wanted files of an archive, read from its start to its end: no other is opened, and no link is followed."""
    contents: dict[str, bytes] = {}
    with open_file(path) as file:
        room, start = Room(path, size_of(file), limit), file.read(6)
        file.seek(0)
        unpack = next((unpack for magic, unpack in PACKED.items() if start.startswith(magic)), None)
        stream: IO[bytes] = unpack(file) if unpack else file
        with tarfile.open(fileobj=Unfolded(stream, room, "its content"), mode="r|") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if member.size > room.left and not member.issparse():  # before a gibibyte of it is unpacked
                    room.take(member.size, name)
                if name not in wanted or not member.isreg():
                    continue
                if member.issparse():
                    raise InputError(f"{path}: {name} is a file with holes; expected a plain one")
                content = archive.extractfile(member)
                contents[name] = content.read() if content else b""
    return contents


def _content(path: Path, files: Mapping[str, bytes], name: str) -> bytes:
    if name not in files:
        raise InputError(f"{path}: lacks {name}; it has {', '.join(sorted(files)) or 'no file of the data set'}")
    return files[name]


def _records(where: str, content: bytes, label_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """The binary form: records of the label's bytes, then 3×32×32 of the image."""
    size = label_bytes + 3072
    if not content or len(content) % size:
        raise InputError(f"{where}: {len(content)} bytes, expected a multiple of {size}")
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    return _upright(records[:, label_bytes:]), records[:, label_bytes - 1].astype(np.int32)


def _pickled(where: str, content: bytes, layout: _Layout) -> tuple[np.ndarray, np.ndarray]:
    """The form for Python: a dictionary with the images `[n, 3072]` and a list of the labels."""
    batch = _unpickle(where, content)
    pixels, labels = batch.get("data"), batch.get(layout.label_key)
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != 3072:
        raise InputError(f"{where}: data is {_describe(pixels)}, expected an array of shape [n, 3072]")
    if not isinstance(labels, list) or len(labels) != len(pixels) or not all(type(label) is int for label in labels):
        raise InputError(
            f"{where}: {layout.label_key} is {_describe(labels)}, expected a list of {len(pixels)} integers"
        )
    return _upright(pixels), np.array(labels, np.int64)


def _upright(pixels: np.ndarray) -> np.ndarray:
    return np.moveaxis(pixels.reshape(-1, 3, 32, 32), 1, -1)  # [n, 3072] -> [n, 32, 32, 3]


def _strings(where: str, found: dict[str, Any], key: str) -> tuple[str, ...]:
    names = found.get(key)
    if not isinstance(names, list) or not all(isinstance(name, bytes | str) for name in names):
        raise InputError(f"{where}: {key} is {_describe(names)}, expected a list of names")
    return tuple(name.decode("latin1") if isinstance(name, bytes) else name for name in names)


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of shape {list(value.shape)}"
    return f"a list of {len(value)}" if isinstance(value, list) else type(value).__name__


def _unpickle(where: str, content: bytes) -> dict[str, Any]:
    try:
        return read_pickle(content)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error

"""A folder of images, one folder a class."""

import functools
import os
from collections.abc import Mapping
from pathlib import Path

from jaxattn.errors import InputError
from jaxattn.files import open_file, reading
from jaxattn.train.data.images import Encoded, decode_parts
from jaxattn.train.data.options import whole_number
from jaxattn.train.data.split import PARTS, Found

JUNK = ("thumbs.db", "desktop.ini", "__macosx", "icon\r")  # what Windows and macOS leave among the files


def read_folder(path: Path, options: Mapping[str, str], skip_bad: bool) -> Found:
    """PATH/train/CLASS/*.png and PATH/test/CLASS/*.png, or PATH/CLASS/*.png, of which the test part is then drawn.

    PATH/val (or valid, validation, dev, eval) is the validation part if there is a test part as well, and the test part
    if there is none; upper and lower case are the same. The classes are the folders of the training part in
    alphabetical order. Every file in them must be an image in the JPEG, PNG, WebP, TIFF or BMP format, but those whose
    name begins with a dot, and Thumbs.db, desktop.ini and __MACOSX.
    """
    size = whole_number(options, "size", None, least=1)
    folders = _parts(path)
    class_folders = _inner(folders["train"])
    if not class_folders:
        raise InputError(f"{folders['train']}: has no folders: expected one for each class")
    numbers = {folder.name: number for number, folder in enumerate(class_folders)}
    files = {part: _files(folder, numbers, path) for part, folder in folders.items()}
    skipped: list[str] = []
    parts = decode_parts(files, size, skip_bad, skipped)
    validation, test = parts.get("validation"), parts.get("test")
    if test is None:
        validation, test = None, validation
    class_names = tuple(map(legible, numbers))
    return Found(str(folders["train"]), class_names, parts["train"], validation, test, tuple(skipped))


def _parts(path: Path) -> dict[str, Path]:
    """The folder of each part; where none is of the training part, the whole folder is."""
    found: dict[str, Path] = {}
    for folder in _inner(path):
        part = PARTS.get(folder.name.lower())
        if part in found:
            raise InputError(f"{folder}: and {found[part].name} are both of the {part} part: expected one")
        if part:
            found[part] = folder
    return found if "train" in found else {"train": path}


def _files(folder: Path, numbers: Mapping[str, int], top: Path) -> list[Encoded]:
    files = []
    for inner in _inner(folder):
        if inner.name not in numbers:
            raise InputError(f"{inner}: no class of the training images: {', '.join(map(legible, numbers))}")
        for path in _listed(inner):
            if path.is_dir():
                hint = f"; where the classes are in {inner}, that is the data: folder:{inner}" if folder == top else ""
                raise InputError(f"{path}: is a folder among the images of a class, expected image files{hint}")
            files.append(Encoded(functools.partial(open_file, path), numbers[inner.name], str(path)))
    if not files:
        raise InputError(f"{folder}: has no images")
    return files


def _inner(folder: Path) -> list[Path]:
    return [path for path in _listed(folder) if path.is_dir()]


def _listed(folder: Path) -> list[Path]:
    """What is in a folder, but for what no user put there."""
    with reading(folder):
        return sorted(path for path in folder.iterdir() if path.name[0] != "." and path.name.lower() not in JUNK)


def legible(name: str) -> str:
    """A folder's name, whose bytes need not be UTF-8, as text that can be written and drawn.

    >>> legible("café"), legible("caf\\udce9")
    ('café', 'caf\\\\xe9')
    """
    return os.fsencode(name).decode("utf-8", "backslashreplace")

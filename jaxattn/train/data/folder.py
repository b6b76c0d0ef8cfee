"""A folder of images, one folder a class."""

from collections.abc import Mapping
from pathlib import Path

from jaxattn.errors import InputError
from jaxattn.train.data.images import Encoded, decode_all
from jaxattn.train.data.options import whole_number
from jaxattn.train.data.split import Examples, Found

VALIDATION = ("val", "valid", "validation")


def read_folder(path: Path, options: Mapping[str, str], skip_bad: bool) -> Found:
    """PATH/train/CLASS/*.png and PATH/test/CLASS/*.png, or PATH/CLASS/*.png, of which the test part is then drawn.

    PATH/val is the validation part if there is a test part as well, and the test part if there is none. The classes
    are the folders of the training part in alphabetical order. Every file in them, but those whose name begins with a
    dot, must be a JPEG or PNG image.
    """
    size = whole_number(options, "size", None, least=1)
    folders = {folder.name: folder for folder in _inner(path)}
    if "train" not in folders:
        folders = {"train": path}
    class_names = tuple(folder.name for folder in _inner(folders["train"]))
    if not class_names:
        raise InputError(f"{folders['train']}: has no folders: expected one for each class")
    skipped: list[str] = []
    read = lambda folder: _read_part(folder, class_names, size, skip_bad, skipped)
    train = read(folders["train"])
    validation = next((read(folders[name]) for name in VALIDATION if name in folders), None)
    test = read(folders["test"]) if "test" in folders else None
    if test is None:
        validation, test = None, validation
    return Found(str(folders["train"]), class_names, train, validation, test, tuple(skipped))


def _read_part(
    folder: Path, class_names: tuple[str, ...], size: int | None, skip_bad: bool, skipped: list[str]
) -> Examples:
    files = []
    for inner in _inner(folder):
        if inner.name not in class_names:
            raise InputError(f"{inner}: no class of the training images: {', '.join(class_names)}")
        for path in sorted(inner.iterdir()):
            if not path.name.startswith("."):
                files.append(Encoded(path.read_bytes, class_names.index(inner.name), str(path)))
    if not files:
        raise InputError(f"{folder}: has no images")
    return decode_all(files, size, skip_bad, skipped)


def _inner(folder: Path) -> list[Path]:
    try:
        return sorted(inner for inner in folder.iterdir() if inner.is_dir() and not inner.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error}") from error

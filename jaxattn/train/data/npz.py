"""NumPy's archive of arrays."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from jaxattn.errors import InputError
from jaxattn.train.data.split import Examples, Found

# what zipfile and NumPy make of a damaged file
DAMAGED = (OSError, EOFError, ValueError, TypeError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)
PARTS = ("train_images", "train_labels", "test_images", "test_labels")


def read_npz(path: Path) -> Found:
    """The arrays `train_images`, `train_labels`, `test_images`, `test_labels` and, if there, `class_names`.

    Images are `[n, height, width]` or `[n, height, width, channels]`, uint8, or floating point in [0, 1]; labels are
    integers `[n]`. Without `class_names` the classes are the numbers up to the largest label. No pickle is read.

    Raises:
      ValueError: a file that is missing, damaged, or has other arrays than these.
    """
    try:
        with open(path, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise InputError(f"{path}: one array; expected an archive of {', '.join(PARTS)}")
            missing = [name for name in PARTS if name not in archive]
            if missing:
                raise InputError(f"{path}: has {', '.join(archive) or 'nothing'}, and lacks {', '.join(missing)}")
            arrays = {name: archive[name] for name in (*PARTS, "class_names") if name in archive}
    except InputError:
        raise
    except DAMAGED as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    train, test = (_examples(path, part, arrays) for part in ("train", "test"))
    names = arrays.get("class_names", np.arange(max(train.labels, default=-1) + 1))
    if names.ndim != 1:
        raise InputError(f"{path}: class_names has shape {names.shape}, expected one axis")
    return Found(str(path), tuple(str(name) for name in names), train, test=test)


def _examples(path: Path, part: str, arrays: dict[str, np.ndarray]) -> Examples:
    images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or 0 in images.shape:
        raise InputError(f"{path}: {part}_images has shape {images.shape}, expected [n, height, width, channels]")
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

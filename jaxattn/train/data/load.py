"""From the name that `--data` gives to the data set."""

from collections.abc import Callable, Mapping
from pathlib import Path

from jaxattn.train.data.dataset import Dataset
from jaxattn.train.data.digits import read_digits
from jaxattn.train.data.idx import read_fashion
from jaxattn.train.data.npz import read_npz
from jaxattn.train.data.split import Found, assemble
from jaxattn.train.extras import InputError

READERS: Mapping[str, Callable[[Path], Found]] = {
    "fashion-mnist": read_fashion,
    "numpy": read_npz,
}
ALLOWED = ", ".join(["'digits'", *(f"'{kind}:PATH'" for kind in READERS)])


def load(name: str, seed: int = 0, skip_bad: bool = False) -> Dataset:
    """Loads the data set that `--data` names, and checks all of it.

    Args:
      name: `digits`, the 1,797 handwritten digits of 8×8 pixels that scikit-learn ships (Alpaydin and Kaynak, 1998);
        `fashion-mnist:PATH`, the four idx files of Xiao et al. 2017 (arXiv 1708.07747) in the folder PATH, gzipped
        or not; `numpy:PATH.npz`, arrays train_images, train_labels, test_images, test_labels and class_names.
      seed: draws the validation images from the training images, stratified, where there are none apart. The test
        images never depend on it, so that the accuracies of different seeds are comparable.
      skip_bad: leaves out a bad example instead of refusing the data set, and lists it in `skipped`. A damaged
        archive is an error either way.

    Raises:
      ValueError: an unknown name, or a file that is missing or is not what it should be, with the file's name.

    >>> digits = load("digits")
    >>> digits.image_shape, len(digits.train), len(digits.validation), len(digits.test)
    ((8, 8, 1), 1200, 200, 397)
    """
    kind, _, path = name.partition(":")
    if name == "digits":
        return assemble(name, read_digits(), seed, skip_bad, validation_size=200)
    if kind in READERS and path:
        return assemble(kind, READERS[kind](Path(path)), seed, skip_bad)
    raise InputError(f"data (={name!r}) must be one of {ALLOWED}")

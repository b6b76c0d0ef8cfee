"""From the name that `--data` gives to the data set."""

from collections.abc import Callable, Mapping
from pathlib import Path

from jaxattn.errors import InputError
from jaxattn.train.data.cifar import read_cifar10, read_cifar100
from jaxattn.train.data.dataset import Dataset
from jaxattn.train.data.digits import read_digits
from jaxattn.train.data.folder import read_folder
from jaxattn.train.data.idx import read_fashion
from jaxattn.train.data.npz import read_npz
from jaxattn.train.data.options import read_options
from jaxattn.train.data.parquet import read_parquet
from jaxattn.train.data.relational import make_relational
from jaxattn.train.data.split import Found, assemble

# what reads each kind, and the options that it takes
READERS: Mapping[str, tuple[Callable[[Path, Mapping[str, str], bool], Found], tuple[str, ...]]] = {
    "fashion-mnist": (lambda path, *_: read_fashion(path), ()),
    "cifar10": (lambda path, *_: read_cifar10(path), ()),
    "cifar100": (lambda path, *_: read_cifar100(path), ()),
    "numpy": (lambda path, *_: read_npz(path), ()),
    "folder": (read_folder, ("size",)),
    "parquet": (read_parquet, ("size", "image", "label")),
}
ALLOWED = ", ".join(["'digits'", *(f"'{kind}:PATH'" for kind in READERS), "'relational:TASK'"])


def load(name: str, seed: int = 0, skip_bad: bool = False) -> Dataset:
    """Loads the data set that `--data` names, and checks all of it.

    Args:
      name: `digits`, the 1,797 handwritten digits of 8×8 pixels that scikit-learn ships (Alpaydin and Kaynak, 1998);
        `fashion-mnist:PATH`, the four idx files of Xiao et al. 2017 (arXiv 1708.07747) in the folder PATH, gzipped
        or not; `cifar10:PATH` or `cifar100:PATH`, the published archive or its folder, for Python or binary;
        `numpy:PATH.npz`, arrays train_images, train_labels, test_images, test_labels and class_names;
        `folder:PATH`, JPEG and PNG files in PATH/train/CLASS and PATH/test/CLASS, or in PATH/CLASS;
        `parquet:PATH`, a folder of `*train*.parquet` and `*test*.parquet` as the Hugging Face hub serves them.
        Images must be of one size, unless `?size=N` after the PATH of a folder or parquet makes all N×N. All of them
        are decoded into memory, as uint8. `relational:same-different`, `relational:copy` and `relational:match` are
        made on the fly, without end (see `relational.py` for their options).
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
    kind, _, rest = name.partition(":")
    path, _, options = rest.partition("?")
    if name == "digits":
        return assemble(name, read_digits(), seed, skip_bad, validation_size=200)
    if kind == "relational":
        return make_relational(rest, seed)
    if kind in READERS and path:
        read, allowed = READERS[kind]
        return assemble(kind, read(Path(path).expanduser(), read_options(options, allowed), skip_bad), seed, skip_bad)
    raise InputError(f"data (={name!r}) must be one of {ALLOWED}")

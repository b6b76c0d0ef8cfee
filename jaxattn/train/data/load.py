"""From the name that `--data` gives to the data set."""

from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import urlencode

from jaxattn.errors import InputError
from jaxattn.files import cut, path_of
from jaxattn.train.data.cifar import read_cifar10, read_cifar100
from jaxattn.train.data.compose import OPTIONS as COMPOSING
from jaxattn.train.data.compose import compose
from jaxattn.train.data.dataset import Dataset
from jaxattn.train.data.digits import read_digits
from jaxattn.train.data.folder import read_folder
from jaxattn.train.data.idx import read_fashion, read_mnist
from jaxattn.train.data.npz import read_npz
from jaxattn.train.data.options import read_options
from jaxattn.train.data.parquet import read_parquet
from jaxattn.train.data.relational import make_relational
from jaxattn.train.data.split import Found, assemble

Reader = Callable[[Path, Mapping[str, str], bool, int | None], Found]
# what reads each kind, and the options that it takes
READERS: Mapping[str, tuple[Reader, tuple[str, ...]]] = {
    "fashion-mnist": (lambda path, _, __, limit: read_fashion(path, limit), ()),
    "mnist": (lambda path, _, __, limit: read_mnist(path, limit), ()),
    "cifar10": (lambda path, _, __, limit: read_cifar10(path, limit), ()),
    "cifar100": (lambda path, _, __, limit: read_cifar100(path, limit), ()),
    "numpy": (lambda path, _, __, limit: read_npz(path, limit), ()),
    "folder": (lambda path, options, skip_bad, _: read_folder(path, options, skip_bad), ("size",)),
    "parquet": (read_parquet, ("size", "image", "label")),
}
ALLOWED = ", ".join(["'digits'", *(f"'{kind}:PATH'" for kind in READERS), "'relational:TASK'", "'compose:DATA'"])


def load(name: str, seed: int = 0, skip_bad: bool = False, limit: int | None = None) -> Dataset:
    """Loads the data set that `--data` names, and checks all of it.

    Args:
      name: `digits`, the 1,797 handwritten digits of 8×8 pixels that scikit-learn ships (Alpaydin and Kaynak, 1998);
        `fashion-mnist:PATH` and `mnist:PATH`, the four idx files of Xiao et al. 2017 (arXiv 1708.07747) or of LeCun et
        al. 1998 in the folder PATH, gzipped or not; `cifar10:PATH` or `cifar100:PATH`, the published archive or its
        folder, for Python or binary; `numpy:PATH.npz`, arrays train_images, train_labels, test_images, test_labels and
        class_names; `folder:PATH`, JPEG, PNG, WebP, TIFF and BMP files in PATH/train/CLASS and PATH/test/CLASS, or in
        PATH/CLASS; `parquet:PATH`, a folder of `*train*.parquet` and `*test*.parquet` as the Hugging Face hub serves
        them, or one file.
        Images must be of one size, unless `?size=N` after the PATH of a folder or parquet makes all N×N. All of them
        are decoded into memory, as uint8. A PATH that exists with a `?` in it is taken as it is.
        `relational:same-different`, `relational:copy` and `relational:match` are made on the fly, without end (see
        `relational.py` for their options). `compose:` and the name of one of the others, as `compose:digits` or
        `compose:folder:PATH?size=28&task=match&n=100000`, composes images of several of its images, without end or n
        distinct ones (see `compose.py` for the tasks and options).
      seed: draws the validation images from the training images, stratified, where there are none apart. The test
        images never depend on it, so that the accuracies of different seeds are comparable.
      skip_bad: leaves out a bad example instead of refusing the data set, and lists it in `skipped`. A damaged
        archive is an error either way.
      limit: the bytes that any one file may unfold to; None is 1 GiB, or 16 times its size if that is more.

    Raises:
      ValueError: an unknown name, or a file that is missing or is not what it should be, with the file's name.

    >>> digits = load("digits")
    >>> digits.image_shape, len(digits.train), len(digits.validation), len(digits.test)
    ((8, 8, 1), 1200, 200, 397)
    """
    kind, _, rest = name.partition(":")
    if name == "digits":
        return assemble(name, read_digits(), seed, skip_bad, validation_size=200)
    if kind == "relational":
        return make_relational(rest, seed)
    if kind == "compose":
        source, given = _composed(rest)
        return compose(load(source, seed, skip_bad, limit), given, seed)
    path, options = split_path(rest)
    if kind not in READERS or not path:
        raise InputError(f"data (={cut(name)!r}) must be one of {ALLOWED}")
    read, allowed = READERS[kind]
    found = read(path_of(path), read_options(options, allowed), skip_bad, limit)
    return assemble(kind, found, seed, skip_bad)


def _composed(text: str) -> tuple[str, dict[str, str]]:
    """The name of the originals, with the options that are theirs, and the options of what is composed of them.

    >>> _composed("folder:images?size=28&task=match")
    ('folder:images?size=28', {'task': 'match'})
    """
    kind, colon, rest = text.partition(":")
    path, options = split_path(rest if colon else text)
    _, theirs = READERS.get(kind, (None, ()))
    given = read_options(options, (*COMPOSING, *theirs))
    kept = urlencode({name: given.pop(name) for name in theirs if name in given})
    return f"{kind if colon else ''}{colon}{path}{'?' if kept else ''}{kept}", given


def split_path(text: str) -> tuple[str, str]:
    """PATH and OPTIONS of PATH?OPTIONS. A path that exists with its `?` is taken as it is.

    >>> split_path("images?size=64")
    ('images', 'size=64')
    """
    if "?" not in text or path_of(text).exists():
        return text, ""
    path, _, options = text.rpartition("?")
    return path, options


def absolute(name: str) -> str:
    """The name of the same data from any folder.

    >>> absolute("digits"), absolute("folder:/data/images?size=64")
    ('digits', 'folder:/data/images?size=64')
    """
    kind, _, rest = name.partition(":")
    if kind == "compose":
        return f"compose:{absolute(rest)}"
    if kind not in READERS:
        return name
    path, options = split_path(rest)
    return f"{kind}:{path_of(path).resolve()}{f'?{options}' if options else ''}"

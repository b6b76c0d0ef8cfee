"""The handwritten digits that scikit-learn ships."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from jaxattn.errors import needs_extra
from jaxattn.train.data.split import Examples, Found, stratify


def read_digits() -> Found:
    """1,797 images of 8×8 pixels in 17 grey levels (Alpaydin and Kaynak, 1998); 397 are kept aside for the test."""
    pixels, labels = _shipped()  # [1797, 64], in 0 to 16
    images = np.reshape(pixels, (-1, 8, 8, 1)).astype(np.float32) / 16
    rest, test = stratify(labels, 397, seed=0)
    train, test = (Examples(images[part], labels[part], "digits: image {}".format) for part in (rest, test))
    return Found("digits", tuple("0123456789"), train, test=test)


def _shipped() -> tuple[np.ndarray, np.ndarray]:
    """Pixels and labels, from the file in scikit-learn's folder: importing the package takes longer than training."""
    package = find_spec("sklearn")
    for folder in (package and package.submodule_search_locations) or ():
        file = Path(folder, "datasets", "data", "digits.csv.gz")
        if file.is_file():
            table = np.loadtxt(file, delimiter=",")
            return table[:, :-1], table[:, -1].astype(int)
    with needs_extra("train"):
        from sklearn.datasets import load_digits
    pixels, labels = load_digits(return_X_y=True)
    return np.asarray(pixels), np.asarray(labels)

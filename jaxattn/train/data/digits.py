"""The handwritten digits that scikit-learn ships."""

import numpy as np

from jaxattn.errors import needs_extra
from jaxattn.train.data.split import Examples, Found, stratify


def read_digits() -> Found:
    """1,797 images of 8×8 pixels in 17 grey levels (Alpaydin and Kaynak, 1998); 397 are kept aside for the test."""
    with needs_extra("train"):
        from sklearn.datasets import load_digits
    pixels, labels = load_digits(return_X_y=True)  # [1797, 64], in 0 to 16
    images, labels = np.reshape(pixels, (-1, 8, 8, 1)).astype(np.float32) / 16, np.asarray(labels)
    rest, test = stratify(labels, 397, seed=0)
    train, test = (Examples(images[part], labels[part], "digits: image {}".format) for part in (rest, test))
    return Found("digits", tuple("0123456789"), train, test=test)

"""Pickles of dictionaries, lists, text, numbers and arrays of bytes, read without running what is in them."""

import math
import pickle
from typing import Any

import numpy as np

from jaxattn import pickles
from jaxattn.files import shown


def read_pickle(content: bytes) -> dict[str, Any]:
    """The dictionary in a pickle of Python 2 or 3, whose text Python 2 wrote as bytes.

    A pickle can name any function, and a plain unpickler calls it. This one knows what NumPy makes of an array of
    bytes; at any other name it stops, and at what would take long or much memory (`jaxattn.pickles`).

    Raises:
      ValueError: the pickle is truncated or damaged, names something else, or holds no dictionary.

    >>> read_pickle(pickle.dumps({b"labels": [3, 1], "data": np.zeros((2, 4), np.uint8)}, protocol=2))
    {'labels': [3, 1], 'data': array([[0, 0, 0, 0],
           [0, 0, 0, 0]], dtype=uint8)}
    >>> read_pickle(pickle.dumps({"labels": print}))
    Traceback (most recent call last):
    ...
    ValueError: names builtins.print; allowed: arrays, dictionaries, lists, text and numbers
    """
    make = lambda stream: _Unpickler(stream, encoding="bytes")
    found = pickles.load(content, make, _admit)
    if not isinstance(found, dict):
        raise ValueError(f"holds a {type(found).__name__}; allowed: a dictionary")
    return {
        key.decode("latin1") if isinstance(key, bytes) else str(key): value.array()
        if isinstance(value, _Array)
        else value
        for key, value in found.items()
    }


class _Array:
    """What stands for an array until all is read: NumPy's pickles make an empty one, and then give it its state."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        match self.state:
            case (_, tuple(shape), _Byte(), bool(fortran), bytes(data)) if len(shape) <= 64 and all(
                type(n) is int and n >= 0 for n in shape
            ):
                if len(data) == math.prod(shape):
                    return np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")
                raise ValueError(f"an array of shape {shown(shape)} in {len(data)} bytes")
        raise ValueError("an array that is damaged, or not of bytes")


class _Byte:
    """The dtype uint8. Its state, the byte order of one byte, says nothing."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _Reconstruct:
    """As `numpy._core.multiarray._reconstruct`."""

    __slots__ = ()  # a pickle may set the attributes of what it is given: this has none, where a function has

    def __call__(self, *_: Any) -> _Array:
        return _Array()


class _Dtype:
    """As `numpy.dtype`, of which one is admitted."""

    __slots__ = ()

    def __call__(self, code: Any, *_: Any) -> _Byte:
        if not isinstance(code, str | bytes) or code not in ("u1", b"u1", "|u1", b"|u1"):
            raise pickle.UnpicklingError(f"an array of {shown(code)}; allowed: 'u1'")
        return _Byte()


class _Encode:
    """As `_codecs.encode`, by which Python 3 writes bytes for Python 2. The same text is encoded once."""

    def __init__(self):
        self._made: dict[str, bytes] = {}

    def __setstate__(self, state: Any):
        """A pickle may set the attributes of what it is given."""
        raise pickle.UnpicklingError("changes what it was given")

    def __call__(self, text: Any, encoding: Any) -> bytes:
        if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
            raise pickle.UnpicklingError(f"bytes in the encoding {shown(encoding)}; allowed: 'latin1'")
        if text not in self._made:
            self._made[text] = text.encode("latin1")
        return self._made[text]


ADMITTED = {
    "numpy.core.multiarray._reconstruct": _Reconstruct(),
    "numpy._core.multiarray._reconstruct": _Reconstruct(),
    "numpy.ndarray": "numpy.ndarray",  # an argument of the above
    "numpy.dtype": _Dtype(),
}


def _admit(module: str, name: str):
    full = f"{module}.{name}"
    if full not in ADMITTED and full != "_codecs.encode":
        raise pickle.UnpicklingError(f"names {full[:200]}; allowed: arrays, dictionaries, lists, text and numbers")


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: Any, encoding: str):
        super().__init__(stream, encoding=encoding)
        self.encode = _Encode()

    def find_class(self, module: str, name: str) -> Any:
        _admit(module, name)
        return ADMITTED.get(f"{module}.{name}", self.encode)

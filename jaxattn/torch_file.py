"""PyTorch's files of weights, read without PyTorch, and without running what is in them."""

import math
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001


class Storage(NamedTuple):
    """A run of numbers in the file."""

    key: str
    dtype: str
    size: int


class View(NamedTuple):
    """A tensor: a storage, the number that it starts at, its shape, and its strides in numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch(path: str | os.PathLike[str], *, unwrap: Callable[[Any], Any] | None = None) -> dict[str, np.ndarray]:
    """The tensors of a file that `torch.save(model.state_dict(), path)` wrote, by name.

    Both of PyTorch's formats are read: the zip archive (since 1.6), and the stream of pickles before it. A pickle can
    name any function, and a plain unpickler calls it. This one knows ordered dictionaries, tensors and parameters; at
    any other name it stops.

    Args:
      path: the file.
      unwrap: finds the dictionary of tensors in what the file holds. With it, a name that is none of the above stands
        for an `Inert` object: nothing is imported or called.

    Returns:
      Each tensor as an array of its shape and dtype (bfloat16 as `jnp.bfloat16`), in the file's order.

    Raises:
      ValueError: the file is of neither format, is cut off or inconsistent, names something else than tensors, or holds
        something else than a dictionary of them; with the file and what was refused.

    >>> import os, pickle, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "weights.pth")
    ...     with open(path, "wb") as file:
    ...         pickle.dump({"weight": print}, file)
    ...     read_torch(path)
    Traceback (most recent call last):
    ...
    ValueError: read_torch: ...weights.pth: names builtins.print; allowed: dictionaries of tensors
    """
    try:
        with open(path, "rb") as file:
            start = file.read(4)
            file.seek(0)
            return _read_zip(file, unwrap) if start == b"PK\x03\x04" else _read_legacy(file, unwrap)
    except (ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(f"read_torch: {os.fspath(path)}: {error}") from error
    except (EOFError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError, MemoryError) as error:
        # what a broken or a hostile pickle makes of the unpickler's own stack
        raise ValueError(f"read_torch: {os.fspath(path)}: damaged, or not PyTorch's: {error!r}") from error


class _Tensor:
    """As `torch._utils._rebuild_tensor_v2`, whose other arguments are for gradients."""

    __slots__ = ()  # a pickle may set the attributes of what it is given: this has none, where a function has

    def __call__(self, storage: Any, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> View:
        numbers = [offset, *shape, *strides]
        if not isinstance(storage, Storage) or not all(type(n) is int and n >= 0 for n in numbers):
            raise pickle.UnpicklingError(f"a tensor of {storage!r} with offset, shape and strides {numbers}")
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if 0 not in shape and (last >= storage.size or math.prod(shape) > storage.size):
            raise pickle.UnpicklingError(
                f"a tensor of shape {tuple(shape)} reads number {last} of a storage of {storage.size}"
            )
        return View(storage, offset, tuple(shape), tuple(strides))


class _Parameter:
    """As `torch._utils._rebuild_parameter`: the tensor in it."""

    __slots__ = ()

    def __call__(self, data: Any, *_: Any) -> Any:
        return data


ADMITTED = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor_v2": _Tensor(),
    "torch._utils._rebuild_parameter": _Parameter(),
}


class Inert:
    """What a pickle's unknown object is read as: it takes whatever a pickle does to an object, and keeps nothing."""

    __slots__ = ()

    def __new__(cls, *_: Any, **__: Any) -> "Inert":
        return super().__new__(cls)

    def _ignore(self, *_: Any) -> None:
        """For what a pickle adds to an object: its state, items and pairs."""

    __setstate__ = __setitem__ = append = extend = add = _ignore


class _Unpickler(pickle.Unpickler):
    """Admits tensors and the dictionaries they come in. It makes tuples of them: the arrays come after the pickle."""

    inert = False  # whether an unknown name is read as `Inert`, or refused

    def __init__(self, stream: IO[bytes]):
        super().__init__(stream)
        self.seen: dict[str, Storage] = {}  # by key

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return name
        if f"{module}.{name}" not in ADMITTED and self.inert:
            return Inert
        if f"{module}.{name}" not in ADMITTED:
            raise pickle.UnpicklingError(f"names {module}.{name}; allowed: dictionaries of tensors")
        return ADMITTED[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> Storage:
        match pid:
            # what may follow is a view of the storage, None but in files of 2017
            case ("storage", str(kind), str(key), str(), int(size), *view) if kind in STORAGES and not any(view):
                self.seen[key] = Storage(key, STORAGES[kind], size)
                return self.seen[key]
        raise pickle.UnpicklingError(f"refers to {pid!r}; allowed: a storage, {', '.join(STORAGES)}")


class _InertUnpickler(_Unpickler):
    inert = True


def _load(stream: IO[bytes], unwrap: Callable[[Any], Any] | None) -> tuple[dict[str, View], dict[str, Storage]]:
    """The tensors by name of the next pickle of a stream, and all storages that it refers to, by key."""
    unpickler = _Unpickler(stream) if unwrap is None else _InertUnpickler(stream)
    loaded = unpickler.load()
    return _views(loaded if unwrap is None else unwrap(loaded)), unpickler.seen


def _read_zip(file: IO[bytes], unwrap: Callable[[Any], Any] | None) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        folders = [name.removesuffix("/data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(folders) != 1:
            raise ValueError(f"a zip archive with {len(folders)} data.pkl; allowed: one")
        folder = folders[0]
        has_order = f"{folder}/byteorder" in archive.namelist()
        big = has_order and archive.read(f"{folder}/byteorder") == b"big"
        with archive.open(f"{folder}/data.pkl") as stream:
            views, _ = _load(stream, unwrap)
        storages = {storage: archive.read(f"{folder}/data/{storage.key}") for storage in _storages(views)}
    return _arrays(views, storages, ">" if big else "<")


def _read_legacy(file: IO[bytes], unwrap: Callable[[Any], Any] | None) -> dict[str, np.ndarray]:
    magic = _Unpickler(file).load()
    if magic != LEGACY_MAGIC:
        raise ValueError(f"neither a zip archive nor a stream that begins with {LEGACY_MAGIC:#x}")
    protocol = _Unpickler(file).load()
    if protocol != LEGACY_PROTOCOL:
        raise ValueError(f"protocol {protocol!r}; allowed: {LEGACY_PROTOCOL}")
    _Unpickler(file).load()  # the writer's byte order and sizes of int: the storages are little-endian on every machine
    views, known = _load(file, unwrap)
    needed, storages = _storages(views), {}
    for key in _Unpickler(file).load():
        count = int.from_bytes(file.read(8), "little")
        if key not in known or count != known[key].size:
            raise ValueError(f"storage {key!r} has {count} numbers; allowed: {known.get(key, 'a storage of a tensor')}")
        data = file.read(count * jnp.dtype(known[key].dtype).itemsize)
        storages |= {known[key]: data} if known[key] in needed else {}
    return _arrays(views, storages, "<")


def _views(loaded: Any) -> dict[str, View]:
    if not isinstance(loaded, dict):
        raise ValueError(f"holds a {type(loaded).__name__}; allowed: a dictionary of tensors")
    loaded = dict(dict.items(loaded))  # a pickle may give an OrderedDict an attribute `items`
    others = [f"{name!r} ({type(value).__name__})" for name, value in loaded.items() if not isinstance(value, View)]
    others += [f"the name {name!r}" for name in loaded if not isinstance(name, str)]
    if others:
        raise ValueError(f"holds what is no tensor: {', '.join(others)}; allowed: a dictionary of tensors by name")
    return loaded


def _storages(views: dict[str, View]) -> set[Storage]:
    return {view.storage for view in views.values()}


def _arrays(views: dict[str, View], storages: dict[Storage, bytes], order: str) -> dict[str, np.ndarray]:
    runs = {}
    for storage, data in storages.items():
        dtype = jnp.dtype(storage.dtype)
        if len(data) != storage.size * dtype.itemsize:
            raise ValueError(
                f"storage {storage.key!r} has {len(data)} bytes; allowed: {storage.size} numbers of {storage.dtype}"
            )
        # bfloat16 knows no byte order, so the bytes are turned as integers
        words = np.frombuffer(data, f"{order}u{dtype.itemsize}").astype(f"u{dtype.itemsize}")
        runs[storage] = words.view(dtype)
    arrays = {}
    for name, (storage, offset, shape, strides) in views.items():
        if storage not in runs:
            raise ValueError(f"{name!r} is in storage {storage.key!r}, which the file lacks")
        run = runs[storage]
        steps = [stride * run.itemsize for stride in strides]
        arrays[name] = np.lib.stride_tricks.as_strided(run[offset:], shape, steps).copy()
    return arrays

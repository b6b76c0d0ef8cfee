"""PyTorch's files of weights, read without PyTorch, and without running what is in them."""

import math
import os
import pickle
import zipfile
from collections.abc import Callable
from typing import IO, Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxattn.errors import InputError
from jaxattn.files import Clipped, Room, open_file, reading, shown, size_of
from jaxattn.pickles import Ordered, load, walk, with_words

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
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
UNTYPED = "torch.storage.UntypedStorage"  # of bytes; the tensors in it say their dtypes
DTYPES = ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
NUMBERS = int | float | str | None  # what a checkpoint says beside its tensors
AXES = 64  # NumPy has no more
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001


class Storage(NamedTuple):
    """A run of numbers in the file."""

    key: str
    dtype: str
    size: int


class View(NamedTuple):
    """A tensor: a storage, its dtype, the number that it starts at, its shape, its strides in numbers, and whether it
    is negated and conjugated when it is read, for which PyTorch only sets a bit."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    neg: bool
    conj: bool


def read_torch(
    path: str | os.PathLike[str],
    key: str | None = None,
    *,
    unwrap: Callable[[Any], Any] | None = None,
    limit: int | None = None,
) -> dict[str, np.ndarray]:
    """The tensors of a file that `torch.save(model.state_dict(), path)` wrote, by name.

    Both of PyTorch's formats are read: the zip archive (since 1.6), and the stream of pickles before it. A pickle can
    name any function, and a plain unpickler calls it. This one knows ordered dictionaries, tensors and parameters; at
    any other name it stops. Nor does a file make us hold more than `limit`: what it says it holds is checked before it
    is read.

    Args:
      path: the file.
      key: where the tensors are an entry of a larger dictionary, such as `{"state_dict": ..., "epoch": 3}`, its name.
        None finds the entry by itself, if one alone holds a dictionary of tensors.
      unwrap: finds the dictionary of tensors in what the file holds. With it, a name that is none of the above stands
        for an `Inert` object: nothing is imported or called.
      limit: the bytes that the file may unfold to; None is 1 GiB, or 16 times its size if that is more.

    Returns:
      Each tensor as an array of its shape and dtype (bfloat16 and float8 as `jnp` has them), in the file's order.
      Arrays that share a storage in the file share it here, so none can be written to. Numbers, text and None beside
      the tensors are left out.

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
    with open_file(path) as file:
        room = Room(f"read_torch: {os.fspath(path)}", size_of(file), limit)
        try:
            with reading(path, "read_torch: {}: ", form=(b"PK",)):
                start = file.read(4)
                file.seek(0)
                find = lambda loaded: _views(loaded if unwrap is None else unwrap(loaded), key)
                read = _read_zip if start == b"PK\x03\x04" else _read_legacy
                views, runs = read(file, room, find, inert=unwrap is not None)
                return _arrays(views, runs, room)
        except InputError as error:
            raise ValueError(str(error)) from error.__cause__


class _Tensor:
    """As `torch._utils._rebuild_tensor_v2`: what lies between the strides and the metadata is for gradients."""

    __slots__ = ()  # a pickle may set the attributes of what it is given: this has none, where a function has

    def __call__(self, storage: Any, offset: int, shape: Any, strides: Any, *more: Any) -> View:
        return _view(storage, storage.dtype if isinstance(storage, Storage) else "", offset, shape, strides, *more[2:])


class _TypedTensor:
    """As `torch._utils._rebuild_tensor_v3`, which says the dtype of what it finds in an untyped storage."""

    __slots__ = ()

    def __call__(self, storage: Any, offset: int, shape: Any, strides: Any, *more: Any) -> View:
        if len(more) < 3 or more[2] not in DTYPES:
            raise pickle.UnpicklingError(f"a tensor of the dtype {shown(more[2:3])}; allowed: {', '.join(DTYPES)}")
        return _view(storage, more[2], offset, shape, strides, *more[3:])


def _view(storage: Any, dtype: str, offset: Any, shape: Any, strides: Any, metadata: Any = None) -> View:
    """The view, if it lies in its storage."""
    flat = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= AXES
    numbers = [offset, *shape, *strides] if flat else []
    if not isinstance(storage, Storage) or not flat or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise pickle.UnpicklingError(
            f"a tensor of {'a storage' if isinstance(storage, Storage) else shown(storage)} with offset "
            f"{shown(offset)}, shape {shown(shape)} and strides {shown(strides)}"
        )
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    size = storage.size // (jnp.dtype(dtype).itemsize // jnp.dtype(storage.dtype).itemsize)
    if 0 not in shape and last >= size:
        raise pickle.UnpicklingError(f"a tensor of shape {tuple(shape)} reads number {last} of a storage of {size}")
    bits = {} if metadata is None else metadata
    if not isinstance(bits, dict) or not all(name in ("neg", "conj") and type(on) is bool for name, on in bits.items()):
        raise pickle.UnpicklingError(f"a tensor with the metadata {shown(metadata)}; allowed: the bits neg and conj")
    return View(storage, dtype, offset, tuple(shape), tuple(strides), bits.get("neg", False), bits.get("conj", False))


class _Parameter:
    """As `torch._utils._rebuild_parameter`: the tensor in it."""

    __slots__ = ()

    def __call__(self, data: Any, *_: Any) -> Any:
        return data


ADMITTED = {
    "torch._utils._rebuild_tensor_v2": _Tensor(),
    "torch._utils._rebuild_tensor_v3": _TypedTensor(),
    "torch._utils._rebuild_parameter": _Parameter(),
    UNTYPED: UNTYPED,
    **{f"torch.{name}": name for name in (*STORAGES, *DTYPES)},
}


def _admit(module: str, name: str):
    full = f"{module}.{name}"
    if full not in ADMITTED and full != "collections.OrderedDict":
        raise pickle.UnpicklingError(f"names {full[:200]}; allowed: dictionaries of tensors")


class Inert:
    """What a pickle's unknown object is read as: it takes whatever a pickle does to an object, and keeps nothing."""

    __slots__ = ()

    def __new__(cls, *_: Any, **__: Any) -> "Inert":
        return super().__new__(cls)

    def _ignore(self, *_: Any) -> None:
        """For what a pickle adds to an object: its state, items and pairs."""

    __setstate__ = __setitem__ = append = extend = add = _ignore


class _Unpickler(pickle.Unpickler):
    """Admits tensors and the dictionaries they come in. It makes tuples of them: the arrays come after the pickle.

    Any other name is refused, or is `Inert`.
    """

    def __init__(self, stream: Any, inert: bool):
        super().__init__(stream)
        self.ordered, self.inert = Ordered(), inert
        self.seen: dict[str, Storage] = {}  # all storages, by key

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" == "collections.OrderedDict":
            return self.ordered
        if not self.inert:
            _admit(module, name)
        return ADMITTED.get(f"{module}.{name}", Inert)

    def persistent_load(self, pid: Any) -> Storage:
        match pid:
            # what may follow is a view of the storage, None but in files of 2017
            case ("storage", str(kind), str(key), str(), int(size), *view) if not any(
                part is not None for part in view
            ):
                if kind in STORAGES or kind == UNTYPED:
                    self.seen[key] = Storage(key, STORAGES.get(kind, "uint8"), size)
                    return self.seen[key]
        raise pickle.UnpicklingError(f"refers to {shown(pid)}; allowed: a storage, {', '.join(STORAGES)}")


def _load(content: bytes, inert: bool) -> tuple[Any, dict[str, Storage]]:
    """What a pickle holds, and the storages that it refers to."""
    made = []

    def make(stream: IO[bytes]) -> pickle.Unpickler:
        made.append(_Unpickler(stream, inert))
        return made[0]

    return load(content, make, _names(inert), objects=inert), made[0].seen


def _names(inert: bool) -> Callable[[str, str], Any]:
    """What admits a name."""
    return (lambda module, name: None) if inert else _admit


Find = Callable[[Any], dict[str, View]]  # the tensors in what a file holds
Read = tuple[dict[str, View], dict[Storage, np.ndarray]]


def _read_zip(file: BinaryIO, room: Room, find: Find, inert: bool) -> Read:
    with zipfile.ZipFile(file) as archive:
        found = {info.filename: info for info in archive.infolist()}
        folders = [name.removesuffix("/data.pkl") for name in found if name.endswith("/data.pkl")]
        if len(folders) != 1:
            raise ValueError(f"a zip archive with {len(folders)} data.pkl; allowed: one")
        folder = folders[0]

        def content(name: str, what: str) -> bytes:
            info = found.get(f"{folder}/{name}")
            if info is None:
                raise ValueError(f"lacks {what}")
            room.take(info.file_size, what)
            with archive.open(info) as stream:
                return stream.read(info.file_size)

        order = ">" if f"{folder}/byteorder" in found and content("byteorder", "byteorder") == b"big" else "<"
        views = find(_load(content("data.pkl", "data.pkl"), inert)[0])
        storages = {view.storage for view in views.values()}
        for storage in storages:
            said, info = _bytes(storage), found.get(f"{folder}/data/{storage.key}")
            if info is not None and info.file_size != said:
                raise ValueError(
                    f"storage {shown(storage.key)} has {info.file_size} bytes; allowed: {storage.size} numbers of "
                    f"{storage.dtype}"
                )
        read = lambda storage: content(f"data/{storage.key}", f"storage {shown(storage.key)}")
        return views, {storage: _run(storage, read(storage), _itemsize(views, storage), order) for storage in storages}


def _read_legacy(file: BinaryIO, room: Room, find: Find, inert: bool) -> Read:
    def part(inert: bool = False) -> tuple[Any, dict[str, Storage]]:
        """The next pickle, and its storages."""
        start = file.tell()
        with_words(lambda: walk(Clipped(file), _names(inert), inert))
        length = file.tell() - start
        file.seek(start)
        return _load(file.read(length), inert)

    magic, _ = part()
    if type(magic) is not int or magic != LEGACY_MAGIC:
        raise ValueError(f"neither a zip archive nor a stream that begins with {LEGACY_MAGIC:#x}")
    protocol, _ = part()
    if type(protocol) is not int or protocol != LEGACY_PROTOCOL:
        raise ValueError(f"protocol {shown(protocol)}; allowed: {LEGACY_PROTOCOL}")
    part()  # the writer's byte order and sizes of int: the storages are little-endian on every machine
    loaded, known = part(inert)
    views, (keys, _) = find(loaded), part()
    needed = {view.storage for view in views.values()}
    if not isinstance(keys, list):
        raise ValueError(f"the keys of its storages are {shown(keys)}; allowed: a list")
    runs = {}
    for name in keys:
        count = int.from_bytes(file.read(8), "little")
        storage = known.get(name) if isinstance(name, str) else None
        if storage is None or count != storage.size:
            allowed = "a storage of a tensor" if storage is None else f"{storage.size}"
            raise ValueError(f"storage {shown(name)} has {count} numbers; allowed: {allowed}")
        if _bytes(storage) > size_of(file) - file.tell():
            raise ValueError(f"storage {shown(name)} has {_bytes(storage)} bytes, and the file ends before them")
        if storage not in needed:
            file.seek(_bytes(storage), os.SEEK_CUR)
            continue
        room.take(_bytes(storage), f"storage {shown(name)}")
        runs[storage] = _run(storage, file.read(_bytes(storage)), _itemsize(views, storage), "<")
    return views, runs


def _views(loaded: Any, key: str | None) -> dict[str, View]:
    """The tensors of the dictionary, or of the one in it that is asked for."""
    if not isinstance(loaded, dict):
        raise ValueError(f"holds a {type(loaded).__name__}; allowed: a dictionary of tensors")
    entries = dict(dict.items(loaded))  # a pickle may give an OrderedDict an attribute `items`
    inner = [name for name, value in entries.items() if isinstance(value, dict) and _holds_tensors(value)]
    if key is not None:
        if key not in entries or not isinstance(entries[key], dict):
            raise ValueError(f"key (={key!r}) must be one of {', '.join(map(shown, inner)) or 'none: it has no such'}")
        entries = dict(dict.items(entries[key]))
    elif len(inner) == 1 and not any(isinstance(value, View) for value in entries.values()):
        entries = dict(dict.items(entries[inner[0]]))
    elif len(inner) > 1:
        raise ValueError(f"holds several dictionaries of tensors: key must be one of {', '.join(map(shown, inner))}")
    views = {name: value for name, value in entries.items() if isinstance(value, View)}
    others = [
        f"{shown(name)} ({type(value).__name__})"
        for name, value in entries.items()
        if not isinstance(value, View) and not (views and isinstance(value, NUMBERS))
    ]
    others += [f"the name {shown(name)}" for name in entries if not isinstance(name, str)]
    if others:
        more = f" and {len(others) - 8} more" if len(others) > 8 else ""
        raise ValueError(
            f"holds what is no tensor: {', '.join(others[:8])}{more}; allowed: a dictionary of tensors by name"
        )
    return views


def _holds_tensors(found: dict[Any, Any]) -> bool:
    values = list(dict.values(found))
    return any(isinstance(value, View) for value in values) and all(isinstance(v, View | NUMBERS) for v in values)


def _bytes(storage: Storage) -> int:
    return storage.size * jnp.dtype(storage.dtype).itemsize


def _itemsize(views: dict[str, View], storage: Storage) -> int:
    """The bytes of the words in a storage, of whose order they are: of the tensors in it, which must agree."""
    sizes = {jnp.dtype(view.dtype).itemsize for view in views.values() if view.storage == storage}
    if len(sizes) > 1:
        raise ValueError(f"storage {shown(storage.key)} holds words of {sizes} bytes; allowed: of one size")
    return sizes.pop() if sizes else 1


def _run(storage: Storage, data: bytes, itemsize: int, order: str) -> np.ndarray:
    """The bytes of a storage, in this machine's order."""
    if len(data) != _bytes(storage):
        raise ValueError(
            f"storage {shown(storage.key)} has {len(data)} bytes; allowed: {storage.size} numbers of {storage.dtype}"
        )
    # bfloat16 knows no byte order, so the bytes are turned as integers; a complex number is two words
    word = itemsize // 2 if storage.dtype.startswith("complex") else itemsize
    words = np.frombuffer(data, f"{order}u{word}", len(data) // word)
    return words.astype(f"u{word}", copy=False).view(np.uint8)


def _arrays(views: dict[str, View], runs: dict[Storage, np.ndarray], room: Room) -> dict[str, np.ndarray]:
    arrays = {}
    for name, (storage, kind, offset, shape, strides, neg, conj) in views.items():
        if storage not in runs:
            raise ValueError(f"{shown(name)} is in storage {shown(storage.key)}, which the file lacks")
        dtype = jnp.dtype(kind)
        if math.prod(shape) * dtype.itemsize > max(_bytes(storage), room.limit):
            raise ValueError(f"{shown(name)} of shape {shape} repeats its numbers to more than {room.limit:,} bytes")
        # as_strided knows NumPy's own dtypes alone
        words = np.dtype(f"V{dtype.itemsize}")
        run = runs[storage][: len(runs[storage]) // dtype.itemsize * dtype.itemsize].view(words)
        steps = [stride * dtype.itemsize for stride in strides]
        array = np.lib.stride_tricks.as_strided(run[offset:], shape, steps, writeable=False).view(dtype)
        if neg or conj:  # a copy
            room.take(array.nbytes, shown(name))
            array = np.conj(array) if conj else array
            array = np.negative(array) if neg else array
            array.setflags(write=False)
        arrays[name] = array
    return arrays

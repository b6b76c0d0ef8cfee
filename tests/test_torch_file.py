"""PyTorch's files, written here byte by byte as `torch.save` writes them, and the files that must be refused."""

import io
import os
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict

import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.torch_file import LEGACY_MAGIC, STORAGES, read_torch

FORMATS = ("zip", "legacy")
KINDS = {dtype: kind for kind, dtype in STORAGES.items()}


class Tensor:
    """What `torch.save` finds in a state dict: a strided view of a storage."""

    def __init__(self, storage, offset=0, shape=None, strides=None):
        self.storage, self.offset = storage, offset
        self.shape = storage.shape if shape is None else shape
        contiguous = tuple(int(np.prod(self.shape[n + 1 :], dtype=int)) for n in range(len(self.shape)))
        self.strides = contiguous if strides is None else strides

    def __reduce__(self):
        torch = sys.modules["torch._utils"]
        return torch._rebuild_tensor_v2, (self.storage, self.offset, self.shape, self.strides, False, OrderedDict())


@pytest.fixture(autouse=True)
def torch(monkeypatch):
    """Pickle writes names only of what it can import."""
    modules = {name: types.ModuleType(name) for name in ("torch", "torch._utils")}
    for kind in STORAGES:
        setattr(modules["torch"], kind, type(kind, (), {"__module__": "torch"}))
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        exec(f"def {name}(*args): pass", {"__name__": "torch._utils"}, vars(modules["torch._utils"]))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules


def write(path, content, form, big=False):
    """The file, and the keys of its storages in order."""
    storages, kinds = [], sys.modules["torch"]

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            if not isinstance(thing, np.ndarray):
                return None
            keys = [n for n, storage in enumerate(storages) if storage is thing]
            key = keys[0] if keys else len(storages)
            if not keys:
                storages.append(thing)
            kind = getattr(kinds, KINDS[thing.dtype.name])
            return ("storage", kind, str(key), "cpu", thing.size, *([None] if form == "legacy" else []))

    stream = io.BytesIO()
    Pickler(stream, 2).dump(content)
    numbers = [storage.tobytes() for storage in storages]
    if form == "legacy":
        head = [pickle.dumps(part, 2) for part in (LEGACY_MAGIC, 1001, {"little_endian": True})]
        keys = pickle.dumps([str(n) for n in range(len(storages))], 2)
        counted = [struct.pack("<q", storage.size) + data for storage, data in zip(storages, numbers, strict=True)]
        path.write_bytes(b"".join([*head, stream.getvalue(), keys, *counted]))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("weights/data.pkl", stream.getvalue())
            archive.writestr("weights/byteorder", "big" if big else "little")
            for n, storage in enumerate(storages):
                words = storage.view(f"u{storage.itemsize // (2 if storage.dtype.kind == 'c' else 1)}")
                archive.writestr(f"weights/data/{n}", (words.byteswap() if big else words).tobytes())
    return path


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", KINDS)
def test_every_dtype(tmp_path, form, dtype):
    numbers = np.arange(6).astype(jnp.dtype(dtype))
    content = OrderedDict(
        a=Tensor(numbers, shape=(2, 3)), b=Tensor(np.zeros(0, numbers.dtype)), c=Tensor(numbers, 5, ())
    )
    arrays = read_torch(write(tmp_path / "weights.pth", content, form))
    assert list(arrays) == ["a", "b", "c"]
    for name, expected in {"a": numbers.reshape(2, 3), "b": numbers[:0], "c": numbers[5]}.items():
        assert arrays[name].dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(arrays[name], expected)


@pytest.mark.parametrize("form", FORMATS)
def test_views(tmp_path, form):
    """Transposed, strided, shifted and repeated views of one storage, which all of them share."""
    numbers = np.arange(24, dtype=np.float32)
    content = {
        "transposed": Tensor(numbers, 0, (4, 6), (1, 4)),
        "every_other": Tensor(numbers, 1, (3,), (2,)),
        "kernel": Tensor(numbers, 4, (2, 1, 3), (10, 7, 2)),
        "repeated": Tensor(numbers, 20, (5, 40, 4), (0, 0, 1)),  # what `expand` makes
    }
    arrays = read_torch(write(tmp_path / "weights.pth", content, form))
    np.testing.assert_array_equal(arrays["transposed"], numbers.reshape(6, 4).T)
    np.testing.assert_array_equal(arrays["every_other"], [1, 3, 5])
    np.testing.assert_array_equal(arrays["kernel"], [[[4, 6, 8]], [[14, 16, 18]]])
    np.testing.assert_array_equal(arrays["repeated"], np.broadcast_to([20, 21, 22, 23], (5, 40, 4)))
    assert np.shares_memory(arrays["transposed"], arrays["kernel"])
    with pytest.raises(ValueError, match="read-only"):
        arrays["transposed"][:] = 0


def test_parameters_and_metadata(tmp_path, torch):
    """A parameter is its tensor; `_metadata`, which a state dict carries as an attribute, does not matter."""

    class Parameter(Tensor):
        def __reduce__(self):
            return torch["torch._utils"]._rebuild_parameter, (Tensor(self.storage), True, OrderedDict())

    content = OrderedDict(weight=Parameter(np.ones(3, np.float32)))
    content._metadata = OrderedDict({"": {"version": 1}})
    np.testing.assert_array_equal(read_torch(write(tmp_path / "weights.pth", content, "zip"))["weight"], np.ones(3))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64"])
def test_big_endian(tmp_path, dtype):
    numbers = np.arange(5).astype(jnp.dtype(dtype))
    arrays = read_torch(write(tmp_path / "weights.pth", {"a": Tensor(numbers)}, "zip", big=True))
    np.testing.assert_array_equal(arrays["a"], numbers)


class Hostile:
    """Unpickled, it calls a function."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def refused(path, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_torch(path)
    assert str(caught.value).startswith(f"read_torch: {path}: ")


@pytest.mark.parametrize("form", FORMATS)
def test_a_pickle_that_calls_something_is_refused(tmp_path, form):
    mark = tmp_path / "mark"
    content = {"weight": Hostile(os.system, f"touch {mark}")}
    path = write(tmp_path / "weights.pth", content, form)
    refused(path, rf"names {os.system.__module__}\.system; allowed: dictionaries of tensors")
    assert not mark.exists()
    for function in (eval, getattr, np.load):
        refused(write(path, {"weight": Hostile(function, "1")}, form), f"names .*{function.__name__}; allowed")
    plain = tmp_path / "plain.pkl"
    plain.write_bytes(pickle.dumps(Hostile(os.system, f"touch {mark}")))
    refused(plain, "names .*system")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"])
def test_a_pickle_that_sets_attributes_is_refused(tmp_path, name):
    """The BUILD instruction sets what it is given on any object: a function's defaults, if one were there."""
    path = tmp_path / "weights.pth"
    for state in ("N(S'__defaults__'\n(I1\ntd\x86", "(S'__name__'\nS'x'\nd"):
        path.write_bytes(f"c{name.replace(' ', chr(10))}\n{state}b.".encode("latin1"))
        refused(path, "weights.pth: damaged: AttributeError")
    written = write(path, {"a": Tensor(np.ones(2, np.float32))}, "legacy")
    np.testing.assert_array_equal(read_torch(written)["a"], [1, 1])


ONE = np.ones(4, np.float32)
REFUSED = [
    ({"epoch": 3, "rate": 0.1}, r"holds what is no tensor: 'epoch' \(int\), 'rate' \(float\); allowed"),
    ({"weight": Tensor(ONE), "model": {"weight": Tensor(ONE)}}, r"holds what is no tensor: 'model' \(dict\); allowed"),
    ({"model": {"a": Tensor(ONE)}, "ema": {"a": Tensor(ONE)}}, "several .*: key must be one of 'model', 'ema'"),
    ({3: Tensor(ONE)}, "the name 3; allowed"),
    ([Tensor(ONE)], "holds a list; allowed: a dictionary of tensors"),
    ({"weight": Tensor(ONE, 1, (2, 2))}, r"of shape \(2, 2\) reads number 4 of a storage of 4"),
    ({"weight": Tensor(ONE, 0, (1 << 40, 4), (0, 1))}, r"repeats its numbers to more than 1,073,741,824 bytes"),
    ({"weight": Tensor(ONE, -1, (2,))}, r"with offset -1, shape \(2,\) and strides \(1,\)"),
    ({"weight": Tensor(ONE, 0, (2,), (-1,))}, r"with offset 0, shape \(2,\) and strides \(-1,\)"),
    ({"weight": Tensor(ONE, 0, (2,), (1, 1))}, r"shape \(2,\) and strides \(1, 1\)"),
    ({"weight": Tensor("ones", 0, (2,), (1,))}, "a tensor of 'ones' with"),
]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("content", "message"), REFUSED)
def test_what_is_no_dictionary_of_tensors_is_refused(tmp_path, form, content, message):
    refused(write(tmp_path / "weights.pth", content, form), message)


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_cut_off_anywhere_is_refused(tmp_path, form):
    whole = write(tmp_path / "whole.pth", {"a": Tensor(np.arange(4.0)), "b": Tensor(ONE)}, form).read_bytes()
    path = tmp_path / "weights.pth"
    for length in range(0, len(whole), 1 if form == "legacy" else 7):
        path.write_bytes(whole[:length])
        refused(path, "read_torch: ")


def test_other_archives_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", b"")
    refused(path, "a zip archive with 0 data.pkl; allowed: one")
    path.write_bytes(pickle.dumps(7))
    refused(path, "neither a zip archive nor a stream that begins with 0x1950a86a20f9469cfc6c")
    path.write_bytes(pickle.dumps(LEGACY_MAGIC) + pickle.dumps(1000))
    refused(path, "protocol 1000; allowed: 1001")
    head = b"".join(pickle.dumps(part) for part in (LEGACY_MAGIC, 1001, {}))
    path.write_bytes(head + b"S'module'\n\x85Q.")
    refused(path, r"refers to \('module',\); allowed: a storage, DoubleStorage")
    shadowed = b"ccollections\nOrderedDict\n)RS'epoch'\nI3\ns}S'items'\nccollections\nOrderedDict\nsb."
    path.write_bytes(head + shadowed)
    refused(path, r"holds what is no tensor: 'epoch' \(int\)")
    with pytest.raises(FileNotFoundError):
        read_torch(tmp_path / "none.pth")


# What PyTorch itself writes


def real(path, content):
    """Saves with PyTorch, where it is installed."""
    torch = pytest.importorskip("torch")
    torch.save(content(torch), path)
    return path


def metadata_of(form, tmp_path, metadata):
    """A tensor whose pickle says more of it, as PyTorch's do where a view is negated or conjugated by a bit."""

    class Marked(Tensor):
        def __reduce__(self):
            function, arguments = super().__reduce__()
            return function, (*arguments, metadata)

    numbers = np.array([1 + 2j, 3 - 4j], np.complex64)
    return read_torch(write(tmp_path / "weights.pth", {"z": Marked(numbers)}, form))["z"]


@pytest.mark.parametrize("form", FORMATS)
def test_the_bits_of_negation_and_conjugation_are_honoured(tmp_path, form):
    for metadata, expected in (
        ({}, [1 + 2j, 3 - 4j]),
        ({"neg": True}, [-1 - 2j, -3 + 4j]),
        ({"conj": True, "neg": False}, [1 - 2j, 3 + 4j]),
        ({"conj": True, "neg": True}, [-1 + 2j, -3 - 4j]),
    ):
        np.testing.assert_array_equal(metadata_of(form, tmp_path, metadata), np.array(expected, np.complex64))
    for metadata in ({"quantized": True}, [1], {"neg": 1}):
        with pytest.raises(ValueError, match=r"a tensor with the metadata .*; allowed: the bits neg and conj"):
            metadata_of(form, tmp_path, metadata)


@pytest.mark.parametrize("form", FORMATS)
def test_an_entry_is_found_by_itself_or_by_its_key(tmp_path, form):
    one, two = Tensor(np.ones(2, np.float32)), Tensor(np.zeros(3, np.float32))
    path = tmp_path / "weights.pth"
    rest = {"epoch": 3, "name": "best", "optimizer": {"state": {0: {"step": 1}}, "param_groups": [{"lr": 0.1}]}}
    for content, key, expected in (
        ({"state_dict": {"a": one}, **rest}, None, [1, 1]),
        ({"model": OrderedDict(a=one)}, None, [1, 1]),
        ({"model": {"a": one}, "ema": {"a": two}}, "ema", [0, 0, 0]),
        ({"a": one, "epoch": 3, "note": None}, None, [1, 1]),
    ):
        found = read_torch(write(path, content, form), key)
        assert list(found) == ["a"]
        np.testing.assert_array_equal(found["a"], expected)
    with pytest.raises(ValueError, match=r"key \(='teacher'\) must be one of 'state_dict'"):
        read_torch(write(path, {"state_dict": {"a": one}, **rest}, form), "teacher")


def test_every_kind_of_tensor_as_pytorch_writes_it(tmp_path, monkeypatch):
    monkeypatch.undo()  # the real modules
    torch = pytest.importorskip("torch")
    z = torch.complex(torch.arange(3.0), torch.tensor([1.0, -2.0, 5.0]))
    half = torch.tensor([0.5, -2.0])
    content = {
        "imaginary": z.clone().conj().imag,
        "conjugate": z.conj(),
        "uint16": torch.arange(5).to(torch.uint16)[2:],
        "uint32": torch.tensor([2**32 - 1]).to(torch.uint32),
        "uint64": torch.tensor([7]).to(torch.uint64),
        "float8": half.to(torch.float8_e5m2),
        "double": z.to(torch.complex128),
        "repeated": half.expand(3, 2),
    }
    for zipped in (True, False):
        path = tmp_path / "weights.pth"
        kept = content if zipped else {k: v for k, v in content.items() if k not in ("uint16", "uint32", "uint64")}
        torch.save(kept, path, _use_new_zipfile_serialization=zipped)
        found = read_torch(path)
        assert list(found) == list(kept)
        np.testing.assert_array_equal(found["imaginary"], [-1, 2, -5])
        np.testing.assert_array_equal(found["conjugate"], np.array([0 - 1j, 1 + 2j, 2 - 5j], np.complex64))
        np.testing.assert_array_equal(found["double"], np.array([0 + 1j, 1 - 2j, 2 + 5j]))
        np.testing.assert_array_equal(found["repeated"], [[0.5, -2]] * 3)
        np.testing.assert_array_equal(found["float8"].astype(np.float32), [0.5, -2])
        for name, expected in {"uint16": [2, 3, 4], "uint32": [2**32 - 1], "uint64": [7]}.items():
            if name in found:
                assert found[name].dtype == name
                np.testing.assert_array_equal(found[name], expected)


# What a file may not do


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer in place of the file"),
        (b"\n<!DOCTYPE html><html>not found</html>", "a web page in place of the file"),
        (b"\x1f\x8b\x08" + bytes(20), "it is a gzip file"),
        (b"", "it is empty"),
    ],
)
def test_what_is_no_such_file_is_told_what_it_is(tmp_path, content, message):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    refused(path, message)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "weights.pth")
    with pytest.raises(OSError, match=r"weights\.pth is a pipe"):
        read_torch(tmp_path / "weights.pth")


def archive(path, pickled, storages, compress=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compress) as made:
        made.writestr("w/data.pkl", pickled)
        for name, content in storages.items():
            made.writestr(f"w/{name}", content)
    return path


def test_views_of_a_storage_share_it_and_what_unfolds_too_far_is_refused(tmp_path):
    numbers = np.zeros(1 << 20, np.float32)
    content = {str(n): Tensor(numbers) for n in range(400)}
    plain = write(tmp_path / "plain.pth", content, "zip")
    with zipfile.ZipFile(plain) as made:
        pickled = made.read("weights/data.pkl")
    path = archive(tmp_path / "weights.pth", pickled, {"data/0": numbers.tobytes()})
    arrays = read_torch(path)
    assert len(arrays) == 400
    assert all(np.shares_memory(arrays["0"], array) for array in arrays.values())
    with pytest.raises(ValueError, match=r"storage '0' would unfold a file of .* to .* bytes; allowed: 1,000,000$"):
        read_torch(path, limit=1_000_000)
    path = archive(tmp_path / "weights.pth", pickled, {"data/0": bytes(8)})
    refused(path, "storage '0' has 8 bytes; allowed: 1048576 numbers of float32")
    path = archive(tmp_path / "weights.pth", pickled, {"byteorder": bytes(1 << 22), "data/0": numbers.tobytes()})
    with pytest.raises(ValueError, match="byteorder would unfold"):
        read_torch(path, limit=1 << 20)

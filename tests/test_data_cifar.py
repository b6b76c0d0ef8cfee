"""CIFAR's two published forms, written here as their authors did, and what a pickle may not do."""

import gzip
import io
import pickle
import tarfile

import numpy as np
import pytest

from jaxattn.train.data import load
from jaxattn.train.data.safe_pickle import read_pickle

TRAIN = {"cifar10": [f"data_batch_{i}" for i in range(1, 6)], "cifar100": ["train"]}
TEST = {"cifar10": "test_batch", "cifar100": "test"}
FOLDER = {
    ("cifar10", "python"): "cifar-10-batches-py",
    ("cifar10", "binary"): "cifar-10-batches-bin",
    ("cifar100", "python"): "cifar-100-python",
    ("cifar100", "binary"): "cifar-100-binary",
}


def as_python_2(value):
    """A pickle as CIFAR's are: protocol 2, NumPy's module by its old name, and dictionary keys that are bytes."""
    return pickle.dumps(value, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def examples(kind, seed):
    rng = np.random.default_rng(seed)
    count, classes = (20, 10) if kind == "cifar10" else (200, 100)
    return rng.integers(0, 256, (count, 32, 32, 3)).astype(np.uint8), rng.permutation(np.arange(count) % classes)


def batch(kind, form, images, labels):
    flat = np.moveaxis(images, -1, 1).reshape(len(images), 3072)  # red plane, green plane, blue plane
    if form == "python":
        key = b"labels" if kind == "cifar10" else b"fine_labels"
        return as_python_2({b"batch_label": b"one", key: [int(label) for label in labels], b"data": flat})
    coarse = [] if kind == "cifar10" else [labels[:, None] // 5]
    return np.concatenate([*coarse, labels[:, None], flat], 1).astype(np.uint8).tobytes()


def files(kind, form):
    """Name -> content, and the images and labels for training and for the test."""
    names = [f"class{i}" for i in range(10 if kind == "cifar10" else 100)]
    train = [(name, *examples(kind, seed)) for seed, name in enumerate(TRAIN[kind])]
    test = (TEST[kind], *examples(kind, 9))
    suffix = "" if form == "python" else ".bin"
    found = {f"{name}{suffix}": batch(kind, form, images, labels) for name, images, labels in (*train, test)}
    if form == "python":
        meta = {b"label_names" if kind == "cifar10" else b"fine_label_names": [name.encode() for name in names]}
        found["batches.meta" if kind == "cifar10" else "meta"] = as_python_2(meta)
    else:
        text = "\n".join(names) + "\n\n"
        found["batches.meta.txt" if kind == "cifar10" else "fine_label_names.txt"] = text.encode()
    return found, train, test


def write(folder, kind, form, packed, found):
    """Writes the files as a folder or as a gzipped tar archive, and returns what `load` is to be given."""
    if not packed:
        inner = folder / FOLDER[kind, form]
        inner.mkdir()
        for name, content in found.items():
            (inner / name).write_bytes(content)
        return inner
    path = folder / f"{kind}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in {"readme.html": b"hello", **found}.items():
            info = tarfile.TarInfo(f"{FOLDER[kind, form]}/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize(("kind", "packed"), [("cifar10", False), ("cifar10", True), ("cifar100", True)])
@pytest.mark.parametrize("form", ["python", "binary"])
def test_cifar(tmp_path, kind, form, packed):
    found, train, (_, test_images, test_labels) = files(kind, form)
    data = load(f"{kind}:{write(tmp_path, kind, form, packed, found)}")
    assert data.image_shape == (32, 32, 3)
    assert data.class_names == tuple(f"class{i}" for i in range(len(data.class_names)))
    assert len(data.class_names) == (10 if kind == "cifar10" else 100)
    images, labels = data.test.fetch(np.arange(len(data.test)))
    np.testing.assert_array_equal(images, test_images)
    np.testing.assert_array_equal(labels, test_labels)
    expected = sorted((x.tobytes(), y) for _, xs, ys in train for x, y in zip(xs, ys, strict=True))
    drawn = [source.fetch(np.arange(len(source))) for source in (data.train, data.validation)]
    assert sorted((x.tobytes(), y) for xs, ys in drawn for x, y in zip(xs, ys, strict=True)) == expected


def test_the_folder_around_the_folder_will_do(tmp_path):
    write(tmp_path, "cifar10", "binary", False, files("cifar10", "binary")[0])
    assert len(load(f"cifar10:{tmp_path}").test) == 20
    write(tmp_path, "cifar10", "python", False, files("cifar10", "python")[0])
    with pytest.raises(ValueError, match=r"more than one data set: name one of .*batches-bin, .*batches-py"):
        load(f"cifar10:{tmp_path}")


IMAGES, LABELS = np.zeros((2, 3072), np.uint8), [0, 1]


@pytest.mark.parametrize(
    ("form", "name", "content", "message"),
    [
        ("binary", "data_batch_2.bin", None, r"lacks data_batch_2.bin; it has batches.meta.txt, data_batch_1.bin, "),
        ("binary", "data_batch_2.bin", b"\0" * 5000, "data_batch_2.bin: 5000 bytes, expected a multiple of 3073"),
        ("binary", "data_batch_2.bin", b"", "data_batch_2.bin: 0 bytes, expected a multiple of 3073"),
        ("binary", "data_batch_2.bin", b"\x0a" * 3073, "data_batch_2.bin: image 0: a label is 10, expected 0 to 9"),
        ("python", "data_batch_3", None, "lacks data_batch_3; it has batches.meta, "),
        ("python", "data_batch_3", b"", "data_batch_3: damaged: ValueError: pickle exhausted"),
        ("python", "data_batch_3", b"junk", "data_batch_3: "),
        ("python", "data_batch_3", as_python_2([1]), "data_batch_3: holds a list; allowed: a dictionary"),
        ("python", "data_batch_3", as_python_2({"labels": LABELS}), r"data is NoneType, expected an array"),
        (
            "python",
            "data_batch_3",
            as_python_2({"data": IMAGES[:, :-1], "labels": LABELS}),
            r"data is an array of shape \[2, 3071\], expected an array of shape \[n, 3072\]",
        ),
        ("python", "data_batch_3", as_python_2({"data": IMAGES, "labels": [1]}), "labels is a list of 1, expected"),
        ("python", "data_batch_3", as_python_2({"data": IMAGES, "labels": [0, -1]}), "image 1: a label is -1"),
        ("python", "batches.meta", as_python_2({"label_names": 3}), "label_names is int, expected a list of names"),
    ],
)
def test_cifar_refuses(tmp_path, form, name, content, message):
    found = files("cifar10", form)[0] | {name: content}
    path = write(tmp_path, "cifar10", form, False, {key: value for key, value in found.items() if value is not None})
    with pytest.raises(ValueError, match=message) as caught:
        load(f"cifar10:{path}")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-200]])
def test_a_truncated_archive(tmp_path, damage):
    path = write(tmp_path, "cifar10", "binary", True, files("cifar10", "binary")[0])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"cifar10\.tar\.gz: (cannot be read|lacks)"):
        load(f"cifar10:{path}")


def test_a_truncated_pickle(tmp_path):
    found = files("cifar10", "python")[0]
    found["data_batch_5"] = found["data_batch_5"][:30000]
    with pytest.raises(ValueError, match="data_batch_5: "):
        load(f"cifar10:{write(tmp_path, 'cifar10', 'python', False, found)}")


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match=r"lacks .*; it has no file of the data set"):
        load(f"cifar100:{tmp_path}")
    with pytest.raises(ValueError, match=r"nowhere: cannot be read"):
        load(f"cifar100:{tmp_path / 'nowhere'}")


class Call:
    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Call(eval, "1/0"), r"names (__builtin__|builtins).eval; allowed"),
        ({"x": Call(__import__, "os")}, "names .*__import__; allowed"),
        ({"x": np.zeros(3)}, "an array of .*f8'; allowed: 'u1'"),
        ({"x": np.array([print], object)}, "names .*print|an array of .*O8"),
        ({"x": np.float64(3)}, "names numpy.*scalar; allowed"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_runs_nothing(value, message, protocol):
    with pytest.raises(ValueError, match=message):
        read_pickle(pickle.dumps(value, protocol=protocol))


@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_bytes_in_either_order(order):
    array = np.asarray(np.arange(12, dtype=np.uint8).reshape(3, 4), order=order)
    np.testing.assert_array_equal(read_pickle(as_python_2({"x": array}))["x"], array)


def test_every_truncation_of_a_pickle_is_refused():
    whole = as_python_2({"x": np.arange(40, dtype=np.uint8), "y": [1, "a", b"b"]})
    for stop in range(len(whole)):
        with pytest.raises(ValueError, match=r".+"):
            read_pickle(whole[:stop])


def test_a_member_larger_than_all_that_may_be_unpacked_is_refused_by_its_header(tmp_path):
    """Whether it is wanted or not: to pass over it, it would be unpacked."""
    member = tarfile.TarInfo("junk")
    member.size = 1 << 40
    path = tmp_path / "cifar10.tar.gz"
    path.write_bytes(gzip.compress(member.tobuf()))
    with pytest.raises(ValueError, match=r"junk would unfold a file of .* bytes to 1,099,511,62"):
        load(f"cifar10:{path}")

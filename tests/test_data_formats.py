"""The files of the data sets: read strictly, and a bad one named with what it holds."""

import gzip
import re
import struct

import numpy as np
import pytest

from jaxattn.train.data import load
from jaxattn.train.data.idx import read_idx


def everything(source):
    return source.fetch(np.arange(len(source)))


# fashion-mnist


def idx(array: np.ndarray) -> bytes:
    return (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    )


def write_fashion(folder, compress, train=240, test=50, replace=None):
    """Idx files of random images whose labels run 0 to 9; `replace` maps a file's name to other content."""
    rng = np.random.default_rng(0)
    files = {}
    for part, count in (("train", train), ("t10k", test)):
        files[f"{part}-images-idx3-ubyte"] = idx(rng.integers(0, 256, (count, 6, 5)))
        files[f"{part}-labels-idx1-ubyte"] = idx(np.arange(count) % 10)
    for name, content in (files | (replace or {})).items():
        if content is None:
            continue
        path = folder / (f"{name}.gz" if compress else name)
        path.write_bytes(gzip.compress(content) if compress else content)
    return files


@pytest.mark.parametrize("compress", [False, True])
def test_fashion_mnist(tmp_path, compress):
    files = write_fashion(tmp_path, compress)
    data = load(f"fashion-mnist:{tmp_path}", seed=3)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [220, 20, 50]
    images, labels = everything(data.test)
    np.testing.assert_array_equal(labels, np.arange(50) % 10)
    raw = np.frombuffer(files["t10k-images-idx3-ubyte"][16:], np.uint8).reshape(50, 6, 5, 1)
    np.testing.assert_array_equal(images, raw)
    np.testing.assert_array_equal(np.bincount(everything(data.validation)[1]), 2)
    assert len(data.class_names) == 10


def test_read_idx_takes_any_number_of_axes(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "x").write_bytes(idx(array))
    np.testing.assert_array_equal(read_idx(tmp_path / "x", 3), array)


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
GOOD = idx(np.zeros((240, 6, 5)))
TEN = np.arange(240) % 10


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IMAGES, None, f"has neither {IMAGES} nor {IMAGES}.gz"),
        (IMAGES, b"", "starts with nothing, expected 00 00 08 03"),
        (IMAGES, b"\0\0\x08", "starts with 00 00 08, expected 00 00 08 03"),
        (IMAGES, idx(np.zeros(240)), "starts with 00 00 08 01, expected 00 00 08 03"),
        (IMAGES, b"\0\0\x0d\x03" + GOOD[4:], "starts with 00 00 0d 03, expected 00 00 08 03"),
        (IMAGES, GOOD[:10], "10 bytes, too short for a header of 16"),
        (IMAGES, GOOD[:-1], r"7215 bytes, expected 7216 for the shape \(240, 6, 5\)"),
        (IMAGES, GOOD + b"\0", r"7217 bytes and more, expected 7216 for the shape \(240, 6, 5\)"),
        (IMAGES, b"\0\0\x08\x03" + b"\xff" * 12 + b"\0" * 99, "would unfold a file of"),
        (LABELS, GOOD, "starts with 00 00 08 03, expected 00 00 08 01"),
        (LABELS, idx(np.zeros(239)), "239 labels for 240 images"),
        (LABELS, idx(np.where(np.arange(240) == 7, 10, TEN)), "image 7: a label is 10, expected 0 to 9"),
        (LABELS, idx(np.where(TEN == 4, 5, TEN)), "class 'coat' has no training image"),
        (
            "t10k-images-idx3-ubyte",
            idx(np.zeros((50, 6, 6))),
            r"training images are \(6, 5, 1\), test images \(6, 6, 1\)",
        ),
    ],
)
@pytest.mark.parametrize("compress", [False, True])
def test_a_bad_file_is_named_with_what_it_holds(tmp_path, compress, name, content, message):
    write_fashion(tmp_path, compress, replace={name: content})
    with pytest.raises(ValueError, match=message) as caught:
        load(f"fashion-mnist:{tmp_path}")
    assert str(tmp_path) in str(caught.value)


def test_skip_bad_leaves_out_labels_out_of_range_and_lists_them(tmp_path):
    bad = {7: 10, 9: 255}
    write_fashion(tmp_path, False, replace={LABELS: idx([bad.get(i, TEN[i]) for i in range(240)] * np.array(1))})
    data = load(f"fashion-mnist:{tmp_path}", skip_bad=True)
    assert len(data.train) + len(data.validation) == 238
    assert data.skipped == tuple(f"{tmp_path / LABELS}: image {i}: a label is {bad[i]}, expected 0 to 9" for i in bad)


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"no gzip" + b, lambda b: b[:20] + b"\xff" * 40 + b[60:]]
)
def test_damaged_gzip(tmp_path, damage):
    write_fashion(tmp_path, compress=True)
    path = tmp_path / f"{IMAGES}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{IMAGES}\.gz: (cannot be read|the shape .* would unfold)"):
        load(f"fashion-mnist:{tmp_path}")


def test_no_such_folder(tmp_path):
    with pytest.raises(ValueError, match="nowhere: has neither train-images-idx3-ubyte"):
        load(f"fashion-mnist:{tmp_path / 'nowhere'}")


# numpy


def arrays(**replace):
    rng = np.random.default_rng(0)
    made = {
        "train_images": rng.integers(0, 256, (36, 5, 4, 3)).astype(np.uint8),
        "train_labels": np.arange(36) % 3,
        "test_images": rng.integers(0, 256, (6, 5, 4, 3)).astype(np.uint8),
        "test_labels": np.arange(6) % 3,
    }
    return {name: array for name, array in (made | replace).items() if array is not None}


def test_numpy(tmp_path):
    made = arrays(class_names=np.array(["cat", "dog", "emu"]))
    np.savez(tmp_path / "x.npz", **made)
    data = load(f"numpy:{tmp_path / 'x.npz'}")
    assert data.class_names == ("cat", "dog", "emu")
    assert data.image_shape == (5, 4, 3)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [33, 3, 6]
    np.testing.assert_array_equal(everything(data.test)[0], made["test_images"])
    np.testing.assert_array_equal(everything(data.test)[1], made["test_labels"])


def test_numpy_without_channels_or_names_and_in_float64(tmp_path):
    grey = np.random.default_rng(0).random((36, 5, 4))
    np.savez_compressed(tmp_path / "x.npz", **arrays(train_images=grey, test_images=grey[:6]))
    data = load(f"numpy:{tmp_path / 'x.npz'}")
    assert data.class_names == ("0", "1", "2")
    images, _ = everything(data.test)
    assert images.dtype == np.float32
    np.testing.assert_array_equal(images, grey[:6, ..., None].astype(np.float32))


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        (dict(test_labels=None), "has train_images, train_labels, test_images, and lacks test_labels"),
        (dict(train_images=np.zeros((36, 5), np.uint8)), r"train_images has shape \(36, 5\), expected"),
        (dict(train_images=np.zeros((0, 5, 4, 3), np.uint8)), r"train_images has shape \(0, 5, 4, 3\), expected"),
        (dict(train_labels=np.arange(35)), r"train_labels is int64 of shape \(35,\), expected integers \(36,\)"),
        (dict(train_labels=np.zeros(36)), "train_labels is float64 of shape"),
        (dict(train_labels=np.arange(36) % 3 - 1), r"train_labels\[0\]: a label is -1, expected 0 to 1"),
        (dict(test_labels=np.arange(6)), r"test_labels\[3\]: a label is 3, expected 0 to 2"),
        (dict(train_images=np.full((36, 5, 4, 3), np.nan)), "runs from nan to nan, expected 0 to 1"),
        (dict(train_images=np.full((36, 5, 4, 3), 255.0)), "runs from 255.0 to 255.0, expected 0 to 1"),
        (dict(train_images=np.zeros((36, 5, 4, 3), np.int32)), "train_images is int32, expected uint8"),
        (dict(train_labels=np.arange(36) % 2 * 2), "class '1' has no training image"),
        (dict(class_names=np.array(["a", "b"])), r"train_labels\[2\]: a label is 2, expected 0 to 1"),
        (dict(class_names=np.zeros((3, 3))), r"class_names has shape \(3, 3\)"),
        (dict(class_names=np.array([print], object)), "cannot be read: Object arrays cannot be loaded"),
        (dict(test_images=np.zeros((6, 5, 5, 3), np.uint8)), r"training images are \(5, 4, 3\), test images"),
    ],
)
def test_numpy_refuses(tmp_path, replace, message):
    np.savez(tmp_path / "x.npz", **arrays(**replace))
    with pytest.raises(ValueError, match=message) as caught:
        load(f"numpy:{tmp_path / 'x.npz'}")
    assert str(tmp_path / "x.npz") in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda b: b[: len(b) // 2], "cannot be read"),
        (lambda b: b"", "cannot be read"),
        # says that it needs version 20.0 of zip
        (lambda b: re.sub(rb"(?s)(?<=PK\x01\x02..).", b"\xc8", b), "cannot be read: zip file version 20"),
        (lambda b: b[:600] + b"\xff" * 40 + b[640:], "cannot be read: Bad CRC"),
        (lambda b: b"hello" * 9, "cannot be read"),
    ],
)
def test_numpy_damaged(tmp_path, content, message):
    np.savez(tmp_path / "x.npz", **arrays())
    (tmp_path / "x.npz").write_bytes(content((tmp_path / "x.npz").read_bytes()))
    with pytest.raises(ValueError, match=message):
        load(f"numpy:{tmp_path / 'x.npz'}")


def test_numpy_of_one_array_or_none(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(3))
    with pytest.raises(ValueError, match="one array; expected an archive"):
        load(f"numpy:{tmp_path / 'x.npy'}")
    with pytest.raises(ValueError, match=r"nowhere\.npz: cannot be read"):
        load(f"numpy:{tmp_path / 'nowhere.npz'}")

"""The data sets: read strictly, split as promised, shuffled and moved as promised."""

import gzip
import struct

import numpy as np
import pytest

from jaxattn.train.data import Dataset, batches, load, read_idx

PARTS = ("train", "validation", "test")


def parts(data: Dataset):
    return {part: (getattr(data, f"{part}_images"), getattr(data, f"{part}_labels")) for part in PARTS}


@pytest.fixture(scope="module")
def digits():
    return load("digits", seed=0)


def original(data: Dataset, images):
    """The grey levels 0 to 16 of scikit-learn's file, whatever the normalisation."""
    low, high = min(x.min() for x, _ in parts(data).values()), max(x.max() for x, _ in parts(data).values())
    return np.rint((images - low) / (high - low) * 16).astype(int)


def test_digits_are_all_of_scikit_learns_and_each_once(digits):
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    expected = sorted((*x.astype(int), y) for x, y in zip(pixels, labels, strict=True))
    split = [
        (*original(digits, x).reshape(-1), y)
        for images, ys in parts(digits).values()
        for x, y in zip(images, ys, strict=True)
    ]
    assert sorted(split) == expected


def test_digits_shapes_and_dtypes(digits):
    sizes = {"train": 1200, "validation": 200, "test": 397}
    for part, (images, labels) in parts(digits).items():
        assert images.shape == (sizes[part], 8, 8, 1)
        assert images.dtype == np.float32
        assert labels.shape == (sizes[part],)
        assert labels.dtype == np.int32
    assert digits.class_names == tuple("0123456789")


def test_normalised_by_the_training_images_alone(digits):
    assert abs(digits.train_images.mean()) < 1e-5
    assert abs(digits.train_images.std() - 1) < 1e-5
    assert abs(digits.test_images.mean()) > 1e-4  # so the test images had no say


def test_every_part_has_every_class_in_proportion(digits):
    everything = np.concatenate([labels for _, labels in parts(digits).values()])
    share = np.bincount(everything, minlength=10) / len(everything)
    for _, labels in parts(digits).values():
        assert np.abs(np.bincount(labels, minlength=10) - share * len(labels)).max() <= 2


def test_the_seed_decides_the_validation_images_and_never_the_test_images(digits):
    again, other = load("digits", seed=0), load("digits", seed=1)
    for field in ("train_images", "validation_images", "test_images", "test_labels"):
        np.testing.assert_array_equal(getattr(again, field), getattr(digits, field))
    np.testing.assert_array_equal(original(other, other.test_images), original(digits, digits.test_images))
    assert (other.validation_labels != digits.validation_labels).any() or (
        original(other, other.validation_images) != original(digits, digits.validation_images)
    ).any()


@pytest.mark.parametrize("name", ["mnist", "digits:", "digits:x", "fashion-mnist", "fashion-mnist:", ""])
def test_an_unknown_name_lists_what_is_allowed(name):
    with pytest.raises(ValueError, match=r"data \(=.*must be 'digits' or 'fashion-mnist:PATH'"):
        load(name)


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
    assert [len(labels) for _, labels in parts(data).values()] == [220, 20, 50]
    np.testing.assert_array_equal(data.test_labels, np.arange(50) % 10)
    np.testing.assert_array_equal(np.bincount(data.validation_labels), 2)
    assert len(data.class_names) == 10
    raw = np.frombuffer(files["t10k-images-idx3-ubyte"][16:], np.uint8).reshape(50, 6, 5, 1).astype(float)
    # one affine map takes the file's bytes to what was loaded
    slope, intercept = np.polyfit(raw.ravel(), data.test_images.ravel(), 1)
    np.testing.assert_allclose(data.test_images, raw * slope + intercept, atol=1e-5)
    assert abs(data.train_images.mean()) < 1e-5


def test_read_idx_takes_any_number_of_axes(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "x").write_bytes(idx(array))
    np.testing.assert_array_equal(read_idx(tmp_path / "x", 3), array)


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
GOOD = idx(np.zeros((240, 6, 5)))


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
        (IMAGES, GOOD + b"\0", r"7217 bytes, expected 7216 for the shape \(240, 6, 5\)"),
        (IMAGES, b"\0\0\x08\x03" + b"\xff" * 12 + b"\0" * 99, "115 bytes, expected "),
        (LABELS, GOOD, "starts with 00 00 08 03, expected 00 00 08 01"),
        (LABELS, idx(np.zeros(239)), "239 labels for 240 images"),
        (LABELS, idx(np.full(240, 10)), "a label is 10, expected 0 to 9"),
        ("t10k-images-idx3-ubyte", idx(np.zeros((50, 6, 6))), r"training images are \(6, 5\), test images \(6, 6\)"),
    ],
)
@pytest.mark.parametrize("compress", [False, True])
def test_a_bad_file_is_named_with_what_it_holds(tmp_path, compress, name, content, message):
    write_fashion(tmp_path, compress, replace={name: content})
    with pytest.raises(ValueError, match=message) as caught:
        load(f"fashion-mnist:{tmp_path}")
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"no gzip" + b, lambda b: b[:20] + b"\xff" * 40 + b[60:]]
)
def test_damaged_gzip(tmp_path, damage):
    write_fashion(tmp_path, compress=True)
    path = tmp_path / f"{IMAGES}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{IMAGES}.gz: cannot be read"):
        load(f"fashion-mnist:{tmp_path}")


def test_no_such_folder(tmp_path):
    with pytest.raises(ValueError, match="nowhere: has neither train-images-idx3-ubyte"):
        load(f"fashion-mnist:{tmp_path / 'nowhere'}")


# batches


def test_an_epoch_has_every_image_once_with_its_label():
    images, labels = np.arange(24.0).reshape(12, 1, 2, 1), np.arange(12)
    seen = list(batches(images, labels, 4, np.random.default_rng(0)))
    assert [len(y) for _, y in seen] == [4, 4, 4]
    order = np.concatenate([y for _, y in seen])
    assert sorted(order) == list(range(12))
    assert list(order) != list(range(12))
    np.testing.assert_array_equal(np.concatenate([x for x, _ in seen]), images[order])


def test_the_last_incomplete_batch_is_left_out():
    seen = list(batches(np.zeros((10, 2, 2, 1)), np.arange(10), 4, np.random.default_rng(0)))
    assert [len(y) for _, y in seen] == [4, 4]


def test_shifts_move_each_image_by_at_most_that_and_repeat_its_edge():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(200, 5, 4, 2))
    ((moved, labels),) = batches(images, np.arange(200), 200, rng, shift=1)
    found = set()
    for x, label in zip(moved, labels, strict=True):
        padded = np.pad(images[label], ((1, 1), (1, 1), (0, 0)), mode="edge")
        fits = [(r, c) for r in range(3) for c in range(3) if (padded[r : r + 5, c : c + 4] == x).all()]
        assert len(fits) == 1
        found.update(fits)
    assert len(found) == 9  # every shift is drawn


def test_batches_are_decided_by_the_generator():
    images, labels = np.random.default_rng(0).normal(size=(20, 4, 4, 1)), np.arange(20)
    one, two, other = (list(batches(images, labels, 5, np.random.default_rng(seed), shift=1)) for seed in (1, 1, 2))
    for (x, y), (x2, y2) in zip(one, two, strict=True):
        np.testing.assert_array_equal(x, x2)
        np.testing.assert_array_equal(y, y2)
    assert any((y != y2).any() for (_, y), (_, y2) in zip(one, other, strict=True))

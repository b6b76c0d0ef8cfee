"""The data sets: split as promised, shuffled as promised, and resumed anywhere."""

import json

import numpy as np
import pytest

from jaxattn.train.data import Arrays, Dataset, batches, load
from jaxattn.train.data.split import statistics, stratify

PARTS = ("train", "validation", "test")


def everything(source):
    return source.fetch(np.arange(len(source)))


def parts(data: Dataset):
    return {part: everything(getattr(data, part)) for part in PARTS}


@pytest.fixture(scope="module")
def digits():
    return load("digits", seed=0)


def test_digits_are_all_of_scikit_learns_and_each_once(digits):
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    expected = sorted((*x.astype(int), y) for x, y in zip(pixels, labels, strict=True))
    split = [
        (*np.rint(x * 16).astype(int).reshape(-1), y)
        for images, ys in parts(digits).values()
        for x, y in zip(images, ys, strict=True)
    ]
    assert sorted(split) == expected


def test_digits_shapes_and_dtypes(digits):
    sizes = {"train": 1200, "validation": 200, "test": 397}
    for part, (images, labels) in parts(digits).items():
        assert images.shape == (sizes[part], *digits.image_shape)
        assert images.dtype == np.float32
        assert labels.shape == (sizes[part],)
        assert labels.dtype == np.int32
    assert digits.image_shape == (8, 8, 1)
    assert digits.class_names == tuple("0123456789")
    assert digits.skipped == ()


def test_mean_and_std_are_of_the_training_images_alone(digits):
    images, _ = everything(digits.train)
    np.testing.assert_allclose(digits.mean, [images.astype(float).mean()], rtol=1e-6)
    np.testing.assert_allclose(digits.std, [images.astype(float).std()], rtol=1e-6)
    test_images, _ = everything(digits.test)
    assert abs(test_images.mean() - digits.mean[0]) > 1e-4  # so the test images had no say


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_statistics_are_per_channel_and_a_constant_channel_has_deviation_one(dtype):
    images = np.random.default_rng(0).integers(0, 256, (7, 5, 3, 3)).astype(np.uint8)
    images[..., 2] = 51
    unit = images / 255
    mean, std = statistics(images if dtype == np.uint8 else unit.astype(np.float32))
    np.testing.assert_allclose(mean, unit.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, [*unit.std((0, 1, 2))[:2], 1], rtol=1e-6)


def test_every_part_has_every_class_in_proportion(digits):
    labels = {part: ys for part, (_, ys) in parts(digits).items()}
    total = np.concatenate(list(labels.values()))
    share = np.bincount(total, minlength=10) / len(total)
    for ys in labels.values():
        assert np.abs(np.bincount(ys, minlength=10) - share * len(ys)).max() <= 2


def test_stratify_takes_out_without_loss():
    left, taken = stratify(np.array([2, 0, 1] * 10), 6, seed=0)
    assert sorted([*left, *taken]) == list(range(30))
    np.testing.assert_array_equal(np.bincount(np.array([2, 0, 1] * 10)[taken]), 2)


def test_the_seed_decides_the_validation_images_and_never_the_test_images(digits):
    again, other = parts(load("digits", seed=0)), parts(load("digits", seed=1))
    for part, (images, labels) in parts(digits).items():
        np.testing.assert_array_equal(again[part][0], images)
        np.testing.assert_array_equal(again[part][1], labels)
    np.testing.assert_array_equal(other["test"][0], again["test"][0])
    assert (other["validation"][0] != again["validation"][0]).any()


@pytest.mark.parametrize("name", ["mnist", "digits:", "digits:x", "fashion-mnist", "fashion-mnist:", "numpy", ""])
def test_an_unknown_name_lists_what_is_allowed(name):
    with pytest.raises(ValueError, match=r"data \(=.*must be one of 'digits', .*'fashion-mnist:PATH'"):
        load(name)


# batches


def numbered(count):
    """A source whose image i holds the number i, and whose label is 3 i."""
    images = np.arange(count, dtype=np.float32).reshape(count, 1, 1, 1) * np.ones((1, 2, 3, 1), np.float32)
    return Arrays(images, 3 * np.arange(count, dtype=np.int32))


class Endless:
    endless = True

    def __len__(self):
        return 20

    def fetch(self, indices):
        return np.zeros((len(indices), 2, 2, 1), np.uint8), (indices % 7).astype(np.int32)


def shown(iterator):
    return [batch["index"].tolist() for batch in iterator]


def test_an_epoch_has_every_image_once_with_its_label():
    seen = list(batches(numbered(12), 4, seed=0, epochs=1))
    assert [batch["image"].shape for batch in seen] == [(4, 2, 3, 1)] * 3
    order = np.concatenate([batch["index"] for batch in seen])
    assert order.dtype == np.int64
    assert sorted(order) == list(range(12))
    assert list(order) != list(range(12))
    np.testing.assert_array_equal(np.concatenate([batch["image"] for batch in seen])[:, 0, 0, 0], order)
    np.testing.assert_array_equal(np.concatenate([batch["label"] for batch in seen]), 3 * order)


def test_the_last_incomplete_batch_of_every_epoch_is_left_out():
    seen = shown(batches(numbered(10), 4, seed=0, epochs=3))
    assert [len(indices) for indices in seen] == [4] * 6
    for epoch in range(3):
        assert len({*seen[2 * epoch], *seen[2 * epoch + 1]}) == 8


def test_seed_and_epoch_decide_the_order():
    one, two, other = (shown(batches(numbered(64), 32, seed=seed, epochs=2)) for seed in (1, 1, 2))
    assert one == two
    assert one != other
    assert one[:2] != one[2:]


def test_without_epochs_it_never_ends():
    iterator = batches(numbered(4), 2, seed=0)
    assert len([next(iterator) for _ in range(50)]) == 50


@pytest.mark.parametrize("source", [numbered(10), Endless()])
@pytest.mark.parametrize("stop", [0, 1, 3, 4, 7])
def test_a_run_that_stops_anywhere_goes_on_with_the_same_batches(source, stop):
    whole = shown(batches(source, 3, seed=5, epochs=3))
    first = batches(source, 3, seed=5, epochs=3)
    before = [next(first)["index"].tolist() for _ in range(stop)]
    state = json.loads(json.dumps(first.get_state()))
    resumed = batches(source, 3, seed=5, epochs=3)
    resumed.set_state(state)
    assert before + shown(resumed) == whole


def test_set_state_also_goes_back():
    iterator = batches(numbered(12), 4, seed=0)
    start = iterator.get_state()
    first = [next(iterator)["index"].tolist() for _ in range(5)]
    iterator.set_state(start)
    assert [next(iterator)["index"].tolist() for _ in range(5)] == first


@pytest.mark.parametrize("source", [numbered(26), Endless()])
@pytest.mark.parametrize("count", [2, 3])
def test_the_processes_together_have_the_batches_of_one(source, count):
    whole = list(batches(source, 6, seed=1, epochs=2))
    shares = [list(batches(source, 6, seed=1, epochs=2, process=(rank, count))) for rank in range(count)]
    for batch, *each in zip(whole, *shares, strict=True):
        for key in ("image", "label", "index"):
            assert all(len(share[key]) == 6 // count for share in each)
            np.testing.assert_array_equal(np.concatenate([share[key] for share in each]), batch[key])


def test_an_endless_source_never_repeats():
    iterator = batches(Endless(), 8, seed=0)
    order = np.concatenate([next(iterator)["index"] for _ in range(20)])
    np.testing.assert_array_equal(order, np.arange(160))
    assert len(shown(batches(Endless(), 8, seed=0, epochs=3))) == 6


@pytest.mark.parametrize(
    ("batch_size", "process", "message"),
    [
        (11, (0, 1), r"batch_size \(=11\) must be at most the 10 training images"),
        (0, (0, 1), r"batch_size \(=0\) must be a positive multiple of the 1 processes"),
        (5, (0, 2), r"batch_size \(=5\) must be a positive multiple of the 2 processes"),
        (4, (2, 2), r"process \(=\(2, 2\)\) must be \(index, count\)"),
    ],
)
def test_batches_that_cannot_be(batch_size, process, message):
    with pytest.raises(ValueError, match=message):
        batches(numbered(10), batch_size, seed=0, process=process)

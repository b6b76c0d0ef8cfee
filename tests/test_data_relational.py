"""The tasks made on the fly: their answers found again by looking, their parts disjoint, their examples repeatable."""

import numpy as np
import pytest

from jaxattn.train.data import batches, load
from jaxattn.train.data.made import draw

MANY = np.arange(2000)
NAMES = ["relational:same-different", "relational:copy", "relational:match"]


@pytest.mark.parametrize(
    ("options", "offset", "glyph", "size"),
    [
        ("", (3, 5), 3, 16),
        ("?offset=-2,0&glyph=2&size=6", (-2, 0), 2, 6),
        ("?offset=0,-7&glyph=7&size=14", (0, -7), 7, 14),
    ],
)
def test_same_different_by_looking(options, offset, glyph, size):
    data = load(f"relational:same-different{options}")
    assert data.name == "relational-same-different"
    assert data.image_shape == (size, size, 1)
    assert data.class_names == ("different", "same")
    images, labels = data.train.fetch(MANY)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int32
    assert abs(labels.mean() - 0.5) < 0.05
    places, firsts, differences = set(), [], []
    for image, label in zip(images[..., 0], labels, strict=True):
        lit = image > 0
        assert lit.sum() == 2 * glyph**2
        starts = [
            (r, c)
            for r in range(size - glyph + 1)
            for c in range(size - glyph + 1)
            if 0 <= r + offset[0] <= size - glyph
            and 0 <= c + offset[1] <= size - glyph
            and lit[r : r + glyph, c : c + glyph].all()
            and lit[r + offset[0] :, c + offset[1] :][:glyph, :glyph].all()
        ]
        assert len(starts) == 1
        ((r, c),) = starts
        first = image[r : r + glyph, c : c + glyph]
        second = image[r + offset[0] :, c + offset[1] :][:glyph, :glyph]
        assert label == (first == second).all()
        assert set(np.unique(image)) <= {0, 85, 255}
        places.add((r, c))
        firsts.append(first == 255)
        differences.append(first != second)
    assert len(places) == (size - glyph + 1 - abs(offset[0])) * (size - glyph + 1 - abs(offset[1]))
    # every pixel of a glyph is lit half of the time, in either class, and differs half of the time if any does
    firsts, differences = np.array(firsts), np.array(differences)
    for label in (0, 1):
        assert np.abs(firsts[labels == label].mean(0) - 0.5).max() < 0.08
    assert np.abs(differences[labels == 0].mean(0) - 0.5).max() < (0.1 if glyph > 2 else 0.13)


@pytest.mark.parametrize(
    ("options", "offset", "classes", "size"),
    [("", (3, 2), 4, 8), ("?offset=-1,4&size=5&classes=256", (-1, 4), 256, 5), ("?offset=0,1&size=2", (0, 1), 4, 2)],
)
def test_copy_by_looking(options, offset, classes, size):
    data = load(f"relational:copy{options}")
    assert data.image_shape == (size, size, 2)
    assert data.class_names == tuple(map(str, range(classes)))
    images, labels = data.train.fetch(MANY)
    levels = [int(255 * symbol / (classes - 1)) for symbol in range(classes)]
    marks = set()
    for image, label in zip(images, labels, strict=True):
        ((row, column),) = np.argwhere(image[..., 1] == 255)
        assert (image[..., 1] > 0).sum() == 1
        assert image[row + offset[0], column + offset[1], 0] == levels[label]
        marks.add((row, column))
    assert len(marks) == (size - abs(offset[0])) * (size - abs(offset[1]))
    assert set(np.unique(images[..., 0])) == set(levels)
    share = np.bincount(labels, minlength=classes) / len(labels)
    assert np.abs(share - 1 / classes).max() < 4 * np.sqrt(1 / classes / len(labels))


@pytest.mark.parametrize(
    ("options", "size", "bits"), [("", 4, 8), ("?size=2&bits=4", 2, 4), ("?size=5&bits=32", 5, 32)]
)
def test_match_by_looking(options, size, bits):
    data = load(f"relational:match{options}")
    assert data.image_shape == (size, size, bits + 1)
    assert data.class_names == ("different", "same")
    images, labels = data.train.fetch(MANY)
    assert set(np.unique(images)) == {0, 255}
    assert abs(labels.mean() - 0.5) < 0.05
    marks = []
    for image, label in zip(images.reshape(len(MANY), size**2, -1), labels, strict=True):
        (mark,) = np.flatnonzero(image[:, -1])
        others = np.delete(image[:, :-1], mark, axis=0)
        assert label == (others == image[mark, :-1]).all(1).any()
        marks.append(mark)
    assert len(np.unique(marks)) == size**2
    # every bit is set half of the time, in either class, at the mark and elsewhere
    held = images.reshape(len(MANY), size**2, -1)[..., :-1] / 255
    for label in (0, 1):
        of = labels == label
        np.testing.assert_allclose(held[of].mean((0, 1)), 0.5, atol=0.05)
        np.testing.assert_allclose(held[of, np.array(marks)[of]].mean(0), 0.5, atol=0.08)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_depends_on_seed_and_index_alone(name):
    source = load(name, seed=3).train
    images, labels = source.fetch(np.arange(100))
    for chosen in (np.array([7]), np.array([99, 0, 0]), np.arange(50, 60)):
        some, answers = load(name, seed=3).train.fetch(chosen)
        np.testing.assert_array_equal(some, images[chosen])
        np.testing.assert_array_equal(answers, labels[chosen])
    other, _ = load(name, seed=4).train.fetch(np.arange(100))
    assert (other != images).any((1, 2, 3)).mean() > 0.9


@pytest.mark.parametrize("name", NAMES)
def test_the_parts_are_apart_and_the_test_never_changes(name):
    one, two = load(name, seed=0), load(name, seed=1)
    all_of = lambda source: source.fetch(np.arange(len(source)))
    np.testing.assert_array_equal(all_of(one.test)[0], all_of(two.test)[0])
    assert (all_of(one.validation)[0] != all_of(two.validation)[0]).any()
    assert one.train.endless
    assert not one.validation.endless
    assert not one.test.endless
    # no image of one part is in another, nor twice in one: there are far more images than are drawn
    parts = [all_of(one.validation)[0], all_of(one.test)[0], one.train.fetch(np.arange(4000))[0]]
    seen = np.concatenate([part.reshape(len(part), -1) for part in parts])
    assert len(np.unique(seen, axis=0)) > (0.8 if "same" in name else 0.999) * len(seen)


def test_mean_and_std_are_those_of_training_images():
    data = load("relational:copy")
    images, _ = data.train.fetch(np.arange(5000))
    np.testing.assert_allclose(data.mean, (images / 255).mean((0, 1, 2)), atol=2e-3)
    np.testing.assert_allclose(data.std, (images / 255).std((0, 1, 2)), atol=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_batches_go_on_without_end_and_resume(name):
    source = load(name).train
    iterator = batches(source, 16, seed=0)
    seen = [next(iterator) for _ in range(6)]
    again = batches(source, 16, seed=0)
    again.set_state({"next_index": 4})
    for key, value in next(again).items():
        np.testing.assert_array_equal(value, seen[4][key])
    # a run of many years
    again.set_state({"next_index": 2**40})
    assert next(again)["index"][0] == 16 * 2**40


def test_draws_are_splitmix64():
    """Against the reference implementation in Python's integers, and as random as 64 bits should be."""
    mask = 2**64 - 1

    def mix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    assert mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # the first number of the published generator for seed 0
    found = draw(5, np.array([0, 3, 2**40]), 2)
    for column, index in enumerate((0, 3, 2**40)):
        key = mix((mix(5) + index * 0x9E3779B97F4A7C15) & mask)
        for row in range(2):
            assert int(found[row, column]) == mix((key + (row + 1) * 0x9E3779B97F4A7C15) & mask)
    bits = np.unpackbits(draw(0, np.arange(1000), 4).view(np.uint8).reshape(4, 1000, 8), axis=-1)
    assert np.abs(bits.mean(1) - 0.5).max() < 0.08


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("relational", "must be 'relational:same-different', 'relational:copy' or 'relational:match'"),
        ("relational:sort", r"data \(='relational:sort'\) must be 'relational:same-different'"),
        ("relational:copy?glyph=3", r"option \(='glyph'\) must be one of size, offset, classes"),
        ("relational:copy?offset=3", r"option offset \(='3'\) must be ROWS,COLUMNS"),
        ("relational:copy?offset=0,0", r"option offset \(=\(0, 0\)\) must lead away"),
        ("relational:copy?offset=0,8", r"option offset \(=\(0, 8\)\) must be at most 7 in an image of size 8"),
        ("relational:copy?classes=1", r"option classes \(=1\) must be 2 to 256"),
        ("relational:same-different?glyph=8", r"option glyph \(=8\) must be 2 to 7"),
        ("relational:same-different?offset=2,-2", "must keep glyphs of 3 pixels apart"),
        ("relational:match?size=1", r"option size \(=1\) must be at least 2"),
        ("relational:match?size=8&bits=7", r"option bits \(=7\) must be 8 to 32 for size 8"),
        ("relational:same-different?offset=14,0", "must be at most 13 in an image of size 16"),
    ],
)
def test_tasks_that_cannot_be(name, message):
    with pytest.raises(ValueError, match=message):
        load(name)

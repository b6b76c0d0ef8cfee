"""Composed images: their answers found again by looking, their parts apart, their examples repeatable."""

import numpy as np
import pytest

from jaxattn.train.data import Arrays, Dataset, absolute, batches, compose, fingerprint, load
from jaxattn.train.recipes import recipe

SIDE, KINDS = 8, 5
LEVELS = 50 * np.arange(1, KINDS + 1)  # of the squares of each class
CELL = 10  # the largest object's
PARTS = ("train", "validation", "test")


def squares():
    """A data set of whole squares, whose grey says the class, and whose channel the part."""
    labels = np.arange(3 * KINDS, dtype=np.int32) % KINDS
    parts = []
    for channel in range(3):
        labels = labels.copy()
        images = np.zeros((len(labels), SIDE, SIDE, 3), np.uint8)
        images[..., channel] = LEVELS[labels, None, None]
        parts.append(Arrays(images, labels))
    names = tuple("abcde")
    return Dataset("squares", names, (SIDE, SIDE, 3), np.zeros(3, np.float32), np.ones(3, np.float32), *parts)


def made(**options):
    return compose.compose(squares(), {name: str(value) for name, value in options.items()}, seed=0)


def cells(images):
    """`[n, 9, CELL, CELL]`, over the channels."""
    n = len(images)
    return images.max(-1).reshape(n, 3, CELL, 3, CELL).swapaxes(2, 3).reshape(n, 9, CELL, CELL)


def seen(images):
    """How many squares of each class are in each image: a square's middle is as bright as its class."""
    brightest = cells(images).max((2, 3)).astype(int)
    kind = np.abs(brightest[..., None] - LEVELS).argmin(-1)
    return ((kind[..., None] == np.arange(KINDS)) & (brightest > 25)[..., None]).sum(1), brightest > 25


def by_looking(task, counts):
    if task == "repeat":
        assert (counts.max(1) == 2).all()
        assert ((counts == 2).sum(1) == 1).all()
        return counts.argmax(1)
    if task == "match":
        assert (counts.max(1) <= 2).all()
        assert ((counts == 2).sum(1) <= 1).all()
        return (counts == 2).any(1)
    return counts[:, 0] if task == "count" else counts.argmax(1)


@pytest.mark.parametrize(("task", "objects"), [("repeat", 4), ("match", 3), ("count", 5), ("alone", 1)])
def test_the_answer_by_looking(task, objects):
    data = made(task=task, objects=objects, clutter=0)
    images, labels = data.train.fetch(np.arange(1500))
    assert (images.dtype, labels.dtype, images.shape[1:]) == (np.uint8, np.int32, data.image_shape)
    counts, where = seen(images)
    assert (counts.sum(1) == objects).all()
    np.testing.assert_array_equal(labels, by_looking(task, counts))
    share = np.bincount(labels, minlength=len(data.class_names)) / len(labels)
    assert np.abs(share - 1 / len(data.class_names)).max() < 0.05  # each answer is as likely
    assert np.abs(where.mean(0) - objects / 9).max() < 0.06  # as is each cell
    if task == "match":  # and no class of an object says which answer
        for answer in (0, 1):
            assert np.abs(counts[labels == answer].mean(0) - objects / KINDS).max() < 0.1


def test_what_one_object_says_of_the_answer():
    """The best guess from the class of one object, drawn at random: all of the answer where recognition is enough."""
    says = {}
    for task in ("alone", "match", "count", "repeat"):
        data = made(task=task, clutter=0, objects=1 if task == "alone" else 4)
        images, labels = data.train.fetch(np.arange(1500))
        counts, _ = seen(images)
        joint = np.zeros((KINDS, len(data.class_names)))  # of an object's class and the answer
        for row, label in zip(counts / counts.sum(1, keepdims=True), labels, strict=True):
            joint[:, label] += row
        says[task] = joint.max(1).sum() / joint.sum()
    assert says["alone"] == 1
    assert 0.48 < says["match"] < 0.55  # a coin
    assert says["count"] < 0.45
    assert says["repeat"] < 0.6  # two of four objects are of the answer's class


def test_sizes_places_and_clutter_are_drawn():
    images, _ = made(task="alone", clutter=3).train.fetch(np.arange(2000))
    lit = cells(images) > 0
    heights = (lit.any(3).sum(2)).ravel()
    objects = heights[heights > 5]
    pieces = heights[(heights > 0) & (heights <= 5)]
    assert len(objects) == 2000
    assert set(range(7, 11)) <= set(objects) <= set(range(6, 12))  # 8 pixels by 0.75 to 1.25, and a soft edge
    assert set(range(3, 6)) <= set(pieces)
    found = np.bincount((lit.any((2, 3))).sum(1), minlength=5)[1:] / 2000
    np.testing.assert_allclose(found, 0.25, atol=0.04)  # 0 to 3 pieces beside the object
    free = lit[:, 0].any(2)[heights.reshape(-1, 9)[:, 0] == 7]
    assert free[:, 0].any()  # a small object touches either side of its cell
    assert free[:, -1].any()


def test_an_object_keeps_its_shape():
    """Area and centre of what is drawn, by geometry, whatever size and place."""
    draw = np.random.default_rng(0)
    scale, place = draw.uniform(0.75, 1.25, (1, 500)), draw.random((1, 500))
    zero, one = np.zeros((1, 500)), np.ones((1, 500))
    weights = compose.resample(SIDE, CELL, scale, place, zero, one)[0].astype(float)
    inner = weights[..., 2:-2]  # what is near an edge may be cut off
    assert abs(inner.sum((1, 2)) / (4 * scale[0]) - 1).max() < 0.03
    middle = (np.arange(CELL) + 0.5) @ inner.sum(2)[..., None] / inner.sum((1, 2))[:, None]
    wanted = place * (CELL - scale * SIDE) + scale * SIDE / 2  # the middle of the room that the size leaves
    np.testing.assert_allclose(middle.T, wanted, atol=0.06)
    assert np.abs(weights[..., 1:-1].sum(2).max(1) - 1).max() < 1e-5  # and it is as bright
    third = compose.resample(9, 12, one, place, draw.random((1, 500)), one / 3)[0]
    assert ((third > 0).any(1).sum(1) == 3).all()  # pixels of a piece


def test_each_part_is_composed_of_its_own_originals():
    data = made(task="match")
    for channel, part in enumerate(PARTS):
        source = getattr(data, part)
        images, _ = source.fetch(np.arange(500))
        assert set(np.flatnonzero(images.max((0, 1, 2)))) == {channel}
    assert [len(getattr(data, part)) for part in PARTS[1:]] == [2000, 4000]


def test_an_example_depends_on_seed_and_index_alone():
    whole = load("compose:digits?n=1000000", seed=3)
    images, labels = whole.train.fetch(np.arange(100))
    endless = load("compose:digits", seed=3).train
    assert endless.endless
    assert not whole.train.endless
    for chosen in (np.array([7]), np.array([99, 0, 0]), np.arange(50, 60)):
        some, answers = endless.fetch(chosen)
        np.testing.assert_array_equal(some, images[chosen])
        np.testing.assert_array_equal(answers, labels[chosen])
    other = load("compose:digits", seed=4)
    assert (other.train.fetch(np.arange(100))[0] != images).any((1, 2, 3)).all()
    np.testing.assert_array_equal(other.test.fetch(np.arange(9))[0], whole.test.fetch(np.arange(9))[0])
    assert (other.validation.fetch(np.arange(9))[0] != whole.validation.fetch(np.arange(9))[0]).any()
    last = np.array([999_999])
    assert whole.train.fetch(last)[0].any()
    iterator = batches(whole.train, 16, seed=0)
    seen = [next(iterator) for _ in range(3)]
    again = batches(whole.train, 16, seed=0)
    again.set_state({"next_index": 2})
    np.testing.assert_array_equal(next(again)["image"], seen[2]["image"])


@pytest.mark.full
def test_all_are_distinct():
    images, _ = load("compose:digits?n=20000").train.fetch(np.arange(20_000))
    assert len({image.tobytes() for image in images}) == 20_000


def test_the_fingerprint_sees_one_original():
    same, changed = squares(), squares()
    changed.test.images[-1, 0, 0, 2] ^= 1
    prints = [fingerprint(compose.compose(source, {"n": "1000000"}, seed=0)) for source in (squares(), same, changed)]
    assert prints[0] == prints[1] != prints[2]


def test_names_and_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        absolute("compose:folder:img?size=8&task=match") == f"compose:folder:{tmp_path.resolve()}/img?size=8&task=match"
    )
    assert absolute("compose:digits?n=5") == "compose:digits?n=5"
    assert recipe(None, "compose:digits?n=5").recipe == "digits"
    assert recipe(None, "compose:fashion-mnist:x").recipe == "fashion"
    data = load("compose:digits?task=count&objects=2")
    assert (data.name, data.class_names) == ("compose-digits-count", ("0", "1", "2"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("compose", r"data \(=''\) must be one of 'digits'"),
        ("compose:nothing", r"data \(='nothing'\) must be one of 'digits'"),
        ("compose:numpy:nowhere.npz?task=match", "^nowhere.npz"),
        ("compose:digits?size=3", r"option \(='size'\) must be one of task, n, objects, clutter"),
        ("compose:folder:x?sise=3", r"option \(='sise'\) must be one of task, n, objects, clutter, size"),
        ("compose:digits?task=sort", r"option task \(='sort'\) must be one of repeat, match, count, alone"),
        ("compose:digits?n=0", r"option n \(='0'\) must be a whole number of at least 1"),
        ("compose:digits?n=many", r"option n \(='many'\) must be a whole number"),
        ("compose:digits?objects=1", r"option objects \(=1\) must be 2 to 9 for task 'repeat' of 10 classes"),
        ("compose:digits?task=count&objects=10", r"option objects \(=10\) must be 1 to 9"),
        ("compose:digits?objects=8&clutter=2", r"option clutter \(=2\) must be at most 1 beside 8 objects"),
        ("compose:relational:copy", "must be composed of images that are read"),
        ("compose:compose:digits", "must be composed of images that are read"),
    ],
)
def test_what_cannot_be_composed(name, message):
    with pytest.raises(ValueError, match=message):
        load(name)


def test_a_part_that_lacks_a_class():
    source = squares()
    source.test.labels[source.test.labels == 2] = 1  # in place
    with pytest.raises(ValueError, match="the test part must have images of every class: of 'c' it has none"):
        compose.compose(source, {}, seed=0)

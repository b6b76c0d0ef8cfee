"""Images composed of several real ones, without end: what stands where must be recognised, and then related.

Each object is an original of the data set, at a drawn size, somewhere in a cell of its own of a 3 × 3 grid, on black;
so none hides another. Clutter, pieces of originals, lies in other cells. Image i is a function of (seed, i) alone, and
each part is composed of that part's originals.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int, UInt8, UInt64

from jaxattn.errors import InputError
from jaxattn.train.data.dataset import Dataset, Source
from jaxattn.train.data.made import EPOCH, FIRST, TEST, VALIDATION, Made, Pair, draw
from jaxattn.train.data.options import whole_number
from jaxattn.train.data.split import statistics

CELLS = 3  # along each axis
SMALL, LARGE = 0.75, 1.25  # an object's size, by its original's
PIECE = 1 / 3  # of an original's height and width
OPTIONS = ("task", "n", "objects", "clutter")


class Relation(NamedTuple):
    """What is asked of the objects.

    `classes(kinds, shuffled, free)` gives the class of each object `[n, objects]` and the label `[n]`, from each
    image's random bits `[n]`, all classes in a random order `[n, classes]`, and random bits for each object.
    It takes from `least` objects to `most(kinds)`, where there are so many classes.
    """

    classes: Callable[[UInt64[np.ndarray, "n"], Int[np.ndarray, "n kinds"], UInt64[np.ndarray, "n objects"]], Pair]
    class_names: Callable[[tuple[str, ...], int], tuple[str, ...]]
    least: int
    most: Callable[[int], int]


def _count(bits: np.ndarray, shuffled: np.ndarray, free: np.ndarray) -> Pair:
    """How many are of the first class? Each number is as likely; the others are of any other class."""
    (_, kinds), (_, objects) = shuffled.shape, free.shape
    label = (bits % np.uint64(objects + 1)).astype(int)
    others = 1 + (free % np.uint64(kinds - 1)).astype(int)
    return np.where(np.arange(objects) < label[:, None], 0, others), label


def _match(bits: np.ndarray, shuffled: np.ndarray, free: np.ndarray) -> Pair:
    """Are two of one class? If not, all are of different ones. Each object alone is as likely either way."""
    objects, label = shuffled[:, : free.shape[1]].copy(), (bits >> np.uint64(63)).astype(int)
    objects[:, 1] = objects[np.arange(len(objects)), 1 - label]  # its own, or the first one's
    return objects, label


def _repeat(bits: np.ndarray, shuffled: np.ndarray, free: np.ndarray) -> Pair:
    """Which class is there twice? The others are there once."""
    objects = shuffled[:, : free.shape[1]].copy()
    objects[:, 1] = objects[:, 0]
    return objects, objects[:, 0]


def _alone(bits: np.ndarray, shuffled: np.ndarray, free: np.ndarray) -> Pair:
    """Of which class is the only object? A control, without relation."""
    return shuffled[:, :1], shuffled[:, 0]


ALL = CELLS**2
RELATIONS = {
    "repeat": Relation(_repeat, lambda names, objects: names, 2, lambda kinds: kinds),
    "match": Relation(_match, lambda names, objects: ("no", "yes"), 2, lambda kinds: kinds),
    "count": Relation(_count, lambda names, objects: tuple(map(str, range(objects + 1))), 1, lambda kinds: ALL),
    "alone": Relation(_alone, lambda names, objects: names, 1, lambda kinds: 1),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Compose:
    """Composes images of originals `[n, channels, height, width]`, sorted by class; class c has `counts[c]`."""

    originals: UInt8[np.ndarray, "n channels height width"]
    counts: Int[np.ndarray, "kinds"]
    relation: Relation
    objects: int
    clutter: int

    @property
    def cell(self) -> int:
        """Pixels along a cell, in which the largest object has room."""
        return math.ceil(LARGE * max(self.originals.shape[2:]))

    def make(self, seed: int, indices: Int[np.ndarray, "n"]) -> Pair:
        n, kinds, items = len(indices), len(self.counts), self.objects + self.clutter
        drawn = iter(draw(seed, indices, 2 + kinds + ALL + 7 * items))
        several = lambda count: np.stack([next(drawn) for _ in range(count)], 1)  # [n, count]
        asked, scattered = next(drawn), next(drawn)
        shuffled, cells = several(kinds).argsort(1), several(ALL).argsort(1)[:, :items]
        classes, labels = self.relation.classes(asked, shuffled, several(self.objects))
        free = several(self.clutter) if self.clutter else np.zeros((n, 0), np.uint64)
        chosen = several(items)
        size, row, column, top, left = (unit(several(items)) for _ in range(5))  # [n, items]
        # an object is an original of its class, and clutter is one of any
        starts = np.cumsum(self.counts) - self.counts
        of_class = starts[classes] + (chosen[:, : self.objects] % self.counts[classes].astype(np.uint64)).astype(int)
        of_any = (free % np.uint64(len(self.originals))).astype(int)
        pictures = self.originals[np.concatenate([of_class, of_any], 1)].astype(np.float32)
        # of which an object shows all, a piece of clutter a third each way, and what was not drawn nothing
        is_object = np.arange(items) < self.objects
        shown = np.arange(items) < self.objects + (scattered % np.uint64(self.clutter + 1))[:, None].astype(int)
        part = np.where(is_object, 1.0, PIECE) * shown
        scale = SMALL + (LARGE - SMALL) * size
        height, width = self.originals.shape[2:]
        rows = resample(height, self.cell, scale, row, top, part)  # [n, items, cell, height]
        columns = resample(width, self.cell, scale, column, left, part)
        made = rows[:, :, None] @ pictures @ columns[:, :, None].swapaxes(-1, -2)  # [n, items, channels, cell, cell]
        grid = np.zeros((n, ALL, *made.shape[2:]), np.uint8)
        grid[np.arange(n)[:, None], cells] = np.rint(np.minimum(made, 255))
        grid = grid.reshape(n, CELLS, CELLS, -1, self.cell, self.cell).transpose(0, 1, 4, 2, 5, 3)
        side = CELLS * self.cell
        return grid.reshape(n, side, side, -1), labels.astype(np.int32)


def unit(bits: UInt64[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    """Random bits as numbers in [0, 1)."""
    return (bits >> np.uint64(40)).astype(np.float32) / np.float32(2**24)


def resample(
    pixels: int,
    cell: int,
    scale: Float[np.ndarray, "n items"],
    place: Float[np.ndarray, "n items"],
    start: Float[np.ndarray, "n items"],
    part: Float[np.ndarray, "n items"],
) -> Float32[np.ndarray, "n items cell pixels"]:
    """How much each pixel of the original gives to each of the cell, along one axis: its linear interpolation.

    Args:
      pixels: of the original.
      cell: pixels of the cell.
      scale: the object's size, by its original's. When it is below 1 the triangle of the interpolation is as much
        wider, so that no pixel is lost.
      place: of the object in the room that its size leaves, from 0 to 1.
      start: of the part that is shown, in the room that its size leaves, from 0 to 1.
      part: what share of the original is shown.

    >>> one, none = np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32)
    >>> resample(2, 4, 2 * one, none, none, one)[0, 0].tolist()  # twice as large
    [[0.75, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 0.75]]
    """
    scale, place, start, part = (x[..., None, None].astype(np.float32) for x in (scale, place, start, part))
    source = np.arange(pixels, dtype=np.float32)
    corner = place * (cell - scale * pixels)
    at = (np.arange(cell, dtype=np.float32)[:, None] + 0.5 - corner) / scale - 0.5
    triangle = lambda distance: np.maximum(0, 1 - np.abs(distance) * np.minimum(scale, 1))
    everywhere = triangle(at % 1 - np.arange(-1, 3, dtype=np.float32)).sum(
        -1, keepdims=True
    )  # as if the original had no end
    weights = triangle(at - source) / everywhere
    first = np.rint(start * (1 - part) * pixels)
    return weights * ((source >= first) & (source < first + np.rint(part * pixels)))


def compose(source: Dataset, options: Mapping[str, str], seed: int) -> Dataset:
    """The data set of `compose:SOURCE?OPTIONS`: training images without end, or n of them, and validation and test.

    Args:
      source: the originals.
      options: `task`: `repeat` (the default: which class is there twice?), `match` (are two of one class?), `count`
        (how many are of the first class?) or `alone` (of which class is the only object? a control, without relation);
        `n` distinct images (without end); `objects` in each (4, or as many as the task allows); pieces of `clutter`,
        at most (2).
      seed: of the training and validation images. The test images are the same for every seed.

    Raises:
      ValueError: another task, objects that the task or the grid has no room for, a part without originals of some
        class, originals without end or of more than two axes.

    >>> from jaxattn.train.data.digits import read_digits
    >>> from jaxattn.train.data.split import assemble
    >>> digits = assemble("digits", read_digits(), seed=0, skip_bad=False)
    >>> data = compose(digits, {"task": "match", "n": "1000000"}, seed=0)
    >>> data.image_shape, data.class_names, len(data.train)
    ((30, 30, 1), ('no', 'yes'), 1000000)
    >>> images, labels = data.train.fetch(np.array([999_999]))
    """
    if source.train.endless or len(source.image_shape) != 3:
        raise InputError(f"data (='compose:{source.name}') must be composed of images that are read, of two axes")
    task, kinds = options.get("task", "repeat"), len(source.class_names)
    if task not in RELATIONS:
        raise InputError(f"data: option task (={task!r}) must be one of {', '.join(RELATIONS)}")
    relation, length = RELATIONS[task], whole_number(options, "n", None, least=1)
    most = min(ALL, relation.most(kinds))
    objects = whole_number(options, "objects", min(4, most), least=1)
    if not relation.least <= objects <= most:
        raise InputError(
            f"data: option objects (={objects}) must be {relation.least} to {most} for task {task!r} of {kinds} classes"
        )
    clutter = whole_number(options, "clutter", min(2, ALL - objects), least=0)
    if clutter > ALL - objects:
        raise InputError(f"data: option clutter (={clutter}) must be at most {ALL - objects} beside {objects} objects")
    parts = {"training": source.train, "validation": source.validation, "test": source.test}
    train, validation, test = (
        Compose(*_by_class(part, source.class_names, name), relation, objects, clutter) for name, part in parts.items()
    )
    images, _ = train.make(seed, FIRST + np.arange(1024))
    return Dataset(
        f"compose-{source.name}-{task}",
        relation.class_names(source.class_names, objects),
        images.shape[1:],
        *statistics(images),
        Made(train, seed, FIRST, EPOCH if length is None else length, endless=length is None),
        Made(validation, seed, 0, VALIDATION, endless=False),
        Made(test, 0, VALIDATION, TEST, endless=False),
        skipped=source.skipped,
        originals=tuple(parts.values()),
    )


def _by_class(part: Source, names: tuple[str, ...], what: str) -> Pair:
    """The originals of a part, uint8 and channels first, one class after the other, and how many there are of each."""
    images, labels = part.fetch(np.arange(len(part)))
    counts = np.bincount(labels, minlength=len(names))
    if not counts.all():
        missing = names[int(counts.argmin())]
        raise InputError(f"data: the {what} part must have images of every class: of {missing!r} it has none")
    images = images if images.dtype == np.uint8 else np.rint(images * 255).astype(np.uint8)
    return np.moveaxis(images[labels.argsort(kind="stable")], -1, 1), counts

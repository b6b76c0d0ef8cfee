"""Tasks made on the fly whose answer depends on two places: at a known offset from each other, or at any.

What a layer must do for them is known: compare, or fetch, at that offset; or search. Example i is a function of
(seed, i) alone.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int, UInt64

from jaxattn.errors import InputError
from jaxattn.train.data.dataset import Dataset
from jaxattn.train.data.made import EPOCH, FIRST, TEST, VALIDATION, Made, Pair, draw, mix
from jaxattn.train.data.options import read_options, whole_number
from jaxattn.train.data.split import statistics

DARK, BRIGHT = 85, 255  # of a glyph, on black


@dataclasses.dataclass(frozen=True)
class SameDifferent:
    """Are two glyphs of random pixels the same? The second stands at `offset` from the first, and all else is black.

    Each glyph alone is as likely in either class: only their comparison tells.
    """

    size: int
    offset: tuple[int, int]
    glyph: int

    class_names = ("different", "same")
    channels = 1

    def __post_init__(self) -> None:
        if not 2 <= self.glyph <= 7:  # its pixels are the bits of one number
            raise InputError(f"data: option glyph (={self.glyph}) must be 2 to 7")
        if max(map(abs, self.offset)) < self.glyph:
            raise InputError(f"data: option offset (={self.offset}) must keep glyphs of {self.glyph} pixels apart")
        _check_room(self.offset, self.size, self.glyph)

    def make(self, seed: int, indices: Int[np.ndarray, "n"]) -> Pair:
        n, bits = len(indices), self.glyph**2
        draws = draw(seed, indices, 5)
        first, place = draws[0] >> (64 - bits), _places(draws[1:3], self.offset, self.size - self.glyph + 1)
        labels = draws[3] >> 63  # the highest bit
        change = 1 + (draws[4] >> 1) % (2**bits - 1)  # what differs: at least one pixel, every set of them alike
        second = first ^ np.where(labels == 1, np.uint64(0), change)
        images = np.zeros((n, self.size, self.size, 1), np.uint8)
        inner = np.arange(self.glyph)
        for glyph, start in ((first, place), (second, place + np.array(self.offset))):
            on = glyph[:, None] >> np.arange(bits, dtype=np.uint64) & 1  # [n, bits]
            pixels = np.where(on, BRIGHT, DARK).reshape(n, self.glyph, self.glyph)
            rows, columns = start[:, :1] + inner, start[:, 1:] + inner  # [n, glyph]
            images[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :], 0] = pixels
        return images, labels.astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Copy:
    """Which symbol stands at `offset` from the mark?

    The first channel has a symbol at every pixel, one of `classes` grey levels; the second is bright at the mark.
    """

    size: int
    offset: tuple[int, int]
    classes: int

    channels = 2

    def __post_init__(self) -> None:
        if not 2 <= self.classes <= 256:
            raise InputError(f"data: option classes (={self.classes}) must be 2 to 256")
        if self.offset == (0, 0):
            raise InputError("data: option offset (=(0, 0)) must lead away from the mark")
        _check_room(self.offset, self.size, 1)

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(map(str, range(self.classes)))

    def make(self, seed: int, indices: Int[np.ndarray, "n"]) -> Pair:
        n = len(indices)
        draws = draw(seed, indices, 2 + self.size**2)
        symbols = ((draws[2:].T >> 32) % self.classes).astype(int).reshape(n, self.size, self.size)
        mark = _places(draws[:2], self.offset, self.size)
        source = mark + np.array(self.offset)
        images = np.zeros((n, self.size, self.size, 2), np.uint8)
        images[..., 0] = symbols * 255 // (self.classes - 1)
        images[np.arange(n), mark[:, 0], mark[:, 1], 1] = 255
        return images, symbols[np.arange(n), source[:, 0], source[:, 1]].astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Match:
    """Does any other pixel hold what the marked one holds?

    Every pixel is a vector of random bits, in the first `bits` channels; the last channel is bright at the mark. In
    half the images another pixel has the bits of the marked one; in the rest none has. Where they stand says nothing,
    and each pixel alone is as likely in either class.
    """

    size: int
    bits: int

    class_names = ("different", "same")

    def __post_init__(self) -> None:
        if self.size < 2:
            raise InputError(f"data: option size (={self.size}) must be at least 2")
        if not self._least <= self.bits <= 32:  # else a vector that no pixel holds is hard to find
            raise InputError(f"data: option bits (={self.bits}) must be {self._least} to 32 for size {self.size}")

    @property
    def _least(self) -> int:
        return (2 * self.size**2).bit_length()

    @property
    def channels(self) -> int:
        return self.bits + 1

    def make(self, seed: int, indices: Int[np.ndarray, "n"]) -> Pair:
        n, pixels = len(indices), self.size**2
        draws = draw(seed, indices, pixels + 3)
        held = (draws[3:] >> (64 - self.bits)).T  # [n, pixels]
        mark, step = (draws[0] % pixels).astype(int), 1 + (draws[1] % (pixels - 1)).astype(int)
        labels, rows = (draws[2] >> 63).astype(np.int32), np.arange(n)
        there, absent = held[rows, (mark + step) % pixels], _absent(held, draws[2], self.bits)
        held[rows, mark] = np.where(labels == 1, there, absent)
        images = np.zeros((n, pixels, self.channels), np.uint8)
        images[..., :-1] = (held[..., None] >> np.arange(self.bits, dtype=np.uint64) & 1) * BRIGHT
        images[rows, mark, -1] = BRIGHT
        return images.reshape(n, self.size, self.size, -1), labels


def _absent(held: UInt64[np.ndarray, "n pixels"], draw: UInt64[np.ndarray, "n"], bits: int) -> UInt64[np.ndarray, "n"]:
    """For each row a random number of so many bits that is not in it."""
    wanted, taken, tries = np.zeros_like(draw), np.ones(len(draw), bool), 0
    while taken.any():
        tries += 1
        wanted[taken] = mix(draw[taken] + np.uint64(tries)) >> (64 - bits)
        taken = (held == wanted[:, None]).any(1)
    return wanted


def make_relational(text: str, seed: int) -> Dataset:
    """The data set of `relational:TEXT`: endless training images, and others for validation and test.

    Args:
      text: `same-different`, with the options size (16), offset (3,5: rows down, columns right) and glyph (3), or
        `copy`, with size (8), offset (3,2) and classes (4): `copy?offset=-1,4`; or `match`, with size (4) and bits (8).
      seed: of the training and validation images. The test images are the same for every seed.

    Raises:
      ValueError: another task or option, or places that do not fit into the image.

    >>> data = make_relational("copy?offset=0,1&size=2", seed=0)
    >>> images, labels = data.train.fetch(np.array([5]))
    >>> (images[0, :, :, 1] // 255).tolist()  # the mark
    [[0, 0], [1, 0]]
    >>> images[0, :, :, 0].tolist(), labels  # symbols 0, 1, 2, 3 are the levels 0, 85, 170, 255
    ([[0, 170], [85, 0]], array([0], dtype=int32))
    """
    task = _task(text)
    train = Made(task, seed, FIRST, EPOCH, endless=True)
    validation = Made(task, seed, 0, VALIDATION, endless=False)
    test = Made(task, 0, VALIDATION, TEST, endless=False)
    mean, std = statistics(train.fetch(np.arange(4096))[0])
    shape = (task.size, task.size, task.channels)
    return Dataset(f"relational-{text.partition('?')[0]}", task.class_names, shape, mean, std, train, validation, test)


def _task(text: str) -> SameDifferent | Copy | Match:
    kind, _, rest = text.partition("?")
    if kind == "same-different":
        options = read_options(rest, ("size", "offset", "glyph"))
        offset = _offset(options, (3, 5))
        return SameDifferent(whole_number(options, "size", 16, 1), offset, whole_number(options, "glyph", 3, 1))
    if kind == "copy":
        options = read_options(rest, ("size", "offset", "classes"))
        offset = _offset(options, (3, 2))
        return Copy(whole_number(options, "size", 8, 1), offset, whole_number(options, "classes", 4, 1))
    if kind == "match":
        options = read_options(rest, ("size", "bits"))
        return Match(whole_number(options, "size", 4, 1), whole_number(options, "bits", 8, 1))
    raise InputError(
        f"data (='relational:{text}') must be 'relational:same-different', 'relational:copy' or 'relational:match'"
    )


def _offset(options: Mapping[str, str], default: tuple[int, int]) -> tuple[int, int]:
    if "offset" not in options:
        return default
    try:
        rows, columns = map(int, options["offset"].split(","))
    except ValueError as error:
        raise InputError(f"data: option offset (={options['offset']!r}) must be ROWS,COLUMNS") from error
    return rows, columns


def _check_room(offset: tuple[int, int], size: int, extent: int) -> None:
    most = size - extent
    if max(map(abs, offset)) > most:
        raise InputError(f"data: option offset (={offset}) must be at most {most} in an image of size {size}")


def _places(draws: UInt64[np.ndarray, "2 n"], offset: tuple[int, int], room: int) -> Int[np.ndarray, "n 2"]:
    """Pixels below `room` whose offset is one as well, all alike."""
    axes = [max(0, -step) + (draw % (room - abs(step))).astype(int) for draw, step in zip(draws, offset, strict=True)]
    return np.stack(axes, -1)

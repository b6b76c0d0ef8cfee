"""The order of the examples, and the threads that fetch them ahead of the step."""

import dataclasses
import functools
import sys
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int64

from jaxattn.errors import InputError, needs_extra
from jaxattn.train.data.dataset import Source

if TYPE_CHECKING:
    import grain  # when it runs, only training needs it


@dataclasses.dataclass(frozen=True, eq=False)
class _Batches:
    """Every batch of a training run, by its number: what grain reads from."""

    source: Source
    batch_size: int
    seed: int
    epochs: int | None
    process: tuple[int, int]

    def __len__(self) -> int:
        return sys.maxsize if self.epochs is None else self.epochs * (len(self.source) // self.batch_size)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rank, count = self.process
        rows = np.array_split(self.indices(index), count)[rank]  # this process's part of the global batch
        images, labels = self.source.fetch(rows)
        return {"image": images, "label": labels, "index": rows}

    def indices(self, number: int) -> Int64[np.ndarray, "batch"]:
        """Of the whole batch: a stretch of its epoch's permutation, or of what an endless source has not shown yet."""
        if self.source.endless:
            return np.arange(number * self.batch_size, (number + 1) * self.batch_size)
        epoch, place = divmod(number, len(self.source) // self.batch_size)
        start = place * self.batch_size
        return _permutation(len(self.source), self.seed, epoch)[start : start + self.batch_size]


def batches(
    source: Source, batch_size: int, *, seed: int, epochs: int | None = None, process: tuple[int, int] = (0, 1)
) -> "grain.DatasetIterator":
    """The batches of a training run, fetched ahead by threads, from wherever `set_state` puts it.

    Epoch e shows the examples in the order of a permutation that depends on (`seed`, e) alone, and leaves out those
    that fill no batch. So batch number k can be had without those before it: the state of the iterator is that number.

    Args:
      source: what to draw from. An endless one is not shuffled, and never shows an example twice.
      batch_size: of all processes together.
      seed: decides the order.
      epochs: how many; without it the iterator does not end.
      process: (index, count) of this process: it fetches its own equal share of each batch, in the order of the index.

    Returns:
      A grain iterator over {"image": [b, height, width, channels], "label": int32 [b], "index": int64 [b]} with
      b = batch_size / count. `get_state()` is a dictionary for JSON; `set_state` of it, in any process,
      continues with the batch after the one last returned.

    Raises:
      ValueError: a batch_size that the source cannot fill, or that the processes do not divide.

    >>> from jaxattn.train.data import load
    >>> digits = load("digits").train
    >>> iterator = batches(digits, 400, seed=0, epochs=2)
    >>> [batch["image"].shape for batch in iterator]
    [(400, 8, 8, 1), (400, 8, 8, 1), (400, 8, 8, 1), (400, 8, 8, 1), (400, 8, 8, 1), (400, 8, 8, 1)]
    >>> iterator.get_state()
    {'next_index': 6}
    """
    index, count = process
    if not 0 <= index < count:
        raise InputError(f"process (={process}) must be (index, count) with 0 <= index < count")
    if batch_size < 1 or batch_size % count:
        raise InputError(f"batch_size (={batch_size}) must be a positive multiple of the {count} processes")
    if not source.endless and batch_size > len(source):
        raise InputError(f"batch_size (={batch_size}) must be at most the {len(source)} training images")
    with needs_extra("train"):
        import grain
    every = _Batches(source, batch_size, seed, epochs, process)
    ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    return iter(grain.MapDataset.source(every).to_iter_dataset(ahead))


@functools.lru_cache(maxsize=4)  # the threads read the same one, and at an epoch's end the next
def _permutation(size: int, seed: int, epoch: int) -> Int64[np.ndarray, "size"]:
    order = np.random.default_rng((seed, epoch)).permutation(size)
    order.setflags(write=False)
    return order

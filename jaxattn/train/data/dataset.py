"""What a data set is: three sources, of which each gives the images and labels of the indices asked for."""

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int, Int32, Shaped


@runtime_checkable
class Source(Protocol):
    """Examples by index. `fetch` is pure: the same indices give the same examples, in any thread or process.

    Images are `[n, height, width, channels]`, uint8, or float32 in [0, 1]; labels are int32 `[n]`.
    An `endless` source has an example for every index up to 2⁶²; its length is what is called an epoch.
    """

    @property
    def endless(self) -> bool: ...

    def __len__(self) -> int: ...

    def fetch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
    """A source that lies in memory.

    >>> source = Arrays(np.zeros((3, 8, 8, 1), np.uint8), np.array([0, 1, 2], np.int32))
    >>> images, labels = source.fetch(np.array([2, 0]))
    >>> images.shape, labels
    ((2, 8, 8, 1), array([2, 0], dtype=int32))
    """

    images: Shaped[np.ndarray, "n *grid channels"]
    labels: Int32[np.ndarray, "n"]
    endless: bool = dataclasses.field(default=False, init=False)

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: Int[np.ndarray, "b"]) -> tuple[np.ndarray, np.ndarray]:
        return self.images[indices], self.labels[indices]


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Three disjoint parts of one data set, and the mean and standard deviation of its training images in [0, 1].

    `skipped` names the examples that `skip_bad` left out, each with what is wrong with it. Of images that are composed
    of others, `originals` are those, part by part.
    """

    name: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, ...]  # height, width, channels; or depth before them
    mean: Float32[np.ndarray, "channels"]
    std: Float32[np.ndarray, "channels"]
    train: Source
    validation: Source
    test: Source
    skipped: tuple[str, ...] = ()
    originals: tuple[Source, ...] = ()

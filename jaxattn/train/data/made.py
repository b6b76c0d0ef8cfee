"""Sources that make their examples: number i is a function of (seed, i) alone, so that a run can go on."""

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt64

EPOCH, VALIDATION, TEST = 20_000, 2_000, 4_000
FIRST = 2**32  # of training: the indices before it are of the validation and test parts
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
Pair = tuple[np.ndarray, np.ndarray]


@runtime_checkable
class Task(Protocol):
    """What makes the images and int32 labels of these numbers: a pure function, for any numbers at once."""

    def make(self, seed: int, indices: Int[np.ndarray, "n"]) -> Pair: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Made:
    """A source that makes its examples: number i is the task's number `first + i`."""

    task: Task
    seed: int
    first: int
    length: int
    endless: bool

    def __len__(self) -> int:
        return self.length

    def fetch(self, indices: Int[np.ndarray, "b"]) -> Pair:
        return self.task.make(self.seed, indices + self.first)


def draw(seed: int, indices: Int[np.ndarray, "n"], count: int) -> UInt64[np.ndarray, "count n"]:
    """Random bits as a function of (seed, index, place): SplitMix64 (Steele, Lea and Flood 2014), for whole arrays."""
    key = mix(np.array([seed % 2**64], np.uint64))
    keys = mix(key + indices.astype(np.uint64) * GOLDEN)  # [n]
    return mix(keys + np.arange(1, count + 1, dtype=np.uint64)[:, None] * GOLDEN)


def mix(z: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    z = (z ^ (z >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> 27)) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> 31)

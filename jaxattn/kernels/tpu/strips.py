"""Where a grid does not fit in VMEM: strips of its first axis, one after the other.

A strip is some tiles of that axis, with all of the other axes. It holds its queries, and the keys that its tiles meet:
these it shares with the strips beside it. Keys come from HBM once for each strip that meets them.
"""

from typing import NamedTuple

import numpy as np


class Strips(NamedTuple):
    """Along the first axis a strip has `tiles` tiles and `queries` places of queries. Strip s meets the `keys` places
    of keys from begin[s] on; all strips together cover every place."""

    tiles: int
    queries: int
    keys: int
    begin: np.ndarray  # [strips]

    @property
    def number(self) -> int:
        """How many there are."""
        return len(self.begin)

    @property
    def done(self) -> np.ndarray:
        """[strips], how many places, of the first that a strip meets, no later strip meets."""
        return np.diff(self.begin, append=self.begin[-1] + self.keys)


def cut(tile: int, columns: int, start: np.ndarray, length: int, count: int) -> Strips:
    """So many strips of equally many tiles: of `tile` places each, with `columns` keys from `start` on of `length`.

    >>> cut(tile=2, columns=4, start=np.array([0, 1, 3, 4]), length=8, count=2)
    Strips(tiles=2, queries=4, keys=5, begin=array([0, 3]))
    """
    of_strips = start.reshape(count, -1)
    begin = np.minimum.accumulate(of_strips.min(1)[::-1])[::-1]
    begin[0] = 0  # where no strip meets the first places, or none those between two, they belong to the one before
    end = np.maximum.accumulate(of_strips.max(1) + columns)
    keys = int((np.maximum(end, np.append(begin[1:], length)) - begin).max())
    return Strips(of_strips.shape[1], of_strips.shape[1] * tile, keys, np.minimum(begin, length - keys))

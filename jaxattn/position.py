"""Relative positions: tables over the offsets -(k-1) .. k-1 of a window of k slots, looked up by slot."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def by_slot(table: Array, first: Sequence[np.ndarray], size: Sequence[int]) -> Array:
    """Look a table ``[heads, *(2k-1), ...]`` up for every query and slot: ``[heads, queries, slots, ...]``, row-major.

    `first` is, per axis and query, the entry of slot 0; slot u is u further on.

    >>> by_slot(jnp.arange(5.0)[None], [np.array([2, 1, 0])], [3])[0]  # three queries that see the same three keys
    Array([[2., 3., 4.],
           [1., 2., 3.],
           [0., 1., 2.]], dtype=float...)
    """
    rank = len(size)
    index = []
    for axis in range(rank):
        entry = first[axis][:, None] + np.arange(size[axis])
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = entry.shape
        index.append(entry.reshape(shape))
    queries, slots = np.prod([len(entries) for entries in first]), np.prod(size)
    picked = table[(slice(None), *index)]
    return jnp.reshape(picked, (table.shape[0], int(queries), int(slots), *table.shape[1 + rank :]))

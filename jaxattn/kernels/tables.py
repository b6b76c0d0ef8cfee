"""Relative positions: tables over the offsets -(k-1) .. k-1 of a window of k slots, looked up by slot."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def spread(tables: Sequence[Array]) -> list[Array]:
    """One table ``[heads, 2k-1, dim]`` for each axis, each laid out over the offsets of all axes.

    Their sum or their concatenation is a table ``[heads, *(2k-1), dim]``, or ``rank·dim``: an offset's embedding is
    made of its axes' embeddings.

    >>> rows, columns = spread([jnp.array([[[1.0], [2.0], [3.0]]]), jnp.array([[[10.0], [20.0], [30.0]]])])
    >>> (rows + columns)[0, :, :, 0]
    Array([[11., 21., 31.],
           [12., 22., 32.],
           [13., 23., 33.]], dtype=float...)
    """
    axes = range(1, len(tables) + 1)
    laid = [jnp.expand_dims(t, [b for b in axes if b != a]) for a, t in zip(axes, tables, strict=True)]
    return list(jnp.broadcast_arrays(*laid))


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

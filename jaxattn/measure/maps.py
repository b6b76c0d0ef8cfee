"""Where attention looks: weights by slot become maps over the keys, or means over offsets. NumPy arrays in and out."""

import numpy as np
from jaxtyping import Float, Int

from jaxattn.checked import checked
from jaxattn.measure.heads import rank_of
from jaxattn.sizes import Size, ints, per_axis


@checked
def attention_maps(
    weights: Float[np.ndarray, "*query_grid heads slots"],
    indices: Int[np.ndarray, "*query_grid_and_window rank"],
    shape: Size,
) -> Float[np.ndarray, "..."]:
    """The weight that every query gives to every key, `[*query_grid, heads, *shape]`.

    map[i, h, j] = Σ_u A_h(i, u) over the slots u of query i that hold key j; what lies outside the grid is left out.

    Args:
      weights: of one image, slots row-major over the window.
      indices: `Window.indices(shape)`: `[*query_grid, *window, rank]`, the key in each slot, -1 for none.
      shape: the grid of the keys.

    >>> import numpy as np
    >>> attention_maps(np.array([[[0.25, 0.75]], [[0.5, 0.5]]]), np.array([[[0], [1]], [[1], [2]]]), (3,))[1, 0]
    array([0. , 0.5, 0.5])
    """
    rank = rank_of("attention_maps", weights, indices)
    if weights.ndim != rank + 2:
        raise ValueError(f"attention_maps: weights (={list(weights.shape)}) must be of one image, without batch axes")
    shape = ints("attention_maps", "shape", shape)
    if len(shape) != rank or indices.reshape(-1, rank).max(0, initial=0).tolist() >= list(shape):
        raise ValueError(f"attention_maps: shape (={shape}) must be the grid of {rank} axes whose keys indices hold")
    grid, heads, slots = weights.shape[: len(shape)], *weights.shape[len(shape) :]
    keys = indices.reshape(-1, slots, len(shape))
    maps = np.zeros((len(keys), heads, *shape), weights.dtype)
    inside = (keys >= 0).all(-1)
    query, slot = np.nonzero(inside)
    flat = np.moveaxis(maps.reshape(len(keys), heads, -1), 1, -1)  # [query, key, heads], a view
    key = np.ravel_multi_index(keys[query, slot].T, shape)
    np.add.at(flat, (query, key), weights.reshape(-1, heads, slots)[query, :, slot])
    return maps.reshape(*grid, heads, *shape)


@checked
def mean_by_offset(
    weights: Float[np.ndarray, "images *query_grid heads slots"],
    indices: Int[np.ndarray, "*query_grid_and_window rank"],
    stride: Size = 1,
) -> tuple[Float[np.ndarray, "..."], tuple[int, ...]]:
    """The mean weight at every offset δ = key - stride · query, over the images and the queries that have a key there.

    Args:
      weights: slots row-major over the window.
      indices: `Window.indices(shape)`, `[*query_grid, *window, rank]`, -1 where a slot holds no key.
      stride: of the window; an int serves all axes.

    Returns:
      The means `[heads, *extent]`, NaN at an offset that no query has, and the lowest offset of each axis: the entry 0.

    >>> import numpy as np
    >>> mean_by_offset(np.array([[[[0.25, 0.75]], [[0.5, 0.5]]]]), np.array([[[-1], [0]], [[0], [1]]]))
    (array([[0.5  , 0.625]]), (-1,))
    """
    rank = rank_of("mean_by_offset", weights, indices)
    strides = np.asarray(per_axis("mean_by_offset", "stride", stride, rank))
    grid, heads, slots = indices.shape[:rank], *weights.shape[-2:]
    queries = np.moveaxis(np.indices(grid), 0, -1).reshape(-1, 1, rank)  # [query, 1, rank]
    keys = indices.reshape(-1, slots, rank)
    inside = (keys >= 0).all(-1)
    offsets = (keys - strides * queries)[inside]  # [pair, rank]
    low, high = offsets.min(0), offsets.max(0)
    by_query = weights.mean(0).reshape(-1, heads, slots)
    total, count = np.zeros((*(high - low + 1), heads)), np.zeros((*(high - low + 1), 1))
    query, slot = np.nonzero(inside)
    where = tuple((offsets - low).T)
    np.add.at(total, where, by_query[query, :, slot])
    np.add.at(count, where, 1)
    mean = np.divide(total, count, where=count > 0, out=np.full_like(total, np.nan))
    return np.moveaxis(mean, -1, 0), tuple(int(each) for each in low)

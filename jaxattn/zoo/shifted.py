"""Swin: windows that part the grid, moved by a cyclic shift in every other layer."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import ArrayLike, Real

from jaxattn.attention import attention
from jaxattn.checked import MeshAxis
from jaxattn.halo import halo
from jaxattn.sizes import Size, every_axis, per_axis
from jaxattn.window import Window
from jaxattn.zoo.heads import PROJECTIONS, bias_rank, join, offsets, project
from jaxattn.zoo.parameters import parameters
from jaxattn.zoo.registry import row
from jaxattn.zoo.whole_grid import whole_grid


@row(
    "Swin", weights="q·k/√d + b_{j-i}, partition, cyclic shift", source="pair + learned", shared="head / no",
    normalizer="softmax", paper="Liu et al. 2021 (2103.14030)",
    shapes=PROJECTIONS | {"relative_bias": "heads *offsets"},
)  # fmt: skip
def shifted_window_attention(
    x: Real[ArrayLike, "*batch_and_grid features"],
    params: Mapping[str, Any],
    *,
    window: Size,
    shift: Annotated[Size, 0] = 0,
    shift_whole: bool = False,
    scale: float | None = None,
    precision: lax.PrecisionLike = None,
    implementation: str | None = None,
    axis_name: MeshAxis | None = None,
) -> jax.Array:
    """The grid is parted into windows, and each token attends to its own window's,

        y_i = b_O + Σ_h W_O,h Σ_{j in N(i)} softmax_j(scale · q_i·k_j + b_h[j-i]) v_j,
        N(i) = {j of the grid: ⌊(j - shift) / k⌋ = ⌊(i - shift) / k⌋ along each axis}.

    (Liu et al. 2021, Swin, arXiv 2103.14030.) The windows that a shift cuts in two at the border are computed as one,
    by rolling the grid, whose parts do not attend to each other: `segment_ids` where the paper has a mask.

    Args:
      x: `[*batch, *grid, features]`, with any number of batch axes. A grid that is no multiple of the window is padded
        with tokens that nothing attends to.
      params: "relative_bias" b, `[heads, *(2k-1)]`, indexed by k - 1 + j - i. "query", "key" `[features, heads,
        head_dim]`, "value" `[features, heads, value_dim]`, and optionally "query_bias", "key_bias", "value_bias"
        (without features), "out" `[heads, value_dim, out_features]` and "out_bias" `[out_features]`. Without "out" the
        heads' outputs stand one after the other.
      window: k, an int, or one for each axis of the grid.
      shift: from 0 to k - 1; an int, or one for each axis. The paper's layers alternate between 0 and k // 2.
      shift_whole: whether to shift along an axis that one window covers too; the published networks do not.
      scale: None means head_dim ** -0.5.
      axis_name: the mesh axis, inside `jax.shard_map`, over which the grid's first axis is split; the window must
        divide a shard's tokens.

    Returns:
      `[*batch, *grid, out_features]`, in the dtype of x and params.

    Raises:
      ValueError: a parameter is missing or unknown, or a shape doesn't fit, by name.

    >>> import jax.numpy as jnp
    >>> params = {name: jnp.ones((8, 2, 4)) for name in ("query", "key", "value")}
    >>> bias = {"relative_bias": jnp.ones((2, 7, 7))}
    >>> shifted_window_attention(jnp.ones((1, 8, 8, 8)), params | bias, window=(4, 4), shift=2).shape
    (1, 8, 8, 8)
    """
    sizes = every_axis("shifted_window_attention", "window", window, bias_rank(params))
    rank = len(sizes)
    shifts = shifts_below("shifted_window_attention", shift, sizes)
    whole = whole_grid("shifted_window_attention", x, rank, axis_name)
    if not shift_whole:
        shifts = tuple(s if k < n else 0 for s, k, n in zip(shifts, sizes, whole, strict=True))
    p, x, grid = parameters("shifted_window_attention", x, params, rank, offsets=offsets(sizes))
    if axis_name is not None and grid[0] % sizes[0]:
        raise ValueError(
            f"shifted_window_attention: window (={window!r}) must divide the {grid[0]} tokens of a shard of the grid's "
            f"first axis, which is split over {axis_name!r}"
        )
    pads = [(0, 0)] * (x.ndim - 1 - rank) + [(0, -n % k) for n, k in zip(grid, sizes, strict=True)] + [(0, 0)]
    rolled = _rolled(jnp.pad(x, pads), [-s for s in shifts], x.ndim - 1 - rank, axis_name)
    query, key, value = project(rolled, p, precision)
    y = attention(
        query,
        key,
        value,
        window=Window(sizes, block=sizes),
        scale=scale,
        relative_bias=p["relative_bias"],
        segment_ids=_segments(rolled, _regions(whole, sizes, shifts), axis_name),
        precision=precision,
        implementation=implementation,
    )
    y = _rolled(y, shifts, x.ndim - 1 - rank, axis_name)
    return join(y[(..., *(slice(n) for n in grid), slice(None), slice(None))], p, precision)


def _segments(rolled: jax.Array, regions: np.ndarray, axis_name: str | None) -> jax.Array | None:
    """The region of each token of a shard, for every entry of the batch; None where all are of one."""
    if not regions.any():
        return None
    grid = rolled.shape[-1 - regions.ndim : -1]
    here = jnp.asarray(regions)
    if axis_name is not None:
        here = lax.dynamic_slice_in_dim(here, lax.axis_index(axis_name) * grid[0], grid[0])
    return jnp.broadcast_to(here.reshape((1,) * (rolled.ndim - 1 - len(grid)) + grid), rolled.shape[:-1])


def _rolled(x: jax.Array, shifts: Sequence[int], first: int, axis_name: str | None) -> jax.Array:
    """`jnp.roll` by `shifts` along the axes that begin at `first`, of which the first may be split."""
    if axis_name is not None:
        x = halo(x, first, axis_name, shifts[0], -shifts[0], "wrap")
        shifts = (0, *shifts[1:])
    return jnp.roll(x, shifts, range(first, first + len(shifts)))


def _regions(grid: Sequence[int], window: Sequence[int], shifts: Sequence[int]) -> np.ndarray:
    """A number for each token of the padded and rolled grid; those with the same one came from the same side of a cut.

    >>> _regions((5,), (3,), (1,))  # tokens 1 .. 4, the padding, and 0, which the roll brought here
    array([0, 0, 0, 0, 2, 1], dtype=int32)
    """
    regions = np.zeros((), np.int32)
    for n, k, s in zip(grid, window, shifts, strict=True):
        token = np.roll(np.arange(n + -n % k), -s)
        part = np.where(token >= n, 2, token < s).astype(np.int32)
        regions = 3 * regions[..., None] + part
    return regions


def shifts_below(where: str, shift: Size, window: Sequence[int]) -> tuple[int, ...]:
    """How far each axis is shifted, which is less than a window.

    >>> shifts_below("layer", 2, (4, 3))
    (2, 2)
    """
    shifts = per_axis(where, "shift", shift, len(window), least=0)
    if not all(s < k for s, k in zip(shifts, window, strict=True)):
        raise ValueError(f"{where}: shift (={shift!r}) must be below window (={tuple(window)}) along every axis")
    return shifts

"""Swin: windows that part the grid, moved by a cyclic shift in every other layer."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

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
from jaxattn.zoo.heads import PROJECTIONS, join, offsets, project
from jaxattn.zoo.parameters import grid_rank, parameters
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
    boundary: str | Sequence[str] = "mask",
    scale: float | None = None,
    precision: lax.PrecisionLike = None,
    implementation: str | None = None,
    axis_name: MeshAxis | None = None,
) -> jax.Array:
    """The grid is parted into windows, and each token attends to its own window's,

        y_i = b_O + Σ_h W_O,h Σ_{j in N(i)} softmax_j(scale · q_i·k_j + b_h[j-i]) v_j,
        N(i) = {j of the grid: ⌊(j - shift) / k⌋ = ⌊(i - shift) / k⌋ along each axis}.

    (Liu et al. 2021, Swin, arXiv 2103.14030.) The windows that a shift cuts in two at the border are computed as one,
    by rolling the grid, whose parts do not attend to each other: `segment_ids` where the paper has a mask. Along a
    cyclic axis nothing is cut: its last window goes on at its first token.

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
      boundary: "mask", or "wrap" for a cyclic axis, as longitude is, whose tokens the window divides; one, or one for
        each axis.
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
    where = "shifted_window_attention"
    sizes = every_axis(where, "window", window, grid_rank(where, params))
    turn = Turn.of(where, x, sizes, shifts_below(where, shift, sizes), shift_whole, boundary, axis_name)
    p, x, _ = parameters(where, x, params, len(sizes), offsets=offsets(sizes))
    query, key, value = project(turn.there(x, 1), p, precision)
    parts = turn.regions()
    y = attention(
        query,
        key,
        value,
        window=Window(sizes, block=sizes),
        scale=scale,
        relative_bias=p["relative_bias"],
        segment_ids=None if parts is None else jnp.broadcast_to(parts, query.shape[:-2]),
        precision=precision,
        implementation=implementation,
    )
    return join(turn.back(y, 2), p, precision)


class Turn(NamedTuple):
    """A grid, or a shard of it, that is padded to whole windows and rolled by the shift; and back."""

    grid: tuple[int, ...]
    whole: tuple[int, ...]
    window: tuple[int, ...]
    shifts: tuple[int, ...]
    cyclic: tuple[bool, ...]
    axis_name: str | None

    @classmethod
    def of(
        cls, where: str, x: Any, window: tuple[int, ...], shifts: tuple[int, ...], shift_whole: bool,
        boundary: str | Sequence[str], axis_name: str | None,
    ) -> "Turn":  # fmt: skip
        """Of an input [*batch, *grid, features]."""
        rank, cyclic = len(window), cyclic_axes(where, boundary, len(window))
        whole, grid = whole_grid(where, x, rank, axis_name), np.shape(x)[-1 - rank : -1]
        if not shift_whole:
            shifts = tuple(s if k < n else 0 for s, k, n in zip(shifts, window, whole, strict=True))
        if axis_name is not None and grid[0] % window[0]:
            raise ValueError(
                f"{where}: window (={window}) must divide the {grid[0]} tokens of a shard of the grid's first axis, "
                f"which is split over {axis_name!r}"
            )
        for axis, (around, n, k) in enumerate(zip(cyclic, whole, window, strict=True)):
            if around and n % k:
                raise ValueError(
                    f"{where}: boundary (='wrap') must be 'mask' on axis {axis}, or window (={window}) divide its {n} "
                    "tokens, so that the last window goes on at the first token"
                )
        return cls(grid, whole, window, shifts, cyclic, axis_name)

    def there(self, x: jax.Array, after: int) -> jax.Array:
        """The padded and rolled x, which has so many axes after the grid's; an axis that broadcasts stays."""
        first = x.ndim - after - len(self.grid)
        along = list(zip(x.shape[first:], self.grid, self.window, self.shifts, strict=False))
        pads = [(0, -n % k) if m == n else (0, 0) for m, n, k, _ in along]
        shifts = [-s if m == n else 0 for m, n, _, s in along]
        return _rolled(jnp.pad(x, [(0, 0)] * first + pads + [(0, 0)] * after), shifts, first, self.axis_name)

    def back(self, y: jax.Array, after: int) -> jax.Array:
        """What `there` was made of."""
        y = _rolled(y, self.shifts, y.ndim - after - len(self.grid), self.axis_name)
        return y[(..., *(slice(n) for n in self.grid), *[slice(None)] * after)]

    def regions(self) -> jax.Array | None:
        """The region of each token that `there` makes; None where all are of one."""
        parts = _regions(self.whole, self.window, self.shifts, self.cyclic)
        if not parts.any():
            return None
        if self.axis_name is None:
            return jnp.asarray(parts)
        rows = self.grid[0]
        return lax.dynamic_slice_in_dim(jnp.asarray(parts), lax.axis_index(self.axis_name) * rows, rows)


def _rolled(x: jax.Array, shifts: Sequence[int], first: int, axis_name: str | None) -> jax.Array:
    """`jnp.roll` by `shifts` along the axes that begin at `first`, of which the first may be split."""
    if axis_name is not None:
        x = halo(x, first, axis_name, shifts[0], -shifts[0], "wrap")
        shifts = (0, *shifts[1:])
    return jnp.roll(x, shifts, range(first, first + len(shifts)))


def _regions(grid: Sequence[int], window: Sequence[int], shifts: Sequence[int], cyclic: Sequence[bool]) -> np.ndarray:
    """A number for each token of the padded and rolled grid; those with the same one came from the same side of a cut.

    >>> _regions((5,), (3,), (1,), (False,))  # tokens 1 .. 4, the padding, and 0, which the roll brought here
    array([0, 0, 0, 0, 2, 1], dtype=int32)
    """
    found = np.zeros((), np.int32)
    for n, k, s, around in zip(grid, window, shifts, cyclic, strict=True):
        token = np.roll(np.arange(n + -n % k), -s)
        part = np.where(token >= n, 2, (token < s) & (not around)).astype(np.int32)
        found = 3 * found[..., None] + part
    return found


def cyclic_axes(where: str, boundary: str | Sequence[str], rank: int) -> tuple[bool, ...]:
    """Which axes have no seam.

    >>> cyclic_axes("layer", ("wrap", "mask"), 2)
    (True, False)
    """
    each = (boundary,) * rank if isinstance(boundary, str) else tuple(boundary)
    if len(each) != rank or not all(b in ("mask", "wrap") for b in each):
        raise ValueError(
            f"{where}: boundary (={boundary!r}) must be 'mask' or 'wrap', or one of these for each of the {rank} axes"
        )
    return tuple(b == "wrap" for b in each)


def shifts_below(where: str, shift: Size, window: Sequence[int]) -> tuple[int, ...]:
    """How far each axis is shifted, which is less than a window.

    >>> shifts_below("layer", 2, (4, 3))
    (2, 2)
    """
    shifts = per_axis(where, "shift", shift, len(window), least=0)
    if not all(s < k for s, k in zip(shifts, window, strict=True)):
        raise ValueError(f"{where}: shift (={shift!r}) must be below window (={tuple(window)}) along every axis")
    return shifts

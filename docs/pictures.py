"""The site's pictures, drawn while it is built: where windows reach, by `Window.mask` itself.

Each is a function without arguments that returns an SVG.
"""

import functools
import io
from collections.abc import Callable

import claim10
import numpy as np
import picture
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from jaxattn import Window
from jaxattn.plots import COLORS, INK, QUERY, styled
from jaxattn.window import BOUNDARIES

SEEN, LIGHT = COLORS[0], "#9cc9e8"
KEYS, SIZE, BEYOND = 8, 5, 4  # of the pictures of boundaries; how far they show what is outside


def svg(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="svg", facecolor="white", metadata={"Date": None})
    return file.getvalue()


def bare(axes: Axes, low: float, high: float, rows: int) -> None:
    axes.set(xlim=(low, high), ylim=(rows - 0.4, -0.6), xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_visible(False)


def boundary(name: str) -> bytes:
    """A row for each query, a column for each place; what takes part is dark where it is a key of its own place."""
    window = Window(SIZE, boundary=name)
    (axis,) = window.axes((KEYS,))
    mask, keys, places = window.mask((KEYS,)), window.indices((KEYS,))[..., 0], axis.positions()
    with styled(9):
        figure = Figure(figsize=(3.6, 1.9), layout="constrained")
        axes = figure.subplots()
        for row, (seen, key, place) in enumerate(zip(mask, keys, places, strict=True)):
            for x in range(KEYS):
                axes.add_patch(square(x, row, "#eceef1"))
            for takes_part, k, x in zip(seen, key, place, strict=True):
                if takes_part:
                    own = k == x and k >= 0
                    axes.add_patch(
                        square(x, row, SEEN if own else LIGHT if k >= 0 else "white", "white" if own else SEEN)
                    )
                    if not own:
                        axes.text(x, row, str(max(k, 0)), ha="center", va="center_baseline", fontsize=7, color=INK)
            axes.plot(axis.query[row], row, ".", color=QUERY, markersize=5)
        for border in (-0.5, KEYS - 0.5):
            axes.axvline(border, color=INK, linewidth=0.8)
        bare(axes, -BEYOND + 0.5, KEYS + BEYOND - 1.5, KEYS)
    return svg(figure)


def square(x: float, y: float, color: str, edge: str = "white") -> Rectangle:
    return Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, edgecolor=edge, linewidth=0.6)


def windows() -> bytes:
    """What one query of an 11 × 11 grid sees, under windows that differ in one argument."""
    grid, at = (11, 11), (6, 4)
    kinds = {
        "Window((5, 5))": Window((5, 5)),
        "dilation=2": Window((5, 5), dilation=2),
        "block=5": Window((5, 5), block=5),
        "causal=(True, False)": Window((5, 5), causal=(True, False)),
        "offset=0": Window((5, 5), offset=0, boundary="mask"),
    }
    with styled(9):
        figure = Figure(figsize=(10, 2.3), layout="constrained")
        for axes, (name, window) in zip(figure.subplots(1, len(kinds)), kinds.items(), strict=True):
            seen = np.zeros(grid)
            seen[tuple(window.indices(grid)[at][window.mask(grid)[at]].T)] = 1
            for i, j in np.ndindex(grid):
                axes.add_patch(square(j, i, SEEN if seen[i, j] else "#eceef1"))
            axes.plot(at[1], at[0], ".", color=QUERY, markersize=9)
            axes.set_title(name, family="monospace", fontsize=9)
            bare(axes, -0.6, grid[1] - 0.4, grid[0])
    return svg(figure)


def weights() -> bytes:
    """The README's picture."""
    return svg(picture.draw())


def crossing() -> bytes:
    return svg(claim10.draw())


PICTURES: dict[str, Callable[[], bytes]] = {
    "pictures/weights.svg": weights,
    "pictures/claim10.svg": crossing,
    "pictures/windows.svg": windows,
    **{f"pictures/boundary-{name}.svg": functools.partial(boundary, name) for name in BOUNDARIES},
}

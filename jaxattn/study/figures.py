"""The figures of the study that `plots` has no function for."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from jaxattn.plots import COLORS, INK, STYLE


def lines(
    x: Sequence[float], series: Mapping[str, Sequence[float]], xlabel: str, ylabel: str, *, log: bool = False
) -> Figure:
    """One line a series over x, with a mark at each point; `log` is the vertical axis. A zero on it is left out.

    >>> lines([1, 2], {"error": [0.1, 0.01]}, "alpha", "error", log=True).axes[0].get_yscale()
    'log'
    """
    with matplotlib.rc_context(STYLE):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        figure.set_label(f"Lines: {ylabel} by {xlabel}")
        axes = figure.subplots()
        for (name, y), color, mark in zip(series.items(), COLORS, "os^Dvx", strict=False):
            shown = np.where(np.asarray(y) > 0, y, np.nan) if log else y
            axes.plot(x, shown, color=color, marker=mark, markersize=5, label=name)
        axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear", xticks=x)
        axes.grid(axis="y", color=INK, alpha=0.2, linewidth=0.6)
        axes.legend()
    return figure

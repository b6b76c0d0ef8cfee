"""The figures of the study that `plots` has no function for."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter

from jaxattn.plots import COLORS, INK, styled
from jaxattn.study.seeds import interval


def lines(
    x: Sequence[float], series: Mapping[str, Sequence[float]], xlabel: str, ylabel: str, *, log: bool = False
) -> Figure:
    """One line a series over x, with a mark at each point; `log` is the vertical axis. A zero on it is left out.

    >>> lines([1, 2], {"error": [0.1, 0.01]}, "alpha", "error", log=True).axes[0].get_yscale()
    'log'
    """
    with styled():
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


def dots(panels: Mapping[str, Mapping[str, Sequence[float]]], xlabel: str) -> Figure:
    """One panel beside the other, a row for each name: a dot a seed, and a line at their mean.

    >>> [axes.get_title() for axes in dots({"images": {"conv": [0.9, 0.8]}}, "accuracy").axes]
    ['images']
    """
    most = max(map(len, panels.values()))
    with styled():
        figure = Figure(figsize=(7.2, 0.9 + 0.34 * most), layout="constrained")
        figure.set_label(f"Dots: {xlabel} of each seed, and their mean")
        grid = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, rows) in zip(grid, panels.items(), strict=True):
            for y, values in enumerate(rows.values()):
                axes.plot(values, [y] * len(values), "o", color=COLORS[0], markersize=5, alpha=0.6)
                axes.plot([np.mean(values)] * 2, [y - 0.3, y + 0.3], color=COLORS[1])
            axes.set(
                title=title, xlabel=xlabel, yticks=range(len(rows)), yticklabels=list(rows), ylim=(most - 0.5, -0.5)
            )
            axes.grid(axis="y", color=INK, alpha=0.2, linewidth=0.6)
            axes.margins(x=0.08)
    return figure


def curves(
    panels: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]], xlabel: str, order: Sequence[str] = ()
) -> Figure:
    """Test accuracy over how many images were known: of each mixer the mean over the seeds, and its 95 % interval.

    Mixers look alike in all figures that have the same order of them.

    >>> [axes.get_xscale() for axes in curves({"digits": {"conv": {10: [0.5, 0.6], 100: [0.8, 0.9]}}}, "images").axes]
    ['log']
    """
    names = list(dict.fromkeys([*order, *(name for mixers in panels.values() for name in mixers)]))
    looks = dict(zip(names, zip(COLORS, "os^Dvx", strict=True), strict=False))
    with styled():
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        figure.set_label(f"Lines: test accuracy by {xlabel}, with 95 % intervals")
        grid = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, mixers) in zip(grid, panels.items(), strict=True):
            for name, curve in mixers.items():
                color, mark = looks[name]
                found = [interval(values) for values in curve.values()]
                axes.plot(
                    list(curve), [value.mean for value in found], color=color, marker=mark, markersize=5, label=name
                )
                if all(map(math.isfinite, found[0])):
                    low, high = [value.low for value in found], [value.high for value in found]
                    axes.fill_between(list(curve), low, np.minimum(high, 1), color=color, alpha=0.15, linewidth=0)
            axes.set(title=title, xlabel=xlabel, xscale="log")
            counts = list(next(iter(mixers.values())))
            axes.set_xticks(counts)
            axes.xaxis.set_major_formatter("{x:,.0f}" if max(counts) < 100_000 else EngFormatter(sep=""))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.grid(axis="y", color=INK, alpha=0.2, linewidth=0.6)
        grid[0].set_ylabel("test accuracy")
        fullest = max(grid, key=lambda axes: len(axes.get_lines()))
        handles, labels = fullest.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure

"""Figures of a benchmark: bars of every way in every case, and how time and temporaries grow."""

from collections.abc import Sequence

import numpy as np

from jaxattn.bench.programs import MODES
from jaxattn.bench.report import NAMES, Result
from jaxattn.errors import needs_extra
from jaxattn.plots import COLORS, INK, styled

with needs_extra("train"):
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

OURS, THEIRS, FASTER = COLORS[0], "#b8bcc4", COLORS[1]


def bars(results: Sequence[Result], caption: str) -> Figure:
    """Every way that computed a case, a bar each; the number is its time over ours.

    A peer that is faster than ours is drawn in another colour.
    """
    counts = [max(len(drawn(r, mode)) for mode in MODES) for r in results]
    height = 0.17 * (sum(counts) + 2 * len(counts)) + 1.0
    with styled(8):
        figure = Figure(figsize=(11, height), layout="constrained")
        figure.set_label("Horizontal bars: the time of every way in every case")
        for axes, mode in zip(figure.subplots(1, len(MODES)), MODES, strict=True):
            draw_bars(axes, results, counts, mode)
        names = {OURS: "jaxattn", THEIRS: "a peer, and its time / jaxattn's", FASTER: "a peer that is faster"}
        keys = [Patch(color=color, label=name) for color, name in names.items()]
        figure.legend(handles=keys, loc="outside upper center", ncols=3)
        figure.supxlabel(caption, fontsize=7, color=INK)
    return figure


def drawn(result: Result, mode: str):
    """The measurements that have a bar: ours first, then the fastest."""
    ours = [m for m in result.measurements if m.mode == mode and m.ours and m.status == "ok"]
    return [*ours, *result.peers(mode)]


def draw_bars(axes, results: Sequence[Result], counts: Sequence[int], mode: str):
    y, ticks = 0, []
    for result, count in zip(results, counts, strict=True):
        title, weight = (result.case.name, "bold") if mode == "forward" else (str(result.case), "normal")
        axes.text(0, y, title, transform=axes.get_yaxis_transform(), va="center", weight=weight, color=INK)
        for row, m in enumerate(drawn(result, mode)):
            color = OURS if m.ours else FASTER if result.mark(m) == "<" else THEIRS
            low, middle, high = (1e3 * x for x in m.quartiles)
            axes.barh(y + row + 1, middle, 0.8, color=color, xerr=[[middle - low], [high - middle]], ecolor=INK)
            ratio = result.ratio(m)
            axes.annotate(
                "" if ratio is None or m.ours else f"{ratio:.3g} ×",
                (high, y + row + 1),
                (3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
            )
            ticks.append((y + row + 1, m.way))
        y += count + 2
    axes.margins(x=0.12)
    axes.set(xscale="log", xlabel="ms", title=NAMES[mode], ylim=(y - 1, -1))
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks])
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(axis="x", color=INK, alpha=0.2, linewidth=0.6)
    axes.set_axisbelow(True)


def scaling(results: Sequence[Result], series: str) -> Figure:
    """Time and temporaries of every way along one series, both axes logarithmic; dashed, what grows in proportion."""
    label = {"tokens": "tokens", "volume": "tokens in a window"}[series]
    sizes = [r.case.place for r in results]
    ways = list(dict.fromkeys(m.way for r in results for m in r.measurements))
    panels = [(mode, what) for what in ("ms", "MB of temporaries") for mode in MODES]
    with styled():
        figure = Figure(figsize=(9, 6.5), layout="constrained")
        figure.set_label(f"Lines: time and temporaries by {label}")
        for axes, (mode, what) in zip(figure.subplots(2, 2).flat, panels, strict=True):
            axes.set(xscale="log", yscale="log", xlabel=label, ylabel=what, title=NAMES[mode])
            for way, color in zip(ways, COLORS, strict=False):
                draw_line(axes, sizes, [value(r, way, mode, what) for r in results], way, color)
            axes.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30)
            axes.minorticks_off()
            axes.yaxis.set_major_formatter("{x:g}")
            axes.grid(color=INK, alpha=0.2, linewidth=0.6)
        figure.axes[0].plot([], color=INK, linestyle="--", linewidth=0.8, label="in proportion")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(ways) + 1)
    return figure


def value(result: Result, way: str, mode: str, what: str) -> float:
    """In the unit of a panel; NaN, which is not drawn, where there is none."""
    m = next((m for m in result.measurements if (m.way, m.mode, m.status) == (way, mode, "ok")), None)
    if m is None or (what != "ms" and m.temporaries is None):
        return np.nan
    return 1e3 * m.median if what == "ms" else (m.temporaries or 0) / 1e6


def draw_line(axes, sizes: Sequence[int], values: Sequence[float], way: str, color: str):
    """One way, and a line from its first point as if it grew in proportion."""
    x, y = np.array(sizes, float), np.array(values)
    axes.plot(x, y, marker="o", color=color, label=way)
    known = np.flatnonzero(np.isfinite(y))
    if len(known) > 1:
        x, first = x[known], known[0]
        axes.plot(x, y[first] * x / x[0], color=color, linestyle="--", linewidth=0.8)

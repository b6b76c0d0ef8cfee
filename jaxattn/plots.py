"""Figures: functions from arrays to a matplotlib `Figure`. No pyplot, so no global state and no display."""

import functools
import html
import io
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter
except ImportError as error:
    raise ImportError("matplotlib is not installed, and figures need it: pip install 'jaxattn[train]'") from error

# Okabe and Ito's colours, told apart by colour-blind readers and legible on white and on black.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK = "#555a63"  # text and axes
SEQUENTIAL, DIVERGING = "viridis", "RdBu_r"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "image.interpolation": "nearest",
    "savefig.facecolor": "none",
}


def _styled(draw: Callable) -> Callable:
    """Draws under this module's style, and leaves matplotlib's own as it was."""

    @functools.wraps(draw)
    def wrapped(*args, **kwargs):
        with matplotlib.rc_context(STYLE):  # pyright: ignore[reportArgumentType]
            return draw(*args, **kwargs)

    return wrapped


@_styled
def learning_curves(runs: Mapping[str, Sequence[Mapping[str, int | float]]]) -> Figure:
    """Loss and accuracy by epoch, one colour a run. The accuracy's axis begins at the lowest tenth of its values.

    Args:
      runs: for each name, one mapping per epoch with `epoch`, `train_loss`, `train_accuracy`, `validation_accuracy`.

    >>> epochs = [{"epoch": 1, "train_loss": 2.0, "train_accuracy": 0.3, "validation_accuracy": 0.5}]
    >>> [axes.get_ylabel() for axes in learning_curves({"conv": epochs}).axes]
    ['training loss', 'accuracy']
    """
    figure = Figure(figsize=(8, 3.1), layout="constrained")
    figure.set_label("Lines by epoch: the training loss, and the accuracy on training and validation images")
    loss, accuracy = figure.subplots(1, 2)
    for (name, epochs), color in zip(runs.items(), COLORS, strict=False):
        x = [line["epoch"] for line in epochs]
        curve = {key: [line[key] for line in epochs] for key in epochs[0]}
        mark = {"color": color, "marker": "o" if len(x) == 1 else ""}  # a single epoch is a point, not a line
        loss.plot(x, curve["train_loss"], label=name, **mark)
        accuracy.plot(x, curve["validation_accuracy"], label=f"{name}, validation", **mark)
        accuracy.plot(x, curve["train_accuracy"], label=f"{name}, training", linestyle=":", **mark)
    loss.set(xlabel="epoch", ylabel="training loss", yscale="log")
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter(NullFormatter())
    values = [
        line[key] for epochs in runs.values() for line in epochs for key in ("train_accuracy", "validation_accuracy")
    ]
    low = np.quantile(values, 0.1)  # the first epochs would press the others together
    accuracy.set(xlabel="epoch", ylabel="accuracy", ylim=(low - 0.02, 1 + 0.02 * (1 - low)))
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    for axes, place in ((loss, "upper right"), (accuracy, "lower right")):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color=INK, alpha=0.2, linewidth=0.6)
        axes.legend(loc=place)
    return figure


@_styled
def attention_maps(
    images: Float[np.ndarray, "images height width"],
    queries: Int[np.ndarray, "images 2"],
    maps: Float[np.ndarray, "images heads map_height map_width"],
    titles: Sequence[str] | None = None,
) -> Figure:
    """One column an image: the image with its query pixel marked, and below it where each head looks from there.

    Args:
      images: in grey levels.
      queries: row and column of the query, in the grid of the maps.
      maps: the weight of every key; each map has its own colour scale, from zero to its largest weight.
      titles: one per image.

    >>> import numpy as np
    >>> maps = np.full((3, 2, 8, 8), 1 / 64)
    >>> len(attention_maps(np.zeros((3, 8, 8)), np.full((3, 2), 4), maps).axes)
    9
    """
    count, heads, height, width = maps.shape
    figure = Figure(figsize=(8, 8 / (count + 0.4) * (heads + 1.3)), layout="constrained")
    figure.set_label("Test images, one a column, and below each one a heat map per attention head")
    grid = figure.subplots(heads + 1, count, squeeze=False)
    for column, (image, (row, col)) in enumerate(zip(images, queries, strict=True)):
        # images and maps share their extent, so that a query marks the same place in both
        box = (-0.5, width - 0.5, height - 0.5, -0.5)
        grid[0, column].imshow(image, cmap="gray", extent=box)
        grid[0, column].set_title(titles[column] if titles else "")
        for head in range(heads):
            grid[head + 1, column].imshow(maps[column, head], cmap=SEQUENTIAL, vmin=0, extent=box)
        for axes in grid[:, column]:
            axes.plot(
                col,
                row,
                marker="s",
                markersize=42 / max(height, width),
                fillstyle="none",
                markeredgewidth=1.4,
                color="#ff3b30",
            )
    for row, name in enumerate(["image", *(f"head {head + 1}" for head in range(heads))]):
        grid[row, 0].set_ylabel(name)
    _bare(grid)
    return figure


@_styled
def kernels(kernel: Float[np.ndarray, "height width in_features features"], columns: int = 6) -> Figure:
    """Convolution kernels by offset, one per output feature: that of the input feature whose norm is largest.

    Blue is negative, red positive, white zero; one colour scale serves all.

    >>> import numpy as np
    >>> len(kernels(np.ones((3, 3, 1, 16))).axes)
    16
    """
    features = kernel.shape[-1]
    rows = -(-features // columns)
    figure = Figure(figsize=(4, 4 * rows / columns), layout=ConstrainedLayoutEngine(wspace=0.12, hspace=0.12))
    figure.set_label("Convolution kernels, small squares in red and blue")
    grid = figure.subplots(rows, columns, squeeze=False)
    strongest = np.linalg.norm(kernel, axis=(0, 1)).argmax(0)  # an input feature for each output feature
    pictures = np.moveaxis(kernel[:, :, strongest, np.arange(features)], -1, 0)  # [features, height, width]
    limit = np.abs(pictures).max() or 1.0
    for feature, axes in enumerate(grid.flat):
        if feature < features:
            axes.imshow(pictures[feature], cmap=DIVERGING, vmin=-limit, vmax=limit)
        else:
            axes.remove()
    _bare(grid)
    return figure


@_styled
def mean_attention(means: Float[np.ndarray, "heads height width"], low: tuple[int, int], columns: int = 2) -> Figure:
    """Each head's mean weight by offset, as `jaxattn.measure.mean_by_offset` returns it; a cross marks offset zero.

    Each head has its own colour scale, from zero to the largest mean, which stands above it.

    >>> import numpy as np
    >>> [axes.get_title() for axes in mean_attention(np.full((2, 3, 3), 1 / 9), (-1, -1)).axes]
    ['head 1: 0.11', 'head 2: 0.11']
    """
    heads, height, width = means.shape
    columns = min(columns, heads)
    rows = -(-heads // columns)
    figure = Figure(figsize=(4, 4.3 * rows / columns), layout="constrained")
    figure.set_label("A heat map per attention head: its mean weight by offset")
    grid = figure.subplots(rows, columns, squeeze=False)
    box = (low[1] - 0.5, low[1] + width - 0.5, low[0] + height - 0.5, low[0] - 0.5)
    for head, axes in enumerate(grid.flat):
        if head < heads:
            axes.imshow(means[head], cmap=SEQUENTIAL, vmin=0, extent=box)
            axes.plot(0, 0, marker="+", markersize=8, markeredgewidth=1.6, color="#ff3b30")
            axes.set_title(f"head {head + 1}: {np.nanmax(means[head]):.2f}")
        else:
            axes.remove()
    _bare(grid)
    return figure


def inline_svg(figure: Figure, name: str) -> str:
    """The figure as SVG to stand in an HTML page: its font, its colour for ink, ids that begin with `name`.

    >>> inline_svg(mean_attention(np.full((2, 3, 3), 1 / 9), (-1, -1)), "mean")[:28]
    '<svg viewBox="0 0 288 154.8"'
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", dpi=200, transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")  # HTML knows these by itself
    svg = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg).replace(INK, "currentColor")
    opening = rf'<svg \1 role="img" aria-label="{html.escape(str(figure.get_label()))}">'
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', opening, svg, count=1)


def _bare(grid: np.ndarray):
    """Pictures: no ticks, no frame."""
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)

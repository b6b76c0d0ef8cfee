"""Figures: functions from arrays to a matplotlib `Figure`. No pyplot, so no global state and no display."""

import contextlib
import functools
import html
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from jaxattn.checked import AnyInt, Natural, checked
from jaxattn.errors import needs_extra

with needs_extra("train"):
    import matplotlib
    from matplotlib import font_manager
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Ellipse, Rectangle
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

# Okabe and Ito's colours, told apart by colour-blind readers and legible on white and on black.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK = "#555a63"  # text and axes
QUERY = "#ff3b30"  # the mark of a query
SHARES = (0.5, 0.9)  # of a Gaussian's weight, inside a head's ellipses
SEQUENTIAL, DIVERGING = "viridis", "RdBu_r"
# Fonts that have what matplotlib's own lacks, where they are installed.
MORE_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Noto Sans SC", "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei", "Droid Sans Fallback", "PingFang SC", "Hiragino Sans GB", "Hiragino Sans",
    "Apple SD Gothic Neo", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Arial Unicode MS",
)  # fmt: skip
STYLE: "dict[RcKeyType, Any]" = {
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


@checked
@contextlib.contextmanager
def styled(size: int = 10) -> Iterator[None]:
    """A context, or a decorator, that draws in this module's style, in letters of `size` points.

    It leaves matplotlib's own style as it was.
    """
    with matplotlib.rc_context({**STYLE, "font.size": size, "font.family": _fonts()}):
        yield


def _fonts() -> list[str]:
    """The fonts that letters are looked for in, one after the other."""
    return [*matplotlib.rcParams["font.family"], *_more_fonts()]


@functools.cache
def _more_fonts() -> tuple[str, ...]:
    return tuple(name for name in MORE_FONTS if name in font_manager.get_font_names())


@checked
def can_be_drawn(text: str) -> bool:
    """Whether some installed font has each letter.

    >>> can_be_drawn("café $5"), can_be_drawn("\\U0010ffff")
    (True, False)
    """
    fonts = [
        font_manager.get_font(font_manager.findfont(font_manager.FontProperties(family=[name]))) for name in _fonts()
    ]
    return all(any(font.get_char_index(ord(letter)) for font in fonts) for letter in text)


@checked
def plain(text: str, most: int = 24) -> str:
    """A text from outside as matplotlib draws it: no part of it is a formula, and it is not too long.

    >>> plain("$100 bill$")
    '\\\\$100 bill\\\\$'
    """
    return (text if len(text) <= most else f"{text[: most - 1]}…").replace("$", r"\$")


@checked
@styled()
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
        loss.plot(x, curve["train_loss"], label=plain(name), **mark)
        accuracy.plot(x, curve["validation_accuracy"], label=plain(f"{name}, validation", 40), **mark)
        accuracy.plot(x, curve["train_accuracy"], label=plain(f"{name}, training", 40), linestyle=":", **mark)
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


@checked
@styled()
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
    if titles and len(titles) != count:
        raise ValueError(f"attention_maps: titles (={titles!r}) must be one for each of the {count} images")
    figure = Figure(figsize=(8, 8 / (count + 0.4) * (heads + 1.3)), layout="constrained")
    figure.set_label("Test images, one a column, and below each one a heat map per attention head")
    grid = figure.subplots(heads + 1, count, squeeze=False)
    for column, (image, (row, col)) in enumerate(zip(images, queries, strict=True)):
        # images and maps share their extent, so that a query marks the same place in both
        box = (-0.5, width - 0.5, height - 0.5, -0.5)
        grid[0, column].imshow(image, cmap="gray", extent=box)
        grid[0, column].set_title(plain(titles[column]) if titles else "")
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
                color=QUERY,
            )
    for row, name in enumerate(["image", *(f"head {head + 1}" for head in range(heads))]):
        grid[row, 0].set_ylabel(name)
    _bare(grid)
    return figure


@checked
@styled()
def predictions(
    images: Float[np.ndarray, "images height width channels"],
    titles: Sequence[str],
    maps: Float[np.ndarray, "images map_height map_width"] | None = None,
) -> Figure:
    """One column an image: the image with its title, and below it where a network looked.

    Args:
      images: grey, or red, green and blue, from 0 to 1.
      titles: one per image.
      maps: how much each token of it was attended to; each has its own colour scale, from zero to its largest.

    >>> import numpy as np
    >>> len(predictions(np.zeros((3, 8, 8, 1)), ["cat", "dog", "cat"], np.ones((3, 4, 4))).axes)
    6
    """
    count, rows = len(images), 1 if maps is None else 2
    for name, given in (("titles", titles), ("maps", maps)):
        if given is not None and len(given) != count:
            raise ValueError(f"predictions: {name} (={len(given)} of them) must be one for each of the {count} images")
    figure = Figure(figsize=(2.2 * count, 2.4 * rows), layout="constrained")
    figure.set_label("Images, one a column, with what was predicted, and below each one where attention looked")
    grid = figure.subplots(rows, count, squeeze=False)
    for column, (image, title) in enumerate(zip(images, titles, strict=True)):
        grid[0, column].imshow(image, cmap="gray", vmin=0, vmax=1)
        grid[0, column].set_title(plain(title, 20))
        if maps is not None:
            grid[1, column].imshow(maps[column], cmap=SEQUENTIAL, vmin=0)
    _bare(grid)
    return figure


@checked
@styled()
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


@checked
@styled()
def mean_attention(means: Float[np.ndarray, "heads height width"], low: Sequence[AnyInt], columns: int = 2) -> Figure:
    """Each head's mean weight by offset, as `jaxattn.measure.mean_by_offset` returns it; a cross marks offset zero.

    Each head has its own colour scale, from zero to the largest mean, which stands above it.

    >>> import numpy as np
    >>> [axes.get_title() for axes in mean_attention(np.full((2, 3, 3), 1 / 9), (-1, -1)).axes]
    ['head 1: 0.11', 'head 2: 0.11']
    """
    heads, height, width = means.shape
    if len(low) != 2:
        raise ValueError(f"mean_attention: low (={low}) must be two ints, a row and a column")
    columns = min(columns, heads)
    rows = -(-heads // columns)
    figure = Figure(figsize=(4, 4.3 * rows / columns), layout="constrained")
    figure.set_label("A heat map per attention head: its mean weight by offset")
    grid = figure.subplots(rows, columns, squeeze=False)
    box = (low[1] - 0.5, low[1] + width - 0.5, low[0] + height - 0.5, low[0] - 0.5)
    for head, axes in enumerate(grid.flat):
        if head < heads:
            axes.imshow(means[head], cmap=SEQUENTIAL, vmin=0, extent=box)
            axes.plot(0, 0, marker="+", markersize=8, markeredgewidth=1.6, color=QUERY)
            axes.set_title(f"head {head + 1}: {np.nanmax(means[head]):.2f}")
        else:
            axes.remove()
    _bare(grid)
    return figure


@checked
@styled()
def heads_by_layers(
    maps: Float[np.ndarray, "layers heads height width"],
    query: Sequence[Natural],
    image: Float[np.ndarray, "image_height image_width"] | None = None,
) -> Figure:
    """Where every head of every layer looks from one query: a row a layer, a column a head, the query's token outlined.

    Args:
      maps: the weight of every key, for instance `jaxattn.measure.attention_maps(...)[query]` of each layer; each map
        has its own colour scale, from zero to its largest weight.
      query: row and column of the query, in the grid of the maps.
      image: in grey levels, of any size, to lie under the maps, which then show weight by their opacity as well.

    >>> import numpy as np
    >>> figure = heads_by_layers(np.full((2, 3, 8, 8), 1 / 64), (4, 4))
    >>> [axes.get_title() for axes in figure.axes[:3]]
    ['head 1', 'head 2', 'head 3']
    """
    layers, heads, height, width = maps.shape
    if len(query) != 2:
        raise ValueError(f"heads_by_layers: query (={query}) must be two ints, a row and a column")
    side = min(2.0, 7.75 / heads)  # of a map, in inches
    figsize = (heads * side + 0.25, layers * side * height / width + 0.25)
    figure = Figure(figsize=figsize, layout="constrained")
    figure.set_label("Heat maps of the weights of one query: a row for each layer, a column for each attention head")
    grid = figure.subplots(layers, heads, squeeze=False)
    box = (-0.5, width - 0.5, height - 0.5, -0.5)
    for (layer, head), axes in np.ndenumerate(grid):
        picture, limit = maps[layer, head], maps[layer, head].max() or 1.0
        if image is not None:
            axes.imshow(image, cmap="gray", extent=box)
        opacity = 1.0 if image is None else 0.9 * picture / limit
        axes.imshow(picture, cmap=SEQUENTIAL, vmin=0, vmax=limit, extent=box, alpha=opacity)
        axes.add_patch(Rectangle((query[1] - 0.5, query[0] - 0.5), 1, 1, fill=False, edgecolor=QUERY, linewidth=1.4))
    for head in range(heads):
        grid[0, head].set_title(f"head {head + 1}")
    for layer in range(layers):
        grid[layer, 0].set_ylabel(f"layer {layer + 1}")
    _bare(grid)
    return figure


@checked
@styled()
def head_centers_on_grid(
    centers: Float[np.ndarray, "layers heads 2"],
    spreads: Float[np.ndarray, "layers heads 2 2"],
    columns: int = 3,
) -> Figure:
    """Where the heads of each layer look about the query, one panel a layer, on the grid of the tokens.

    The filled square is the query. Each head has a dot with its number at its mean offset, and about it two ellipses,
    which would hold half and nine tenths of a Gaussian's weight (after Cordonnier, Loukas & Jaggi 2020, arXiv
    1911.03584). All panels have one scale. A head without spread has no ellipse, and one that is NaN is not drawn.

    Args:
      centers: row and column, as `jaxattn.measure.head_centers` gives them.
      spreads: covariances, as `jaxattn.measure.head_spreads` gives them.
      columns: panels in a row, at most.

    >>> import numpy as np
    >>> centers = np.array([[[-1.0, 0.0], [1.0, 1.0]]])  # of one layer with two heads
    >>> [axes.get_title() for axes in head_centers_on_grid(centers, np.tile(np.eye(2), (1, 2, 1, 1))).axes]
    ['layer 1']
    """
    layers, heads = centers.shape[:2]
    columns = min(columns, layers)
    rows = -(-layers // columns)
    figure = Figure(figsize=(8 * columns / 3, 8 / 3 * rows + 0.3), layout="constrained")
    figure.set_label("A panel for each layer: the mean offset of every attention head, and ellipses of its spread")
    grid = figure.subplots(rows, columns, squeeze=False)
    reach = _reach(centers, spreads)
    for layer, axes in enumerate(grid.flat):
        if layer >= layers:
            axes.remove()
            continue
        axes.set(xlim=(-reach, reach), ylim=(reach, -reach), aspect="equal", title=f"layer {layer + 1}")
        for line in np.arange(-reach, reach + 1):  # between the tokens; fainter where they are many
            axes.axhline(line, color=INK, alpha=min(0.25, 1.5 / reach), linewidth=0.5)
            axes.axvline(line, color=INK, alpha=min(0.25, 1.5 / reach), linewidth=0.5)
        axes.add_patch(Rectangle((-0.5, -0.5), 1, 1, color=INK, alpha=0.5, linewidth=0))
        for head in range(heads):
            if np.isfinite(centers[layer, head]).all():
                _draw_head(axes, head, centers[layer, head], spreads[layer, head])
    _bare(grid)
    return figure


def _reach(centers: np.ndarray, spreads: np.ndarray) -> float:
    """Half the side of a panel that holds every ellipse: some tokens and a half, to end between two tokens."""
    variances = np.diagonal(spreads, axis1=-2, axis2=-1)
    far = np.abs(centers) + np.sqrt(np.maximum(variances, 0) * -2 * math.log(1 - SHARES[-1]))
    return math.ceil(np.max(far, initial=2, where=np.isfinite(far))) + 0.5


def _draw_head(axes: Axes, head: int, center: np.ndarray, spread: np.ndarray):
    """A dot with the head's number, and the ellipses that hold half and nine tenths of a Gaussian."""
    color = COLORS[head % len(COLORS)]
    variances, directions = np.linalg.eigh(spread[::-1, ::-1])  # rows and columns are y and x
    angle = math.degrees(math.atan2(directions[1, 1], directions[0, 1]))  # of the wider axis
    for share, style, width in zip(SHARES, ("-", ":"), (1.2, 0.9), strict=True):
        short, long = 2 * np.sqrt(np.maximum(variances, 0) * -2 * math.log(1 - share))
        if long > 1e-6:
            ellipse = Ellipse((center[1], center[0]), long, short, angle=angle, fill=False, edgecolor=color)
            axes.add_patch(ellipse).set(linestyle=style, linewidth=width)
    axes.plot(center[1], center[0], marker="o", markersize=4, color=color)
    axes.annotate(str(head + 1), (center[1], center[0]), (3, 3), textcoords="offset points", color=color, fontsize=8)


@checked
@styled()
def receptive_fields(fields: Float[np.ndarray, "fields height width"], titles: Sequence[str]) -> Figure:
    """Effective receptive fields side by side, and how far each reaches: its share by column, summed over the rows.

    Args:
      fields: as `jaxattn.measure.effective_receptive_field` gives them; each picture has its own colour scale, from
        zero to its largest value.
      titles: one per field, in the colour of its line.

    >>> import numpy as np
    >>> len(receptive_fields(np.ones((2, 9, 9)), ["conv", "attention"]).axes)
    3
    """
    count, height, width = fields.shape
    if len(titles) != count:
        raise ValueError(f"receptive_fields: titles (={titles!r}) must be one for each of the {count} fields")
    inches = min(8, 2.4 * (count + 1.5))
    figure = Figure(figsize=(inches, inches * height / width / (count + 1.8) + 0.5), layout="constrained")
    figure.set_label("Heat maps of effective receptive fields, and lines of their shares by column")
    grid = figure.subplots(1, count + 1, squeeze=False, width_ratios=[1] * count + [1.5])
    *pictures, profile = grid[0]
    for index, (axes, field, title) in enumerate(zip(pictures, fields, titles, strict=True)):
        color, by_column = COLORS[index % len(COLORS)], field.sum(0)
        axes.imshow(field, cmap=SEQUENTIAL, vmin=0)
        axes.set_title(plain(title), color=color)
        profile.plot(by_column / (by_column.sum() or 1.0), color=color, label=plain(title))
    profile.set(xlabel="column", ylabel="share", ylim=(0, None))
    profile.xaxis.set_major_locator(MaxNLocator(integer=True))
    _bare(grid[:, :-1])
    return figure


@checked
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

"""Figures hold what they were given, leave matplotlib's state alone, and become SVG that can stand in a page."""

import subprocess
import sys
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from jaxattn import plots


def epochs(count, offset=0.0):
    return [
        {
            "epoch": n,
            "train_loss": 2.0 / n + offset,
            "train_accuracy": 1 - 0.5 / n,
            "validation_accuracy": 1 - 0.4 / n,
        }
        for n in range(1, count + 1)
    ]


def images_of(axes):
    return [np.asarray(image.get_array()) for image in axes.get_images()]


def test_learning_curves_draw_every_number():
    runs = {"one": epochs(5), "two": epochs(5, 0.1)}
    loss, accuracy = plots.learning_curves(runs).axes
    for line, run in zip(loss.lines, runs.values(), strict=True):
        np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3, 4, 5])
        np.testing.assert_array_equal(line.get_ydata(), [epoch["train_loss"] for epoch in run])
    drawn = {line.get_label(): list(line.get_ydata()) for line in accuracy.lines}
    assert drawn == {
        f"{name}, {part}": [epoch[key] for epoch in run]
        for name, run in runs.items()
        for part, key in (("validation", "validation_accuracy"), ("training", "train_accuracy"))
    }
    # a run has one colour in both panels, and no two runs the same
    colors = [line.get_color() for line in loss.lines]
    assert len(set(colors)) == 2
    assert [line.get_color() for line in accuracy.lines] == [colors[0], colors[0], colors[1], colors[1]]


def test_a_single_epoch_can_be_seen():
    loss, _ = plots.learning_curves({"one": epochs(1)}).axes
    assert loss.lines[0].get_marker() == "o"


def test_attention_maps_show_images_queries_and_weights():
    rng = np.random.default_rng(0)
    images, maps = rng.random((3, 16, 16)), rng.random((3, 2, 8, 6))
    queries = np.array([[0, 1], [7, 5], [3, 2]])
    grid = np.array(plots.attention_maps(images, queries, maps, ["a", "b", "c"]).axes).reshape(3, 3)
    for column in range(3):
        assert grid[0, column].get_title() == "abc"[column]
        np.testing.assert_array_equal(images_of(grid[0, column])[0], images[column])
        for head in range(2):
            np.testing.assert_array_equal(images_of(grid[head + 1, column])[0], maps[column, head])
        for axes in grid[:, column]:
            (mark,) = axes.lines
            assert (mark.get_ydata()[0], mark.get_xdata()[0]) == tuple(queries[column])
            # an image of any size lies under its map
            assert axes.get_images()[0].get_extent() == [-0.5, 5.5, 7.5, -0.5]
    assert [axes.get_ylabel() for axes in grid[:, 0]] == ["image", "head 1", "head 2"]


def test_kernels_show_the_strongest_input_of_each_output_on_one_scale():
    kernel = np.random.default_rng(0).normal(size=(3, 2, 4, 7))
    pictures = [images_of(axes)[0] for axes in plots.kernels(kernel, columns=4).axes]
    assert len(pictures) == 7
    for feature, picture in enumerate(pictures):
        norms = [np.sqrt((kernel[:, :, n, feature] ** 2).sum()) for n in range(4)]
        np.testing.assert_array_equal(picture, kernel[:, :, int(np.argmax(norms)), feature])
    limits = {axes.get_images()[0].get_clim() for axes in plots.kernels(kernel).axes}
    assert limits == {(-max(np.abs(p).max() for p in pictures), max(np.abs(p).max() for p in pictures))}


def test_a_kernel_of_zeros_can_be_drawn():
    assert len(plots.kernels(np.zeros((3, 3, 1, 2))).axes) == 2


def test_mean_attention_marks_offset_zero():
    means = np.random.default_rng(0).random((3, 4, 5))
    figure = plots.mean_attention(means, (-1, -3))
    assert len(figure.axes) == 3
    for head, axes in enumerate(figure.axes):
        np.testing.assert_array_equal(images_of(axes)[0], means[head])
        # the cross is at (0, 0), which is row 1 and column 3 of the picture
        assert axes.get_images()[0].get_extent() == [-3.5, 1.5, 2.5, -1.5]
        assert (axes.lines[0].get_xdata()[0], axes.lines[0].get_ydata()[0]) == (0, 0)
        assert f"{means[head].max():.2f}" in axes.get_title()


@pytest.mark.parametrize("under", [False, True])
def test_heads_by_layers_show_every_map_and_the_query(under):
    rng = np.random.default_rng(0)
    maps, image = rng.random((2, 3, 8, 6)), rng.random((16, 12))
    grid = np.array(plots.heads_by_layers(maps, (7, 2), image if under else None).axes).reshape(2, 3)
    for (layer, head), axes in np.ndenumerate(grid):
        pictures = axes.get_images()
        assert {tuple(picture.get_extent()) for picture in pictures} == {(-0.5, 5.5, 7.5, -0.5)}
        *below, above = images_of(axes)
        np.testing.assert_array_equal(above, maps[layer, head])
        assert pictures[-1].get_clim() == (0, maps[layer, head].max())
        assert len(below) == under
        if under:
            np.testing.assert_array_equal(below[0], image)
            np.testing.assert_allclose(pictures[-1].get_alpha(), 0.9 * maps[layer, head] / maps[layer, head].max())
        (mark,) = axes.patches
        assert (mark.get_xy(), mark.get_width(), mark.get_height()) == ((1.5, 6.5), 1, 1)
    assert [axes.get_title() for axes in grid[0]] == ["head 1", "head 2", "head 3"]
    assert [axes.get_ylabel() for axes in grid[:, 0]] == ["layer 1", "layer 2"]


def test_a_map_of_zeros_can_be_drawn():
    plots.inline_svg(plots.heads_by_layers(np.zeros((1, 1, 4, 4)), np.array([1, 1]), np.ones((4, 4))), "zero")


def test_head_centers_and_ellipses_are_where_the_heads_look():
    """An ellipse is the curve (p - c)ᵀ Σ⁻¹ (p - c) = -2 log(1 - share), inside which a Gaussian has that share."""
    rng = np.random.default_rng(0)
    centers, factors = rng.normal(size=(4, 3, 2)) * 3, rng.normal(size=(4, 3, 2, 2))
    spreads = factors @ factors.swapaxes(-1, -2)
    panels = plots.head_centers_on_grid(centers, spreads, columns=3).axes
    assert [axes.get_title() for axes in panels] == [f"layer {n}" for n in (1, 2, 3, 4)]
    for layer, axes in enumerate(panels):
        query, *ellipses = axes.patches
        assert (query.get_xy(), query.get_width(), query.get_height()) == ((-0.5, -0.5), 1, 1)
        dots = [line for line in axes.lines if line.get_marker() == "o"]
        assert [text.get_text() for text in axes.texts] == ["1", "2", "3"]
        assert (len(dots), len(ellipses)) == (3, 6)
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        assert (left, bottom, top) == (-right, right, -right)  # rows go down
        for head in range(3):
            assert (dots[head].get_ydata()[0], dots[head].get_xdata()[0]) == tuple(centers[layer, head])
            for share, ellipse in zip((0.5, 0.9), ellipses[2 * head : 2 * head + 2], strict=True):
                drawn = ellipse.get_patch_transform().transform([[np.cos(t), np.sin(t)] for t in range(6)])
                assert (np.abs(drawn) <= right).all()
                away = drawn[:, ::-1] - centers[layer, head]  # row and column
                form = np.einsum("ni,ij,nj->n", away, np.linalg.inv(spreads[layer, head]), away)
                np.testing.assert_allclose(form, -2 * np.log(1 - share), rtol=1e-8)
                assert ellipse.get_edgecolor()[:3] == to_rgb(dots[head].get_color())


def test_heads_without_spread_or_weight():
    centers, spreads = np.array([[[1.0, 2.0], [np.nan, np.nan]]]), np.zeros((1, 2, 2, 2))
    (axes,) = plots.head_centers_on_grid(centers, spreads).axes
    assert [text.get_text() for text in axes.texts] == ["1"]
    assert len(axes.patches) == 1  # the query


def test_receptive_fields_show_each_field_and_its_share_by_column():
    fields = np.random.default_rng(0).random((2, 5, 7))
    first, second, profile = plots.receptive_fields(fields, ["a", "b"]).axes
    for axes, field, title, line in zip((first, second), fields, "ab", profile.lines, strict=True):
        np.testing.assert_array_equal(images_of(axes)[0], field)
        assert axes.get_images()[0].get_clim() == (0, field.max())
        assert axes.get_title() == title
        assert axes.title.get_color() == line.get_color()
        np.testing.assert_array_equal(line.get_xdata(), range(7))
        shares = [sum(field[row, column] for row in range(5)) / field.sum() for column in range(7)]
        np.testing.assert_allclose(line.get_ydata(), shares, rtol=1e-12)
    assert len({line.get_color() for line in profile.lines}) == 2


def test_one_receptive_field_of_zeros_can_be_drawn():
    assert len(plots.receptive_fields(np.zeros((1, 4, 4)), ["nothing"]).axes) == 2


def figures() -> dict[str, Figure]:
    rng = np.random.default_rng(0)
    return {
        "learning_curves": plots.learning_curves({"a & b": epochs(3)}),
        "attention_maps": plots.attention_maps(
            rng.random((2, 8, 8)), np.zeros((2, 2), int), rng.random((2, 3, 8, 8)), ["<", "2"]
        ),
        "kernels": plots.kernels(rng.normal(size=(3, 3, 1, 8))),
        "mean_attention": plots.mean_attention(rng.random((4, 5, 5)), (-2, -2)),
        "heads_by_layers": plots.heads_by_layers(rng.random((2, 2, 5, 5)), (1, 1), rng.random((9, 9))),
        "head_centers_on_grid": plots.head_centers_on_grid(rng.normal(size=(2, 3, 2)), np.ones((2, 3, 2, 2)), 1),
        "receptive_fields": plots.receptive_fields(rng.random((2, 5, 5)), ["<", "&"]),
    }


@pytest.mark.core(3)
@pytest.mark.parametrize("name", list(figures()))
def test_svg_can_stand_in_a_page(name):
    svg = plots.inline_svg(figures()[name], name)
    root = ET.fromstring(svg)  # well-formed, and without namespaces
    assert root.tag == "svg"
    assert root.get("aria-label")
    assert root.get("width") is None  # the page's style decides
    assert "http" not in svg
    assert plots.INK not in svg  # text is in the page's colour, so readable on dark paper too;
    assert ("currentColor" in svg) == (name != "kernels")  # kernels have no text
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert all(each.startswith(f"{name}-") for each in ids)
    for element in root.iter():
        target = element.get("href")
        assert target is None or target.startswith("data:image/png;base64,") or target[1:] in ids
        clip = element.get("clip-path")
        assert clip is None or clip[len("url(#") : -1] in ids


def test_the_same_figure_gives_the_same_svg():
    one, two = (plots.inline_svg(figures()["learning_curves"], "x") for _ in range(2))
    assert one == two


@pytest.mark.full
def test_matplotlibs_own_state_is_left_alone():
    before = dict(matplotlib.rcParams)
    for name, figure in figures().items():
        plots.inline_svg(figure, name)
    assert dict(matplotlib.rcParams) == before


def test_pyplot_is_never_imported():
    code = "import sys, jaxattn.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_comes_from_outside_is_no_formula():
    """`$%$` and `\\frac` are names, and so is a long one, or one of letters that only some fonts have."""
    names = ["$%$", r"\frac", "$100 bill$", "a" * 500, "<b>&", "_"]
    figure = plots.attention_maps(np.zeros((6, 4, 4)), np.zeros((6, 2), int), np.ones((6, 1, 4, 4)), names)
    svg = plots.inline_svg(figure, "names")
    for shown in ("$%$", r"\frac", "$100 bill$", "a" * 23 + "…", "&lt;b&gt;&amp;"):
        assert f">{shown}</text>" in svg
    ET.fromstring(svg)
    plots.inline_svg(plots.receptive_fields(np.ones((1, 9, 9)), ["$x$"]), "field")
    plots.inline_svg(plots.learning_curves({"$%$": epochs(2)}), "curves")

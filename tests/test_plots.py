"""Figures hold what they were given, leave matplotlib's state alone, and become SVG that can stand in a page."""

import subprocess
import sys
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest
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


def figures() -> dict[str, Figure]:
    rng = np.random.default_rng(0)
    return {
        "learning_curves": plots.learning_curves({"a & b": epochs(3)}),
        "attention_maps": plots.attention_maps(
            rng.random((2, 8, 8)), np.zeros((2, 2), int), rng.random((2, 3, 8, 8)), ["<", "2"]
        ),
        "kernels": plots.kernels(rng.normal(size=(3, 3, 1, 8))),
        "mean_attention": plots.mean_attention(rng.random((4, 5, 5)), (-2, -2)),
    }


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


def test_matplotlibs_own_state_is_left_alone():
    before = dict(matplotlib.rcParams)
    for name, figure in figures().items():
        plots.inline_svg(figure, name)
    assert dict(matplotlib.rcParams) == before


def test_pyplot_is_never_imported():
    code = "import sys, jaxattn.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

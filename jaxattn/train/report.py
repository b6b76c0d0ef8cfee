"""The report: one HTML file that needs nothing else, with its style and figures inside and no scripts."""

import dataclasses
import html
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any

import jax

from jaxattn.train.config import Config
from jaxattn.train.data import Dataset
from jaxattn.train.recipes import changed, recipe

TEMPLATE = Path(__file__).with_name("report.html")
COMPARED = {"conv": "convolution", "attention": "local attention"}
FIGURES = ("learning_curves", "attention_maps", "kernels", "mean_attention")
NO_FIGURE = "<p>This figure could not be drawn.</p>"
HEADER = ("", "test accuracy", "test errors", "parameters", "MFLOPs per image", "training images/s", "training time")


def write_report(
    path: Path, config: Config, data: Dataset, results: Mapping[str, Mapping[str, Any]], figures: Mapping[str, str]
):
    """Writes the report of two runs, one by convolution and one by local attention.

    Args:
      path: of the file to write.
      config: of both runs.
      data: what they were trained on.
      results: of each run, as its results.json holds them, under "conv" and "attention".
      figures: as HTML, those of `FIGURES` that could be drawn.
    """
    shown = dict.fromkeys(FIGURES, NO_FIGURE) | dict(figures)
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(texts(config, data, results) | shown)
    path.write_text(page, encoding="utf-8")


def texts(config: Config, data: Dataset, results: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What stands in the report beside its figures, as HTML."""
    train, validation, test = (len(part) for part in (data.train, data.validation, data.test))
    height, width, _ = data.image_shape
    return {
        "title": f"Convolution and local attention on {html.escape(data.name)}",
        "lede": f"The network <b>{config.model}</b>, trained twice on {train:,} images of {height} × {width} "
        f"pixels in {len(data.class_names)} classes: once with convolutions, once with local attention in their place, "
        "and everything else alike.",
        "cards": "".join(_card(mix, results[mix]) for mix in COMPARED),
        "learning_caption": "<b>Left:</b> mean training loss of each epoch. <b>Right:</b> accuracy on the "
        f"{validation:,} validation images after each epoch (solid), and on the training images, {_moved(config)}, "
        "while they were being learned from (dotted). The lowest tenth lies below the frame.",
        "results": _table(HEADER, [_row(COMPARED[mix], results[mix]) for mix in COMPARED]),
        "results_note": f"The {test:,} test images were looked at once, after the last epoch; nothing was chosen by "
        "them. FLOPs are XLA's count for one image through the compiled forward pass. Images per second is the median "
        "over the epochs, without compilation and evaluation; the time is all of the training, with both.",
        "attention_caption": "One test image of each class, of the first twelve. The red square is the query, the "
        "image's brightest pixel. "
        "Below, where each head of the first attention layer looks from there: every map has its own scale, from zero "
        "(dark, as is all outside the window) to its largest weight (yellow).",
        "kernels_caption": "<b>Convolution.</b> The first block's first layer: for each output channel, of its kernels "
        "the one whose norm is largest. Red is positive, blue negative; one scale for all.",
        "mean_caption": "<b>Local attention,</b> in the same place: each head's mean weight at each offset from the "
        "query (the cross), over test images and positions. Each head has its own scale, from zero to the "
        "number above it.",
        "commands": html.escape(commands(config)),
        "config": _definitions(dataclasses.asdict(config)),
        "versions": _definitions(environment()),
    }


def commands(config: Config) -> str:
    """The command that makes this run again: what differs from the defaults is spelled out."""
    settings = changed(config)
    if recipe(None, config.data).recipe != config.recipe:
        settings = {"recipe": config.recipe} | settings
    return "jaxattn train" + "".join(f" {_flag(name, value)}" for name, value in settings.items())


def environment() -> dict[str, str]:
    """What the numbers were made with, and on."""
    versions = {package: version(package) for package in ("jaxattn", "jax", "flax", "optax", "numpy")}
    return versions | {
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "CPU cores": str(os.cpu_count()),
    }


def _flag(name: str, value: object) -> str:
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {shlex.quote(str(value))}"


def _card(mix: str, result: Mapping[str, Any]) -> str:
    wrong = result["test_images"] - result["test_correct"]
    return (
        f'<div class="card {mix}"><span>{COMPARED[mix]}</span><b>{result["test_accuracy"]:.1%}</b>'
        f"<span>of {result['test_images']:,} test images; {wrong} wrong</span></div>"
    )


def _row(name: str, result: Mapping[str, Any]) -> list[str]:
    return [
        name,
        f"{result['test_accuracy']:.2%}",
        f"{result['test_images'] - result['test_correct']} of {result['test_images']:,}",
        f"{result['parameters']:,}",
        f"{result['flops_per_image'] / 1e6:.2f}",
        f"{result['train_images_per_second']:,.0f}",
        f"{result['seconds']:.0f} s",
    ]


def _moved(config: Config) -> str:
    if config.shift:
        return f"moved at random by up to {config.shift} pixel{'s' if config.shift > 1 else ''}"
    return "as they are"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{name}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        for name, *cells in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _definitions(values: Mapping[str, Any]) -> str:
    rows = (
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd></div>" for name, value in values.items()
    )
    return f"<dl>{''.join(rows)}</dl>"

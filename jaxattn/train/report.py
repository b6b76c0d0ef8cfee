"""The report: one HTML file that needs nothing else, with its style and figures inside and no scripts."""

import dataclasses
import html
import io
import os
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any

import jax

from jaxattn.train.data import Dataset
from jaxattn.train.loop import Config

TEMPLATE = Path(__file__).with_name("report.html")
MIXERS = {"conv": "convolution", "attention": "local attention"}


def write_report(
    path: Path, config: Config, data: Dataset, results: Mapping[str, Mapping[str, Any]], figures: Mapping[str, Any]
):
    """Writes the report of two runs, one by convolution and one by local attention.

    Args:
      path: of the file to write.
      config: of both runs.
      data: what they were trained on.
      results: of each run, as its results.json holds them, under "conv" and "attention".
      figures: matplotlib figures: learning_curves, attention_maps, kernels, mean_attention.
    """
    parts = texts(config, data, results)
    pictures = {name: inline_svg(figure, name, parts.pop(f"{name}_alt")) for name, figure in figures.items()}
    path.write_text(Template(TEMPLATE.read_text()).substitute(parts | pictures))


def texts(config: Config, data: Dataset, results: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What stands in the report beside its figures, as HTML."""
    e = html.escape
    classes = len(data.class_names)
    sizes = [len(labels) for labels in (data.train_labels, data.validation_labels, data.test_labels)]
    height, width = data.train_images.shape[1:3]
    return {
        "title": f"{e(data.name)}: convolution and local attention, one equation",
        "lede": f"The network <b>{e(config.model)}</b> was trained twice on {sizes[0]:,} images of {height} × {width} pixels "
        f"in {classes} classes: once with convolutions, once with local attention in their place, everything else alike.",
        "cards": "".join(_card(mix, results[mix]) for mix in MIXERS),
        "learning_curves_alt": "Two panels of lines by epoch: training loss, and accuracy on training and validation images",
        "learning_caption": f"<b>Left:</b> mean training loss of each epoch. <b>Right:</b> accuracy on the {sizes[1]:,} validation "
        "images after each epoch (solid), and on the training images while they were being learned from, "
        f"{_moved(config)} (dotted).",
        "results": _table(
            (
                "",
                "test accuracy",
                "test errors",
                "parameters",
                "MFLOPs per image",
                "training images/s",
                "training time",
            ),
            [_row(MIXERS[mix], results[mix]) for mix in MIXERS],
        ),
        "results_note": f"The {sizes[2]:,} test images were looked at once, after the last epoch; nothing was chosen by them. "
        "FLOPs are XLA's count for one image through the compiled forward pass. Speed is the median over epochs, "
        "compilation excluded.",
        "attention_maps_alt": "Test images, one a column, and below each one heat map per attention head",
        "attention_caption": "One test image of each class. The red square is the query, the brightest pixel; below it, how much each head of "
        "the first attention layer looks at each pixel from there. Every map has its own scale, from zero (dark) to its largest "
        "weight (yellow).",
        "kernels_alt": "Small red and blue squares: convolution kernels",
        "kernels_caption": "<b>Convolution.</b> Kernels of the first block's first layer, for each output channel the one whose norm is largest. "
        "Red is positive, blue negative; one scale for all.",
        "mean_attention_alt": "One heat map per attention head: mean weight by offset",
        "mean_caption": "<b>Local attention.</b> In the same place, each head's mean weight at each offset from the query (the cross), over "
        "the test images and all positions; beside its name, the largest mean. An even gaze would give "
        "every offset the same.",
        "commands": e(commands(config)),
        "config": _definitions(dataclasses.asdict(config)),
        "versions": _definitions(environment()),
        "footer": "Written by <b>jaxattn train</b>. The file needs no network: its style and figures are inside.",
    }


def commands(config: Config) -> str:
    """The commands that make this run again: what differs from the defaults is spelled out."""
    default = Config()
    changed = {k: v for k, v in dataclasses.asdict(config).items() if v != getattr(default, k)}
    flags = "".join(f" --{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in changed.items())
    return f"pip install 'jaxattn[train]=={version('jaxattn')}'\njaxattn train{flags}"


def environment() -> dict[str, str]:
    """What the numbers were made with, and on."""
    versions = {package: version(package) for package in ("jaxattn", "jax", "flax", "optax", "numpy")}
    return versions | {
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "CPU cores": str(os.cpu_count()),
    }


def inline_svg(figure: Any, name: str, description: str) -> str:
    """A matplotlib figure as SVG to stand in a page: scalable, text in the page's font and colour, names of its own."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", dpi=200, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")  # HTML knows these by itself
    svg = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    label = html.escape(description, quote=True)
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{label}">', svg, count=1)


def _card(mix: str, result: Mapping[str, Any]) -> str:
    wrong = result["test_images"] - result["test_correct"]
    return (
        f'<div class="card {mix}"><span>{MIXERS[mix]}</span><b>{result["test_accuracy"]:.1%}</b>'
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

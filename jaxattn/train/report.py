"""The report: one HTML file that needs nothing else, with its style and figures inside and no scripts."""

import html
import io
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = Path(__file__).with_name("report.html")


def write_report(path: Path, **parts: str):
    """Fills the template; every part is HTML."""
    path.write_text(Template(TEMPLATE.read_text()).substitute(parts))


def inline_svg(figure: "Figure", name: str, description: str) -> str:
    """The figure as SVG to stand in a page: text in the page's font and colour, and no names that clash with others'."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", dpi=200, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")  # HTML knows these by itself
    svg = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    label = html.escape(description, quote=True)
    return re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", rf'<svg \1 role="img" aria-label="{label}">', svg, count=1)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table whose first column names the row."""
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{html.escape(first)}</th>' + "".join(f"<td>{html.escape(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def definitions(values: Mapping[str, object]) -> str:
    """An HTML list of names and values."""
    return "<dl>" + "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd></div>" for k, v in values.items()) + "</dl>"


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    found = {}
    for package in ("jaxattn", "jax", "jaxlib", "flax", "optax", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found

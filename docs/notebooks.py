"""The notebooks of colab/ as pages: run while the site is built, with what they print and draw."""

import os
import pathlib
import re

import nbformat
from latex2mathml.converter import convert
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

COLAB = pathlib.Path(__file__).parent.parent / "colab"
NOTEBOOKS = sorted(COLAB.glob("*.ipynb"))
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", re.DOTALL)
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
NOT_RUN = "!!! note\n    This build did not run the notebook: `python docs/build.py` does.\n\n"


def pages(run: bool = True) -> dict[str, str | bytes]:
    """A page for each notebook, its pictures, and the notebook itself without outputs, to be opened elsewhere."""
    made: dict[str, str | bytes] = {}
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, 4)
        if run:
            ran(notebook)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = with_formulas(cell.source)
        text, resources = MarkdownExporter().from_notebook_node(notebook)
        for name, content in resources["outputs"].items():
            text = text.replace(f"({name})", f"({path.stem}-{name}){size(notebook, name)}")
            made[f"notebooks/{path.stem}-{name}"] = content
        title, _, rest = text.strip().partition("\n")
        head = f"{title}\n\n[The notebook itself]({path.name}){{ download='{path.name}' }}, to be run anywhere.\n\n"
        made[f"notebooks/{path.stem}.md"] = head + NOT_RUN * (not run) + COLOURS.sub("", rest)
        made[f"notebooks/{path.name}"] = path.read_bytes()
    return made


def ran(notebook: nbformat.NotebookNode) -> None:
    """Run from top to bottom; what is wrong ends the build. Bars are left out: they show how far a training was."""
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    there = {"metadata": {"path": str(COLAB)}}
    client = NotebookClient(notebook, timeout=300, coalesce_streams=True, resources=there)
    client.extra_arguments = ["--InlineBackend.figure_format=retina"]
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if not is_bar(o)]


def size(notebook: nbformat.NotebookNode, name: str) -> str:
    """The width in CSS pixels of a picture that has more: output_3_0.png is the first output of the fourth cell."""
    cell, output = map(int, re.findall(r"\d+", name))
    size = notebook.cells[cell].outputs[output].metadata.get("image/png", {})
    return f"{{ width={size['width']} }}" if "width" in size else ""


def is_bar(output: nbformat.NotebookNode) -> bool:
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {}) or output.get("name") == "stderr"


def with_formulas(text: str) -> str:
    """LaTeX as MathML, which browsers draw without help."""

    def formula(found: re.Match) -> str:
        shown = convert(found[1] or found[2], display="block" if found[1] else "inline")
        return shown if found[1] else f"<span>{shown}</span>"  # at the start of a line, too, a part of it

    parts = re.split(r"(```.*?```|`[^`]*`)", text, flags=re.DOTALL)  # not in code
    return "".join(part if n % 2 else FORMULA.sub(formula, part) for n, part in enumerate(parts))


def navigation() -> list:
    return [f"notebooks/{path.stem}.md" for path in NOTEBOOKS]

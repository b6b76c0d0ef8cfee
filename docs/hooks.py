"""What mkdocs asks for while it builds the site: the pages that are made, and the links of names in code."""

import pathlib
import re
import sys
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # this checkout, wherever else there is one

import layers  # noqa: E402
import networks  # noqa: E402
import notebooks  # noqa: E402
import pictures  # noqa: E402
import reference  # noqa: E402

# What mkdocs.yml has in the navigation, and what makes its pages.
MADE = {"layers/": layers, "networks.md": networks, "notebooks/": notebooks, "api/": reference}
CODE = re.compile(r"<code>([A-Za-z_][\w.]*)</code>")
FROM_README = re.compile(r"^<!-- README.md: (.*?) -->$", re.MULTILINE)
THERE = {  # where in the site the README's links lead
    "#is-a-cnn-a-kind-of-local-self-attention": "study.md",
    "#the-zoo": "layers/index.md",
    "#training": "guides/training.md",
    "CONTRIBUTING.md": "guides/contributing.md",
    "docs/recipes.md": "recipes.md",
    "docs/guides/migration.md": "guides/migration.md",
    "docs/weights.png": "weights.png",
    "docs/claim10.png": "pictures/claim10.svg",
    "#does-much-data-favour-attention": "#does-much-data-favour-attention",
}
REPORT = HERE.parent / "runs" / "study" / "report.html"
HAVE_REPORT = "[The report of a run](study-report.html): every experiment with its code, its numbers and its figures."
HAVE_NO_REPORT = "`jaxattn study` writes a report, `runs/study/report.html`; a site built after it shows it here."
LINKED = re.compile(r"(<h[1-6].*?</h[1-6]>|<a .*?</a>|<b>.*?</b>)", re.DOTALL)


def filled(entry: Any) -> Any:
    """A part of the navigation, in which what is made stands for its pages."""
    if isinstance(entry, list):
        return [filled(inside) for inside in entry]
    if isinstance(entry, dict):
        return {title: filled(inside) for title, inside in entry.items()}
    return MADE[entry].navigation() if entry in MADE else entry


def on_config(config):
    config.nav = filled(config.nav)
    return config


def on_files(files, config):
    made = notebooks.pages(run=config.extra.get("notebooks", True))
    for part in MADE.values():
        made |= part.pages() if part is not notebooks else {}
    made |= {name: draw() for name, draw in (pictures.PICTURES | layers.PICTURES).items()}
    if REPORT.exists():
        made["study-report.html"] = REPORT.read_text(encoding="utf-8")
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """`<!-- README.md: Two commands -->` in a page becomes that section of the README, its links those of the site."""
    markdown = markdown.replace("<!-- the report -->", HAVE_REPORT if REPORT.exists() else HAVE_NO_REPORT)
    return FROM_README.sub(lambda found: section(found[1], page.file.src_uri), markdown)


def section(title: str, page: str) -> str:
    text = (HERE.parent / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise PluginError(f"{page}: README.md has no section {title!r}")
    up = "../" * page.count("/")
    return re.sub(r"\]\((#[\w-]+|[\w/]+\.\w+)\)", lambda link: f"]({up}{THERE[link[1]]})", found[1])


def on_page_content(html, page, config, files):
    """A name of the library in code becomes a link to it, but where it is a heading, a link, or an argument."""
    names = reference.names(pathlib.PurePath(page.file.src_uri).stem)

    def link(found: re.Match) -> str:
        target = names.get(found[1])
        return f'<autoref identifier="{target}" optional>{found[0]}</autoref>' if target else found[0]

    return "".join(part if n % 2 else CODE.sub(link, part) for n, part in enumerate(LINKED.split(html)))

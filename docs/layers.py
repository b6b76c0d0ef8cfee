"""The pages of the layers: the table of the zoo, and a page for each of its rows."""

import contextlib
import inspect
import io
import re
from collections.abc import Callable

import as_written
import looks
import pictures

from jaxattn import zoo
from jaxattn.zoo.registry import SOURCES, Row

ARXIV = re.compile(r"\b(\d{4}\.\d{5})\b")
ROWS = sorted(zoo.ROWS.values(), key=lambda row: SOURCES.index(row.source))
DRAWN = """The weights with which two pixels of a photograph see the others, by this layer. Queries, keys and values are
the colours around each pixel; what does not come from data is drawn at random. Of weights that are all positive the
root is shown, so that the small ones can be seen; of others red is above zero and blue below."""


def example(of: Callable, package: str) -> str:
    """The example in a docstring, with the import of what it is of."""
    found = as_written.EXAMPLE.finditer(inspect.cleandoc(of.__doc__ or ""))
    return "\n\n".join([f">>> from jaxattn.{package} import {of.__name__}", *(match[0] for match in found)])


def table() -> str:
    """`zoo.table()`, in which each layer leads to its page."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        zoo.table()
    text = printed.getvalue()
    for row in ROWS:
        text = text.replace(f"| {row.layer} ", f"| [{row.layer}]({row.function}.md) ", 1)
        text = text.replace(f"| {row.weights} ", f"| `{row.weights}` ", 1)
        text = re.sub(rf"\| {row.function} +\|", f"| `zoo.{row.function}` |", text)
    return text


def page(row: Row) -> str:
    function, cls = getattr(zoo, row.function), looks.module(row.function)
    said = inspect.cleandoc(function.__doc__).partition("\nArgs:")[0]
    paper = ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", row.paper)
    picture = f"![Where two pixels look](../pictures/look-{row.function}.svg)\n\n{DRAWN}"
    return f"""# {row.layer}

{as_written.readable(said)}

| | |
|---|---|
| A_h(i, j) | `{row.weights}` |
| weights from | {row.source} |
| shared over channels, over positions | {row.channels}, {row.positions} |
| normaliser | {row.normalizer} |
| paper | {paper} |
| function and module | `jaxattn.zoo.{row.function}`, `jaxattn.nn.{cls.__name__}` |

## Where it looks

{looks.NOT_DRAWN.get(row.function, picture)}

## In code

The function, whose parameters are given:

```pycon
{example(function, "zoo")}
```

The module, which has them:

```pycon
{example(cls, "nn")}
```
"""


INDEX = """# Layers

Every layer is the one equation with other weights: a function of a few lines in `jaxattn.zoo`, and a module of the
usual constructor in `jaxattn.nn`. The table is made from the functions themselves.

"""


def pages() -> dict[str, str]:
    return {"layers/index.md": INDEX + table(), **{f"layers/{row.function}.md": page(row) for row in ROWS}}


def navigation() -> list:
    return ["layers/index.md", *({row.layer: f"layers/{row.function}.md"} for row in ROWS)]


PICTURES = {f"pictures/look-{name}.svg": lambda name=name: pictures.svg(looks.look(name)) for name in looks.DRAWN}

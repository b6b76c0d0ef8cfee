"""What distinguishes one layer from another: where its weights come from, what shares them, what normalises them."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from jaxattn.checked import checked

Function = TypeVar("Function", bound=Callable[..., Any])


class Row(NamedTuple):
    """One layer of the zoo, as a line of `table`."""

    layer: str
    weights: str
    source: str
    channels: str
    positions: str
    normalizer: str
    paper: str
    function: str
    shapes: Mapping[str, str]


# Where weights come from, in the order of the table: from what is given to what is found for each pair of tokens.
SOURCES = (
    "fixed",
    "learned",
    "image",
    "centre",
    "window centre",
    "learned key",
    "key + learned",
    "pair",
    "pair + learned",
    "learned + pair",
)
ROWS: dict[str, Row] = {}


def row(
    layer: str,
    *,
    weights: str,
    source: str,
    shared: str,
    normalizer: str,
    paper: str,
    shapes: Mapping[str, str] = MappingProxyType({}),
) -> Callable[[Function], Function]:
    """Give a function its line in the table, and check its arguments (`jaxattn.checked`).

    Args:
      layer: what the field calls it.
      weights: the formula of A_h(i, j).
      source: where the weights come from, one of `SOURCES`.
      shared: "over channels / over positions": "all / yes", "head / no", "no / yes".
      normalizer: what makes scores weights: "none", "softmax", "sum".
      paper: authors, year and, where there is one, the arXiv number.
      shapes: each parameter's axes, as in `jaxattn.zoo.parameters`, by which a call is checked and a module drawn.
    """
    channels, positions = shared.split(" / ")

    def register(function: Function) -> Function:
        name = function.__name__
        if name in ROWS:
            raise ValueError(f"zoo: {name} has a row already")
        if source not in SOURCES:
            raise ValueError(f"zoo: source (={source!r}) of {name} must be one of {SOURCES}")
        ROWS[name] = Row(layer, weights, source, channels, positions, normalizer, paper, name, shapes)
        return checked(function)

    return register


def table() -> None:
    """Print the layers as a Markdown table, a line each, from the functions' own descriptions.

    >>> table()
    | layer...| A_h(i, j)...| weights from...| shared over channels / positions...| normaliser...| function...
    """
    lines = [["layer", "A_h(i, j)", "weights from", "shared over channels / positions", "normaliser", "function"]]
    for r in sorted(ROWS.values(), key=lambda r: SOURCES.index(r.source)):
        lines.append([r.layer, r.weights, r.source, f"{r.channels} / {r.positions}", r.normalizer, r.function])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")

"""What distinguishes one layer from another: where its weights come from, what shares them, what normalises them."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

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


ROWS: dict[str, Row] = {}


def row(
    layer: str, *, weights: str, source: str, shared: str, normalizer: str, paper: str
) -> Callable[[Function], Function]:
    """Give a function its line in the table.

    Args:
      layer: what the field calls it.
      weights: the formula of A_h(i, j).
      source: where the weights come from: "fixed", "learned", "centre", "pair", "key", "image" and their sums.
      shared: "over channels / over positions": "all / yes", "head / no", "no / yes".
      normalizer: what makes scores weights: "none", "softmax", "sum".
      paper: authors, year and, where there is one, the arXiv number.
    """
    channels, positions = shared.split(" / ")

    def register(function: Function) -> Function:
        name = function.__name__
        if name in ROWS:
            raise ValueError(f"zoo: {name} has a row already")
        ROWS[name] = Row(layer, weights, source, channels, positions, normalizer, paper, name)
        return function

    return register


def table() -> None:
    """Print the layers as a Markdown table, a line each, from the functions' own descriptions.

    >>> table()
    | layer...| A_h(i, j)...| weights from...| shared over channels / positions...| normaliser...| function...
    """
    head = ("layer", "A_h(i, j)", "weights from", "shared over channels / positions", "normaliser", "function")
    lines = [
        head,
        *(
            (r.layer, r.weights, r.source, f"{r.channels} / {r.positions}", r.normalizer, r.function)
            for r in ROWS.values()
        ),
    ]
    cells = [[re.sub(r"\|", r"\\|", cell) for cell in line] for line in lines]
    widths = [max(len(line[k]) for line in cells) for k in range(len(head))]
    cells.insert(1, ["-" * width for width in widths])
    for line in cells:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")

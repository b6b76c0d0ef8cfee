"""A way to compute a case: ours or a peer's."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class CannotError(Exception):
    """This way cannot compute this case; the message says why, and stands in the table."""


class Layout(NamedTuple):
    """How a tensor of a case is brought to what a way takes, outside of what is timed, and back."""

    enter: Callable[[Any], Any] = lambda x: x
    leave: Callable[[Any], Any] = lambda x: x


class Function(NamedTuple):
    """A function of a case's inputs, each in its layout, to its output in the last layout."""

    call: Callable[..., Any]
    layouts: Sequence[Layout] = ()  # none: as the case has them

    def layout(self, index: int) -> Layout:
        return self.layouts[index] if self.layouts else Layout()


class Way(NamedTuple):
    """One way. `make` gives its function of a case, or raises `CannotError`.

    `needs` is a lower bound, in bytes, of what it would hold: a way that needs more than there is is not begun.
    """

    name: str
    framework: str  # "jax" or "torch"
    make: Callable[[Any], Function]
    needs: Callable[[Any], int] = lambda case: 0
    ours: bool = False


def optional(module: str) -> Any:
    """A module that may not be installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CannotError(f"{module.partition('.')[0]} is not installed") from error


def cannot_unless(condition: Any, reason: str):
    if not condition:
        raise CannotError(reason)

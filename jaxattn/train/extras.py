"""The two courtesies of a command: say which install is missing, and show a user's mistake without a traceback."""

import contextlib
from collections.abc import Iterator


class InputError(ValueError):
    """What the user gave cannot be used. The command line prints the message alone."""


@contextlib.contextmanager
def needs_extra(name: str) -> Iterator[None]:
    """Around an import of an optional package: a failure names the install that brings it."""
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"{error.name or error} is not installed, and this needs it: pip install 'jaxattn[{name}]'"
        ) from error

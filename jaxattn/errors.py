"""What is wrong with what a user gave, or has not installed.

Every message of the library has one grammar: *"function: argument (=value) must be what is allowed"*, and then what
would work, where that can be told. A command has no function to name, so its messages begin with the argument.

    Window: size (=0) must be an integer >= 1 on axis 1
    resume (=True) and overwrite (=True) must not both be set: go on with the run, or replace it
"""

import contextlib
from collections.abc import Iterator


class MissingExtra(ImportError):
    """An optional package is not installed; the message names the install that brings it."""


class InputError(ValueError):
    """What the user gave cannot be used. The command line prints the message alone, without a traceback."""


@contextlib.contextmanager
def needs_extra(name: str) -> Iterator[None]:
    """A context for the import of an optional package: where it fails, the error names the install that brings it."""
    try:
        yield
    except ImportError as error:
        raise MissingExtra(
            f"{error.name or error} is not installed, and this needs it: pip install 'jaxattn[{name}]'"
        ) from error

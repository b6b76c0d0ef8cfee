"""The options in a data set's name: `folder:PATH?size=64`."""

from collections.abc import Mapping
from typing import TypeVar
from urllib.parse import parse_qsl

from jaxattn.errors import InputError

Default = TypeVar("Default", int, None)


def read_options(text: str, allowed: tuple[str, ...]) -> dict[str, str]:
    """The options by name, each given once and with a value.

    >>> read_options("size=16&offset=3,2", ("size", "offset"))
    {'size': '16', 'offset': '3,2'}
    """
    try:
        pairs = parse_qsl(text, keep_blank_values=True, strict_parsing=True) if text else []
    except ValueError as error:
        raise InputError(f"data: options (={text!r}) must be NAME=VALUE, joined by &") from error
    options = dict(pairs)
    for name in options:
        if name not in allowed:
            raise InputError(f"data: option (={name!r}) must be one of {', '.join(allowed) or 'none'}")
    if len(options) < len(pairs):
        raise InputError(f"data: options (={text!r}) must name each option once")
    return options


def whole_number(options: Mapping[str, str], name: str, default: Default, least: int) -> int | Default:
    """The value of one option, or the default where it is not given."""
    if name not in options:
        return default
    if not options[name].isdecimal() or int(options[name]) < least:
        raise InputError(f"data: option {name} (={options[name]!r}) must be a whole number of at least {least}")
    return int(options[name])

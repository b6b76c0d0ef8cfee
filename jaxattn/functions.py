"""What tells a function of the caller's apart from others, so that what was compiled with it is found again.

A function is its code and what it refers to: closures, globals, defaults. Where all of that is numbers, text, names of
JAX and NumPy, and functions of the same kind, two functions with the same of it compute the same. An array, a module
with parameters or any other object may change, or be traced: a function that refers to one is not known.
"""

import functools
import sys
import types
from collections.abc import Callable, Hashable, Iterator
from typing import Any

LIBRARIES = ("jax", "numpy", "math", "operator", "jaxattn")
CONSTANTS = (int, float, complex, bool, str, bytes, type(None), type(...))


class Known:
    """A function that equals every other of the same code that refers to the same.

    >>> from jaxattn.functions import Known, known
    >>> def scaled(by):
    ...     return known(lambda score: by * score)
    >>> scaled(2) == scaled(2), scaled(2) == scaled(3), scaled(2)(5)
    (True, False, 10)
    >>> scaled([2]) is None
    True
    """

    def __init__(self, function: Callable[..., Any], key: Hashable):
        self.function, self.key = function, key

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.function(*arguments, **options)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Known) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return repr(self.function)


def known(function: Callable[..., Any]) -> Known | None:
    """The function, comparable; None where what it refers to may change."""
    try:
        return Known(function, _key(function, ()))
    except (_MayChangeError, ValueError):  # a closure may be empty yet
        return None


class _MayChangeError(Exception):
    """Something that a function refers to is no constant."""


def _key(value: Any, within: tuple[Any, ...]) -> Hashable:
    if isinstance(value, CONSTANTS):
        return type(value), repr(value)  # 0.0 is not -0.0
    if isinstance(value, tuple):
        return tuple(_key(part, within) for part in value)
    if isinstance(value, functools.partial):
        named = tuple((name, _key(x, within)) for name, x in sorted(value.keywords.items()))
        return _key(value.func, within), _key(value.args, within), named
    if (name := _library_name(value)) is not None:
        return name
    if not isinstance(value, types.FunctionType):
        raise _MayChangeError
    for depth, function in enumerate(within):
        if function is value:  # it calls itself
            return "itself", depth
    inside = (*within, value)
    return value.__code__, tuple(_key(x, inside) for x in _referred(value))


def _library_name(value: Any) -> str | None:
    """The name under which a library has a module or a function."""
    if isinstance(value, types.ModuleType):
        return value.__name__ if value.__name__.partition(".")[0] in LIBRARIES else None
    module, name = str(getattr(value, "__module__", "")), str(getattr(value, "__name__", ""))
    theirs = module.partition(".")[0] in LIBRARIES and getattr(sys.modules.get(module), name, None) is value
    return f"{module}.{name}" if theirs else None


def _referred(function: types.FunctionType) -> Iterator[Any]:
    yield from (cell.cell_contents for cell in function.__closure__ or ())
    yield function.__defaults__ or ()
    yield tuple((function.__kwdefaults__ or {}).items())
    names = {name for code in _codes(function.__code__) for name in code.co_names}
    yield from (function.__globals__[name] for name in sorted(names) if name in function.__globals__)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code, and that of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)

"""Arguments checked by their annotations: a signature says once what is allowed, to readers, to tools and to calls."""

import functools
import inspect
import math
import numbers
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, NewType, TypeVar, Union, get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import AbstractArray, Real

from jaxattn.sizes import is_int, is_sequence

Function = TypeVar("Function", bound=Callable[..., Any])
Natural = Annotated[int, 0]  # an int >= 0
AnyInt = Annotated[int, None]
Extended = Annotated[float, math.inf]  # a number that may be infinite
MeshAxis = NewType("MeshAxis", str)  # over which the call is split


class Kind(NamedTuple):
    """What an annotation allows: in words, and the value as it arrives, or `REFUSED`."""

    words: str
    read: Callable[[Any], Any]


REFUSED = object()
NOTHING = Kind("None", lambda value: None if value is None else REFUSED)


def checked(function: Function) -> Function:
    """The function, or constructor, that refuses a call whose arguments are not what its annotations say.

        int, Natural, AnyInt    a whole number, Python's or NumPy's, >= 1, >= 0, or any; it arrives as an int
        Size                    an int >= 1, or one for each axis; `Annotated[Size, 0]`: >= 0. Ints and tuples arrive
        float, Extended         one real number, also as an array or traced; finite, or not
        bool, str               one, and nothing that could stand for it
        Literal["a", "b"]       one of these
        Float[Array, "a *b"]    an array, or what makes one, of such numbers and so many axes
        DTypeLike, PrecisionLike
        Mapping, Callable, and classes

    A union allows what its parts do. What has another annotation, or none, the function checks itself.

    >>> @checked
    ... def padded(size: int, *, mode: Literal["same", "valid"] | None = None):
    ...     return size, mode
    >>> padded(np.int64(3))
    (3, None)
    >>> padded(3, mode="some")
    Traceback (most recent call last):
        ...
    ValueError: padded: mode (='some') must be one of 'same', 'valid', or None
    """
    parameters = inspect.signature(function).parameters.values()
    found = {p.name: kind for p in parameters if p.kind not in VARIADIC and (kind := _kind(p.annotation)) is not None}
    order = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]

    @functools.wraps(function)
    def checks(*args: Any, **kwargs: Any) -> Any:
        where = type(args[0]).__name__ if order[:1] == ["self"] else function.__name__

        def read(name: str, value: Any) -> Any:
            return allowed(where, name, value, found[name]) if name in found else value

        read_args = [read(name, value) for name, value in zip(order, args, strict=False)]
        read_kwargs = {name: read(name, value) for name, value in kwargs.items()}
        return function(*read_args, *args[len(order) :], **read_kwargs)

    return checks  # pyright: ignore[reportReturnType]


def allowed(where: str, name: str, value: Any, kind: Kind) -> Any:
    """The value as it arrives, or the error that says what it must be."""
    arrives = kind.read(value)
    if arrives is REFUSED:
        raise ValueError(f"{where}: {name} (={shown(value)}) must be {kind.words}")
    return arrives


VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def shown(value: Any) -> str:
    """A value in an error: an array by its dtype and shape."""
    return f"{value.dtype}{list(value.shape)}" if has_dtype(value) else repr(value)


def has_dtype(value: Any) -> bool:
    """Whether a value is an array, of whatever library, or its description."""
    return hasattr(value, "dtype") and hasattr(value, "shape") and not isinstance(value, type)


def _kind(annotation: Any) -> Kind | None:
    """What an annotation allows; None for anything."""
    if annotation in KINDS:
        return KINDS[annotation]
    if annotation == lax.PrecisionLike:
        return Kind("a jax.lax.Precision, its name, a pair of them, or None", allowed_precision)
    if annotation == DTypeLike:
        return Kind("a dtype", _dtype)
    if annotation == DTypeLike | None:
        return _any_of([Kind("a dtype", _dtype), NOTHING])
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        parts = get_args(annotation)
        if arrays := [part for part in parts if _is_array(part)]:  # one for each class of arrays, and Python's numbers
            parts = (arrays[0], type(None)) if type(None) in parts else arrays[:1]
        kinds = [_kind(part) for part in parts]
        return None if None in kinds else _any_of([kind for kind in kinds if kind is not None])
    if origin is Annotated:
        base, limit = annotation.__origin__, annotation.__metadata__[-1]
        if isinstance(limit, str):  # the name of the function that checks it
            return None
        return _whole(limit) if base is int else _real(limit) if base is float else _sizes(limit)
    if origin is Sequence:
        return _sequence(_kind(get_args(annotation)[0]))
    if origin is Literal:
        words = get_args(annotation)
        among = lambda value: value if isinstance(value, str) and value in words else REFUSED
        return Kind(f"one of {', '.join(map(repr, words))}", among)
    if origin is Callable or annotation is Callable:
        return Kind("a function", lambda value: value if callable(value) else REFUSED)
    if _is_array(annotation):
        return _array(annotation)
    if origin is Mapping:
        return Kind("a mapping from names", lambda value: value if isinstance(value, Mapping) else REFUSED)
    if inspect.isclass(annotation) and annotation not in (Any, inspect.Parameter.empty, jax.Array, np.ndarray):
        return Kind(f"a {annotation.__name__}", lambda value: value if isinstance(value, annotation) else REFUSED)
    return None


def _is_array(annotation: Any) -> bool:
    return inspect.isclass(annotation) and issubclass(annotation, AbstractArray)


def _any_of(kinds: list[Kind]) -> Kind:
    def read(value: Any) -> Any:
        arriving = (kind.read(value) for kind in kinds)
        return next((arrives for arrives in arriving if arrives is not REFUSED), REFUSED)

    return Kind(", or ".join(kind.words for kind in kinds), read)


def _whole(least: int | None) -> Kind:
    fits = lambda value: is_int(value) and (least is None or value >= least)
    return Kind(_words(least), lambda value: int(value) if fits(value) else REFUSED)


def _words(least: int | None) -> str:
    return "an int" if least is None else f"an int >= {least}"


def _sizes(least: int) -> Kind:
    one = _whole(least)

    def read(value: Any) -> Any:
        if not is_sequence(value):
            return one.read(value)
        values = tuple(map(one.read, value))
        return values if values and not any(each is REFUSED for each in values) else REFUSED

    return Kind(f"{_words(least)}, or one for each axis", read)


def _sequence(of: Kind | None) -> Kind | None:
    if of is None:
        return None

    def read(value: Any) -> Any:
        values = tuple(map(of.read, value)) if is_sequence(value) else (REFUSED,)
        return REFUSED if any(each is REFUSED for each in values) else values

    return Kind(f"a sequence, each {of.words}", read)


def _real(limit: float | None = None) -> Kind:
    def read(value: Any) -> Any:
        array = has_dtype(value)
        number = _is(value.dtype, jnp.floating, jnp.integer) if array else isinstance(value, numbers.Real)
        if not number or isinstance(value, bool) or np.shape(value) != ():
            return REFUSED
        if isinstance(value, Tracer):
            return value
        if math.isnan(value) or (math.isinf(value) and not limit):
            return REFUSED
        return float(value) if array else value

    return Kind("one number, or inf" if limit else "one finite number", read)


def _is(dtype: Any, *kinds: Any) -> bool:
    return any(jnp.issubdtype(dtype, kind) for kind in kinds)


def _mesh_axis(value: Any) -> Any:
    try:
        return value if isinstance(value, str) and lax.axis_size(value) else REFUSED
    except NameError:
        return REFUSED


def _dtype(value: Any) -> Any:
    try:
        if value is not None and not has_dtype(value) and _is(np.dtype(value), np.number, np.bool_):
            return value
    except TypeError:
        pass
    return REFUSED


def allowed_precision(value: Any) -> Any:
    """What a product of matrices takes, which is asked once."""
    try:
        return value if _is_precision(value) else REFUSED
    except TypeError:  # no hash
        return REFUSED


@functools.lru_cache(maxsize=64, typed=True)
def _is_precision(value: Any) -> bool:
    one = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    try:
        jax.eval_shape(functools.partial(jnp.dot, precision=value), one, one)
    except (ValueError, TypeError, KeyError):
        return False
    return True


# What jaxtyping calls an array, in words; "Shaped" is of anything.
NUMBERS = {"Float": "floating-point numbers", "Int": "whole numbers", "Real": "real numbers", "Bool": "bools"}


def _array(annotation: Any) -> Kind:
    """An array of the dtypes and the axes that jaxtyping says: so many, or with a variadic one at least so many."""
    kind = annotation.__name__.partition("[")[0]
    axes = annotation.dim_str.split()
    fixed = [axis for axis in axes if not axis.startswith(("*", "..."))]

    def read(value: Any) -> Any:
        try:
            array = value if has_dtype(value) else np.asarray(value)
        except ValueError:  # ragged
            return REFUSED
        untyped = array is not value and array.dtype.kind in "iu" and kind == "Float"  # a list of Python's ints
        anything = kind == "Shaped" and (array is value or array.dtype.kind in "biufc")
        fits = anything or untyped or str(array.dtype) in annotation.dtypes
        rank = len(array.shape)
        return array if fits and (rank == len(fixed) or (rank > len(fixed) < len(axes))) else REFUSED

    shape = "" if axes == ["..."] else f" [{', '.join(axes)}]"
    return Kind(f"{NUMBERS.get(kind, 'numbers')}{shape}", read)


REAL = _array(Real[jax.Array, "..."])
KINDS: dict[Any, Kind] = {
    int: _whole(1),
    float: _real(),
    bool: Kind("True or False", lambda value: bool(value) if isinstance(value, bool | np.bool_) else REFUSED),
    str: Kind("a string", lambda value: value if isinstance(value, str) else REFUSED),
    type(None): NOTHING,
    None: NOTHING,
    MeshAxis: Kind("a mesh axis of the jax.shard_map around the call", _mesh_axis),
}

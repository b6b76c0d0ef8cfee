"""A function that is linear in each operand, as a primitive: each platform computes it and its derivatives in its way.

Its derivative in one operand is itself, of the tangent. The transpose of that is linear in the cotangent and in the
other operands, so it is such a function again; and so is either under `vmap`. Nothing is kept for the derivative but
the operands.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.interpreters import ad, batching
from jaxtyping import Array

from jaxattn.platforms import primitive_of, varying_alike

Function = Callable[..., Array]  # equal where it is the same function: a program is kept by it


def multilinear(function: Function, operands: Sequence[Array]) -> Array:
    """`function(*operands)`, traced when it is lowered, in the context of the platform that it is lowered for."""
    return multilinear_p.bind(*varying_alike(operands), call=function)[0]


@dataclasses.dataclass(frozen=True)
class Transposed:
    """Of the other operands and the result's cotangent: the cotangent of the operand at `place`, like `aval`."""

    function: Function
    place: int
    aval: Any

    def __call__(self, *arrays: Array) -> Array:
        *others, cotangent = arrays
        anywhere = ad.instantiate_zeros(ad.Zero(self.aval))
        return jax.vjp(lambda x: self.function(*self.operands(others, x)), anywhere)[1](cotangent)[0]

    def operands(self, others: Sequence[Any], mine: Any) -> list[Any]:
        return [*others[: self.place], mine, *others[self.place :]]


@dataclasses.dataclass(frozen=True)
class Vmapped:
    """A function under `vmap`."""

    function: Function
    axes: tuple[int | None, ...]

    def __call__(self, *arrays: Array) -> Array:
        return jax.vmap(self.function, self.axes)(*arrays)


def _run(*arrays: Array, call: Function) -> tuple[Array]:
    return (call(*arrays),)


multilinear_p = primitive_of("multilinear", _run, _run)


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, call: Function) -> tuple[Any, Any]:
    (output,) = multilinear_p.bind(*primals, call=call)
    moved = [k for k, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]
    terms = [multilinear_p.bind(*primals[:k], tangents[k], *primals[k + 1 :], call=call)[0] for k in moved]
    tangent = functools.reduce(ad.add_tangents, terms) if terms else ad.Zero(jax.typeof(output).to_tangent_aval())
    return [output], [tangent]


def _transpose(cotangents: Sequence[Any], *arrays: Any, call: Function) -> list[Any]:
    (place,) = (k for k, x in enumerate(arrays) if ad.is_undefined_primal(x))
    others = [*arrays[:place], *arrays[place + 1 :]]
    if isinstance(cotangents[0], ad.Zero):
        found = ad.Zero(arrays[place].aval)
    elif isinstance(call, Transposed) and place == len(others):  # transposed twice in the same operand
        (found,) = multilinear_p.bind(*call.operands(others, cotangents[0]), call=call.function)
    else:
        (found,) = multilinear_p.bind(*others, cotangents[0], call=Transposed(call, place, arrays[place].aval))
    return [found if k == place else None for k in range(len(arrays))]


def _batch(arrays: Sequence[Any], dims: Sequence[int | None], *, call: Function) -> tuple[Any, Any]:
    return multilinear_p.bind(*arrays, call=Vmapped(call, tuple(dims))), [0]


ad.primitive_jvps[multilinear_p] = _jvp
ad.primitive_transposes[multilinear_p] = _transpose
batching.primitive_batchers[multilinear_p] = _batch

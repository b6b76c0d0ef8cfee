"""The record of a layer: all that the tests know of it, for the tables of many files."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Geometry(NamedTuple):
    """A call of the function and of its loops, which must agree: on x [*grid, features], without a batch."""

    grid: tuple[int, ...]
    params: Mapping[str, Any]  # in the family "mix" their shapes, in "attention" arrays
    kwargs: Mapping[str, Any] = {}  # of the function
    loop: Mapping[str, Any] = {}  # of the loops


class Step(NamedTuple):
    """A module that is trained for a step, and the loops that it is: of {"x": x, **params} or of (x, params)."""

    kwargs: Mapping[str, Any]
    shape: tuple[int, ...]  # of x, without a batch
    loop: Callable[..., np.ndarray]


class Whole(NamedTuple):
    """A module that can't be split over a mesh, and a pattern of the error that says why."""

    kwargs: Mapping[str, Any]
    reason: str


class Refused(NamedTuple):
    """Parameters or keywords that the function refuses, and a pattern of its error.

    x is [5, 5, 4] in the family "mix", and the parameters are ones of these shapes. In "attention" it is [4, 5, 4],
    and these replace some of `projections()`; None takes one away.
    """

    params: Mapping[str, Any]
    kwargs: Mapping[str, Any]
    message: str


class LayerCase(NamedTuple):
    """All that the tests know of one layer."""

    function: Callable[..., Any]  # of `jaxattn.zoo`
    module: Callable[..., Any]  # of `jaxattn.nn`
    # How its loops are called, and by which tests: loop(p), with p["x"] (test_zoo_mix, test_nn_zoo_mix);
    # loop(x, params) (test_zoo_attention, test_nn_zoo_attention); or as test_quadratic does
    family: Literal["mix", "attention", "quadratic"]
    loop: Callable[..., np.ndarray]
    geometries: Mapping[str, Geometry]  # by name; of several dimensions, and one name ends in " 2d"
    step: Step | None  # None: a file of tests of its own trains it
    call: Mapping[str, Any]  # what the function takes beside `X`: every argument, but precision and the like
    arguments: Mapping[str, Any]  # what the module's constructor needs, for inputs like `X`
    counts: Sequence[tuple[Mapping[str, Any], int]]  # a module's arguments, and how many parameters it has
    split: Sequence[Mapping[str, Any]] | Whole  # modules of 4 features that are split along an axis of (8, 5)
    errors: Sequence[Refused] = ()  # of the function
    refused: Sequence[tuple[Callable[..., Any], str]] = ()  # of the module: its constructor, and the error's pattern
    takes: Mapping[str, tuple[str, ...]] = {}  # arguments of names of its own: what of test_bad_arguments they take


GRID = (4, 6)


def numbers(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(shape)).uniform(0.1, 1, shape), jnp.float32)


def named(**shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    return {name: numbers(*shape) for name, shape in shapes.items()}


X = numbers(2, *GRID, 8)
PROJECTIONS = named(query=(8, 2, 4), key=(8, 2, 4), value=(8, 2, 4), out=(2, 4, 6))

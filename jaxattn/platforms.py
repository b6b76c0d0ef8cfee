"""A function as a primitive that is traced again for each platform that a program is lowered for."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jaxattn import machine


def primitive_of(name: str, run: Callable[..., tuple], shapes: Callable[..., tuple]) -> Primitive:
    """`run(*arrays, call=...)` as a primitive of several results, without derivatives; `shapes` is one of the same
    shapes, and `call` can be hashed.

    Of a program for several platforms, each has its own tiles, dtypes, and ways to compute.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(lambda *arrays, call: jax.jit(run, static_argnames="call")(*arrays, call=call))
    lower = mlir.lower_fun(run, multiple_results=True)
    for platform in machine.PLATFORMS:
        mlir.register_lowering(primitive, functools.partial(_lower, lower, platform), platform=platform)

    @functools.lru_cache(maxsize=1024)
    def known(mesh: Any, avals: tuple[Any, ...], call: Any) -> Any:
        return jax.make_jaxpr(functools.partial(shapes, call=call))(*avals).out_avals

    # the mesh is in what comes out
    primitive.def_abstract_eval(lambda *avals, call: known(jax.sharding.get_abstract_mesh(), avals, call))
    return primitive


def _lower(lower: Callable, platform: str, *arguments: Any, **params: Any) -> Any:
    with machine.lowered_for(platform):
        return lower(*arguments, **params)


def varying_alike(arrays: Sequence[Any]) -> list[Any]:
    """The arrays for a primitive: inside a `shard_map` all of them vary where one does."""
    varying = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))
    missing = [tuple(sorted(varying - jax.typeof(x).manual_axis_type.varying)) for x in arrays]
    return [lax.pcast(x, axes, to="varying") if axes else x for x, axes in zip(arrays, missing, strict=True)]

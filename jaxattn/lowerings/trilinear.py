"""Derivatives of a form T that is linear in each of three arguments, as one JAX primitive closed under differentiation.

∂T by one argument is bilinear in the two that are left, and its transposes are the derivatives by those: so reverse and
forward mode of any order stay inside the primitive, and none differentiates the loop that computes it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array


def trilinear(name: str, arguments: str, evaluate: Callable, alike: Callable, batch: Callable) -> Callable[..., Array]:
    """The function `(wrt, first, second, **static)` to ∂T/∂`wrt`, given the other two arguments in their order.

    Args:
      name: of the primitive, as jaxprs show it.
      arguments: the three, a letter each.
      evaluate: `(first, second, *, wrt, **static)` to ∂T/∂`wrt`.
      alike: the same, to anything of its shape, dtype, sharding and varying mesh axes.
      batch: `(primitive, arrays, dims, *, wrt, **static)` to the array and its mapped axis: the rule of `vmap`.
    """
    primitive = Primitive(name)

    def bind(wrt: str, first: Array, second: Array, **static: Any) -> Array:
        return primitive.bind(*vary_together([first, second]), wrt=wrt, **static)

    def transpose(which: int, cotangent: Any, first: Any, second: Any, *, wrt: str, **static: Any) -> Array:
        """In the first argument (0) or the second (1)."""
        given = dict(zip(others(arguments, wrt), (first, second), strict=True)) | {wrt: cotangent}
        name = others(arguments, wrt)[which]
        return primitive.bind(*(given[other] for other in others(arguments, name)), wrt=name, **static)

    @functools.lru_cache(maxsize=1024)
    def known(mesh: Any, avals: tuple[Any, ...], static: tuple[tuple[str, Any], ...]) -> Any:
        return jax.make_jaxpr(lambda *arrays: alike(*arrays, **dict(static)))(*avals).out_avals[0]

    def abstract(*avals: Any, **static: Any) -> Any:
        return known(jax.sharding.get_abstract_mesh(), avals, tuple(static.items()))  # the mesh is in what comes out

    primitive.def_impl(lambda *arrays, **static: jax.jit(evaluate, static_argnames=tuple(static))(*arrays, **static))
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, mlir.lower_fun(evaluate, multiple_results=False))
    batching.primitive_batchers[primitive] = functools.partial(batch, primitive)
    ad.defbilinear(primitive, functools.partial(transpose, 0), functools.partial(transpose, 1))
    return bind


def others(arguments: str, wrt: str) -> list[str]:
    """The two arguments that are not `wrt`.

    >>> others("xwy", "w")
    ['x', 'y']
    """
    return [name for name in arguments if name != wrt]


def vary_together(arrays: Sequence[Array]) -> list[Array]:
    """Inside a `shard_map`, all of them vary where one does."""
    axes = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    missing = [tuple(sorted(frozenset().union(*axes) - mine)) for mine in axes]
    return [lax.pcast(x, m, to="varying") if m else x for x, m in zip(arrays, missing, strict=True)]

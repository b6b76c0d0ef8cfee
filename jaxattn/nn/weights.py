"""How the zoo's modules draw their parameters, and read a size."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

default_kernel_init = nnx.initializers.lecun_normal()
default_bias_init = nnx.initializers.zeros_init()
small_init = nnx.initializers.truncated_normal(0.02)


def weight(
    init: Callable[..., Any], rngs: nnx.Rngs, before: Sequence[int], after: Sequence[int], dtype: Any
) -> nnx.Param:
    """A parameter `[*before, *after]`, drawn as the matrix that it is, so that an initialiser sees its true fans.

    >>> weight(default_kernel_init, nnx.Rngs(0), (8,), (2, 3), jnp.float32).shape
    (8, 2, 3)
    """
    matrix = init(rngs.params(), (math.prod(before), math.prod(after)), dtype)
    return nnx.Param(matrix.reshape(*before, *after))


def linear(
    layer: nnx.Module,
    name: str,
    before: Sequence[int],
    after: Sequence[int],
    *,
    bias: bool,
    init: Callable[..., Any],
    rngs: nnx.Rngs,
    dtype: Any,
) -> None:
    """Give a layer the parameter `name`, `[*before, *after]`, and if asked for `name`_bias, `[*after]`, of zeros."""
    setattr(layer, name, weight(init, rngs, before, after, dtype))
    if bias:
        setattr(layer, f"{name}_bias", nnx.Param(jnp.zeros(after, dtype)))


def ints(size: int | Sequence[int]) -> tuple[int, ...]:
    """An int is one axis."""
    return (size,) if isinstance(size, int) else tuple(size)


def frozen(value: Any) -> Any:
    """Lists as tuples: what a module keeps beside its arrays is part of its graph, which `jax.jit` hashes."""
    return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value


def divided(layer: nnx.Module, name: str, groups: int, features: int, of: str = "in_features") -> int:
    """features / groups, or an error that names them."""
    if groups < 1 or features % groups:
        raise ValueError(f"{type(layer).__name__}: {name} (={groups}) must divide {of} (={features})")
    return features // groups

"""How arrays of different ranks meet inside the library: as its equations say, whatever a user forbids outside."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax

Function = TypeVar("Function", bound=Callable[..., Any])


def broadcasting(function: Function) -> Function:
    """The function, which broadcasts on purpose: `jax_numpy_rank_promotion` stays the user's for the user's own code.

    >>> import jax.numpy as jnp
    >>> with jax.numpy_rank_promotion("raise"):
    ...     print(broadcasting(jnp.add)(jnp.ones((2, 3)), jnp.ones(3)).shape)
    (2, 3)
    """

    @functools.wraps(function)
    def allowed(*arguments, **options):
        with jax.numpy_rank_promotion("allow"):
            return function(*arguments, **options)

    return allowed  # pyright: ignore[reportReturnType]

"""What the zoo's modules share: their parameters as the mapping that the zoo's functions take."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def operands(layer: nnx.Module, *inputs, dtype: Any = None) -> tuple[Any, ...]:
    """`inputs` and the layer's own parameters by name, all in one floating dtype: `dtype`, or the promoted one.

    >>> import jax.numpy as jnp
    >>> class Scale(nnx.Module):
    ...     def __init__(self):
    ...         self.scale = nnx.Param(jnp.ones(3))
    >>> x, params = operands(Scale(), jnp.ones((2, 3), jnp.bfloat16))
    >>> x.dtype, params["scale"].dtype
    (dtype('float32'), dtype('float32'))
    """
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    arrays = [jnp.asarray(x) for x in inputs]
    if dtype is None:
        dtype = jnp.result_type(*(x.dtype for x in [*arrays, *jax.tree.leaves(params)]))
        dtype = dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.promote_types(dtype, jnp.float32)
    return *(x.astype(dtype) for x in arrays), jax.tree.map(lambda p: p.astype(dtype), params)

"""A sink: a logit in the denominator of softmax that has no key and no value (gpt-oss; Xiao et al. 2023, 2309.17453).

    y = sum_j exp(s_j) v_j / (exp(sink) + sum_j exp(s_j)) = sigmoid(lse - sink) · (y without it)

So it is a factor of what any backend computes, made of its lse, and no kernel knows of it.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxattn.kernels import primitive
from jaxattn.kernels.backend import Backend
from jaxattn.kernels.operands import Operands, Options


def attend(operands: Operands, options: Options, backend: Backend) -> tuple[Array, ...]:
    """The output [*batch, *queries, heads, value_dim]; with `options.residuals` also lse, the sink included."""
    if operands.sink is None:
        return primitive.attend(operands, options, backend)
    with_lse = dataclasses.replace(options, residuals=True)
    output, lse = primitive.attend(operands._replace(sink=None), with_lse, backend)
    some = lse != -jnp.inf  # else there is the sink alone, and the output is zero
    seen = jnp.where(some, lse, 0)
    share = jax.nn.sigmoid(seen - operands.sink)[..., None]
    total = jnp.where(some, jnp.logaddexp(seen, operands.sink), operands.sink)
    return ((output.astype(share.dtype) * share).astype(output.dtype), total)[: 1 + options.residuals]

"""A sink: a logit in the denominator of softmax that has no key and no value (gpt-oss; Xiao et al. 2023, 2309.17453).

    y = sum_j exp(s_j) v_j / (exp(sink) + sum_j exp(s_j)) = sigmoid(lse - sink) · (y without it)

So it is a factor of what any backend computes, made of its lse, and no kernel knows of it. All of it is a primitive
whose derivatives are those of its parts, for one thing that they do not know: lse does not depend on the values, in
which the whole is linear.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad
from jaxtyping import Array

from jaxattn.kernels import primitive
from jaxattn.kernels.backend import Backend
from jaxattn.kernels.operands import Operands, Options
from jaxattn.kernels.primitive import Call, attend_p
from jaxattn.promotion import broadcasting


def attend(operands: Operands, options: Options, backend: Backend) -> tuple[Array, ...]:
    """The output [*batch, *queries, heads, value_dim]; with `options.residuals` also lse, the sink included."""
    if operands.sink is None:
        return primitive.attend(operands, options, backend)
    if (bound := primitive.bound(operands, options, backend)) is not None:
        return tuple(sunk_p.bind(*bound[0], call=bound[1]))
    output, lse = primitive.attend(operands._replace(sink=None), _with_lse(options), backend)
    return _shared(output, lse, operands.sink)[: 1 + options.residuals]


def _with_lse(options: Options) -> Options:
    return dataclasses.replace(options, residuals=True)


def _shared(output: Array, lse: Array, sink: Array) -> tuple[Array, Array]:
    """Output and lse with what the sink takes of them."""
    some = lse != -jnp.inf  # else there is the sink alone, and the output is zero
    seen = jnp.where(some, lse, 0)
    share = jax.nn.sigmoid(seen - sink)[..., None]
    total = jnp.where(some, jnp.logaddexp(seen, sink), sink)
    return (output.astype(share.dtype) * share).astype(output.dtype), total


@broadcasting
def _attend(call: Call, *arrays: Any) -> tuple[Array, ...]:
    given = dict(zip(call.names, arrays, strict=True))
    sink = given.pop("sink")
    inner = call._replace(names=tuple(given), options=_with_lse(call.options), vmaps=())
    output, lse = attend_p.bind(*given.values(), call=inner)
    return _shared(output, lse, sink)[: 1 + call.options.residuals]


def _some(call: Call, arrays: Sequence[Any], there: Sequence[int]) -> Any:
    """It as a function of some of its arrays."""

    def function(*mine: Any) -> tuple[Array, ...]:
        given = list(arrays)
        for k, x in zip(there, mine, strict=True):
            given[k] = x
        return tuple(primitive.vmapped(_attend, call)(*given))

    return function


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, call: Call) -> tuple[Any, Any]:
    there = [k for k, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]
    if not there:
        output = sunk_p.bind(*primals, call=call)
        return output, [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in output]
    return jax.jvp(_some(call, primals, there), [primals[k] for k in there], [tangents[k] for k in there])


def _transpose(cotangents: Sequence[Any], *arrays: Any, call: Call) -> list:
    there, _ = primitive.transposed(arrays, call)
    anywhere = [jnp.zeros(arrays[k].aval.shape, arrays[k].aval.dtype) for k in there]
    pull = jax.vjp(_some(call, arrays, there), *anywhere)[1]
    found = iter(pull(tuple(ad.instantiate_zeros(x) for x in cotangents)))
    return [next(found) if k in there else None for k in range(len(arrays))]


sunk_p = primitive.primitive_of("windowed_attention_with_sink", _attend, primitive.shapes_of_attention)
ad.primitive_jvps[sunk_p] = _jvp
ad.primitive_transposes[sunk_p] = _transpose

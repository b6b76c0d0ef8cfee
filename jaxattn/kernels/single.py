"""Attention of one query to all keys, as decoding asks for: on a CPU, each key and each value read once, none moved.

A product batched over heads has its operands transposed, heads first: for one query that costs more than the product.
Here the scores of all heads are one product with a block-diagonal matrix of the query, and the output is summed key by
key. The zeros between the blocks would carry a NaN of one head into the scores of the others, so scores with a NaN
among them are computed again, head by head. Scores are [*batch, keys, heads].
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxattn import machine
from jaxattn.kernels.backend import Cost
from jaxattn.kernels.loop import zeros
from jaxattn.kernels.operands import Operands, Options, hiding_score, is_seen, soft_capped
from jaxattn.normalize import softmax
from jaxattn.sizes import planned

FIELDS = {"query", "key", "value", "scale", "soft_cap", "bias", "slot_mask", "query_segments", "key_segments"}
LEAST = 2**16  # numbers of the keys, from which on it is quicker than a batched product


def fits(operands: Operands, options: Options) -> bool:
    """Whether it can, and is quicker: one query that sees every key, on a CPU, in a dtype that it has products in."""
    given = {name for name, x in operands._asdict().items() if x is not None}
    return (
        machine.backend() == "cpu"
        and (options.window, options.queries, options.normalize) == (None, (1,), softmax)
        and not (given - FIELDS or options.score_mod or options.dropout_rate)
        and operands.query.dtype == operands.key.dtype == operands.value.dtype
        and operands.query.dtype in (jnp.float32, jnp.float64)
        and math.prod(map(planned, operands.key.shape)) >= LEAST
    )


def forward(operands: Operands, options: Options) -> tuple[Array, ...]:
    """The output [*batch, 1, heads, value_dim]; with `options.residuals` also lse [*batch, 1, heads]."""
    query, value = operands.query, operands.value
    scores = _scores(operands, options)
    most = scores.max(-2, keepdims=True)
    weights = jnp.exp(scores - most)
    total, some = weights.sum(-2), is_seen(most[..., 0, :])
    grouped = weights.reshape(*value.shape[:-1], -1, 1)  # [*batch, keys, key_heads, group, 1]

    def add(i: Array, output: Array) -> Array:
        weight, of_key = (lax.dynamic_index_in_dim(x, i, value.ndim - 3, keepdims=False) for x in (grouped, value))
        return output + weight * of_key[..., None, :]

    shape = (*value.shape[:-3], *grouped.shape[-3:-1], value.shape[-1])
    output = lax.fori_loop(0, value.shape[-3], add, zeros(shape, value.dtype, operands))
    output = output.reshape(*query.shape[:-1], value.shape[-1]) * jnp.where(some, 1 / total, 0)[..., None, :, None]
    lse = jnp.where(some, jnp.log(total) + most[..., 0, :], -jnp.inf)
    return (output, lse[..., None, :])[: 1 + options.residuals]


def _scores(operands: Operands, options: Options) -> Float[Array, "*batch keys heads"]:
    key, (*batch, keys, key_heads, dim) = operands.key, operands.key.shape
    query = (operands.scale * operands.query).astype(key.dtype).reshape(*batch, key_heads, -1, dim)
    blocks = jnp.einsum("...kgd,kl->...ldkg", query, jnp.eye(key_heads, dtype=query.dtype))
    blocks = blocks.reshape(*batch, key_heads * dim, -1)
    scores = jnp.matmul(key.reshape(*batch, keys, key_heads * dim), blocks, precision=options.precision)

    def by_head() -> Array:
        return (query[..., None, :, :, :] * key[..., None, :]).sum(-1).reshape(scores.shape)

    scores = lax.cond(jnp.isnan(scores).any(), by_head, lambda: scores)
    if operands.bias is not None:
        scores = scores + _by_key(operands.bias).astype(scores.dtype)
    seen = is_seen(scores) & _seen(operands)
    scores = soft_capped(jnp.where(seen, scores, 0), operands.soft_cap)
    return jnp.where(seen, scores, hiding_score(scores.dtype))


def _seen(operands: Operands) -> Bool[Array, "*#batch #keys #heads"]:
    seen = jnp.ones((1, 1), bool)
    if operands.slot_mask is not None:
        seen = seen & _by_key(operands.slot_mask)
    if operands.query_segments is not None and operands.key_segments is not None:
        seen = seen & (operands.query_segments == operands.key_segments)[..., None]
    return seen


def _by_key(x: Array) -> Array:
    """[..., 1, heads|1, keys|1] as scores."""
    return jnp.swapaxes(x[..., 0, :, :], -1, -2)


def cost(operands: Operands) -> Cost:
    """One step, that holds the scores; the zeros between the blocks are multiplied as well."""
    (*batch, keys, key_heads, dim), heads = operands.key.shape, operands.query.shape[-2]
    scores = math.prod(batch) * keys * heads
    flops = 2 * scores * (key_heads * dim + operands.value.shape[-1])
    return Cost((1,), keys, 1, scores * operands.query.dtype.itemsize, flops)

"""The readable attention: gather each query's keys, multiply, normalise, multiply.

It materialises the gathered keys, `N × window × head_dim`; `kernels/xla.py` is the one that does not. Queries are
flattened to one axis n and slots to one axis w; keys and values are repeated for the h query heads.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from jaxattn.kernels.backend import Backend, Cost
from jaxattn.kernels.operands import (
    Operands,
    Options,
    apply_normalizer,
    dropout_factors,
    embedding_parts,
    empty_result,
    modified,
    soft_capped,
    statistics_dtype,
    without_hidden,
)
from jaxattn.kernels.tables import by_slot, spread
from jaxattn.normalize import logsumexp
from jaxattn.window import outer


def attend(operands: Operands, options: Options) -> tuple[Array, ...]:
    """The output [*batch, *queries, heads, value_dim]; with `options.residuals` also lse [*batch, *queries, heads]."""
    if 0 in operands.query.shape[:-1]:
        return empty_result(operands, options)
    scores, mask = masked_scores(operands, options)
    weight = _weights(scores, mask, operands, options).astype(operands.value.dtype)
    value = _gather(operands.value, options)
    if operands.extra_value is not None:
        value = _append(value, operands.extra_value)
    value = _seen(value, mask)
    output = _einsum("...nhw,...nwhd->...nhd", weight, value, options).astype(value.dtype)
    grid = operands.query.shape[:-1]
    output = output.reshape(*grid, value.shape[-1])
    return (output, logsumexp(scores, mask).reshape(grid)) if options.residuals else (output,)


def _weights(scores: Array, mask: Array, operands: Operands, options: Options) -> Array:
    weight = apply_normalizer(options.normalize, scores, mask)
    if options.dropout_rate > 0:
        *batch, queries, heads, slots = weight.shape
        shape = (*batch, heads, slots)
        kept = lambda query: dropout_factors(operands, options, query, shape, weight.dtype)
        weight = weight * jnp.moveaxis(jax.vmap(kept)(jnp.arange(queries)), 0, -3)
    return weight


def masked_scores(
    operands: Operands, options: Options
) -> tuple[Float[Array, "*batch queries heads slots"], Bool[Array, "*batch queries heads slots"]]:
    """The final scores of slots and then extra tokens, and who takes part."""
    mask = _mask(operands, options)
    mask = jnp.broadcast_to(mask, (*_flat(operands.query, options).shape[:-1], mask.shape[-1]))
    scores = _products(operands, _seen(_gather(operands.key, options), mask), options)
    scores = scores + _position_terms(operands, options, scores)
    scores, mask = without_hidden(scores, mask)
    scores = soft_capped(scores, operands.soft_cap)
    if options.score_mod is not None:
        scores = _modify(scores, options)
    scores, mask = without_hidden(scores, mask)
    if operands.extra_key is not None:
        extra = jnp.expand_dims(operands.extra_key, -4)  # the same for every query
        extra = jnp.repeat(extra, scores.shape[-2] // extra.shape[-2], axis=-2)
        extra = soft_capped(_products(operands, extra, options), operands.soft_cap)
        scores = jnp.concatenate([scores, extra], -1)
        seen = jnp.ones_like(extra, bool)
        if operands.extra_mask is not None:
            seen = seen & jnp.expand_dims(_flat(operands.extra_mask, options, trailing=1), -2)
        mask = jnp.concatenate([mask, seen], -1)
    return scores, mask


def _products(
    operands: Operands, key: Float[Array, "*#batch #queries slots heads head_dim"], options: Options
) -> Float[Array, "*batch queries heads slots"]:
    """scale·(q·k), with the keys of every query."""
    return operands.scale * _einsum("...nhd,...nwhd->...nhw", _flat(operands.query, options), key, options)


def _seen(
    x: Float[Array, "*batch queries slots key_heads dim"], mask: Bool[Array, "*batch queries heads slots"]
) -> Float[Array, "*batch queries slots heads dim"]:
    """What each query head sees of the keys, or values, of its key head; zeros of what is masked, so that a NaN stays
    with those that see it."""
    x = jnp.repeat(x, mask.shape[-2] // x.shape[-2], axis=-2)
    return jnp.where(jnp.swapaxes(mask, -1, -2)[..., None], x, jnp.zeros((), x.dtype))


def _position_terms(operands: Operands, options: Options, scores: Array) -> Array:
    """q·r[j-i] + relative_bias[j-i] + bias, to be broadcast against the scores."""
    total = jnp.zeros((1, 1, 1), scores.dtype)
    first, sizes = [axis.relative for axis in options.axes], [axis.size for axis in options.axes]
    if operands.key_embedding is not None:
        parts = [part for _, part in embedding_parts(operands, options)]
        embedding = parts[0] if len(parts) == 1 else functools.reduce(jnp.add, spread(parts))
        table = by_slot(embedding, [entry() for entry in first], sizes)  # [heads|1, n, w, head_dim]
        query = _flat(operands.query, options)
        table = jnp.broadcast_to(table, (query.shape[-2], *table.shape[1:]))
        total = total + _einsum("...nhd,hnwd->...nhw", query, table, options)
    if operands.relative_bias is not None:
        table = by_slot(operands.relative_bias, [entry() for entry in first], sizes)
        total = total + jnp.swapaxes(table, 0, 1).astype(scores.dtype)
    if operands.bias is not None:
        total = total + _flat_slots(operands.bias, options).astype(scores.dtype)
    return total


def _mask(operands: Operands, options: Options) -> Array:
    """Who takes part, [..., n, heads|1, w]. What stands outside under "zero" has no key, so no key mask or segment."""
    inside = _inside(options)[:, None]
    mask = jnp.asarray(np.logical_and.reduce(outer([axis.visible() for axis in options.axes])))
    mask = mask.reshape(inside.shape)
    if operands.key_mask is not None:
        mask = mask & (jnp.expand_dims(_gather(operands.key_mask, options, trailing=0), -2) | ~inside)
    if operands.slot_ranges is not None:
        ranges = _flat(operands.slot_ranges, options)  # [*batch|1, n, rank, 2]
        sizes = tuple(axis.size for axis in options.axes)
        slot = jnp.indices(sizes, jnp.int32).reshape(len(sizes), -1)
        seen = (ranges[..., :1] <= slot) & (slot < ranges[..., 1:])
        mask = mask & jnp.expand_dims(seen.all(-2), -2)
    if operands.slot_mask is not None:
        mask = mask & _flat_slots(operands.slot_mask, options)
    if operands.query_segments is not None and operands.key_segments is not None:
        query = _flat(operands.query_segments, options, trailing=0)
        same = query[..., None] == _gather(operands.key_segments, options, trailing=0)
        mask = mask & (jnp.expand_dims(same, -2) | ~inside)
    return mask


def _modify(scores: Array, options: Options) -> Array:
    """`options.score_mod`, with indices that broadcast against the scores [..., n, heads, w]."""
    shape = _inside(options).shape
    query = np.unravel_index(np.arange(shape[0]), tuple(len(axis.start) for axis in options.axes))
    position = outer([axis.named_keys() for axis in options.axes])
    return modified(
        options,
        scores,
        jnp.arange(scores.shape[-2])[:, None],
        [jnp.asarray(index)[:, None, None] for index in query],
        [jnp.asarray(index.reshape(shape))[:, None] for index in position],
    )


def _inside(options: Options) -> np.ndarray:
    """Whether a slot holds a key of the grid, [n, w]."""
    inside = np.logical_and.reduce(outer([axis.keys() >= 0 for axis in options.axes]))
    return inside.reshape(math.prod(options.queries), math.prod(axis.size for axis in options.axes))


def _gather(x: Array, options: Options, trailing: int = 2) -> Array:
    """[*batch, *keys, ...] by slot, [*batch, n, w, ...]; zeros outside. `trailing` axes follow the grid."""
    inside = _inside(options)
    index = np.ravel_multi_index(
        outer([np.maximum(axis.keys(), 0) for axis in options.axes]), tuple(axis.length for axis in options.axes)
    )
    x, dtype = _flat(x, options, trailing), x.dtype
    if jnp.issubdtype(dtype, jnp.floating):
        x = x.astype(statistics_dtype(dtype))  # the transpose of gathering is a sum
    axis = x.ndim - trailing - 1
    if inside.size == 0:  # jnp.take would give x
        return jnp.zeros((*x.shape[:axis], *inside.shape, *x.shape[axis + 1 :]), dtype)
    picked = jnp.take(x, index.reshape(inside.shape), axis=axis).astype(dtype)
    return jnp.where(inside.reshape(*inside.shape, *[1] * trailing), picked, jnp.zeros((), dtype))


def _flat(x: Array, options: Options, trailing: int = 2) -> Array:
    """The grid, followed by `trailing` axes, as one axis."""
    cut = x.ndim - trailing
    first = cut - len(options.axes)
    return x.reshape(*x.shape[:first], math.prod(x.shape[first:cut]), *x.shape[cut:])


def _flat_slots(x: Array, options: Options) -> Array:
    """[..., *queries|1, heads|1, *slots|1] as [..., n, heads|1, w]."""
    rank = len(options.axes)
    queries, slots = (tuple(map(n, options.axes)) for n in (lambda axis: len(axis.start), lambda axis: axis.size))
    batch, heads = x.shape[: -2 * rank - 1], x.shape[-rank - 1]
    x = jnp.broadcast_to(x, (*batch, *queries, heads, *slots))
    return x.reshape(*batch, math.prod(queries), heads, math.prod(slots))


def _append(
    value: Shaped[Array, "*batch queries slots heads dim"], extra: Shaped[Array, "*batch extra heads dim"]
) -> Shaped[Array, "*batch queries slots+extra heads dim"]:
    """Extra tokens after the slots of every query."""
    extra = jnp.expand_dims(extra, -4)
    shape = (*value.shape[:-3], extra.shape[-3], *value.shape[-2:])
    return jnp.concatenate([value, jnp.broadcast_to(extra, shape)], -3)


def _einsum(equation: str, left: Array, right: Array, options: Options) -> Array:
    dtype = statistics_dtype(left.dtype)
    return jnp.einsum(equation, left, right, precision=options.precision, preferred_element_type=dtype)


def _cost(operands: Operands, options: Options) -> Cost:
    """All queries at once, with the keys and values of each."""
    query, value_dim = operands.query, operands.value.shape[-1]
    extra = 0 if operands.extra_key is None else operands.extra_key.shape[-3]
    columns = math.prod(axis.size for axis in options.axes) + extra
    *_, heads, head_dim = query.shape
    rows = math.prod(query.shape[:-2])
    held = rows * columns * heads * ((head_dim + value_dim) * query.dtype.itemsize + 4)
    return Cost(options.queries, columns, 1, held, 2 * rows * heads * columns * (head_dim + value_dim))


REFERENCE = Backend(
    name="reference", supports=lambda operands, options: None, forward=attend, backward=None, cost=_cost
)

"""Scores with keys first, [keys, (head, query)], as the backward kernel has them, and the forward one where that costs
less, as with four heads in a block: all of them fill the columns of one product.

    Sᵀ = scale·K·Qᵀ + table,  P = softmax over keys,  y = Pᵀ·V

Queries are stacked block-diagonally, each head in its own lanes. Sums over keys are plain additions, and weights are
normalised before they meet the values.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxattn.kernels.operands import hiding_score
from jaxattn.kernels.tpu.block import F32, Numbers, Tile, capped, matched, own, product, put
from jaxattn.kernels.tpu.inputs import Inputs
from jaxattn.kernels.tpu.plan import Plan


def scores(given: Inputs, tile: Tile) -> jax.Array:
    """[keys, (head, query)], in units of log 2, without a soft cap."""
    s = product(given.keys(tile), given.stacked(given.query, tile), (1, 1), given.precision)
    s = s * given.numbers[Numbers().scale] + given.table[tile.pattern, given.row, 0]
    if given.key_codes is None:
        return s
    mine, theirs = given.codes(tile)
    mine = None if mine is None else jnp.concatenate([mine] * given.plan.heads.abreast, 0)
    seen = matched(mine, theirs, s.shape[1], given.plan.extra_places, keys_first=True)
    return jnp.where(seen, s, hiding_score(F32))


def softmax(s: jax.Array, some_see_nothing: bool) -> jax.Array:
    """Over the keys; zeros for a query that sees none."""
    maximum = s.max(0, keepdims=True)
    p = jnp.exp2(s - maximum)
    share = 1.0 / p.sum(0, keepdims=True)
    return p * (jnp.where(maximum <= hiding_score(F32), 0.0, share) if some_see_nothing else share)


def mixed(weights: jax.Array, values: jax.Array, plan: Plan, precision: Any) -> jax.Array:
    """Pᵀ·V, [queries, lanes], by one product for all heads, of which each head takes its own lanes."""
    y = product(weights, values, (0, 0), precision)  # [(head, query), lanes]
    return own([y[n : n + plan.queries] for n in range(0, len(y), plan.queries)], plan.heads)


def mixed_apart(weights: jax.Array, values: jax.Array, plan: Plan, precision: Any) -> jax.Array:
    """The same as (Vᵀ·P)ᵀ, where a few heads' queries fill the columns of a matrix unit: then only the rows of Vᵀ that
    are those heads' own go through it, and not all lanes."""
    heads, queries, together = plan.heads, plan.queries, plan.apart
    rows, columns, transposed = together * heads.dim, together * queries, values.T
    parts = [
        product(transposed[n * rows : (n + 1) * rows], weights[:, n * columns : (n + 1) * columns], (1, 0), precision)
        for n in range(-(-heads.abreast // together))
    ]
    if (missing := columns - parts[-1].shape[1]) > 0:
        parts[-1] = jnp.concatenate([parts[-1], jnp.zeros((len(parts[-1]), missing), F32)], 1)
    y = jnp.concatenate(parts, 0).T  # [(head of those together, query), lanes]
    return own([y[n : n + queries] for n in range(0, columns, queries)], heads)


def phases(
    given: Inputs, output: Any, weights: Any, *, soft_cap: bool, some_see_nothing: bool
) -> tuple[Callable[[Tile], None], ...]:
    """What the forward kernel does with a tile: first its weights, then their products with the values."""

    def score(tile: Tile) -> None:
        s = scores(given, tile)
        s = capped(s, given.numbers)[0] if soft_cap else s
        weights[tile.at] = softmax(s, some_see_nothing).astype(given.dtype)

    def mix(tile: Tile) -> None:
        by = mixed_apart if given.plan.apart else mixed
        y = by(weights[tile.at], given.values(tile), given.plan, given.precision)
        put(output, tile, y, given.interpret)

    return score, mix

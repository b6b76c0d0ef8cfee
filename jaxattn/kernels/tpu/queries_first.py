"""Scores with queries first, [queries, keys], one head after the other, as the forward kernel has them where lse is
asked for, or where that costs less.

    S = scale·Q·Kᵀ + table,  P = exp(S - max),  y = P·V / P·1

Values carry ones in the lanes of the other heads: so the product with them is also the sum of the weights, for nothing.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxattn.kernels.operands import hiding_score
from jaxattn.kernels.tpu.block import F32, LOG2E, Numbers, Tile, by_head, capped, matched, own, product, put
from jaxattn.kernels.tpu.inputs import Inputs
from jaxattn.kernels.tpu.plan import LANES

reciprocal = getattr(pltpu, "reciprocal", None) or pl.reciprocal  # where jax 0.12 has it, and where 0.10 does


def phases(
    given: Inputs, output: Any, lse: Any, weights: Any, most: Any, *, soft_cap: bool, some_see_nothing: bool
) -> tuple[Callable[[Tile], None], ...]:
    """What the forward kernel does with a tile: first its weights, then their products with the values. `lse` and
    `most`, of the scores, may be None."""
    heads, rows, c, dtype = given.plan.heads, given.plan.queries, given.numbers, given.dtype
    ones = int(np.array([1] * heads.packing, dtype).view(np.int32)[0])  # as many as 32 bits hold

    def score(tile: Tile) -> None:
        keys, seen = given.keys(tile), None
        if given.key_codes is not None:
            seen = matched(*given.codes(tile), rows, given.plan.extra_places, keys_first=False)
        for h, queries in enumerate(given.by_head(given.query, tile)):
            s = product(queries, keys, (1, 1), given.precision) * c[Numbers().scale]
            s = s + given.table[tile.pattern, given.row, 0, h * rows : h * rows + rows]
            s = s if seen is None else jnp.where(seen, s, hiding_score(F32))
            s = capped(s, c)[0] if soft_cap else s
            maximum = s.max(-1, keepdims=True)
            if some_see_nothing:  # then all their weights are 0
                maximum = jnp.maximum(maximum, hiding_score(F32) / 2)
            weights[tile.at, h] = jnp.exp2(s - maximum).astype(dtype)
            if most is not None:
                most[tile.at, h] = jnp.broadcast_to(maximum, (rows, LANES))

    def mix(tile: Tile) -> None:
        mixed, totals = [], []
        for h, values in enumerate(by_head(given.words_of_values(tile), heads, ones)):
            p = weights[tile.at, h]
            mixed.append(product(p, given.number(values), (1, 0), given.precision))
            if heads.abreast == 1:
                totals.append(jnp.broadcast_to(p.astype(F32).sum(-1, keepdims=True), mixed[h].shape))
        if heads.abreast > 1:  # the sum of a head stands in the lanes of the next
            totals = [pltpu.roll(own([mixed[-1], *mixed[:-1]], heads), heads.lanes - heads.dim, 1)]
        total = divisor = totals[0]
        if some_see_nothing:  # who sees something has a weight of 1
            divisor = jnp.maximum(total, 0.5)
        put(output, tile, own(mixed, heads) * reciprocal(divisor, approx=dtype != F32), given.interpret)
        if lse is not None:
            maximum = own([_wide(most[tile.at, h], heads.lanes) for h in range(heads.abreast)], heads)
            found = (maximum + jnp.log2(divisor)) * (1 / LOG2E)
            found = jnp.where(total <= 0, -jnp.inf, found) if some_see_nothing else found
            put(lse, tile, found, given.interpret)

    return score, mix


def _wide(x: jax.Array, n: int) -> jax.Array:
    """[rows, 128], the same in all lanes, as [rows, n]."""
    return jnp.concatenate([x] * -(-n // LANES), 1)[:, :n]

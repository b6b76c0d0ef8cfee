"""The forward kernel: y = P·V / (P·1) with P = exp(scale·Q·Kᵀ + table - max), a tile of queries at a time.

Two phases an iteration, over several tiles: all scores and their maxima first, into VMEM, then all products with the
values. Between them stand addresses that the compiler cannot see through: so it keeps the two kinds of product on
different units, and both are busy. The values carry ones in the lanes of the other heads: so their product with the
weights is also the sum of the weights, for nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxattn.kernels.operands import hiding_score
from jaxattn.kernels.tpu.block import F32, I32, LOG2E, as_numbers, head_of_lane, in_own_lanes, load, of_head, product, tiles
from jaxattn.kernels.tpu.plan import LANES, Plan


def attend(
    query: jax.Array,  # [entries, *places, members · blocks · lanes]
    key: jax.Array,  # [entries, *places, blocks · lanes]
    value: jax.Array,
    table: jax.Array,  # [patterns, members|1, (blocks · abreast)|1, queries, keys]
    scale: jax.Array,
    plan: Plan,
    *,
    residuals: bool,
    some_see_nothing: bool,
    precision: Any,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """The output, flat as the query is; with `residuals` also lse, likewise, the same in all lanes of a head."""
    heads, dtype = plan.heads, query.dtype
    at_once = plan.rows * plan.tile_columns
    ones = int(np.array([1] * heads.packing, dtype).view(np.int32)[0])

    def kernel(at: Any, c: Any, q: Any, k: Any, v: Any, t: Any, o: Any, *rest: Any) -> None:
        lse, (scores, most) = (rest[0] if residuals else None), rest[-2:]
        q, k, v = (x.bitcast(I32) for x in (q, k, v))
        shared, member = t.shape[1:3] == (1, 1), pl.program_id(2)

        def score(tile):
            mine, keys = load(q, tile.queries(heads.packing), heads), load(k, tile.keys(heads.packing), heads)
            for h in range(heads.abreast):
                s = product(as_numbers(of_head(mine, h, heads), dtype), as_numbers(keys, dtype), (1, 1), precision)
                s = s * c[0] + t[(tile.pattern, 0, 0) if shared else (tile.pattern, member, h)]
                scores[tile.at, h] = s
                most[tile.at, h] = jnp.broadcast_to(s.max(-1, keepdims=True), (plan.queries, LANES))

        def mix(tile):
            values, mixed, maxima, totals = load(v, tile.keys(heads.packing), heads), [], [], []
            for h in range(heads.abreast):
                maximum = most[tile.at, h]
                p = jnp.exp2(scores[tile.at, h] - _wide(maximum, plan.keys))
                mixed.append(product(p.astype(dtype), as_numbers(of_head(values, h, heads, ones), dtype), (1, 0), precision))
                maxima.append(_wide(maximum, heads.lanes))
                if heads.abreast == 1:
                    totals.append(jnp.broadcast_to(p.sum(-1, keepdims=True), mixed[0].shape))
            if heads.abreast > 1:  # of every head, in the lanes of the next
                total = in_own_lanes([mixed[-1], *mixed[:-1]], heads)
                total = pltpu.roll(total, heads.lanes - heads.dim, 1)
            else:
                total = totals[0]
            y = in_own_lanes(mixed, heads) * pl.reciprocal(total, approx=dtype != F32)
            maximum = in_own_lanes(maxima, heads)
            if some_see_nothing:
                sees = maximum > hiding_score(F32)
                y = jnp.where(sees, y, 0.0)
            places = (0, *tile.queries(), slice(None))
            shape = (*(axis.tile for axis in plan.axes), heads.lanes)
            o[places] = y.astype(dtype).reshape(shape)
            if lse is not None:
                found = (maximum + jnp.log2(total)) * (1 / LOG2E)
                lse[places] = (jnp.where(sees, found, -jnp.inf) if some_see_nothing else found).reshape(shape)

        def iterate(n, _):
            for phase in (score, mix):
                for tile in tiles(plan, at, n):
                    phase(tile)
            return I32(0)

        lax.fori_loop(np.int32(0), np.int32(plan.tile_rows // plan.rows), iterate, I32(0))

    spread = lambda x, lane: pl.BlockSpec((1, *x.shape[1:-1], heads.lanes), lambda c, b, m, *_: (b, *zeros, lane(c, m)))
    zeros = (0,) * len(plan.axes)
    of_queries, of_keys = spread(query, lambda c, m: m * heads.blocks + c), spread(key, lambda c, m: c)
    shape = (heads.abreast, plan.queries)
    out_shape = [jax.ShapeDtypeStruct(query.shape, dtype)] + [jax.ShapeDtypeStruct(query.shape, F32)] * residuals
    return pl.pallas_call(
        kernel,
        name="windowed_attention",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(heads.blocks, query.shape[0], heads.members),
            in_specs=[of_queries, of_keys, of_keys, table_spec(table, plan)],
            out_specs=[of_queries] * len(out_shape),
            scratch_shapes=[pltpu.VMEM((at_once, *shape, n), F32) for n in (plan.keys, LANES)],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 3, vmem_limit_bytes=limit(plan)
        ),
        interpret=interpret,
    )(jnp.asarray(plan.table()), (scale * LOG2E).reshape(1).astype(F32), query, key, value, table * LOG2E)


def table_spec(table: jax.Array, plan: Plan) -> pl.BlockSpec:
    """What a step takes of a score table."""
    shared = table.shape[2] == 1
    block = (*table.shape[:2], 1 if shared else plan.heads.abreast, *table.shape[3:])
    return pl.BlockSpec(block, lambda c, b, m, *_: (0, 0, 0 if shared else c, 0, 0))


def limit(plan: Plan) -> int:
    """Bytes of VMEM that the compiler may use: what is planned with, and as much as a quarter of it for spills."""
    return int(plan.vmem * 1.25) + 2**22


def _wide(x: jax.Array, n: int) -> jax.Array:
    """[rows, 128], the same in all lanes, as [rows, n]."""
    return jnp.concatenate([x] * -(-n // LANES), 1)[:, :n]

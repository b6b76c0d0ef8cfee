"""The forward kernel: attention of a tile of queries at a time, whose windows a box of keys holds whole.

    Sᵀ = scale·K·Qᵀ + table,  P = softmax over keys,  y = P·V

Scores are transposed, [keys, (head, query)]: so all heads of a block fill the columns of a product, and a maximum or a
sum over keys takes plain operations between registers, not across their lanes.

An iteration takes several tiles, in phases: first all scores, into VMEM, then all weights and their products with the
values. Between them stand addresses that the compiler cannot see through: so it does not chain one tile's phases, and
the matrix units are kept busy.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxattn.kernels.operands import hiding_score
from jaxattn.kernels.tpu.block import F32, I32, LOG2E, box, product, stacked, tiles, unstacked
from jaxattn.kernels.tpu.plan import Plan


def attend(
    query: jax.Array,  # [entries, *places, members · blocks · lanes]
    key: jax.Array,  # [entries, *places, blocks · lanes]
    value: jax.Array,
    table: jax.Array,  # [patterns, members|1, blocks|1, keys, abreast · queries]
    scale: jax.Array,
    plan: Plan,
    *,
    residuals: bool,
    some_see_nothing: bool,
    precision: Any,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """The output, flat as the query is; with `residuals` also lse, [entries, members, blocks, tile rows, tile columns,
    abreast · queries]."""
    heads, dtype = plan.heads, query.dtype
    rows = heads.abreast * plan.queries

    def kernel(at: Any, c: Any, q: Any, k: Any, v: Any, t: Any, y: Any, *rest: Any) -> None:
        lse, (scores, weights) = (rest[0] if residuals else None), rest[-2:]
        q, k, v = (x.bitcast(I32) for x in (q, k, v))
        mine = 0 if table.shape[1] == 1 else pl.program_id(2)

        def score(tile):
            s = product(box(k, tile, dtype), stacked(q, tile, dtype), (1, 1), precision)
            scores[tile.at] = s * c[0] + t[tile.pattern, mine, 0]

        def normalize(tile):
            s = scores[tile.at]
            maximum = s.max(0, keepdims=True)
            p = jnp.exp2(s - maximum)
            total = p.sum(0, keepdims=True)
            share = 1.0 / total
            sees = maximum > hiding_score(F32)
            p = p * (jnp.where(sees, share, 0.0) if some_see_nothing else share)
            weights[tile.at] = p.astype(dtype)
            if lse is not None:
                found = (maximum + jnp.log2(total)) * (1 / LOG2E)
                found = jnp.where(sees, found, -jnp.inf) if some_see_nothing else found
                lse[0, 0, 0, tile.i, tile.j : tile.j + 1] = found

        def mix(tile):
            mixed = product(weights[tile.at], box(v, tile, dtype), (0, 0), precision)
            y[(0, *tile.queries(), slice(None))] = unstacked(mixed, tile).astype(dtype)

        def iterate(n, _):
            for phase in (score, normalize, mix):
                for tile in tiles(plan, at, n):
                    phase(tile)
            return I32(0)

        lax.fori_loop(np.int32(0), np.int32(plan.tile_rows // plan.rows), iterate, I32(0))

    entries = query.shape[0]
    of_queries, of_keys, of_scores, of_rows = specs(plan, query, key, table)
    out_shape, out_specs = [jax.ShapeDtypeStruct(query.shape, dtype)], [of_queries]
    if residuals:
        shape = (entries, heads.members, heads.blocks, plan.tile_rows, plan.tile_columns, rows)
        out_shape.append(jax.ShapeDtypeStruct(shape, F32))
        out_specs.append(of_rows)
    return pl.pallas_call(
        kernel,
        name="windowed_attention",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(heads.blocks, entries, heads.members),
            in_specs=[of_queries, of_keys, of_keys, of_scores],
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM((plan.at_once, plan.keys, rows), x) for x in (F32, dtype)],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3, vmem_limit_bytes=limit(plan)),
        interpret=interpret,
    )(jnp.asarray(plan.table()), (scale * LOG2E).reshape(1).astype(F32), query, key, value, table * LOG2E)


def specs(plan: Plan, query: jax.Array, key: jax.Array, table: jax.Array) -> list[pl.BlockSpec]:
    """What a step (block of heads, entry, member) takes of queries, of keys, of a score table, and of what is one
    number for each head and query."""
    heads, zeros = plan.heads, (0,) * len(plan.axes)
    grid = lambda x: (1, *x.shape[1:-1], heads.lanes)
    of_members = (1, 1, 1, plan.tile_rows, plan.tile_columns, heads.abreast * plan.queries)
    blocks = table.shape[2]
    return [
        pl.BlockSpec(grid(query), lambda c, b, m, *_: (b, *zeros, m * heads.blocks + c)),
        pl.BlockSpec(grid(key), lambda c, b, m, *_: (b, *zeros, c)),
        pl.BlockSpec((*table.shape[:2], 1, *table.shape[3:]), lambda c, b, m, *_: (0, 0, c if blocks > 1 else 0, 0, 0)),
        pl.BlockSpec(of_members, lambda c, b, m, *_: (b, m, c, 0, 0, 0)),
    ]


def limit(plan: Plan) -> int:
    """Bytes of VMEM that the compiler may use: what is planned with, and a quarter of it and 4 MiB for spills."""
    return int(plan.vmem * 1.25) + 2**22

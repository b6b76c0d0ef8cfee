"""The forward kernel: attention of a tile of queries at a time, whose windows a box of keys holds whole.

An iteration takes several tiles in two phases: first weights, into VMEM, then products of them with the values. Between
them stand addresses that the compiler cannot see through: so it gives the two kinds of product different matrix units,
and keeps both busy. What the phases do is in `queries_first` and `keys_first`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxattn.kernels.tpu import keys_first, order, queries_first
from jaxattn.kernels.tpu.arrange import Beside, shape_of
from jaxattn.kernels.tpu.block import F32, I32, MEMBER, by_turns, first_row, lanes_of_heads, tiles
from jaxattn.kernels.tpu.inputs import Inputs
from jaxattn.kernels.tpu.plan import LANES, Plan
from jaxattn.sizes import planned

BEHIND = 16  # so many tiles the second phase is behind the first
BEHIND_APART = 4  # where the heads' products are apart


def attend(
    query: jax.Array,  # [entries, *queries, members · blocks · lanes]
    key: jax.Array,  # [entries, *keys, blocks · lanes]
    value: jax.Array,
    table: jax.Array,  # [patterns, members|1, blocks|1, *scores of a tile], in units of log 2
    given: jax.Array,  # `block.numbers`
    beside: Beside,
    plan: Plan,
    *,
    soft_cap: bool,
    residuals: bool,
    some_see_nothing: bool,
    precision: Any,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """The output, flat as the query is; with `residuals` also lse, likewise, the same in all lanes of a head."""
    heads, dtype, placed = plan.heads, query.dtype, order.orders(plan)
    common = dict(soft_cap=soft_cap, some_see_nothing=some_see_nothing)

    def kernel(at: Any, c: Any, rows_at: Any, q: Any, k: Any, v: Any, t: Any, *rest: Any) -> None:
        others = list(rest)
        qc, kc, ke, ve = (None if x is None else others.pop(0).bitcast(I32) for x in beside)
        results = [others.pop(0) for _ in range(1 + residuals)]
        weights, *others = others
        most, copies = others[:residuals], others[residuals:]
        q, k, v = (x.bitcast(I32) for x in (q, k, v))
        (q, qc), (k, v, kc) = order.arrange(placed, rows_at, copies, (q, qc), (k, v, kc), dtype)
        y, lse = [*(copies or results), None][:2]
        row = 0 if table.shape[1] == 1 else pl.program_id(MEMBER)
        inputs = Inputs(plan, dtype, precision, c, t, row, q, k, v, qc, kc, ke, ve, interpret, lanes_of_heads(plan))
        if plan.keys_first:
            phases = keys_first.phases(inputs, y, weights, **common)
        else:
            phases = queries_first.phases(inputs, y, lse, weights, most[0] if most else None, **common)
        of_step, behind = first_row(plan), (0, BEHIND_APART if plan.keys_first and plan.apart else BEHIND)

        def iterate(n, _):
            by_turns(phases, behind, tiles(plan, at, of_step, n))
            return I32(0)

        lax.fori_loop(np.int32(0), np.int32(plan.step_rows // plan.rows), iterate, I32(0))
        if placed.queries_back is not None:
            for source, target in zip(copies, results, strict=True):
                order.put_back(placed.queries_back, rows_at, source, target, interpret)

    of_queries, of_keys, of_scores, _ = specs(plan, query, key, table)
    inputs = [query, key, value, table, *(x for x in beside if x is not None)]
    out_shape = [shape_of(query.shape, x, query) for x in (dtype, F32)[: 1 + residuals]]
    stacked = heads.abreast * plan.queries
    of_weights = (plan.keys, stacked) if plan.keys_first else (heads.abreast, plan.queries, plan.keys)
    call = pl.pallas_call(
        kernel,
        name="windowed_attention",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(heads.blocks, query.shape[0], plan.strip_count, heads.members),
            in_specs=[of_queries, of_keys, of_keys, of_scores, *beside_specs(plan, beside)],
            out_specs=[of_queries] * len(out_shape),
            scratch_shapes=[
                pltpu.VMEM((plan.at_once, *of_weights), dtype),
                *[pltpu.VMEM((plan.at_once, heads.abreast, plan.queries, LANES), F32)] * residuals,
                *order.copies(placed, plan, beside, [x.dtype for x in out_shape]),
            ],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            # the members of a key head share the copies of its keys
            dimension_semantics=("parallel",) * 3 + (("parallel" if placed.keys is None else "arbitrary"),),
            vmem_limit_bytes=limit(plan),
        ),
        cost_estimate=estimate(plan, 2, [*inputs, *out_shape]),
        interpret=interpret,
    )
    with jax.enable_x64(False):  # a TPU's kernels count in 32 bits
        inputs = inputs if interpret else map(in_hbm, inputs)
        return call(jnp.asarray(plan.table()), given, jnp.asarray(placed.table), *inputs)


def specs(plan: Plan, query: jax.Array, key: jax.Array, table: jax.Array) -> list[pl.BlockSpec]:
    """What a step (block of heads, entry, strip, member) takes of queries, of keys, of a score table, and of what is
    one number for each head and query."""
    heads = plan.heads
    of_members = (1, 1, 1, plan.step_rows, plan.tile_columns, heads.abreast * plan.queries)
    blocks = table.shape[2]
    return [
        _of_queries(plan, query.shape, heads.lanes, lambda c, m: m * heads.blocks + c),
        _of_keys(plan, key.shape, heads.lanes, lambda c: c if heads.blocks > 1 else 0),
        pl.BlockSpec(
            (*table.shape[:2], 1, *table.shape[3:]), lambda c, b, s, m, *_: (0, 0, c if blocks > 1 else 0, 0, 0)
        ),
        pl.BlockSpec(of_members, lambda c, b, s, m, *_: (b, m, c, s, 0, 0)),
    ]


def _of_queries(plan: Plan, shape: Sequence[int], lanes: int, lane: Callable[[Any, Any], Any]) -> pl.BlockSpec:
    """The queries of a grid or a strip, [entries, *places, lanes]."""
    first = shape[1] if plan.strips is None else plan.strips.queries
    zeros, entry = (0,) * (len(plan.axes) - 1), _entry_of(shape)
    return pl.BlockSpec((1, first, *shape[2:-1], lanes), lambda c, b, s, m, *_: (entry(b), s, *zeros, lane(c, m)))


def _entry_of(shape: Sequence[int]) -> Callable[[Any], Any]:
    """The entry of an array that a step takes; of one that all entries share, the first."""
    return (lambda _: 0) if shape[0] == 1 else (lambda b: b)


def _of_keys(plan: Plan, shape: Sequence[int], lanes: int, lane: Callable[[Any], Any]) -> pl.BlockSpec:
    """The keys of a grid or a strip, [entries, *places, lanes]. Strips share keys: they begin at any place."""
    entry = _entry_of(shape)
    if (strips := plan.strips) is None:
        zeros = (0,) * len(plan.axes)
        return pl.BlockSpec((1, *shape[1:-1], lanes), lambda c, b, s, m, *_: (entry(b), *zeros, lane(c)))
    zeros, begins = (0,) * (len(plan.axes) - 1), 2 * len(plan.looped) + 1
    begin = lambda s, at: at[begins, s * plan.step_rows]
    return pl.BlockSpec(
        tuple(map(pl.Element, (1, strips.keys, *shape[2:-1], lanes))),
        lambda c, b, s, m, at, *_: (entry(b), begin(s, at), *zeros, lane(c) * lanes),
    )


def beside_specs(plan: Plan, beside: Beside) -> list[pl.BlockSpec]:
    """What a step takes of what is there: codes and extra tokens of its entry, these of its heads."""
    found = []
    if beside.of_queries is not None:
        found.append(_of_queries(plan, beside.of_queries.shape, LANES, lambda c, m: 0))
    if beside.of_keys is not None:
        found.append(_of_keys(plan, beside.of_keys.shape, LANES, lambda c: 0))
    return found + [of_extra(plan) for x in beside[2:] if x is not None]


def of_extra(plan: Plan) -> pl.BlockSpec:
    """Extra tokens of an entry, for a block of heads."""
    return pl.BlockSpec((1, plan.extra_places, plan.heads.lanes), lambda c, b, s, m, *_: (b, 0, c))


def in_hbm(x: jax.Array) -> jax.Array:
    """The same, which is left where it is: what the compiler fetches into VMEM before a kernel runs is copied by the
    kernel's own loads and stores in every step."""
    return pltpu.with_memory_space_constraint(x, pltpu.MemorySpace.HBM)


def estimate(plan: Plan, products: int, moved: Sequence[Any]) -> pl.CostEstimate:
    """What XLA is told of a kernel, which it cannot look into: so many products of each tile's queries and keys, an
    exponential of each score, and every array moved once."""
    heads = plan.heads
    tiles = plan.tile_rows * plan.tile_columns * planned(moved[0].shape[0]) * heads.blocks * heads.members
    scores = tiles * heads.abreast * plan.queries * plan.keys
    read = sum(planned(math.prod(x.shape)) * x.dtype.itemsize for x in moved)
    return pl.CostEstimate(flops=2 * products * scores * heads.lanes, transcendentals=scores, bytes_accessed=read)


def limit(plan: Plan) -> int:
    """Bytes of VMEM that the compiler may use: what is planned with, and a quarter of it and 4 MiB for spills."""
    return int(plan.vmem * 1.25) + 2**22

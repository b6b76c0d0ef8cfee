"""The backward kernel: dq, dk, dv and the cotangent of the score table, a tile of queries at a time.

Scores are [keys, (head, query)], as in `keys_first`, and dy is stacked as queries are: so two of the three products
that follow need no transposition. Every tile sees its windows whole: so the softmax is computed again, and neither y
nor lse is read. What overlapping boxes send to a key is added up in float32 in VMEM.

    Sᵀ = scale·K·Qᵀ + table,  P = softmax over keys,  dS = P·(V·dyᵀ - sum over keys of it + dlse)
    dv += P·dy,  dk += scale·dS·Q,  dq = scale·dSᵀ·K,  dtable += dS
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxattn.kernels.tpu import carry, keys_first, order
from jaxattn.kernels.tpu.arrange import Beside, shape_of
from jaxattn.kernels.tpu.block import (
    BLOCK,
    ENTRY,
    F32,
    I32,
    MEMBER,
    STRIP,
    Numbers,
    by_turns,
    capped,
    first_row,
    lanes_of_heads,
    product,
    put,
    tiles,
)
from jaxattn.kernels.tpu.forward import beside_specs, estimate, in_hbm, limit, of_extra, specs
from jaxattn.kernels.tpu.inputs import Inputs
from jaxattn.kernels.tpu.plan import SUBLANES, Plan

BEHIND = 0, 2, 4  # so many tiles each phase is behind the first


def pull(
    query: jax.Array,  # [entries, *queries, members · blocks · lanes]
    key: jax.Array,  # [entries, *keys, blocks · lanes]
    value: jax.Array,
    cotangent: jax.Array,  # of the output
    of_lse: jax.Array | None,  # [entries, members, blocks, tile rows, tile columns, abreast · queries]
    table: jax.Array,  # [patterns, members|1, blocks|1, keys, abreast · queries], in units of log 2
    given: jax.Array,  # `block.numbers`
    beside: Beside,
    plan: Plan,
    *,
    soft_cap: bool,
    of_table: bool,
    some_see_nothing: bool,
    precision: Any,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """The cotangents of query, key and value, flat as they are, of the extra ones where there are any, and with
    `of_table` of the table."""
    heads, dtype = plan.heads, query.dtype
    tall = plan.keys, heads.abreast * plan.queries
    placed, places = order.orders(plan), [axis.length for axis in plan.axes]
    if plan.strips is not None:
        places[0] = plan.strips.keys

    kernel = _kernel(
        plan,
        dtype,
        placed=placed,
        one_table=table.shape[1] == 1,
        there=[x is not None for x in beside],
        soft_cap=soft_cap,
        with_lse=of_lse is not None,
        of_table=of_table,
        some_see_nothing=some_see_nothing,
        precision=precision,
        interpret=interpret,
    )
    of_queries, of_keys, of_scores, of_rows = specs(plan, query, key, table)
    inputs = [query, key, value, cotangent, table, *(x for x in beside if x is not None)]
    in_specs = [of_queries, of_keys, of_keys, of_queries, of_scores, *beside_specs(plan, beside)]
    if of_lse is not None:
        inputs.append(of_lse)
        in_specs.append(of_rows)
    extra = [x for x in beside[2:] if x is not None]
    like = lambda x: shape_of(x.shape, x.dtype, query)
    # in strips, which share keys, the kernel writes their sums itself
    of_sums = of_keys if plan.strips is None else pl.BlockSpec(memory_space=pl.ANY)
    out_shape = [*map(like, (query, key, value, *extra)), *[like(table)] * of_table]
    call = pl.pallas_call(
        kernel,
        name="windowed_attention_backward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(heads.blocks, query.shape[0], plan.strip_count, heads.members),
            in_specs=in_specs,
            out_specs=[of_queries, of_sums, of_sums, *[of_extra(plan)] * len(extra), *[of_scores] * of_table],
            scratch_shapes=[
                *[pltpu.VMEM((plan.at_once, *tall), F32)] * 2,
                *[pltpu.VMEM((plan.at_once, *tall), dtype)] * 2,
                *[pltpu.VMEM((*places, heads.lanes), F32)] * 2,
                *[pltpu.VMEM((plan.extra_places, heads.lanes), F32)] * len(extra),
                *carry.scratch(plan, dtype),
                *order.copies(placed, plan, beside, [dtype], cotangent=True),
            ],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"), vmem_limit_bytes=limit(plan)
        ),
        cost_estimate=estimate(plan, 5, [*inputs, *out_shape]),
        interpret=interpret,
    )
    with jax.enable_x64(False):  # a TPU's kernels count in 32 bits
        inputs = inputs if interpret else map(in_hbm, inputs)
        return call(jnp.asarray(plan.table()), given, jnp.asarray(placed.table), *inputs)


def _kernel(
    plan: Plan,
    dtype: Any,
    *,
    placed: order.Orders,
    one_table: bool,
    there: Sequence[bool],
    soft_cap: bool,
    with_lse: bool,
    of_table: bool,
    some_see_nothing: bool,
    precision: Any,
    interpret: bool,
) -> Callable[..., None]:
    """What a step does: of a block of heads, an entry, a strip, and one of the query heads that share a key head.

    Args:
      placed: where queries and keys are put.
      one_table: whether the members share a score table.
      there: which of `Beside` there are.
      soft_cap: whether scores are capped.
      with_lse: whether lse has a cotangent.
      of_table: whether the table's is wanted.
    """
    heads = plan.heads

    def kernel(at: Any, c: Any, rows_at: Any, q: Any, k: Any, v: Any, g: Any, t: Any, *rest: Any) -> None:
        others = list(rest)
        qc, kc, ke, ve = (others.pop(0).bitcast(I32) if given else None for given in there)
        dlse = others.pop(0) if with_lse else None
        dq_given, dk, dv = (others.pop(0) for _ in range(3))
        extra = [others.pop(0) for _ in range(2 * bool(plan.extra))]
        dt = others.pop(0) if of_table else None
        scores, products, weights, of_scores, sum_k, sum_v, *others = others
        extra_sums, others = others[: len(extra)], others[len(extra) :]
        kept, copies = (others[:4], others[4:]) if plan.strips else ([], others)
        q, k, v, g = (x.bitcast(I32) for x in (q, k, v, g))
        (q, g, qc), (k, v, kc) = order.arrange(placed, rows_at, copies, (q, g, qc), (k, v, kc), dtype)
        dq = copies[0] if copies else dq_given
        rows = sum_k.shape[0]
        block, entry, strip, member = (pl.program_id(axis) for axis in (BLOCK, ENTRY, STRIP, MEMBER))
        first = (strip == 0) & (member == 0)
        of_step = first_row(plan)
        whole = 1 if plan.static else SUBLANES * heads.packing  # one axis lies across the registers
        row = 0 if one_table else member  # of the table
        given = Inputs(plan, dtype, precision, c, t, row, q, k, v, qc, kc, ke, ve, interpret, lanes_of_heads(plan))

        def score(tile):
            scores[tile.at] = keys_first.scores(given, tile)
            products[tile.at] = product(given.values(tile), given.stacked(g, tile), (1, 1), precision)

        def differentiate(tile):
            s, of_p = scores[tile.at], products[tile.at]
            s, slope = capped(s, c) if soft_cap else (s, None)
            p = keys_first.softmax(s, some_see_nothing)
            inner = (p * of_p).sum(0, keepdims=True)
            if dlse is not None:
                inner = inner - dlse[0, 0, 0, tile.i, tile.j : tile.j + 1]
            d = p * (of_p - inner)
            d = d if slope is None else d * slope
            if dt is not None:
                dt[tile.pattern, row, 0] = dt[tile.pattern, row, 0] + d
            weights[tile.at], of_scores[tile.at] = p.astype(dtype), d.astype(dtype)

        def send(tile):
            p, d = weights[tile.at], of_scores[tile.at]
            keys = (*tile.keys(), slice(None))
            boxed = (*(axis.columns for axis in plan.axes), heads.lanes)
            dy, queries = given.stacked(g, tile), given.stacked(q, tile)
            found = product(p, dy, (1, 0), precision), product(d, queries, (1, 0), precision)
            for x, total in zip(found, (sum_v, sum_k), strict=True):
                total[keys] = total[keys] + x[: plan.box].reshape(boxed)
            for x, total in zip(found, reversed(extra_sums), strict=False):
                total[...] = total[...] + x[plan.box :]
            x = keys_first.mixed(d, given.keys(tile), plan, precision)
            put(dq, tile, x * c[Numbers().plain_scale], interpret)

        def iterate(n, _):
            by_turns((score, differentiate, send), BEHIND, tiles(plan, at, of_step, n))
            return I32(0)

        @pl.when(member == 0)
        def _():
            zero = lambda y: [ref.__setitem__(y, jnp.zeros(ref[y].shape, F32)) for ref in (sum_k, sum_v)]
            if plan.strips is not None:
                carry.begin(plan, at, strip, (sum_k, sum_v))
            else:
                over(rows, zero, whole)

        if extra:

            @pl.when(first)
            def _():
                for total in extra_sums:
                    total[...] = jnp.zeros(total.shape, F32)

        if dt is not None:

            @pl.when((entry == 0) & first)
            def _():
                dt[...] = jnp.zeros(dt.shape, F32)

        lax.fori_loop(np.int32(0), np.int32(plan.step_rows // plan.rows), iterate, I32(0))
        if placed.queries_back is not None:
            order.put_back(placed.queries_back, rows_at, dq, dq_given, interpret)

        @pl.when(member == heads.members - 1)
        def _():
            def write(y):
                dk[(0, y)] = (sum_k[y] * c[Numbers().plain_scale]).astype(dtype)
                dv[(0, y)] = sum_v[y].astype(dtype)

            if plan.strips is not None:
                factors = c[Numbers().plain_scale], 1.0
                carry.send(plan, at, (block, entry, strip), (sum_k, sum_v), factors, (dk, dv), kept)
            elif placed.keys_back is None:
                over(rows, write, whole)
            else:  # by way of the copies of the keys, which have done their work
                order.add_twins(placed, rows_at, (sum_k, sum_v))
                for total, factor, copy, target in ((sum_k, c[Numbers().plain_scale], k, dk), (sum_v, 1.0, v, dv)):
                    order.narrow(total, factor, copy, dtype)
                    order.put_back(placed.keys_back, rows_at, copy, target, interpret)

        if extra:

            @pl.when((strip == plan.strip_count - 1) & (member == heads.members - 1))
            def _():
                for y, total, factor in zip(extra, extra_sums, (c[Numbers().plain_scale], 1.0), strict=True):
                    y[0] = (total[...] * factor).astype(dtype)

    return kernel


def over(count: int, body: Any, whole: int) -> None:
    """`body` of every place along the first axis, of so many at once if not of one."""
    steps = count // whole
    unroll = next(n for n in (8, 4, 2, 1) if steps % n == 0)
    at = lambda y: y if whole == 1 else pl.ds(pl.multiple_of(y * I32(whole), whole), whole)
    lax.fori_loop(np.int32(0), np.int32(steps), lambda y, _: (body(at(y)), I32(0))[1], I32(0), unroll=unroll)

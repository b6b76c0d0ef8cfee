"""The score table of a window on two axes, and what is wanted of a relative bias in return, by small kernels.

The offsets of a head, one row after the other, each as long as a row of the box of keys, are a line. Key l of query t
then stands at l - shift of the line, where the shift is so many rows and so many columns: so a query's scores are the
line, rolled. What a roll brings round from the other end, or from the row beside, no window shows. Where rows of
offsets are longer than rows of keys, there are several lines, of every second row, or third, and rows of keys take
turns. A line's cotangent is that of the table, rolled back and added up.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxattn.kernels.operands import hiding_score
from jaxattn.kernels.tpu import arrange
from jaxattn.kernels.tpu.block import F32, I32, LOG2E
from jaxattn.kernels.tpu.plan import LANES, MIB, SUBLANES, Plan


def table(relative_bias: jax.Array | None, plan: Plan, interpret: bool) -> jax.Array:
    """`arrange.score_table`, in units of log 2. By XLA where the kernel can't, and interpreted, for rolls are slow."""
    if interpret or not can(relative_bias, plan):
        return arrange.score_table(relative_bias, plan) * LOG2E
    return rolled(relative_bias, plan, interpret)


def of_bias(of_table: jax.Array, relative_bias: jax.Array, plan: Plan, interpret: bool) -> jax.Array:
    """The cotangent of a relative bias from that of `arrange.score_table`, which has keys first."""
    if interpret or not can(relative_bias, plan):
        return jax.vjp(lambda x: arrange.score_table(x, plan), relative_bias)[1](of_table)[0]
    return rolled_back(of_table, relative_bias, plan, interpret)


def can(relative_bias: jax.Array | None, plan: Plan) -> bool:
    """Whether the table is of two axes, without extra tokens, its queries fill registers, and VMEM holds a step."""
    # the compiler rolls no row of a register further than the register is wide
    if len(plan.axes) != 2 or plan.extra or (SUBLANES - 1) * plan.axes[1].step > LANES:
        return False
    room = plan.patterns * (plan.heads.abreast * plan.queries + LANES) * _lanes(relative_bias, plan) * 4
    return plan.axes[1].tile % SUBLANES == 0 and room <= 4 * MIB


def rolled(relative_bias: jax.Array | None, plan: Plan, interpret: bool) -> jax.Array:
    """The table, by the kernel."""
    heads, hide = plan.heads, hiding_score(F32)
    (first, last), lanes, turns = plan.axes, _lanes(relative_bias, plan), _turns(relative_bias, plan)
    tall = heads.abreast * plan.queries
    alike = jnp.zeros((1, 1, heads.abreast, 1, 1), F32)
    bias = alike if relative_bias is None else _in_blocks(relative_bias, plan)
    bounds = np.broadcast_to(np.stack([last.low, last.high])[..., None], (2, *last.low.shape, LANES))

    def kernel(given: Any, bound: Any, out: Any, whole: Any, rows: Any) -> None:
        row, column = _places(plan, lanes)
        limit = lambda which, q: jnp.concatenate([bound[which, q]] * (lanes // LANES), 1)
        rows[...] = jnp.zeros(rows.shape, F32)

        def begun(h):
            x = given[0, 0, h].astype(F32)
            rows[: x.shape[0], : x.shape[1]] = jnp.where(x <= hide / 2, hide, x) * LOG2E
            lines = [jnp.zeros((1, lanes), F32)] * turns
            for r in range(x.shape[0]):
                lines[r % turns] = lines[r % turns] + _moved(rows[r : r + 1], _stand(r, plan, turns))
            repeated = (jnp.broadcast_to(x, (last.tile, lanes)) for x in lines)
            # along the last axis each query is so many steps further on than the first
            return [pltpu.roll(x, 0, 1, stride=last.step, stride_axis=0) for x in repeated]

        lines = [begun(h) for h in range(heads.abreast)]
        for n, (p, q) in enumerate(np.ndindex(len(first.low), len(last.low))):
            near = (limit(0, q) <= column) & (column < limit(1, q))
            for t, h in itertools.product(range(first.tile), range(heads.abreast)):
                x = jnp.full((last.tile, lanes), hide * LOG2E, F32)
                seen = near & (row >= int(first.low[p, t])) & (row < int(first.high[p, t]))
                for which, shift, own in _moves(plan, lanes, turns, row, p, q, t):
                    x = jnp.where(seen if own is None else seen & own, _moved(lines[h][which], shift), x)
                whole[pl.ds(h * plan.queries + t * last.tile, last.tile)] = x
            out[n, 0, 0] = whole[...].T[: plan.box, :tall] if plan.keys_first else whole[:tall, : plan.box]

    shape = (plan.box, tall) if plan.keys_first else (tall, plan.box)
    members, blocks = bias.shape[:2]
    call = pl.pallas_call(
        kernel,
        name="score_table",
        grid=(members, blocks),
        in_specs=[
            pl.BlockSpec((1, 1, *bias.shape[2:]), lambda m, b: (m, b, 0, 0, 0)),
            pl.BlockSpec(bounds.shape, lambda m, b: (0, 0, 0, 0)),
        ],
        out_specs=pl.BlockSpec((plan.patterns, 1, 1, *shape), lambda m, b: (0, m, b, 0, 0)),
        out_shape=arrange.shape_of((plan.patterns, members, blocks, *shape), F32, bias),
        scratch_shapes=[
            pltpu.VMEM((tall + -tall % LANES, lanes), F32),
            pltpu.VMEM((-(-bias.shape[3] // SUBLANES) * SUBLANES, lanes), F32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
    )
    with jax.enable_x64(False):
        return call(bias, jnp.asarray(bounds, I32))


def rolled_back(of_table: jax.Array, relative_bias: jax.Array, plan: Plan, interpret: bool) -> jax.Array:
    """The cotangent of the bias, by the kernel."""
    heads, hide = plan.heads, hiding_score(F32)
    (first, last), lanes, turns = plan.axes, _lanes(relative_bias, plan), _turns(relative_bias, plan)
    tall = heads.abreast * plan.queries

    def kernel(of: Any, out: Any, whole: Any) -> None:
        row, _ = _places(plan, lanes)
        whole[...] = jnp.zeros(whole.shape, F32)
        found = [[jnp.zeros((last.tile, lanes), F32)] * turns for _ in range(heads.abreast)]
        for n, (p, q) in enumerate(np.ndindex(len(first.low), len(last.low))):
            whole[: plan.box, :tall] = of[n, 0, 0]
            turned = whole[...].T  # [(head, query), keys]
            for t, h in itertools.product(range(first.tile), range(heads.abreast)):
                begin = h * plan.queries + t * last.tile
                x = turned[begin : begin + last.tile]
                for which, shift, own in _moves(plan, lanes, turns, row, p, q, t):
                    mine = x if own is None else jnp.where(own, x, 0.0)
                    found[h][which] = found[h][which] + _moved(mine, -shift)
        of_query = lax.broadcasted_iota(I32, (last.tile, lanes), 0)
        for h, x in enumerate(found):
            lines = []
            for y in x:
                moved = (jnp.where(of_query == t, _moved(y, -t * last.step), 0.0) for t in range(last.tile))
                lines.append(sum(moved, jnp.zeros((last.tile, lanes), F32)).sum(0, keepdims=True))
            for r in range(tall_bias):
                out[0, 0, h, r : r + 1] = _moved(lines[r % turns], -_stand(r, plan, turns))[:, :width]

    bias, pull = jax.vjp(lambda x: _in_blocks(x.astype(F32), plan), relative_bias)
    members, blocks, _, tall_bias, width = bias.shape
    call = pl.pallas_call(
        kernel,
        name="score_table_backward",
        grid=(members, blocks),
        in_specs=[pl.BlockSpec((plan.patterns, 1, 1, plan.box, tall), lambda m, b: (0, m, b, 0, 0))],
        out_specs=pl.BlockSpec((1, 1, *bias.shape[2:]), lambda m, b: (m, b, 0, 0, 0)),
        out_shape=arrange.shape_of(bias.shape, F32, of_table),
        scratch_shapes=[pltpu.VMEM((lanes, tall + -tall % LANES), F32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
    )
    with jax.enable_x64(False):
        (found,) = pull(call(of_table))
    return jnp.where(relative_bias <= hide / 2, 0, found)


def _places(plan: Plan, lanes: int) -> tuple[jax.Array, jax.Array]:
    """The row and the column of the key in each lane, for the queries of a row of a tile."""
    place, columns = lax.broadcasted_iota(I32, (plan.axes[1].tile, lanes), 1), I32(plan.axes[1].columns)
    return lax.div(place, columns), lax.rem(place, columns)


def _moves(
    plan: Plan, lanes: int, turns: int, row: jax.Array, p: int, q: int, t: int
) -> Iterator[tuple[int, int, jax.Array | None]]:
    """For the queries of row t in the patterns p and q: each line, how far it is rolled, and which keys take it."""
    first, last = plan.axes
    begin = int(first.relative[p, 0]) - t * first.step  # the row of offsets that the first row of keys has
    for which in range(turns):
        shift = ((which - begin) * last.columns - int(last.relative[q, 0])) % lanes
        yield which, shift, None if turns == 1 else lax.rem(row + I32(begin % turns), I32(turns)) == which


def _moved(x: jax.Array, by: int) -> jax.Array:
    """Rolled by so many lanes."""
    by %= x.shape[1]
    return pltpu.roll(x, by, 1) if by else x


def _stand(row: int, plan: Plan, turns: int) -> int:
    """Where a row of offsets begins on its line."""
    return row // turns * turns * plan.axes[1].columns


def _in_blocks(bias: jax.Array, plan: Plan) -> jax.Array:
    """[heads, offsets, offsets] as [members, blocks, abreast, offsets, offsets]."""
    heads, offsets = plan.heads, bias.shape[1:]
    bias = bias.reshape(heads.key_heads, heads.members, *offsets)
    missing = heads.blocks * heads.abreast - heads.key_heads
    bias = jnp.pad(bias, [(0, missing), *[(0, 0)] * 3]) if missing else bias
    return jnp.moveaxis(bias.reshape(heads.blocks, heads.abreast, heads.members, *offsets), 2, 0)


def _turns(relative_bias: jax.Array | None, plan: Plan) -> int:
    """How many rows of keys a row of offsets is as long as."""
    return 1 if relative_bias is None else math.ceil(relative_bias.shape[2] / plan.axes[1].columns)


def _lanes(relative_bias: jax.Array | None, plan: Plan) -> int:
    """Of a line and of a row of the table, in whole registers."""
    turns, tall = _turns(relative_bias, plan), 0 if relative_bias is None else relative_bias.shape[1]
    rows = math.ceil(tall / turns) * turns
    return math.ceil(max(rows * plan.axes[1].columns, plan.box) / LANES) * LANES

"""The score table of a window on two axes, and what is wanted of a relative bias in return, by small kernels.

The offsets of a head, one row after the other, each as long as a row of the box of keys, are a line. Key l of query t
then stands at l - shift of the line, where the shift is so many rows and so many columns: so a query's scores are the
line, rolled. What a roll brings round from the other end, or from the row beside, no window shows. Where rows of offsets
are longer than rows of keys, there are several lines, of every second row, or third, and rows of keys take turns. A
line's cotangent is that of the table, rolled back and added up.
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


def table(relative_bias: jax.Array | None, plan: Plan, keys_first: bool, interpret: bool) -> jax.Array:
    """`arrange.score_table`, in units of log 2. By XLA where the kernel can't, and interpreted, for rolls are slow."""
    if interpret or not can(relative_bias, plan):
        return arrange.score_table(relative_bias, plan, keys_first) * LOG2E
    return rolled(relative_bias, plan, keys_first, interpret)


def of_bias(of_table: jax.Array, relative_bias: jax.Array, plan: Plan, interpret: bool) -> jax.Array:
    """The cotangent of a relative bias from that of `arrange.score_table`, keys first."""
    if interpret or not can(relative_bias, plan):
        return jax.vjp(lambda x: arrange.score_table(x, plan, keys_first=True), relative_bias)[1](of_table)[0]
    return rolled_back(of_table, relative_bias, plan, interpret)


def can(relative_bias: jax.Array | None, plan: Plan) -> bool:
    """Whether the table is of two axes, without extra tokens, its queries fill registers, and VMEM holds a step."""
    if len(plan.axes) != 2 or plan.extra:
        return False
    room = plan.patterns * (plan.heads.abreast * plan.queries + LANES) * _lanes(relative_bias, plan) * 4
    return plan.axes[1].tile % SUBLANES == 0 and room <= 4 * MIB


def rolled(relative_bias: jax.Array | None, plan: Plan, keys_first: bool, interpret: bool) -> jax.Array:
    """The table, by the kernel."""
    heads, hide = plan.heads, hiding_score(F32)
    (first, last), lanes, turns = plan.axes, _lanes(relative_bias, plan), _turns(relative_bias, plan)
    tall = heads.abreast * plan.queries
    if relative_bias is None:  # all heads are alike
        lines = jnp.zeros((1, 1, heads.abreast, 1, lanes), F32)
    else:
        lines = _lines(jnp.where(relative_bias <= hide / 2, hide, relative_bias.astype(F32)) * LOG2E, plan)
    bounds = np.broadcast_to(np.stack([last.low, last.high])[..., None], (2, *last.low.shape, LANES))

    def kernel(line: Any, bound: Any, out: Any, whole: Any) -> None:
        row, column = _places(plan, lanes)
        limit = lambda which, q: jnp.concatenate([bound[which, q]] * (lanes // LANES), 1)

        def begun(h, j):  # along the last axis each query is so many steps further on than the first
            x = jnp.broadcast_to(line[0, 0, h, j : j + 1], (last.tile, lanes))
            return pltpu.roll(x, 0, 1, stride=last.step, stride_axis=0)

        lines = [[begun(h, j) for j in range(turns)] for h in range(heads.abreast)]
        for n, (p, q) in enumerate(np.ndindex(len(first.low), len(last.low))):
            near = (limit(0, q) <= column) & (column < limit(1, q))
            for t, h in itertools.product(range(first.tile), range(heads.abreast)):
                x = jnp.full((last.tile, lanes), hide * LOG2E, F32)
                seen = near & (row >= int(first.low[p, t])) & (row < int(first.high[p, t]))
                for which, shift, own in _moves(plan, lanes, turns, row, p, q, t):
                    moved = pltpu.roll(lines[h][which], shift, 1) if shift else lines[h][which]
                    x = jnp.where(seen if own is None else seen & own, moved, x)
                whole[pl.ds(h * plan.queries + t * last.tile, last.tile)] = x
            out[n, 0, 0] = whole[...].T[: plan.box, :tall] if keys_first else whole[:tall, : plan.box]

    shape = (plan.box, tall) if keys_first else (tall, plan.box)
    members, blocks = lines.shape[:2]
    call = pl.pallas_call(
        kernel,
        name="score_table",
        grid=(members, blocks),
        in_specs=[
            pl.BlockSpec((1, 1, *lines.shape[2:]), lambda m, b: (m, b, 0, 0, 0)),
            pl.BlockSpec(bounds.shape, lambda m, b: (0, 0, 0, 0)),
        ],
        out_specs=pl.BlockSpec((plan.patterns, 1, 1, *shape), lambda m, b: (0, m, b, 0, 0)),
        out_shape=arrange.shape_of((plan.patterns, members, blocks, *shape), F32, lines),
        scratch_shapes=[pltpu.VMEM((tall + -tall % LANES, lanes), F32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
    )
    with jax.enable_x64(False):
        return call(lines, jnp.asarray(bounds, I32))


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
                    found[h][which] = found[h][which] + (pltpu.roll(mine, lanes - shift, 1) if shift else mine)
        of_query = lax.broadcasted_iota(I32, (last.tile, lanes), 0)
        for h, j in itertools.product(range(heads.abreast), range(turns)):
            total = jnp.zeros((last.tile, lanes), F32)
            for t in range(last.tile):
                shift, x = -t * last.step % lanes, found[h][j]
                total = total + jnp.where(of_query == t, pltpu.roll(x, shift, 1) if shift else x, 0.0)
            out[0, 0, h, j] = total.sum(0)

    lines, pull = jax.vjp(lambda x: _lines(x.astype(F32), plan), relative_bias)
    members, blocks = lines.shape[:2]
    call = pl.pallas_call(
        kernel,
        name="score_table_backward",
        grid=(members, blocks),
        in_specs=[pl.BlockSpec((plan.patterns, 1, 1, plan.box, tall), lambda m, b: (0, m, b, 0, 0))],
        out_specs=pl.BlockSpec((1, 1, *lines.shape[2:]), lambda m, b: (m, b, 0, 0, 0)),
        out_shape=arrange.shape_of(lines.shape, F32, of_table),
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


def _lines(bias: jax.Array, plan: Plan) -> jax.Array:
    """[heads, offsets, offsets] as [members, blocks, abreast, turns, lanes]."""
    heads, lanes, turns = plan.heads, _lanes(bias, plan), _turns(bias, plan)
    tall, width = bias.shape[1:]
    bias = jnp.pad(bias, [(0, 0), (0, -tall % turns), (0, turns * plan.axes[1].columns - width)])
    bias = jnp.swapaxes(bias.reshape(len(bias), -1, turns, bias.shape[2]), 1, 2).reshape(len(bias), turns, -1)
    bias = jnp.pad(bias, [(0, 0), (0, 0), (0, lanes - bias.shape[2])])
    bias = bias.reshape(heads.key_heads, heads.members, turns, lanes)
    bias = jnp.pad(bias, [(0, heads.blocks * heads.abreast - heads.key_heads), (0, 0), (0, 0), (0, 0)])
    return jnp.moveaxis(bias.reshape(heads.blocks, heads.abreast, heads.members, turns, lanes), 2, 0)


def _turns(relative_bias: jax.Array | None, plan: Plan) -> int:
    """How many rows of keys a row of offsets is as long as."""
    return 1 if relative_bias is None else math.ceil(relative_bias.shape[2] / plan.axes[1].columns)


def _lanes(relative_bias: jax.Array | None, plan: Plan) -> int:
    """Of a line and of a row of the table, in whole registers."""
    turns, tall = _turns(relative_bias, plan), 0 if relative_bias is None else relative_bias.shape[1]
    rows = math.ceil(tall / turns) * turns
    return math.ceil(max(rows * plan.axes[1].columns, plan.box) / LANES) * LANES

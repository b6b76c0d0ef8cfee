"""The score table of a window on two axes, and what is wanted of a relative bias in return, by small kernels.

The offsets of a head, one row after the other, each as long as a row of the box of keys, are a line. Key l of query t
then stands at l - shift of the line, where the shift is so many rows and so many columns: so a query's scores are the
line, rolled. What a roll brings round from the other end, or from the row beside, no window shows. The line's cotangent
is that of the table, rolled back and added up.
"""

import itertools
import math
from collections.abc import Callable
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
    """Whether rows of offsets fit into rows of the box, queries fill registers, and there are no extra tokens."""
    if len(plan.axes) != 2 or plan.extra:
        return False
    last, (width, lanes) = plan.axes[1], _sizes(relative_bias, plan)
    room = plan.patterns * (plan.heads.abreast * plan.queries + LANES) * lanes * 4  # bytes of a step
    return width <= last.columns and last.tile % SUBLANES == 0 and room <= 4 * MIB


def rolled(relative_bias: jax.Array | None, plan: Plan, keys_first: bool, interpret: bool) -> jax.Array:
    """The table, by the kernel."""
    heads, hide = plan.heads, hiding_score(F32)
    (first, last), (_, lanes), rows = plan.axes, _sizes(relative_bias, plan), plan.queries
    tall = heads.abreast * rows
    if relative_bias is None:  # all heads are alike
        lines = jnp.zeros((1, 1, heads.abreast, lanes), F32)
    else:
        lines = _lines(jnp.where(relative_bias <= hide / 2, hide, relative_bias.astype(F32)) * LOG2E, plan)
    bounds = np.broadcast_to(np.stack([last.low, last.high])[..., None], (2, *last.low.shape, LANES))

    def kernel(line: Any, bound: Any, out: Any, whole: Any) -> None:
        place = lax.broadcasted_iota(I32, (last.tile, lanes), 1)
        row, column = lax.div(place, I32(last.columns)), lax.rem(place, I32(last.columns))
        limit = lambda which, q: jnp.concatenate([bound[which, q]] * (lanes // LANES), 1)
        rolls = _rolls(plan, lanes)
        # along the last axis each query is so many steps further on than the first
        begun = [jnp.broadcast_to(line[0, 0, h : h + 1], (last.tile, lanes)) for h in range(heads.abreast)]
        begun = [pltpu.roll(x, 0, 1, stride=last.step, stride_axis=0) for x in begun]
        for n, (p, q) in enumerate(np.ndindex(len(first.low), len(last.low))):
            near = (limit(0, q) <= column) & (column < limit(1, q))
            for t, (h, x) in itertools.product(range(first.tile), enumerate(begun)):
                seen = near & (row >= int(first.low[p, t])) & (row < int(first.high[p, t]))
                x = jnp.where(seen, rolls(x, p, q, t), F32(hide * LOG2E))
                whole[pl.ds(h * rows + t * last.tile, last.tile)] = x
            out[n, 0, 0] = whole[...].T[: plan.box, :tall] if keys_first else whole[:tall, : plan.box]

    shape = (plan.box, tall) if keys_first else (tall, plan.box)
    members, blocks = lines.shape[:2]
    call = pl.pallas_call(
        kernel,
        name="score_table",
        grid=(members, blocks),
        in_specs=[
            pl.BlockSpec((1, 1, *lines.shape[2:]), lambda m, b: (m, b, 0, 0)),
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
    (first, last), (_, lanes), rows = plan.axes, _sizes(relative_bias, plan), plan.queries
    tall = heads.abreast * rows

    def kernel(of: Any, out: Any, whole: Any) -> None:
        back = _rolls(plan, lanes, back=True)
        whole[...] = jnp.zeros(whole.shape, F32)
        found = [jnp.zeros((last.tile, lanes), F32)] * heads.abreast
        for n, (p, q) in enumerate(np.ndindex(len(first.low), len(last.low))):
            whole[: plan.box, :tall] = of[n, 0, 0]
            turned = whole[...].T  # [(head, query), keys]
            for t, h in itertools.product(range(first.tile), range(heads.abreast)):
                begin = h * rows + t * last.tile
                found[h] = found[h] + back(turned[begin : begin + last.tile], p, q, t)
        of_query = lax.broadcasted_iota(I32, (last.tile, lanes), 0)
        for h, x in enumerate(found):
            moved = [pltpu.roll(x, -t * last.step % lanes, 1) if t * last.step else x for t in range(last.tile)]
            own = sum(jnp.where(of_query == t, y, 0.0) for t, y in enumerate(moved))
            out[0, 0, h] = own.sum(0)

    lines, pull = jax.vjp(lambda x: _lines(x.astype(F32), plan), relative_bias)
    members, blocks = lines.shape[:2]
    call = pl.pallas_call(
        kernel,
        name="score_table_backward",
        grid=(members, blocks),
        in_specs=[pl.BlockSpec((plan.patterns, 1, 1, plan.box, tall), lambda m, b: (0, m, b, 0, 0))],
        out_specs=pl.BlockSpec((1, 1, *lines.shape[2:]), lambda m, b: (m, b, 0, 0)),
        out_shape=arrange.shape_of(lines.shape, F32, of_table),
        scratch_shapes=[pltpu.VMEM((lanes, tall + -tall % LANES), F32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
    )
    with jax.enable_x64(False):
        (found,) = pull(call(of_table))
    return jnp.where(relative_bias <= hide / 2, 0, found)


def _rolls(plan: Plan, lanes: int, back: bool = False) -> Callable[[jax.Array, int, int, int], jax.Array]:
    """What moves a line to where it stands for the queries of row t in the patterns p and q, or from there back."""
    first, last = plan.axes

    def move(x: jax.Array, p: int, q: int, t: int) -> jax.Array:
        begin = int(first.relative[p, 0]) * last.columns + int(last.relative[q, 0])
        shift = t * first.step * last.columns - begin
        shift = (-shift if back else shift) % lanes
        return pltpu.roll(x, shift, 1) if shift else x

    return move


def _lines(bias: jax.Array, plan: Plan) -> jax.Array:
    """[heads, offsets, offsets] as [members, blocks, abreast, lanes]."""
    heads, (_, last), (_, lanes) = plan.heads, plan.axes, _sizes(bias, plan)
    bias = jnp.pad(bias, [(0, 0), (0, 0), (0, last.columns - bias.shape[2])]).reshape(len(bias), -1)
    bias = jnp.pad(bias, [(0, 0), (0, lanes - bias.shape[1])])
    bias = bias.reshape(heads.key_heads, heads.members, -1)
    bias = jnp.pad(bias, [(0, heads.blocks * heads.abreast - heads.key_heads), (0, 0), (0, 0)])
    return jnp.moveaxis(bias.reshape(heads.blocks, heads.abreast, heads.members, -1), 2, 0)


def _sizes(relative_bias: jax.Array | None, plan: Plan) -> tuple[int, int]:
    """Offsets in a row; and lanes of a line and of a row of the table, in whole registers."""
    tall, width = (0, 0) if relative_bias is None else relative_bias.shape[1:]
    return width, math.ceil(max(tall * plan.axes[-1].columns, plan.box) / LANES) * LANES

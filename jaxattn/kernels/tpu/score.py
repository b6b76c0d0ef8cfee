"""The score table of a relative bias, made by a small kernel: each row of it is one line of numbers, moved on.

The offsets of a head, one row after the other, each as long as a row of the box of keys, are a line. Key l of query t
then stands at l - shift of the line, where the shift is so many rows and so many columns: so a query's scores are the
line, rolled. What a roll brings round from the other end, or from the row beside, no window shows.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxattn.kernels.operands import hiding_score
from jaxattn.kernels.tpu import arrange
from jaxattn.kernels.tpu.block import F32, LOG2E
from jaxattn.kernels.tpu.plan import LANES, MIB, SUBLANES, Plan


def table(relative_bias: jax.Array | None, plan: Plan, keys_first: bool, interpret: bool) -> jax.Array:
    """`arrange.score_table`, in units of log 2. By XLA where the kernel can't, and interpreted, for rolls are slow."""
    if relative_bias is None or interpret or not can(relative_bias.shape[1:], plan):
        return arrange.score_table(relative_bias, plan, keys_first) * LOG2E
    return rolled(relative_bias, plan, keys_first, interpret)


def can(offsets: Sequence[int], plan: Plan) -> bool:
    """Whether rows of offsets fit into rows of the box, queries fill registers, and there are no extra tokens."""
    if len(plan.axes) != 2 or plan.extra:
        return False
    room = plan.patterns * (plan.heads.abreast * plan.queries + LANES) * _lanes(offsets, plan) * 4  # bytes of a step
    last = plan.axes[1]
    return offsets[1] <= last.columns and last.tile % SUBLANES == 0 and room <= 4 * MIB


def rolled(relative_bias: jax.Array, plan: Plan, keys_first: bool, interpret: bool) -> jax.Array:
    """By the kernel."""
    heads, hide = plan.heads, hiding_score(F32)
    (first, last), lanes, rows = plan.axes, _lanes(relative_bias.shape[1:], plan), plan.queries
    lines = _lines(jnp.where(relative_bias <= hide / 2, hide, relative_bias.astype(F32)) * LOG2E, plan)
    one = plan._replace(heads=heads._replace(abreast=1))
    seen = jnp.where(arrange.sees(one, False), F32(0), F32(1))  # [patterns, queries, keys], 1 where hidden
    patterns = list(np.ndindex(len(first.low), len(last.low)))
    tall = heads.abreast * rows

    def kernel(line: Any, hidden: Any, out: Any, whole: Any) -> None:
        lines = [jnp.broadcast_to(line[0, 0, h : h + 1], (last.tile, lanes)) for h in range(heads.abreast)]
        # along the last axis each query is so many steps further on than the first
        lines = [pltpu.roll(x, 0, 1, stride=last.step, stride_axis=0) for x in lines]
        for n, (p, q) in enumerate(patterns):
            begin = int(first.relative[p, 0]) * last.columns + int(last.relative[q, 0])
            for (h, x), t in itertools.product(enumerate(lines), range(first.tile)):
                shift = (t * first.step * last.columns - begin) % lanes
                x = pltpu.roll(x, shift, 1) if shift else x
                hides = hidden[n, t * last.tile : (t + 1) * last.tile] > 0.5
                x = jnp.where(hides, F32(hide * LOG2E), x[:, : plan.box])
                whole[pl.ds(h * rows + t * last.tile, last.tile), : plan.box] = x
            out[n, 0, 0] = whole[...].T[: plan.box, :tall] if keys_first else whole[:tall, : plan.box]

    shape = (plan.box, tall) if keys_first else (tall, plan.box)
    members, blocks = lines.shape[:2]
    call = pl.pallas_call(
        kernel,
        name="score_table",
        grid=(members, blocks),
        in_specs=[
            pl.BlockSpec((1, 1, *lines.shape[2:]), lambda m, b: (m, b, 0, 0)),
            pl.BlockSpec(seen.shape, lambda m, b: (0, 0, 0)),
        ],
        out_specs=pl.BlockSpec((len(patterns), 1, 1, *shape), lambda m, b: (0, m, b, 0, 0)),
        out_shape=arrange.shape_of((len(patterns), members, blocks, *shape), F32, relative_bias),
        scratch_shapes=[pltpu.VMEM((tall + -tall % LANES, lanes), F32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
    )
    with jax.enable_x64(False):
        return call(lines, seen)


def _lines(bias: jax.Array, plan: Plan) -> jax.Array:
    """[heads, offsets, offsets] as [members, blocks, abreast, lanes]."""
    heads, (_, last), lanes = plan.heads, plan.axes, _lanes(bias.shape[1:], plan)
    bias = jnp.pad(bias, [(0, 0), (0, 0), (0, last.columns - bias.shape[2])]).reshape(len(bias), -1)
    bias = jnp.pad(bias, [(0, 0), (0, lanes - bias.shape[1])])
    bias = bias.reshape(heads.key_heads, heads.members, -1)
    bias = jnp.pad(bias, [(0, heads.blocks * heads.abreast - heads.key_heads), (0, 0), (0, 0)])
    return jnp.moveaxis(bias.reshape(heads.blocks, heads.abreast, heads.members, -1), 2, 0)


def _lanes(offsets: Sequence[int], plan: Plan) -> int:
    """Of a line and of a row of the table, in whole registers."""
    return math.ceil(max(offsets[0] * plan.axes[-1].columns, plan.box) / LANES) * LANES

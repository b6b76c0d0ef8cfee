"""How the TPU's kernels put tokens in order, interpreted: against NumPy's indexing, in words of one number and two."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import jaxattn
from jaxattn.kernels.tpu import order, plan

LANES = 128
ORDERED = {  # odd and even, rectangular, of one to three axes; a dilation that does not divide; runs that are loops
    "mixed": ((9, 14), dict(size=(5, 3), boundary=("wrap", "reflect"), dilation=(1, 2))),
    "odd": ((7, 11), dict(size=(3, 5), dilation=(2, 3), boundary=("zero", "edge"))),
    "long, backwards": ((2100,), dict(size=101, boundary="reflect")),
    "long, dilated": ((2100,), dict(size=31, boundary="edge", dilation=2)),
    "wrapped, dilated": ((6, 20), dict(size=(3, 5), boundary="wrap", dilation=(1, 3))),
    "space and time": ((5, 4, 10), dict(size=(3, 3, 3), boundary=("edge", "zero", "wrap"), dilation=(1, 1, 2))),
}
CASES = [(name, jnp.bfloat16) for name in ORDERED] + [(name, jnp.float32) for name in ("mixed", "long, dilated")]


@pytest.mark.core(1)
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_there_and_back(name, dtype):
    """A copy in the order of tiles; and sums by place as sums by token, each of which adds up all its places."""
    grid, given = ORDERED[name]
    heads = plan.lanes_of(2, 2, (64, 64), jnp.dtype(dtype))
    whole = 8 * heads.packing if len(grid) == 1 else heads.packing
    axes = jaxattn.Window(**given).axes(grid)
    tiles = [axis.block * whole if a == len(grid) - 1 else 2 * axis.block for a, axis in enumerate(axes)]
    made = plan.Plan(heads, tuple(plan.plan_axis(x, t, whole, whole) for x, t in zip(axes, tiles, strict=True)), 0)
    for which in ("queries", "keys"):
        places = [getattr(axis, which) for axis in made.axes]
        if all(x is None for x in places):
            continue
        counts = [axis.query_count if which == "queries" else axis.key_count for axis in made.axes]
        places = [np.arange(n) if x is None else x for x, n in zip(places, counts, strict=True)]
        rng = np.random.default_rng(0)
        tokens = rng.normal(size=(1, *counts, LANES)).astype(dtype)
        sums = rng.integers(-9, 9, (*map(len, places), LANES)).astype(np.float32)
        words, back = jax.jit(functools.partial(interpreted, made, which))(tokens, sums)

        numbers = np.asarray(words)[..., None].view(dtype)  # [1, *places / packing, lanes, packing]
        copy = np.moveaxis(numbers, -1, -2).reshape(*sums.shape)
        at = np.ix_(*places)
        there = functools.reduce(np.logical_and, [x >= 0 for x in at])
        np.testing.assert_array_equal(copy, np.where(there[..., None], tokens[0][at], 0))
        expected = np.zeros((*counts, LANES), np.float32)
        np.add.at(expected, at, np.where(there[..., None], 2 * sums, 0))
        np.testing.assert_array_equal(np.asarray(back[0], np.float32), expected)


def interpreted(made, which, tokens, sums):
    """A copy of the tokens, in words; and, by token, twice the sums of all places of each."""
    placed, dtype = order.orders(made), tokens.dtype
    to, back = (placed.keys, placed.keys_back) if which == "keys" else (placed.queries, placed.queries_back)

    def kernel(table, x, s, copy, y, total, narrowed):
        order.fill(to, table, [(copy, x.bitcast(jnp.int32), jnp.int32(0))])
        total[...] = s[...]
        if which == "keys":
            order.add_twins(placed, table, (total,))
        order.narrow(total, 2.0, narrowed, dtype)
        order.put_back(back, table, narrowed, y, True)

    words = (1, *sums.shape[:-2], sums.shape[-2] // made.heads.packing, LANES)
    whole = lambda shape: pl.BlockSpec(shape, lambda *_: (0,) * len(shape))
    call = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(1,),
            in_specs=[whole(tokens.shape), whole(sums.shape)],
            out_specs=[whole(words), whole(tokens.shape)],
            scratch_shapes=[pltpu.VMEM(sums.shape, jnp.float32), pltpu.VMEM(words, jnp.int32)],
        ),
        out_shape=[jax.ShapeDtypeStruct(words, jnp.int32), jax.ShapeDtypeStruct(tokens.shape, dtype)],
        interpret=True,
    )
    with jax.enable_x64(False):
        return call(jnp.asarray(placed.table), tokens, sums)

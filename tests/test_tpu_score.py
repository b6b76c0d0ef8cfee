"""The kernels of score tables by rolls, there and back, interpreted: against what XLA makes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattn
from jaxattn.kernels.tpu import arrange, plan, score
from jaxattn.kernels.tpu.block import LOG2E

CASES = [  # windows that stop and that move on at the border; blocks in tiles that overlap; steps of two; few heads
    ((8, 16), dict(size=(3, 5), boundary="mask"), ((4, 4, 1), (8, 8, 16)), 3),
    ((12, 24), dict(size=(7, 7)), ((4, 4, 1), (8, 8, 16)), 4),
    ((7, 28), dict(size=(7, 7), block=7), ((7, 7, 1), (14, 16, 16)), 2),
    ((14, 28), dict(size=(7, 7), block=7), ((7, 8, 2), (7, 8, 8)), 2),  # rows of keys that are shorter than of offsets
    ((16, 32), dict(size=(4, 3), stride=2, boundary="mask"), ((2, 2, 1), (8, 8, 16)), 2),
]


def planned(grid, given, tile, heads):
    """A plan, of which each axis has (own queries, tile, unit of keys), and a bias in which some entries hide."""
    window, rng = jaxattn.Window(**given), np.random.default_rng(0)
    lanes = plan.lanes_of(2 * heads, heads, (32, 32), jnp.dtype(jnp.bfloat16))
    (first, last), ((rows, tall, row), (columns, wide, column)) = window.axes(grid), tile
    made = plan.Plan(
        lanes, (plan.plan_axis(first, rows, row, 1, tall), plan.plan_axis(last, columns, column, 2, wide)), 0
    )
    bias = rng.normal(size=(2 * heads, *(2 * k - 1 for k in window.sizes))).astype(np.float32)
    bias[0, 0] = -np.inf
    return made, jnp.asarray(bias)


@pytest.mark.core(1)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_rolled(case, biased):
    made, bias = planned(*case)
    bias = bias if biased else None
    assert score.can(bias, made)
    for each in (made, made._replace(keys_first=True)):
        ours = score.rolled(bias, each, interpret=True)
        theirs = arrange.score_table(bias, each) * LOG2E
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.core(1)
@pytest.mark.parametrize("case", CASES)
def test_rolled_back(case):
    """Where the window hides a key, the kernel of attention gives 0."""
    made, bias = planned(*case)
    made = made._replace(keys_first=True)
    table, pull = jax.vjp(lambda bias: arrange.score_table(bias, made), bias)
    seen = arrange.sees(made, keys_first=True)[:, None, None]
    of_table = jnp.where(seen, jax.random.normal(jax.random.key(0), table.shape, table.dtype), 0)
    ours = score.rolled_back(of_table, bias, made, interpret=True)
    np.testing.assert_allclose(ours, pull(of_table)[0], rtol=1e-5, atol=1e-5)

"""The TPU's kernels in strips of the first axis, interpreted: against loops in float64, and against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import GEOMETRIES, check, relative_bias, residuals
from test_tpu import HIDDEN, against_the_formula, interpreted, of, plan_of

import jaxattn
from jaxattn.kernels.tpu import choose, plan, strips

__all__ = ["interpreted"]
# each boundary along the axis that is cut, dilation, stride and blocks on it, and windows that reach beyond a strip
CUT = [
    *("5 x 5, mask", "halo", "Swin, ragged", "dilated", "strided", "wrap and mask", "edge and reflect"),
    *("zero and valid", "3 x 3 x 3", "3-D, all at once", "4-D", "all at once", "every offset of the grid"),
]


@pytest.fixture
def in_strips(interpreted, monkeypatch):
    """Nothing fits whole: every grid of two axes and up goes in strips."""
    fit = choose._fit
    only = lambda made, *rest: "it is whole" if made.strips is None else fit(made, *rest)
    monkeypatch.setattr(choose, "_fit", only)
    choose.make_plan.cache_clear()
    yield
    choose.make_plan.cache_clear()


@pytest.mark.parametrize("geometry", [pytest.param(x, marks=() if x == "halo" else pytest.mark.full) for x in CUT])
def test_values_and_gradients(in_strips, geometry):
    """Grouped heads, so that members add to the sums of a strip in turn, with a relative bias and lse."""
    check(of(geometry, [relative_bias, residuals]), "tpu", jnp.float32)


@pytest.mark.full
@pytest.mark.parametrize("geometry", ["5 x 5, mask", "dilated", "3 x 3 x 3"])
def test_in_half_precision(in_strips, geometry):
    check(of(geometry, [residuals]), "tpu", jnp.bfloat16)


@pytest.mark.full
@pytest.mark.parametrize(("grid", "given", "dtype", "names"), [x for x in HIDDEN if len(x[0]) > 1])
def test_masks_segments_a_soft_cap_and_extra_tokens(in_strips, grid, given, dtype, names):
    against_the_formula((3 * grid[0], *grid[1:]), given, dtype, names)


@pytest.mark.full
@pytest.mark.parametrize(("grid", "size"), [((8, 4, 8), (3, 3, 3)), ((24, 16), (7, 5))])
@pytest.mark.parametrize("boundary", ["mask", "shift"])
def test_a_small_vmem_makes_strips(interpreted, monkeypatch, grid, size, boundary):
    """Both ways, of a batch; what is whole elsewhere is not here, with the same bits each time."""
    window = jaxattn.Window(size, boundary=boundary)
    monkeypatch.setitem(plan.VMEM, "v5e", 2 * plan.MIB)
    made = of((grid, dict(size=size, boundary=boundary)), [residuals], batch=(2,), heads=2, head_dim=64, value_dim=64)
    counts, choice = [], choose.make_plan

    def chosen(*arguments):
        counts.append(choice(*arguments).strip_count)
        return choice(*arguments)

    monkeypatch.setattr("jaxattn.kernels.tpu.backend.make_plan", chosen)
    check(made, "tpu", jnp.float32)
    assert min(counts) > 1
    x = made.cast(jnp.float32).operands
    loss = lambda x: (jaxattn.attention(**x, window=window, implementation="tpu") ** 2).sum()
    once, again = (jax.jit(jax.grad(loss))(x) for _ in range(2))
    for name in x:
        np.testing.assert_array_equal(once[name], again[name])


def test_a_volume_is_taken_and_its_plan_holds_a_strip():
    """What a step holds is within the VMEM, and what strips can't hold is refused with a reason."""
    window = jaxattn.Window((3, 7, 7), boundary="mask")
    made = plan_of(shape=(1, 16, 64, 64, 8, 64), window=window, implementation="tpu")
    assert made.backend == "tpu"
    assert f"in {4 * made.cost.strips} steps of {made.cost.strips} strips holding" in str(made)
    assert 0 < made.cost.held < choose.SHARE * plan.VMEM["v5e"]
    refused = plan_of(shape=(1, 4, 512, 512, 2, 64), window=window).refused["tpu"]
    assert refused.startswith("its kernels hold a grid, or strips of its first axis, in VMEM: a step would hold ")


def test_strips_cover_every_place_and_hold_what_their_tiles_meet():
    for grid, given in (GEOMETRIES[name] for name in CUT):
        axis = plan.plan_axis(jaxattn.Window(**given).axes(grid)[0], own=6, unit=1, align=1)
        for count in (n for n in range(1, axis.tiles + 1) if axis.tiles % n == 0):
            made = strips.cut(axis.tile, axis.columns, axis.start, axis.length, count)
            assert (made.number, made.queries * count) == (count, axis.places)
            begin = made.begin.repeat(made.tiles)
            assert (begin <= axis.start).all()
            assert (axis.start + axis.columns <= begin + made.keys).all()
            assert made.begin[0] == 0
            assert made.done.sum() == axis.length
            assert ((made.done >= 0) & (made.done <= made.keys)).all()

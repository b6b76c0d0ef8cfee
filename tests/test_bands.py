"""Local scores, local mix and their adjoint by bands, against plain loops and under every transformation."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxattn
from jaxattn import machine
from jaxattn.lowerings import bands, local
from jaxattn.lowerings.bands import BandAxis
from tests.oracle_einsum import Einsum

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="chosen on the CPU only")
# stride, dilation, positions, slots
GEOMETRIES = {
    "odd": (BandAxis(1, 1, 9, 3), BandAxis(1, 1, 7, 5)),
    "even, rectangular": (BandAxis(1, 1, 4, 2), BandAxis(1, 1, 13, 4)),
    "one position": (BandAxis(1, 1, 1, 3), BandAxis(1, 1, 1, 1)),
    "one slot": (BandAxis(1, 1, 5, 1), BandAxis(2, 1, 6, 1)),
    "strided": (BandAxis(2, 1, 5, 3), BandAxis(3, 1, 6, 2)),
    "dilated": (BandAxis(1, 2, 7, 3), BandAxis(2, 3, 5, 3)),
    "line": (BandAxis(2, 2, 19, 4),),
    "volume": (BandAxis(1, 1, 5, 2), BandAxis(2, 1, 3, 2), BandAxis(1, 2, 4, 3)),
}


def draw(*shapes, dtype="float64", seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def operands(axes, n=2, m=2, d=3, **options):
    positions = [a.positions for a in axes]
    keys = [a.stride * (a.positions - 1) + a.dilation * (a.slots - 1) + 1 for a in axes]
    return draw((n, *positions, m, d), (n, *keys, m, d), (n, *positions, m, *(a.slots for a in axes)), **options)


@pytest.fixture
def smaller(monkeypatch):
    """Sets constants of the kernel, for one test."""

    def forget():
        bands._tile.cache_clear()
        jax.clear_caches()

    def change(**constants):
        for name, value in constants.items():
            monkeypatch.setattr(bands, name, value)
        forget()

    yield change
    monkeypatch.undo()
    forget()


def loops(q, k, s, axes):
    """The gradients of T with respect to q, k, s, written from its formula."""
    q, k, s = map(np.asarray, (q, k, s))
    by_q, by_k, by_s = np.zeros(q.shape), np.zeros(k.shape), np.zeros(s.shape)
    for p in itertools.product(*(range(a.positions) for a in axes)):
        for u in itertools.product(*(range(a.slots) for a in axes)):
            at = tuple(a.stride * i + a.dilation * j for a, i, j in zip(axes, p, u, strict=True))
            of_q, of_k, of_s = (slice(None), *p), (slice(None), *at), (slice(None), *p, slice(None), *u)
            by_s[of_s] = (q[of_q] * k[of_k]).sum(-1)
            by_q[of_q] += s[of_s][..., None] * k[of_k]
            by_k[of_k] += s[of_s][..., None] * q[of_q]
    return by_q, by_k, by_s


def ours(q, k, s, axes):
    return [bands.partial(wrt, *pair, axes) for wrt, pair in (("q", (k, s)), ("k", (q, s)), ("s", (q, k)))]


def close(mine, theirs, tolerance=1e-12):
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(float(abs(b).max()), 1))


@pytest.mark.core(5)
@pytest.mark.parametrize("cut", [{}, {"QUERIES": 6}, {"QUERIES": 1}, {"STEP": 1}], ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_three_derivatives_are_those_of_the_formula(name, cut, smaller):
    """With tiles that do and that don't fill the grid, and with n in chunks."""
    smaller(**cut)
    arrays, axes = operands(GEOMETRIES[name], n=16 if "STEP" in cut else 2), GEOMETRIES[name]
    close(jax.jit(functools.partial(ours, axes=axes))(*arrays), loops(*arrays, axes))


@pytest.mark.parametrize("wrt", "qks")
def test_each_derivative_transposes_into_the_other_two(wrt):
    axes = GEOMETRIES["dilated"]
    arrays = dict(zip("qks", operands(axes), strict=True))
    names = [name for name in "qks" if name != wrt]
    given = [arrays[name] for name in names]
    back = jax.vjp(lambda *pair: bands.partial(wrt, *pair, axes), *given)[1](arrays[wrt])
    wanted = dict(zip("qks", loops(*arrays.values(), axes), strict=True))
    close(back, [wanted[name] for name in names])


def plain(q, k, axes):
    """The scores by indexing every key, for derivatives that JAX takes itself."""
    at = np.ix_(*(np.arange(a.positions) * a.stride for a in axes))
    rows = []
    for u in itertools.product(*(range(a.slots) for a in axes)):
        index = [i + a.dilation * j for i, a, j in zip(at, axes, u, strict=True)]
        rows.append((q * k[(slice(None), *index)]).sum(-1))
    return jnp.stack(rows, -1).reshape(*q.shape[:-1], *(a.slots for a in axes))


def scores(q, k, axes):
    return bands.partial("s", q, k, axes)


@pytest.mark.full
def test_derivatives_of_any_order(smaller):
    smaller(QUERIES=4)
    axes = GEOMETRIES["line"]
    (q, k, _), (tq, tk, _) = operands(axes), operands(axes, seed=1)

    def each(f):
        loss = lambda q, k: jnp.sin(f(q, k, axes)).sum()
        first = jax.grad(loss, (0, 1))
        second = lambda q, k: jax.vjp(first, q, k)[1]((tq, tk))
        yield jax.jit(functools.partial(jax.jvp, loss))((q, k), (tq, tk))
        yield jax.jit(functools.partial(jax.jvp, first))((q, k), (tq, tk))  # forward over reverse
        yield jax.jit(second)(q, k)  # reverse over reverse
        yield jax.jit(jax.grad(lambda k: jax.jvp(loss, (q, k), (tq, tk))[1]))(k)  # reverse over forward
        yield jax.jit(jax.grad(jax.checkpoint(loss)))(q, k)

    for mine, theirs in zip(each(scores), each(plain), strict=True):
        close(mine, theirs, 1e-11)


@pytest.mark.core(2)
@pytest.mark.parametrize("mapped", [(0, None), (None, 0), (0, 0), (1, 2)], ids=str)
def test_vmap(mapped):
    axes = GEOMETRIES["strided"]
    q, k, _ = operands(axes)
    arrays = [z if d is None else jnp.stack([z, 2 * z, -z], axis=d) for z, d in zip((q, k), mapped, strict=True)]

    def run(f):
        one = lambda q, k: jax.vjp(lambda *a: f(*a, axes) ** 3, q, k)[1](1 + f(q, k, axes))
        return jax.jit(jax.vmap(one, mapped))(*arrays)

    close(run(scores), run(plain), 1e-11)


SCORES, MIX = "b i j h d, b i+u j+v h d -> b i j h u v", "b i j h u v, b i+u j+v h d -> b i j h d"
SAME = {"padding": "SAME"}
CALLS = {  # equation, shapes, options
    "scores": (SCORES, [(1, 5, 4, 2, 8)] * 2, SAME | {"u": 5, "v": 5}),
    "mix": (MIX, [(1, 5, 4, 2, 5, 5), (1, 5, 4, 2, 8)], SAME),
    "window of the grid": (SCORES, [(1, 1, 1, 2, 8), (1, 5, 4, 2, 8)], {"u": 5, "v": 4}),
    "barely fits": (MIX, [(2, 1, 2, 1, 6, 3), (2, 6, 4, 1, 8)], {}),
    "even, wrap": (MIX, [(1, 4, 5, 1, 4, 5), (1, 4, 5, 1, 8)], SAME | {"boundary": "wrap"}),
    "reflect and edge": (SCORES, [(1, 4, 5, 1, 8)] * 2, SAME | {"boundary": ["reflect", "edge"], "u": 5, "v": 4}),
    "downwards": ("b i-u h d, b i h u -> b i d h", [(2, 6, 2, 8), (2, 6, 2, 17)], SAME),
    "strided, dilated": ("b i d, b 2*i+3*u d -> b u i", [(2, 5, 8), (2, 9, 8)], {"padding": (24, 24), "u": 17}),
    "involution": ("b i+r j+s (g c), b i j r s g -> b i j (g c)", [(1, 4, 3, 16), (1, 4, 3, 5, 5, 2)], SAME | {"g": 2}),
    "composed": (
        "b h i (d e), b h i-u d e -> h b i u",
        [(2, 2, 4, 8), (2, 2, 4, 4, 2)],
        SAME | {"u": 18, "d": 4},
    ),
    "scattered": (
        "b i h u, b i h d -> b i+u h d",
        [(2, 6, 2, 17), (2, 6, 2, 8)],
        {"padding": (3, 3), "boundary": "edge"},
    ),
    "volume": ("i j k d, i+u j+v k+w d -> i j k u v w", [(3, 2, 4, 8)] * 2, SAME | {"u": 3, "v": 3, "w": 3}),
}


@pytest.mark.core(2)
@pytest.mark.parametrize("name", CALLS)
def test_value_and_gradients_of_an_equation(name):
    """Whatever the plan prefers."""
    equation, shapes, options = CALLS[name]
    resolved = jaxattn.plan(equation, *shapes, **options).resolved
    oracle, arrays = Einsum(equation, shapes, **options), [np.asarray(x) for x in draw(*shapes)]
    want, (cotangent,) = oracle.value(*arrays), draw(oracle.shape, seed=1)
    match = local.match(resolved)
    run = lambda *arrays: local.local_product(resolved, match, arrays, None, np.dtype("float64"))
    y, back = jax.vjp(jax.jit(run), *map(jnp.asarray, arrays))
    close((y, back(cotangent)), (want, tuple(oracle.gradients(arrays, np.asarray(cotangent)))))


@pytest.mark.core(4)
@on_cpu
@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("strided, dilated", "scattered")])
def test_the_plan_takes_it(name):
    equation, shapes, options = CALLS[name]
    plan = jaxattn.plan(equation, *shapes, **options)
    assert plan.lowering == "bands"
    assert "bands: one dense product per tile of positions, " in str(plan)
    arrays = draw(*shapes)
    run = functools.partial(jaxattn.einsum, equation, **options)
    close(run(*arrays), run(*arrays, implementation="reference"))


OTHERS = {
    "few slots": (SCORES, [(1, 5, 4, 2, 8)] * 2, SAME | {"u": 4, "v": 4}),
    "few features": (SCORES, [(1, 5, 4, 2, 7)] * 2, SAME | {"u": 5, "v": 5}),
    "mostly waste": (SCORES.replace("i+u j+v", "i+4*u j+4*v"), [(1, 9, 9, 2, 8)] * 2, SAME | {"u": 5, "v": 5}),
    "a window in both": ("b i+u d, b i+u d -> b i u", [(2, 30, 8)] * 2, {"u": 20}),
    "a sum over slots": ("b i d, b i+u d -> b i", [(2, 9, 8)] * 2, SAME | {"u": 20}),
    "features of one alone": ("b i d, b i+u d e -> b i u", [(2, 9, 8), (2, 9, 8, 2)], SAME | {"u": 20}),
    "an axis of the result": ("b i d o, b i+u d -> b i u o", [(2, 9, 8, 3), (2, 9, 8)], SAME | {"u": 20}),
    "two windows": ("b i d, b i+u+v d -> b i u v", [(2, 9, 8)] * 2, SAME | {"u": 5, "v": 5}),
    "nothing": (SCORES, [(0, 5, 4, 2, 8)] * 2, SAME | {"u": 5, "v": 5}),
    "a diagonal": ("b i d, b b i+u d -> b i u", [(2, 9, 8), (2, 2, 9, 8)], SAME | {"u": 20}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_plan_leaves_it(name):
    equation, shapes, options = OTHERS[name]
    assert jaxattn.plan(equation, *shapes, **options).lowering != "bands"


@pytest.mark.parametrize(("dtypes", "wanted"), [(("int32", "int32"), "int32"), (("complex64", "float32"), None)])
def test_only_real_floating_point_is_taken(dtypes, wanted):
    equation, shapes, options = CALLS["scores"]
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    assert jaxattn.plan(equation, *arrays, preferred_element_type=wanted, **options).lowering == "slices"


def test_a_narrower_result_is_not_taken():
    equation, shapes, options = CALLS["scores"]
    wide = [jax.ShapeDtypeStruct(shape, "float64") for shape in shapes]
    assert jaxattn.plan(equation, *wide, preferred_element_type="float32", **options).lowering == "slices"


@pytest.mark.core(2)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2), ("float16", 2e-3)])
@pytest.mark.parametrize("name", ["scores", "mix"])
def test_half_precision_is_rounded_once(name, dtype, tolerance):
    equation, shapes, options = CALLS[name]
    arrays = draw(*shapes, dtype=dtype)

    def both(*arrays):
        with jax.numpy_dtype_promotion("strict"):
            y, back = jax.vjp(functools.partial(jaxattn.einsum, equation, **options), *arrays)
            return y, *back(jnp.ones_like(y))

    for mine, want in zip(jax.jit(both)(*arrays), both(*(x.astype("float64") for x in arrays)), strict=True):
        assert mine.dtype == dtype
        np.testing.assert_allclose(np.asarray(mine, float), want, atol=tolerance * float(abs(want).max()))


def test_mixed_dtypes_and_a_wider_result():
    equation, shapes, options = CALLS["mix"]
    s, k = draw(*shapes)
    run = functools.partial(jaxattn.einsum, equation, **options)
    y = run(s.astype("bfloat16"), k.astype("bfloat16"), preferred_element_type="float32")
    close(y, run(s.astype("bfloat16").astype("float32"), k.astype("bfloat16").astype("float32")), 1e-6)
    assert run(s.astype("bfloat16"), k.astype("float32")).dtype == "float32"


@pytest.mark.core(1)
@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize("name", ["scores", "mix"])
@pytest.mark.parametrize("kind", ["auto", "explicit", "manual"])
def test_cut_over_devices(name, kind, smaller):
    smaller(STEP=1)
    equation, shapes, options = CALLS[name]
    arrays = draw(*((16 * n, *rest) for n, *rest in shapes))
    run = functools.partial(jaxattn.einsum, equation, **options)
    loss = jax.value_and_grad(lambda *arrays: (run(*arrays) ** 2).sum(), (0, 1))
    axis = jax.sharding.AxisType.Explicit if kind == "explicit" else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(axis,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        cut = [jax.device_put(x, jax.NamedSharding(mesh, P("batch"))) for x in arrays]
        if kind == "manual":
            y = jax.jit(jax.shard_map(run, in_specs=P("batch"), out_specs=P("batch")))(*cut)
        else:
            compiled = jax.jit(loss).lower(*cut).compile()
            assert "all-gather" not in compiled.as_text()
            close(jax.device_get(compiled(*cut)), jax.device_get(loss(*arrays)), 1e-11)
            y = jax.jit(run)(*cut)
    assert y.sharding.spec[0] == "batch"
    close(np.asarray(y), run(*arrays))


@on_cpu
@pytest.mark.parametrize("name", ["scores", "mix", "involution", "volume"])
def test_the_plan_counts_what_it_holds(name):
    equation, shapes, options = CALLS[name]
    grown = [
        tuple({5: 20, 4: 16, 3: 15}.get(n, n) if d < (3 if name != "mix" else 2) else n for d, n in enumerate(s))
        for s in shapes
    ]
    plan = jaxattn.plan(equation, *grown, **options)
    assert plan.lowering == "bands"
    run = jax.jit(functools.partial(jaxattn.einsum, equation, **options))
    held = run.lower(*draw(*grown, dtype="float32")).compile().memory_analysis().temp_size_in_bytes
    assert held <= 1.3 * plan.temporaries + 2**19


def test_tiles_are_those_of_the_machine_that_is_traced_for(smaller):
    """A batch cut over devices stays where it is: also where the program is for more of them than are here."""
    smaller(STEP=1)
    axes = (BandAxis(1, 1, 64, 9),)
    q, k = draw((48, 64, 2, 8), (48, 72, 2, 8))
    for devices in (1, 16):
        with machine.traced_for("cpu", devices):
            text = jax.jit(lambda q, k: bands.partial("s", q, k, axes)).lower(q, k).as_text()
        entries = re.search(r"dynamic_slice.*-> tensor<(\d+)x", text).group(1)
        assert int(entries) == devices, "a step takes an entry of each device"

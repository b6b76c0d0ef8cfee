"""`einsum` under JAX's transformations, in every dtype, with strict promotion, and what it holds in memory."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle_einsum import Einsum

import jaxattn

# one equation for each lowering
CASES = {
    "plain": ("b i d, b j d -> b i j", [(2, 3, 4), (2, 5, 4)], {}),
    "convolution": ("n 2*i+r j+s c, r s c o -> n i j o", [(2, 6, 5, 3), (3, 2, 3, 4)], {"padding": "SAME"}),
    "depthwise": (
        "n 2*i+r j+2*s (c h), r s (h m) c -> n i j (h c m)",
        [(2, 6, 5, 6), (3, 2, 6, 2)],
        {"padding": "SAME", "h": 3},
    ),
    "depthwise transposed": ("n i j c, r s c -> n 3*i+2*r j-s c", [(2, 3, 4, 3), (3, 2, 3)], {"boundary": "reflect"}),
    "grouped": (
        "n 2*i+r j-s (g c), c r s (g o) -> n (g o) i j",
        [(2, 6, 5, 4), (2, 3, 2, 6)],
        {"padding": "SAME", "g": 2},
    ),
    "transposed": ("n i j c, r s c o -> n 2*i+r 2*j+s o", [(2, 3, 4, 3), (3, 2, 3, 4)], {"boundary": "wrap"}),
    "slices": ("b i u, b i+u d -> b i d", [(2, 5, 3), (2, 5, 4)], {"padding": "SAME", "boundary": "edge"}),
    "transposed, dilated": ("n i c, r c o -> n 2*i+3*r o", [(2, 4, 3), (3, 3, 4)], {"boundary": "wrap"}),
    "pairs": ("n i+r j+s c, r f, s f, c f -> n i j f", [(2, 4, 3, 3), (3, 2), (2, 2), (3, 2)], {"padding": "SAME"}),
    "gather": ("b 4*i+t-1 c -> b i t c", [(2, 8, 3)], {"i": 2, "t": 6, "boundary": "reflect"}),
}
TOLERANCE = {"float64": 1e-12, "float32": 2e-6, "float16": 2e-3, "bfloat16": 1e-2}  # a few units in the last place
ROUNDS = {"xla_allow_excess_precision": False}  # a program rounds where operations one by one would


def arrays(shapes, dtype="float64", seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


@pytest.fixture(params=CASES)
def case(request):
    equation, shapes, options = CASES[request.param]
    return functools.partial(jaxattn.einsum, equation, **options), shapes, Einsum(equation, shapes, **options)


def test_the_cases_are_one_for_each_lowering():
    lowerings = [jaxattn.plan(equation, *shapes, **options).lowering for equation, shapes, options in CASES.values()]
    of_a_cpu = ["depthwise"] * 3 + ["phases"] if jax.default_backend() == "cpu" else ["convolution"] * 4
    assert lowerings == ["plain", "convolution", *of_a_cpu, "slices", "convolution", "pairs", "gather"]


@pytest.mark.core(4)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("implementation", [None, "reference"])
def test_dtypes_under_strict_promotion(case, dtype, implementation):
    run, shapes, oracle = case
    operands = arrays(shapes, dtype)
    exact = [np.asarray(x, np.float64) for x in operands]

    @functools.partial(jax.jit, compiler_options=ROUNDS)
    def both(*operands):
        y, back = jax.vjp(functools.partial(run, implementation=implementation), *operands)
        return y, back(jnp.ones_like(y))

    with jax.numpy_dtype_promotion("strict"):
        y, grads = both(*operands)
    assert y.dtype == dtype
    scale = abs(oracle.value(*map(np.abs, exact))).max()
    np.testing.assert_allclose(np.asarray(y, float), oracle.value(*exact), atol=TOLERANCE[dtype] * scale)
    for grad, want in zip(grads, oracle.gradients(exact, np.ones(y.shape)), strict=True):
        assert grad.dtype == dtype
        bound = max(abs(want).max(), scale)
        np.testing.assert_allclose(np.asarray(grad, float), want, atol=TOLERANCE[dtype] * bound)


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize(
    ("lowering", "equation", "batch"),
    [("plain", "n i, n i -> n", ()), ("slices", "n i+r, n i r -> n i", (1, 1)), ("convolution", "n i+r, r -> n i", ())],
)
def test_half_precision_accumulates_in_float32(lowering, equation, batch, implementation):
    """4096 ones: bfloat16 alone stops counting at 256."""
    x, w = jnp.ones((1, 4096), jnp.bfloat16), jnp.ones((*batch, 4096), jnp.bfloat16)
    w = w[None] if lowering == "plain" else w
    assert jaxattn.plan(equation, x, w).lowering == lowering
    assert jaxattn.einsum(equation, x, w, implementation=implementation).item() == 4096


@pytest.mark.core(2)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("equation", "shapes", "options"),
    [
        ("n i+r -> n i r", [(2, 400)], {"r": 100}),
        ("n i+r -> n i", [(2, 400)], {"r": 100}),
        ("b i h d, b i+u h d -> b i h u", [(1, 200, 2, 3), (1, 200, 2, 3)], {"u": 101, "padding": "SAME"}),
        ("n i c, r c o -> n i+r o", [(2, 200, 4), (301, 4, 2)], {"padding": 225, "boundary": "edge"}),
        ("n i+r c, r c o -> n i o", [(2, 200, 4), (101, 4, 2)], {"padding": 100, "boundary": "edge"}),
        ("n i+r c k, r c o -> n i o", [(1, 6, 2, 1000), (3, 2, 4)], {}),
    ],
)
def test_half_precision_accumulates_in_float32_backward_too(equation, shapes, options, dtype):
    """Transposes are sums as well: each operand's gradient is right to the rounding of the operands and the result."""
    operands = [jnp.asarray(np.random.default_rng(0).uniform(size=s), dtype) for s in shapes]
    run = functools.partial(jaxattn.einsum, equation, **options)

    @functools.partial(jax.jit, compiler_options=ROUNDS)
    def both(*xs):
        y, back = jax.vjp(run, *xs)
        return y, *back(jnp.ones_like(y))

    for mine, want in zip(both(*operands), both(*[x.astype(jnp.float32) for x in operands]), strict=True):
        assert mine.dtype == dtype
        np.testing.assert_allclose(np.asarray(mine, float), want, atol=0.006 * float(abs(want).max()))


def test_weak_types_promote_as_in_jax():
    x = jnp.ones(3, jnp.bfloat16)
    assert jaxattn.einsum("a, -> a", x, 2.0).dtype == jnp.bfloat16
    assert jaxattn.einsum("a, -> a", x, np.float32(2)).dtype == jnp.float32


@pytest.mark.core(6)
@pytest.mark.parametrize(("dtype", "wider"), [("bfloat16", "float32"), ("int8", "int32")])
def test_preferred_element_type_under_strict_promotion(case, dtype, wider):
    run, shapes, _ = case
    with jax.numpy_dtype_promotion("strict"):
        operands = [jnp.ones(s, dtype) for s in shapes]
        assert jax.jit(functools.partial(run, preferred_element_type=wider))(*operands).dtype == wider


def test_a_plan_takes_what_einsum_takes():
    equation, shapes, options = CASES["convolution"]
    plan = jaxattn.plan(equation, *shapes, **options, precision="highest", preferred_element_type=jnp.bfloat16)
    assert plan.dtype == jnp.bfloat16


@pytest.mark.core(8)
@pytest.mark.parametrize("dtype", ["int8", "int32", "uint8", "int64"])
def test_integers(case, dtype):
    run, shapes, oracle = case
    operands = [np.asarray(np.random.default_rng(0).integers(0, 3, shape), dtype) for shape in shapes]
    y = run(*operands)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, oracle.value(*operands).astype(dtype))


def test_complex(case):
    run, shapes, oracle = case
    operands = [np.asarray(x) + 1j * np.asarray(y) for x, y in zip(arrays(shapes), arrays(shapes, seed=1), strict=True)]
    np.testing.assert_allclose(run(*operands), oracle.value(*operands), rtol=1e-12, atol=1e-12)


def test_promotion_and_preferred_element_type(case):
    run, shapes, oracle = case
    if len(shapes) == 2:
        mixed = [x.astype(t) for x, t in zip(arrays(shapes), ["bfloat16", "float32"], strict=True)]
        assert jax.jit(run)(*mixed).dtype == jnp.float32
    small = arrays(shapes, "bfloat16")

    @functools.partial(jax.jit, compiler_options=ROUNDS)
    def both(*xs):
        y, back = jax.vjp(functools.partial(run, preferred_element_type=jnp.float32), *xs)
        return y, back(y)

    y, grads = both(*small)
    assert y.dtype == jnp.float32
    exact = [np.asarray(x, float) for x in small]
    np.testing.assert_allclose(y, oracle.value(*exact), rtol=1e-5, atol=1e-5)
    assert all(grad.dtype == jnp.bfloat16 for grad in grads)
    narrow = functools.partial(run, preferred_element_type=jnp.bfloat16)
    assert jax.jit(narrow)(*arrays(shapes, "float32")).dtype == jnp.bfloat16


@pytest.mark.core(1)
def test_jit_vmap_jvp_checkpoint_and_second_derivatives(case):
    run, shapes, oracle = case
    operands, tangents = arrays(shapes), arrays(shapes, seed=1)
    want = oracle.value(*operands)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11)
    close(jax.jit(run)(*operands), want)
    stacked = [jnp.stack([x, 2 * x, t]) for x, t in zip(operands, tangents, strict=True)]
    got = jax.jit(jax.vmap(run))(*stacked)
    for k in range(3):
        close(got[k], oracle.value(*[x[k] for x in stacked]))

    # the sum is linear in each operand, so its derivative along t is the sum with that operand replaced
    slope = sum(oracle.value(*[*operands[:k], tangents[k], *operands[k + 1 :]]) for k in range(len(operands)))
    value, tangent = jax.jit(functools.partial(jax.jvp, run))(operands, tangents)
    close(value, want)
    close(tangent, slope)

    def loss(f):
        return lambda *xs: (f(*xs) ** 2).sum() / 2

    grads = oracle.gradients([np.asarray(x) for x in operands], want)
    for f in (run, jax.checkpoint(run)):
        for mine, theirs in zip(jax.jit(jax.grad(loss(f), range(len(operands))))(*operands), grads, strict=True):
            close(mine, theirs)
    hvp = jax.jit(lambda xs, ts: jax.jvp(jax.grad(loss(run), range(len(xs))), xs, ts)[1])
    reverse = jax.grad(lambda *xs: sum(map(jnp.vdot, jax.grad(loss(run), range(len(xs)))(*xs), tangents)), 0)
    reversed_twice = jax.jit(reverse)(*operands)
    close(hvp(tuple(operands), tuple(tangents))[0], reversed_twice)
    # central differences of the loops' own gradient
    step = 1e-5
    ends = []
    for sign in (1, -1):
        moved = [np.asarray(x + sign * step * t) for x, t in zip(operands, tangents, strict=True)]
        ends.append(oracle.gradients(moved, oracle.value(*moved))[0])
    np.testing.assert_allclose(reversed_twice, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-6)


@pytest.mark.core(2)
@pytest.mark.parametrize("name", CASES)
def test_shard_map_over_the_batch(name):
    equation, shapes, options = CASES[name]
    mesh = jax.make_mesh((2,), ("batch",), devices=jax.devices()[:2])
    run = functools.partial(jaxattn.einsum, equation, **options)
    specs = tuple(P("batch") if term.split()[0] in "bn" else P() for term in equation.split("->")[0].split(","))
    operands = [jax.device_put(x, jax.NamedSharding(mesh, spec)) for x, spec in zip(arrays(shapes), specs, strict=True)]
    local = [np.asarray(x) for x in operands]
    sharded = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P("batch"))
    np.testing.assert_allclose(jax.jit(sharded)(*operands), run(*local), rtol=1e-12, atol=1e-12)
    loss = lambda f: lambda *xs: (f(*xs) ** 2).sum()
    for mine, want in zip(
        jax.jit(jax.grad(loss(sharded), range(len(operands))))(*operands),
        jax.grad(loss(run), range(len(local)))(*local),  # operation by operation, too
        strict=True,
    ):
        np.testing.assert_allclose(mine, want, rtol=1e-11, atol=1e-11)


@pytest.mark.core(4)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto])
def test_a_sharded_batch_stays_sharded(name, axis_type):
    """Under a mesh the batch is not gathered: each device holds its own half of the result."""
    equation, shapes, options = CASES[name]
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(axis_type,), devices=jax.devices()[:2])
    run = functools.partial(jaxattn.einsum, equation, **options)
    specs = [P("batch") if term.split()[0] in "bn" else P() for term in equation.split("->")[0].split(",")]
    local = arrays(shapes)
    with jax.set_mesh(mesh):
        operands = [jax.device_put(x, spec) for x, spec in zip(local, specs, strict=True)]
        y = jax.jit(run)(*operands)
        grads = jax.jit(jax.grad(lambda *xs: (run(*xs) ** 2).sum(), range(len(shapes))))(*operands)
    assert y.sharding.spec[0] == "batch"
    np.testing.assert_allclose(np.asarray(y), run(*local), rtol=1e-12, atol=1e-12)
    wanted = jax.jit(jax.grad(lambda *xs: (run(*xs) ** 2).sum(), range(len(shapes))))(*local)
    for mine, want in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(mine), want, rtol=1e-11, atol=1e-11)


CONV = "n i+r j+s c, r s c o -> n i j o"
LYING = {  # operands' shapes, and how they and the result lie on a mesh of Explicit axes
    "features out": (
        CONV,
        ((4, 5, 6, 4), P("data")),
        ((2, 3, 4, 6), P(None, None, None, "model")),
        P("data", None, None, "model"),
    ),
    "summed": (CONV, ((4, 5, 6, 4), P("data", None, None, "model")), ((2, 3, 4, 6), P(None, None, "model")), P("data")),
    "along the grid": (CONV, ((4, 5, 6, 4), P(None, None, "data")), ((2, 3, 4, 6), P()), P()),
    "scattered": (
        "n i c, r c o -> n 2*i+r o",
        ((4, 5, 4), P("data")),
        ((3, 4, 6), P(None, None, "model")),
        P("data", None, "model"),
    ),
    "composed": (
        "n i (g c), g c o -> n i (g o)",
        ((4, 3, 8), P("data")),
        ((2, 4, 3), P("model")),
        P("data", None, "model"),
    ),
    "a scale of features": (
        "n i+r c, r c -> n i c",
        ((4, 5, 4), P("data")),
        ((3, 4), P(None, "model")),
        P("data", None, "model"),
    ),
}


@pytest.mark.core(2)
@pytest.mark.parametrize("name", LYING)
def test_results_lie_as_their_axes_do_in_the_operands(name):
    """On a mesh that is not set; JAX itself asks for `out_sharding` where features of a convolution are split."""
    equation, *given, lies = LYING[name]
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    local = arrays([shape for shape, _ in given])
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, (_, spec) in zip(local, given, strict=True)]

    @jax.jit
    def run(*operands):
        y, back = jax.vjp(functools.partial(jaxattn.einsum, equation), *operands)
        return y, back(jnp.sin(y))

    (y, mine), (expected, gradients) = run(*placed), run(*local)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, lies), y.ndim)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    for x, want, operand in zip(mine, gradients, placed, strict=True):
        assert x.sharding.is_equivalent_to(operand.sharding, x.ndim)
        np.testing.assert_allclose(x, want, rtol=1e-12, atol=1e-12)


@pytest.mark.core(1)
@pytest.mark.parametrize("unroll", [1, 4])
def test_long_windows_are_a_loop(monkeypatch, unroll):
    """Windows too large to write out: the same sums, forward and backward, through a loop."""
    import jaxattn.lowerings.slices as slices

    monkeypatch.setattr(slices, "UNROLL", unroll)
    einsum = importlib.import_module("jaxattn.einsum")
    for name in ("_plan", "_known_plan"):  # plans hold programs that were traced
        monkeypatch.setattr(einsum, name, functools.lru_cache(getattr(einsum, name).__wrapped__))
    for equation, shapes, options in [
        ("b i j h u v, b i+u 2*j+v h d -> b i j h d", [(2, 4, 2, 2, 3, 4), (2, 4, 4, 2, 3)], {"padding": "SAME"}),
        ("b i j h d, b i+u j+v h d -> b i j h u v", [(1, 3, 4, 2, 3)] * 2, {"padding": "SAME", "u": 3, "v": 5}),
        ("b i u, i+u d, b i u -> d b i", [(2, 5, 5), (9, 4), (2, 5, 5)], {}),
    ]:
        assert slices.traced_loops(jaxattn.plan(equation, *shapes, **options).resolved)
        oracle = Einsum(equation, shapes, **options)
        operands = arrays(shapes)
        want = oracle.value(*map(np.asarray, operands))
        y, back = jax.vjp(jax.jit(functools.partial(jaxattn.einsum, equation, **options)), *operands)
        np.testing.assert_allclose(y, want, rtol=1e-12, atol=1e-12)
        for mine, grad in zip(back(y), oracle.gradients(list(map(np.asarray, operands)), want), strict=True):
            np.testing.assert_allclose(mine, grad, rtol=1e-12, atol=1e-12)


@pytest.mark.core(1)
@pytest.mark.parametrize("name", ["local scores", "local mix", "involution"])
def test_no_unfold_is_materialised(name):
    """The unfold of a 7 × 7 window is 49 copies of the keys. Seven slices, a row of the window, are written out."""
    n, h, d = 32, 4, 32
    grid, window = (1, n, n, h, d), (1, n, n, h, 7, 7)
    equation, shapes, options = {
        "local scores": ("b i j h d, b i+u j+v h d -> b i j h u v", (grid, grid), {"u": 7, "v": 7}),
        "local mix": ("b i j h u v, b i+u j+v h d -> b i j h d", (window, grid), {}),
        "involution": ("b i+u j+v (h d), b i j u v h -> b i j (h d)", ((1, n, n, h * d), (1, n, n, 7, 7, h)), {"h": h}),
    }[name]
    run = functools.partial(jaxattn.einsum, equation, padding="SAME", **options)
    operands = arrays(shapes, "float32")
    unfold = 49 * 4 * n * n * h * d
    forward = jax.jit(run).lower(*operands).compile()
    assert forward.memory_analysis().temp_size_in_bytes < unfold / 4
    backward = jax.jit(jax.grad(lambda *xs: (run(*xs) ** 2).sum(), (0, 1))).lower(*operands).compile()
    assert backward.memory_analysis().temp_size_in_bytes < unfold / 2

"""Depthwise convolution on the CPU: sums of shifted products, against `lax` and under every transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxattn
from jaxattn.lowerings import depthwise
from jaxattn.lowerings.depthwise import TapAxis

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="chosen on the CPU only")
# stride, dilation, low, length, positions, taps
GEOMETRIES = {
    "same": (TapAxis(1, 1, 1, 9, 9, 3), TapAxis(1, 1, 2, 6, 6, 5)),
    "valid, even": (TapAxis(1, 1, 0, 9, 6, 4), TapAxis(1, 1, 0, 4, 3, 2)),
    "one place": (TapAxis(1, 1, 0, 3, 1, 3), TapAxis(1, 1, 0, 1, 1, 1)),
    "strided": (TapAxis(2, 1, 1, 9, 5, 3), TapAxis(3, 1, 0, 8, 3, 2)),
    "dilated": (TapAxis(1, 2, 2, 7, 7, 3), TapAxis(2, 3, 0, 9, 2, 3)),
    "stride over taps": (TapAxis(3, 1, 0, 8, 3, 1), TapAxis(4, 1, 1, 10, 3, 2)),
    "cropped": (TapAxis(1, 1, -2, 9, 4, 3), TapAxis(1, 1, -1, 6, 2, 3)),
    "outside on both sides": (TapAxis(1, 1, 5, 3, 11, 3), TapAxis(1, 2, 4, 2, 6, 2)),
    "line": (TapAxis(2, 2, 3, 20, 10, 4),),
    "volume": (TapAxis(1, 1, 1, 4, 4, 3), TapAxis(2, 1, 0, 5, 2, 2), TapAxis(1, 2, 2, 6, 6, 3)),
}


def draw(*shapes, dtype="float64", seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def operands(axes, channels=3, batch=2, **options):
    lengths, taps, counts = ([getattr(a, name) for a in axes] for name in ("length", "taps", "positions"))
    return draw((batch, *lengths, channels), (*taps, channels), (batch, *counts, channels), **options)


def peer(x, w, axes):
    """`lax`, one group for every channel."""
    letters = "XYZ"[: len(axes)]
    reach = [a.stride * (a.positions - 1) + a.dilation * (a.taps - 1) + 1 for a in axes]
    return lax.conv_general_dilated(
        x,
        w[..., None, :],
        [a.stride for a in axes],
        [(a.low, n - a.low - a.length) for a, n in zip(axes, reach, strict=True)],
        rhs_dilation=[a.dilation for a in axes],
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        feature_group_count=x.shape[-1],
    )


def ours(x, w, axes):
    return depthwise.partial("y", x, w, axes)


def close(mine, theirs, tolerance=1e-12):
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(float(abs(b).max()), 1))


@pytest.mark.core(1)
@pytest.mark.parametrize("box", [depthwise.BOX, 4, 1])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_value_and_gradients_are_those_of_lax(name, box, monkeypatch):
    """With boxes of a whole row, of a part of one with something left over, and of one position."""
    monkeypatch.setattr(depthwise, "BOX", box)
    jax.clear_caches()
    axes = GEOMETRIES[name]
    x, w, y = operands(axes)

    @functools.partial(jax.jit, static_argnums=0)
    def both(f, x, w, y):
        value, back = jax.vjp(functools.partial(f, axes=axes), x, w)
        return value, back(y)

    close(both(ours, x, w, y), both(peer, x, w, y))


def test_rows_longer_than_a_box():
    axes = (TapAxis(1, 1, 1, 2, 2, 3), TapAxis(1, 1, 1, 2 * depthwise.BOX + 3, 2 * depthwise.BOX + 3, 3))
    x, w, y = operands(axes)
    loss = lambda f: jax.jit(jax.grad(lambda w: (f(x, w, axes) * y).sum()))(w)
    close(loss(ours), loss(peer))


@pytest.mark.core(2)
@pytest.mark.parametrize("mapped", [(0, None), (None, 0), (0, 0), (1, 2)], ids=str)
def test_vmap(mapped):
    axes = GEOMETRIES["strided"]
    x, w, _ = operands(axes)
    arrays = [z if d is None else jnp.stack([z, 2 * z, z * z, -z], axis=d) for z, d in zip((x, w), mapped, strict=True)]
    run = lambda f: jax.jit(
        jax.vmap(lambda x, w: jax.vjp(lambda *a: f(*a, axes) ** 3, x, w)[1](1 + f(x, w, axes)), mapped)
    )
    close(run(ours)(*arrays), run(peer)(*arrays))
    twice = lambda f: jax.vmap(jax.vmap(functools.partial(f, axes=axes), mapped), (None, 0))
    several = [arrays[0], jnp.stack([arrays[1], arrays[1] ** 2])]
    close(twice(ours)(*several), twice(peer)(*several))


@pytest.mark.full
def test_derivatives_of_any_order():
    axes = GEOMETRIES["line"]
    x, w, _ = operands(axes)
    tx, tw, _ = operands(axes, seed=1)

    def loss(f):
        return lambda x, w: (jnp.sin(f(x, w, axes)) * f(w.sum() * x, w, axes)).sum()

    def each(f):
        first = jax.grad(loss(f), (0, 1))
        second = lambda x, w: jax.vjp(first, x, w)[1]((tx, tw))
        yield jax.jit(functools.partial(jax.jvp, loss(f)))((x, w), (tx, tw))
        yield jax.jit(functools.partial(jax.jvp, first))((x, w), (tx, tw))  # forward over reverse
        yield jax.jit(second)(x, w)  # reverse over reverse
        yield jax.jit(lambda *t: jax.jvp(second, (x, w), t)[1])(tx, tw)
        yield jax.jit(jax.grad(lambda w: jax.jvp(loss(f), (x, w), (tx, tw))[1]))(w)  # reverse over forward
        yield jax.jit(jax.grad(jax.checkpoint(loss(f))))(x, w)

    for mine, theirs in zip(each(ours), each(peer), strict=True):
        close(mine, theirs, 1e-11)


@pytest.mark.core(1)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2), ("float16", 2e-3)])
def test_half_precision_is_rounded_once(dtype, tolerance):
    axes = (TapAxis(1, 1, 3, 40, 40, 7), TapAxis(1, 1, 3, 30, 30, 7))
    x, w, y = operands(axes, dtype=dtype)
    grads = lambda f, *z: jax.jit(lambda x, w: jax.vjp(functools.partial(f, axes=axes), x, w)[1](z[2]))(*z[:2])
    exact = grads(peer, *(z.astype("float64") for z in (x, w, y)))
    for mine, want in zip(grads(ours, x, w, y), exact, strict=True):
        assert mine.dtype == dtype
        np.testing.assert_allclose(np.asarray(mine, float), want, atol=tolerance * float(abs(want).max()))


def test_only_what_is_beside_it_sees_an_infinity():
    axes = (TapAxis(1, 1, 1, 60, 60, 3),)
    x, w, y = operands(axes)
    x, y = x.at[0, 59].set(jnp.inf), jnp.abs(y) + 1
    value, back = jax.vjp(lambda w: ours(x, w, axes), w)
    assert np.isfinite(value[0, :58]).all()
    assert np.isfinite(value[1]).all()
    assert np.isfinite(back(y)[0][0]).all()  # the first tap never meets the last token


CALLS = {
    "depthwise": ("n i+r j+s c, r s c -> n i j c", [(2, 8, 8, 4), (3, 3, 4)], {}),
    "two axes of channels": ("n i+r h c, h r c -> h n c i", [(2, 8, 3, 4), (3, 3, 4)], {}),
    "multiplier": ("n i+r (c m), r (c m) -> n i (c m)", [(2, 8, 6), (3, 6)], {"c": 3}),
    "flipped": ("n i-r 2*j+s c, c r s -> n c i j", [(2, 8, 8, 4), (4, 3, 3)], {"padding": "SAME"}),
    "two channels to a group": ("n i+r (g c), r c (g o) -> n i (g o)", [(2, 8, 4), (3, 2, 6)], {"g": 2}),
    "transposed": ("n i j c, r s c -> n 2*i+r 2*j-s c", [(2, 4, 4, 4), (3, 3, 4)], {"padding": "SAME"}),
}


@on_cpu
@pytest.mark.parametrize("name", CALLS)
def test_the_plan_takes_it(name):
    equation, shapes, options = CALLS[name]
    plan = jaxattn.plan(equation, *shapes, **options)
    assert plan.lowering == "depthwise"
    assert "one sum of shifted products, " in str(plan)
    text = jax.jit(functools.partial(jaxattn.einsum, equation, **options)).lower(*draw(*shapes)).compile().as_text()
    assert "convolution(" not in text


OTHERS = {
    "dense": ("n i+r c, r c o -> n i o", [(2, 8, 4), (3, 4, 4)], {}),
    "small groups of many channels": ("n i+r (g c), r c (g o) -> n i (g o)", [(2, 8, 10), (3, 5, 4)], {"g": 2}),
    "one channel": ("n i+r c, r c -> n i c", [(2, 8, 1), (3, 1)], {}),
    "more taps than one loop takes": ("n i+r c, r c -> n i c", [(2, 400, 4), (depthwise.TAPS + 1, 4)], {}),
    "both ways at once": ("n i+r j c, r s c -> n i j+s c", [(2, 8, 5, 4), (3, 3, 4)], {}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_plan_leaves_it(name):
    equation, shapes, options = OTHERS[name]
    assert jaxattn.plan(equation, *shapes, **options).lowering == "convolution"


def test_integers_are_left_to_lax():
    equation, shapes, _ = CALLS["depthwise"]
    integers = [jax.ShapeDtypeStruct(shape, "int32") for shape in shapes]
    assert jaxattn.plan(equation, *integers, preferred_element_type="float32").lowering == "convolution"


GROUPED = "n c 2*i+r j+s, c r s o -> n o i j".replace("c", "(g c)", 1).replace("o", "(g o)")


@on_cpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_groups_of_more_channels_are_dense_convolutions(dtype):
    shapes = [(3, 12, 31, 30), (6, 5, 5, 16)]
    x, w = draw(*shapes, dtype=dtype)
    plan = jaxattn.plan(GROUPED, x, w, g=2, padding="SAME")
    assert plan.lowering == "grouped"

    def theirs(x, w):
        return lax.conv_general_dilated(
            x, w, (2, 1), "SAME", dimension_numbers=("NCHW", "IHWO", "NCHW"), feature_group_count=2
        )

    def value_and_gradients(f):
        y, back = jax.vjp(f, x, w)
        return y, *back(jnp.ones_like(y))

    run = lambda x, w: jaxattn.einsum(GROUPED, x, w, g=2, padding="SAME")
    close(value_and_gradients(run), value_and_gradients(theirs), {"float32": 1e-5, "bfloat16": 2e-2}[dtype])
    text = jax.jit(run).lower(x, w).compile().as_text()
    assert "feature_group_count" not in text
    assert jaxattn.plan(GROUPED, *draw(*shapes), g=2, padding="SAME").lowering == "convolution"  # float64


@pytest.mark.core(1)
@on_cpu
@pytest.mark.parametrize(
    "equation",
    ["n i+r j+s c, r s c o -> n i j o", "n c i+r j+s, o c r s -> n o i j", "i-r n j+s c, o r s c -> j o i n"],
)
def test_one_tap_is_a_matrix_product(equation):
    sizes = {"n": 2, "i+r": 5, "i-r": 5, "j+s": 4, "r": 1, "s": 1, "c": 16, "o": 17}
    shapes = [[sizes[token] for token in term.split()] for term in equation.split("->")[0].split(",")]
    x, w = draw(*shapes)
    assert jaxattn.plan(equation, x, w).lowering == "product"
    assert jaxattn.plan(equation, x, w, padding=1).lowering == "convolution"
    run = functools.partial(jaxattn.einsum, equation)
    assert "convolution(" not in jax.jit(run).lower(x, w).compile().as_text()
    reference = functools.partial(jaxattn.einsum, equation, implementation="reference")
    ones = jnp.ones_like(run(x, w))
    close((run(x, w), jax.vjp(run, x, w)[1](ones)), (reference(x, w), jax.vjp(reference, x, w)[1](ones)))
    half = [z.astype("bfloat16") for z in (jnp.ones_like(x), jnp.ones_like(w))]
    assert (run(*half) == 16).all()


@on_cpu
@pytest.mark.parametrize("name", CALLS)
def test_the_plan_counts_what_it_holds(name):
    """Forward no more than the plan says; with the derivatives, that of each."""
    equation, shapes, options = CALLS[name]
    grown = [tuple(12 * n if n == 8 else n for n in shape) for shape in shapes]
    plan = jaxattn.plan(equation, *grown, **options)
    arrays = draw(*grown, dtype="float32")
    run = functools.partial(jaxattn.einsum, equation, **options)
    held = jax.jit(run).lower(*arrays).compile().memory_analysis().temp_size_in_bytes
    rest = 4 * (arrays[0].size + np.prod(plan.shape))  # what a transposition into the kernel's order would take
    assert held <= 1.3 * plan.temporaries + 2**14 + rest * (name in ("two axes of channels", "flipped"))

"""The attention layers of the zoo against loops written from their papers' formulas: values and every gradient."""

import inspect
from functools import partial

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import layers
import numpy as np
import pytest
from flax import nnx
from layers.attention_loops import DIM, FEATURES, HEADS, NO_OUT, OUT, biases, directional, draw, projections
from tiers import examples

from jaxattn import zoo

compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # each is run once
ATTENTION = layers.of("attention")
# name: the layer, the grid, its own parameters, its keywords and the loop's
CASES = {case: (name, *geometry) for name, layer in ATTENTION.items() for case, geometry in layer.geometries.items()}
# Where the scale is the paper's in all of them, it is given in one more.
for name, layer in ATTENTION.items():
    for scale in ("scale", "query_scale"):
        given = any(scale in geometry.kwargs for geometry in layer.geometries.values())
        if scale in inspect.signature(layer.function).parameters and not given:
            case, (grid, params, kwargs, loop) = next(iter(layer.geometries.items()))
            CASES[f"{case} scaled"] = (name, grid, params, {**kwargs, scale: 0.7}, {**loop, scale: 0.7})


@pytest.mark.core(6)
@pytest.mark.parametrize("name", CASES)
def test_a_layer_is_its_formula(name):
    is_its_formula(*CASES[name])


@pytest.mark.full
@examples(0.5, phases=[hypothesis.Phase.generate])
@hypothesis.given(data=st.data())
def test_drawn_shifted_windows(data):
    """Of up to two axes, ragged and smaller than a window; a cyclic one has whole windows."""
    grid, window, shift, wrap = [], [], [], []
    for _ in range(data.draw(st.integers(1, 2))):
        k, cyclic = data.draw(st.integers(1, 4)), data.draw(st.booleans())
        n = k * data.draw(st.integers(1, 3)) if cyclic else data.draw(st.integers(1, 8))
        for several, one in ((grid, n), (window, k), (shift, data.draw(st.integers(0, k - 1))), (wrap, cyclic)):
            several.append(one)
    boundary = tuple("wrap" if cyclic else "mask" for cyclic in wrap)
    kwargs = {"window": tuple(window), "shift": tuple(shift), "boundary": boundary, "shift_whole": True}
    loop = {"size": tuple(window), "shift": tuple(shift), "wrap": tuple(wrap)}
    is_its_formula("shifted_window_attention", tuple(grid), projections() | biases(tuple(window)), kwargs, loop)


def is_its_formula(layer, grid, params, kwargs, loop_kwargs):
    """Values, and the derivative of a random projection of them along a random direction of each input and parameter.

    To 1e-10 of the largest: sums of a few hundred products.
    """
    function = partial(getattr(zoo, layer), **kwargs)
    loop = partial(ATTENTION[layer].loop, **loop_kwargs)
    x = draw(9, *grid, FEATURES)
    expected = loop(x, params)
    cotangent = draw(10, *expected.shape)

    @compiled
    def run(x, params):
        y, pull = jax.vjp(function, x, params)
        return y, pull(jnp.asarray(cotangent))

    with jax.numpy_dtype_promotion("strict"):
        y, (by_x, by_params) = run(x, params)
    np.testing.assert_allclose(y, expected, atol=1e-10 * max(1, abs(expected).max()), rtol=0)
    gradients, arrays = {"x": by_x} | by_params, {"x": x} | params
    for n, (operand, array) in enumerate(arrays.items()):
        direction = draw(60 + n, *array.shape)

        def along(moved, operand=operand):
            now = arrays | {operand: moved}
            return (cotangent * loop(now.pop("x"), now)).sum()

        slope = directional(along, array, direction)
        assert abs((gradients[operand] * direction).sum() - slope) < 1e-10 * max(1, abs(slope)), operand


ONE_OF_EACH = [name for name in CASES if name.endswith(" 2d") or name == "global"]


def a_case(name, *batch):
    """A case's layer and loop as functions of x and the parameters, which come with it, x with batch axes."""
    layer, grid, params, kwargs, loop_kwargs = CASES[name]
    loop = partial(ATTENTION[layer].loop, **loop_kwargs)
    return partial(getattr(zoo, layer), **kwargs), loop, draw(9, *batch, *grid, FEATURES), params


@pytest.mark.core(2)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_batches_and_transformations(name):
    """Two batch axes, one of them by vmap; and forward and reverse mode are each other's adjoint."""
    function, loop, x, params = a_case(name, 2, 1)
    expected = np.stack([loop(x[n, 0], params) for n in range(2)])[:, None]
    tangent, cotangent = draw(11, *x.shape), draw(12, *expected.shape)

    @compiled
    def run(x):
        y, moved = jax.jvp(jax.vmap(lambda x: function(x, params)), (x,), (jnp.asarray(tangent),))
        unmapped, pull = jax.vjp(lambda x: function(x, params), x)
        return y, moved, unmapped, pull(jnp.asarray(cotangent))[0]

    mapped, moved, unmapped, back = run(x)
    np.testing.assert_allclose(mapped, expected, atol=1e-10)
    np.testing.assert_allclose(unmapped, expected, atol=1e-10)
    np.testing.assert_allclose((moved * cotangent).sum(), (back * tangent).sum(), rtol=1e-10)


@pytest.mark.core(4)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_precision_and_implementation_reach_their_place(name):
    function, _, x, params = a_case(name)
    lowered = jax.jit(partial(function, precision="highest")).lower(x, params).as_text()
    products = [line for line in lowered.splitlines() if "dot_general" in line]
    assert len(products) >= 4
    assert all("HIGHEST" in line for line in products)
    if not name.startswith("axial"):
        with pytest.raises(ValueError, match=r"implementation \(='fast'\) must be None or one of"):
            jax.eval_shape(partial(function, implementation="fast"), x, params)


def test_global_attention_is_that_of_flax_and_jax():
    params = projections() | {"value": draw(2, FEATURES, HEADS, DIM), "value_bias": draw(5, HEADS, DIM)}
    params |= {"out": draw(6, HEADS, DIM, OUT)}
    theirs = nnx.MultiHeadAttention(
        HEADS, FEATURES, HEADS * DIM, OUT, param_dtype=jnp.float64, decode=False, rngs=nnx.Rngs(0)
    )
    for name in ("query", "key", "value", "out"):
        projection = getattr(theirs, name)
        projection.kernel[...], projection.bias[...] = params[name], params[f"{name}_bias"]
    x, mask = jnp.asarray(draw(9, 3, 5, FEATURES)), draw(10, 3, 1, 5, 5) > -0.5
    mask = jnp.asarray(mask | np.eye(5, dtype=bool))  # a query that sees nothing differs by design
    # Flax keeps float64 scores in float32 where it drops nothing, hence the tolerance
    masked = compiled(lambda x: zoo.global_attention(x, params, mask=mask) - theirs(x, mask=mask))
    np.testing.assert_allclose(masked(x), 0, atol=1e-5)

    def difference(x):
        q, k, v = (jnp.tensordot(x, params[name], 1) + params[f"{name}_bias"] for name in ("query", "key", "value"))
        bare = {name: array for name, array in params.items() if not name.startswith("out")}
        return zoo.global_attention(x, bare) - jax.nn.dot_product_attention(q, k, v).reshape(3, 5, -1)

    np.testing.assert_allclose(compiled(difference)(x), 0, atol=1e-5)


def test_global_attention_over_a_grid_is_over_its_tokens():
    x, params = draw(9, 2, 3, 4, FEATURES), projections()
    expected = zoo.global_attention(x.reshape(2, 12, FEATURES), params).reshape(2, 3, 4, OUT)
    np.testing.assert_array_equal(zoo.global_attention(x, params, rank=2), expected)


@pytest.mark.full
def test_a_shift_of_nothing_and_of_a_whole_partition():
    """Shifted by half a window twice, a torus of windows is itself again; here the border cuts it."""
    params, x = projections() | biases((4, 4)), draw(9, 8, 8, FEATURES)
    still = zoo.shifted_window_attention(x, params, window=(4, 4))
    parts = [zoo.coatnet_attention(x[a : a + 4, b : b + 4], params) for a in (0, 4) for b in (0, 4)]
    np.testing.assert_allclose(still, np.block([[[parts[0]], [parts[1]]], [[parts[2]], [parts[3]]]]), atol=1e-12)
    moved = zoo.shifted_window_attention(x, params, window=(4, 4), shift=2)
    np.testing.assert_allclose(moved[2:6, 2:6], zoo.coatnet_attention(x[2:6, 2:6], params), atol=1e-12)
    corner = {**params, "relative_bias": params["relative_bias"][:, 2:-2, 2:-2]}
    np.testing.assert_allclose(moved[6:, 6:], zoo.coatnet_attention(x[6:, 6:], corner), atol=1e-12)


def test_a_cyclic_axis_has_no_seam():
    """What turns by a window along it turns the output; a token at the seam attends to those on its other side."""
    params, x = projections() | biases((2, 3)), draw(9, 4, 6, FEATURES)
    kwargs = {"window": (2, 3), "shift": (1, 2), "boundary": ("mask", "wrap")}
    run = jax.jit(lambda x: zoo.shifted_window_attention(x, params, **kwargs))
    np.testing.assert_allclose(run(np.roll(x, 3, 1)), np.roll(run(x), 3, 1), atol=1e-12)
    seen = np.asarray(jax.jit(jax.grad(lambda x: run(x)[2, 0].sum()))(x)).any(-1)  # a row and a column
    np.testing.assert_array_equal(np.argwhere(seen), [[a, b] for a in (1, 2) for b in (0, 1, 5)])
    with pytest.raises(ValueError, match=r"boundary \(='wrap'\) must be 'mask' on axis 1, or window .* divide its 6"):
        zoo.shifted_window_attention(x, projections() | biases((2, 4)), **{**kwargs, "window": (2, 4)})
    with pytest.raises(ValueError, match=r"boundary \(='edge'\) must be 'mask' or 'wrap', or one of these for each"):
        zoo.shifted_window_attention(x, params, **{**kwargs, "boundary": "edge"})


@pytest.mark.parametrize("offset", [(0, 0), (1, -1)])
def test_gpsa_with_the_gate_shut_and_sharp_is_a_shift(offset):
    """λ and α large: every token whose neighbour at the offset is there takes that one's value."""
    u = -60.0 * np.array([1, *(-2 * d for d in offset)])
    params = projections(*NO_OUT) | {"position": np.stack([u, u]), "gate": np.full(2, 60.0)}
    x = draw(9, 4, 5, FEATURES)
    value = np.tensordot(x, params["value"], 1).reshape(4, 5, -1)
    expected = np.roll(value, [-d for d in offset], (0, 1))
    np.testing.assert_allclose(zoo.gpsa(x, params)[1:-1, 1:-1], expected[1:-1, 1:-1], atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "kwargs", "change", "message"),
    [(name, error.kwargs, error.params, error.message) for name, layer in ATTENTION.items() for error in layer.errors],
)
def test_errors(layer, kwargs, change, message):
    params = {name: array for name, array in (projections() | change).items() if array is not None}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(partial(getattr(zoo, layer), **kwargs), draw(9, 4, 5, FEATURES), params)


def test_every_layer_has_a_case_and_a_row():
    assert set(ATTENTION) <= set(zoo.ROWS)
    assert {layer for layer, *_ in CASES.values()} == set(ATTENTION)
    missing = set(ATTENTION) - {CASES[name][0] for name in ONE_OF_EACH}
    assert not missing, f"no geometry's name ends in ' 2d' in the LayerCase of {', '.join(sorted(missing))}"

"""The attention layers of the zoo against loops written from their papers' formulas: values and every gradient."""

from functools import partial

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle_zoo_attention as oracle
import pytest
from flax import nnx
from tiers import examples

from jaxattn import zoo
from jaxattn.window import Window

NO_OUT = ("query_bias", "key_bias", "value_bias", "out", "out_bias")
HEADS, DIM, VALUE, FEATURES, OUT = 2, 6, 3, 4, 5

compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # each is run once


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def projections(*without, heads=HEADS):
    shapes = {
        "query": (FEATURES, heads, DIM), "key": (FEATURES, heads, DIM), "value": (FEATURES, heads, VALUE),
        "query_bias": (heads, DIM), "key_bias": (heads, DIM), "value_bias": (heads, VALUE),
        "out": (heads, VALUE, OUT), "out_bias": (OUT,),
    }  # fmt: skip
    return {name: draw(n, *shape) for n, (name, shape) in enumerate(shapes.items()) if name not in without}


def tables(size, width, heads=HEADS):
    return {f"embedding_{axis}": draw(20 + axis, heads, 2 * k - 1, width) for axis, k in enumerate(size)}


def biases(size, heads=HEADS):
    return {"relative_bias": draw(30, heads, *(2 * k - 1 for k in size))}


def axial(n, heads=HEADS):
    widths = {"query": DIM, "key": DIM, "value": VALUE}
    return {f"{name}_embedding": draw(40 + w, heads, 2 * n - 1, w) for name, w in widths.items()}


def positions(rank, heads=HEADS):
    return {"position": draw(50, heads, rank + 1), "gate": draw(51, heads)}


def masked(size, **kwargs):
    return {"window": Window(size, boundary="mask", **kwargs)}


# name: the layer, its own parameters, its keywords and the oracle's, the grid
CASES = {
    "global": ("global_attention", projections(), {"rank": 1}, {}, (5,)),
    "global bare": ("global_attention", projections(*NO_OUT), {"scale": 0.3}, {"scale": 0.3}, (1,)),
    "global over a grid": ("global_attention", projections(), {"rank": 2}, {}, (3, 2)),
    "sasa 1d": ("sasa", projections() | tables((3,), DIM), masked((3,)), {"size": (3,)}, (5,)),
    "sasa 2d": ("sasa", projections() | tables((3, 2), 3), masked((3, 2)), {"size": (3, 2)}, (4, 3)),
    "sasa 2d zeros": (
        "sasa",
        projections(*NO_OUT) | tables((2, 3), DIM, heads=1),
        {"window": Window((2, 3), boundary="zero"), "scale": None},
        {"size": (2, 3), "zeros": True, "scale": DIM**-0.5},
        (3, 4),
    ),
    "sasa 1d strided": (
        "sasa",
        projections() | tables((3,), DIM),
        masked(3, stride=2),
        {"size": (3,), "stride": 2},
        (6,),
    ),
    "sasa 3d": ("sasa", projections() | tables((2, 1, 3), 2), masked((2, 1, 3)), {"size": (2, 1, 3)}, (2, 2, 3)),
    "halo 1d": (
        "halo_attention",
        projections() | tables((5,), DIM),
        {"block": 3, "halo": 1},
        {"block": (3,), "halo": (1,)},
        (6,),
    ),
    "halo 1d ragged": (
        "halo_attention",
        projections() | tables((6,), DIM),
        {"block": 2, "halo": 2, "boundary": "mask"},
        {"block": (2,), "halo": (2,), "zeros": False},
        (5,),
    ),
    "halo 2d": (
        "halo_attention",
        projections(*NO_OUT) | tables((4, 3), 3),
        {"block": (2, 1), "halo": 1},
        {"block": (2, 1), "halo": (1, 1)},
        (4, 3),
    ),
    "halo 3d": (
        "halo_attention",
        projections() | tables((4, 1, 2), 2),
        {"block": (2, 1, 2), "halo": (1, 0, 0)},
        {"block": (2, 1, 2), "halo": (1, 0, 0)},
        (2, 2, 2),
    ),
    "nat 1d": ("neighborhood_attention", projections() | biases((4,)), {"window": 4}, {"size": (4,)}, (6,)),
    "nat 1d fits barely": (
        "neighborhood_attention",
        projections(),
        {"window": Window(3, dilation=2)},
        {"size": (3,), "dilation": 2},
        (6,),
    ),
    "nat 2d strided": (
        "neighborhood_attention",
        projections() | biases((3, 2)),
        {"window": Window((3, 2), stride=2)},
        {"size": (3, 2), "stride": 2},
        (5, 4),
    ),
    "nat 2d": ("neighborhood_attention", projections() | biases((3, 2)), {"window": (3, 2)}, {"size": (3, 2)}, (4, 3)),
    "dinat 2d": (
        "neighborhood_attention",
        projections() | biases((2, 3)),
        {"window": Window((2, 3), dilation=2)},
        {"size": (2, 3), "dilation": 2},
        (4, 7),
    ),
    "nat 3d": (
        "neighborhood_attention",
        projections() | biases((1, 2, 3)),
        {"window": (1, 2, 3)},
        {"size": (1, 2, 3)},
        (1, 3, 3),
    ),
    "swin 1d": (
        "shifted_window_attention",
        projections() | biases((3,)),
        {"window": 3, "shift": 1},
        {"size": (3,), "shift": (1,)},
        (6,),
    ),
    "swin 2d": (
        "shifted_window_attention",
        projections() | biases((2, 4)),
        {"window": (2, 4), "shift": (1, 2), "shift_whole": True},
        {"size": (2, 4), "shift": (1, 2)},
        (4, 4),
    ),
    "swin, a window covers an axis": (
        "shifted_window_attention",
        projections() | biases((2, 4)),
        {"window": (2, 4), "shift": (1, 2)},
        {"size": (2, 4), "shift": (1, 0)},
        (4, 4),
    ),
    "swin 2d ragged": (
        "shifted_window_attention",
        projections() | biases((3, 2)),
        {"window": (3, 2), "shift": (2, 0)},
        {"size": (3, 2), "shift": (2, 0)},
        (4, 3),
    ),
    "swin on a cylinder": (
        "shifted_window_attention",
        projections() | biases((2, 3)),
        {"window": (2, 3), "shift": (1, 2), "boundary": ("wrap", "mask")},
        {"size": (2, 3), "shift": (1, 2), "wrap": (True, False)},
        (4, 5),
    ),
    "swin 3d": (
        "shifted_window_attention",
        projections() | biases((1, 2, 2)),
        {"window": (1, 2, 2)},
        {"size": (1, 2, 2), "shift": (0, 0, 0)},
        (2, 2, 3),
    ),
    "coatnet 1d": ("coatnet_attention", projections() | biases((4,)), {}, {}, (4,)),
    "coatnet 2d": ("coatnet_attention", projections() | biases((3, 4)), {}, {}, (3, 4)),
    "botnet 1d": ("botnet_attention", projections() | tables((4,), DIM), {}, {}, (4,)),
    "botnet 2d": ("botnet_attention", projections(*NO_OUT) | tables((2, 4), DIM, heads=1), {}, {}, (2, 4)),
    "learned 1d": ("learned_relative_attention", projections() | tables((4,), DIM), {}, {}, (4,)),
    "learned 2d": ("learned_relative_attention", projections() | tables((3, 3), DIM), {}, {}, (3, 3)),
    "learned 2d without content": (
        "learned_relative_attention",
        projections("key", "key_bias") | tables((3, 1), DIM),
        {},
        {},
        (3, 1),
    ),
    "axial 1d": ("axial_attention", projections() | axial(5), {}, {}, (5,)),
    "axial 2d": ("axial_attention", projections(*NO_OUT) | axial(3, heads=1), {"axis": -3}, {"axis": -3}, (3, 2)),
    "axial 2d window": ("axial_attention", projections() | axial(3), {"window": 3}, {"window": 3}, (2, 5)),
    "axial 1d even window": ("axial_attention", projections() | axial(2), {"window": 2}, {"window": 2}, (4,)),
    "gpsa 1d": ("gpsa", projections() | positions(1), {}, {}, (5,)),
    "gpsa 2d": ("gpsa", projections() | positions(2), {}, {}, (3, 4)),
}


# Elsewhere the scale is the paper's: here it is given.
CASES |= {
    f"{name} scaled": (layer, params, kwargs | {scale: 0.7}, loop_kwargs | {scale: 0.7}, grid)
    for scale, names in (
        ("scale", ("halo 1d", "nat 1d", "swin 1d", "coatnet 1d", "gpsa 1d")),
        ("query_scale", ("botnet 1d", "learned 1d")),
    )
    for name in names
    for layer, params, kwargs, loop_kwargs, grid in [CASES[name]]
}


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
    is_its_formula("shifted_window_attention", projections() | biases(tuple(window)), kwargs, loop, tuple(grid))


def is_its_formula(layer, params, kwargs, loop_kwargs, grid):
    """Values, and the derivative of a random projection of them along a random direction of each input and parameter.

    To 1e-10 of the largest: sums of a few hundred products.
    """
    function = partial(getattr(zoo, layer), **kwargs)
    loop = partial(getattr(oracle, layer), **loop_kwargs)
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

        slope = oracle.directional(along, array, direction)
        assert abs((gradients[operand] * direction).sum() - slope) < 1e-10 * max(1, abs(slope)), operand


ONE_OF_EACH = [name for name in CASES if name.endswith(" 2d") or name == "global"]


def a_case(name, *batch):
    """A case's layer and loop as functions of x and the parameters, which come with it, x with batch axes."""
    layer, params, kwargs, loop_kwargs, grid = CASES[name]
    loop = partial(getattr(oracle, layer), **loop_kwargs)
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
    [
        ("gpsa", {}, {"gate": None}, "gpsa: params .* must have 'gate'; needed are query, key, value, position, gate"),
        ("gpsa", {}, {"gait": np.ones(2)}, "gpsa: params .* must not have 'gait'; allowed are query, "),
        ("gpsa", {}, {"out": None}, "gpsa: params .* must have 'out', to which 'out_bias' belongs"),
        (
            "learned_relative_attention",
            {},
            tables((4, 5), 6) | {"key": None},
            "params .* must have 'key', to which 'key_bias' belongs",
        ),
        (
            "gpsa",
            {},
            {"key": np.ones((4, 3, 6))},
            r"gpsa: params\['key'\] \(=\[4, 3, 6\]\) must be \[features, heads, head_dim\] = \[4, 2, 6\]",
        ),
        (
            "gpsa",
            {},
            {"position": np.ones((3, 3))},
            r"gpsa: params\['position'\] .* must be \[heads, coordinates\] = \[2, 3\]",
        ),
        ("gpsa", {}, {"position": np.ones((2, 6))}, r"gpsa: x \(=\[4, 5, 4\]\) must be .* with 5 axes of a grid"),
        (
            "global_attention",
            {},
            {"query": np.ones(4)},
            r"\['query'\] \(=\[4\]\) must be \[features, he",
        ),
        ("global_attention", {}, {"out": np.ones((2, 6, 5))}, r"must be .* = \[2, 3, out_features\]"),
        (
            "coatnet_attention",
            {},
            biases((4, 4)),
            r"params\['relative_bias'\] .* must be \[heads, \*offsets\] = \[2, 7, 9\]",
        ),
        ("botnet_attention", {}, {}, "botnet_attention: params .* must have 'embedding_0'"),
        (
            "botnet_attention",
            {},
            tables((4, 5), 2),
            r"\['embedding_0'\] \(of width 2\) must be of width head_dim \(=6\), or head_dim / 2",
        ),
        (
            "learned_relative_attention",
            {},
            tables((4, 4), 6),
            r"\['embedding_1'\] .* must be \[heads, offsets_1, width\] = \[2, 9, 6\]",
        ),
        ("sasa", {"window": (3, 3)}, tables((3,), 6), "sasa: params .* must have 'embedding_1'"),
        ("sasa", {"window": (3, 9)}, tables((3, 9), 6), r"Window: the grid \(=5 along axis 1\)"),
        (
            "halo_attention",
            {"block": (2, 2), "halo": (1, 1, 1)},
            {},
            r"halo \(=\(1, 1, 1\)\) must be an int >= 0, or one",
        ),
        ("halo_attention", {"block": 2, "halo": -1}, {}, r"halo_attention: halo \(=-1\) must be an int >= 0, or one"),
        ("neighborhood_attention", {"window": (3, 3)}, biases((3, 5)), r"must be \[heads, \*offsets\] = \[2, 5, 5\]"),
        (
            "shifted_window_attention",
            {"window": (3, 3), "shift": 3},
            biases((3, 3)),
            r"shift \(=3\) must be below window \(=\(3, 3\)\)",
        ),
        ("shifted_window_attention", {"window": (3, 3)}, {}, "params .* must have 'relative_bias'"),
        (
            "axial_attention",
            {"axis": -1},
            axial(5),
            r"axis \(=-1\) must be an axis of x, which has 3, and not the last",
        ),
        (
            "axial_attention",
            {},
            axial(4),
            r"\['query_embedding'\] .* must be \[heads, offsets, head_dim\] = \[2, 9, 6\]",
        ),
        ("axial_attention", {"window": 0}, axial(4), r"window \(=0\) must be an int >= 1, or None"),
    ],
)
def test_errors(layer, kwargs, change, message):
    params = projections() | (positions(2) if layer == "gpsa" else {}) | change
    params = {name: array for name, array in params.items() if array is not None}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(partial(getattr(zoo, layer), **kwargs), draw(9, 4, 5, FEATURES), params)


def test_every_layer_has_a_case_and_a_row():
    tested = {layer for layer, *_ in CASES.values()}
    assert tested <= set(zoo.ROWS)
    assert tested == {name for name in vars(oracle) if name in zoo.ROWS}

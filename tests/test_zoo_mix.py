"""The zoo's layers that are like convolutions, or driven by keys, against loops: values and every gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import layers
import numpy as np
import pytest
from layers import LAYERS
from layers.aft import channels
from layers.lambdas import lambdas
from layers.mix_loops import FEATURES, OUT, draw, slope

from jaxattn import zoo

compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # each is run once
MIX = layers.of("mix")
# name: the layer, the grid, its parameters' shapes, its keywords and the loop's
CASES = {case: (name, *geometry) for name, layer in MIX.items() for case, geometry in layer.geometries.items()}


def call(name, kwargs):
    """The layer as a function of one mapping; it takes a lone weight as an argument."""
    layer = getattr(zoo, name)
    return lambda p: layer(
        p["x"], p["kernel"] if p.keys() == {"x", "kernel"} else {k: v for k, v in p.items() if k != "x"}, **kwargs
    )


@pytest.mark.core(10)
@pytest.mark.parametrize("case", CASES)
def test_the_formula(case):
    """Values, the derivative in a random direction of everything at once, and in one of each input and parameter."""
    name, grid, shapes, kwargs, loop = CASES[case]
    arrays = draw({"x": (*grid, FEATURES), **shapes})
    direction = draw({key: x.shape for key, x in arrays.items()}, seed=1)
    formula = lambda p: MIX[name].loop(p, **loop)
    expected = formula(arrays).real
    cotangent = np.random.default_rng(2).normal(size=expected.shape)

    @compiled
    def everything(arrays, direction):
        y, tangent = jax.jvp(call(name, kwargs), (arrays,), (direction,))
        return y, tangent, jax.vjp(call(name, kwargs), arrays)[1](jnp.asarray(cotangent))[0]

    with jax.numpy_dtype_promotion("strict"):
        y, tangent, gradient = everything(arrays, direction)
    close = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)
    close(y, expected)
    close(tangent, slope(formula, arrays, direction))
    for key in arrays:
        alone = {k: d if k == key else np.zeros_like(d) for k, d in direction.items()}
        close((gradient[key] * direction[key]).sum(), (cotangent * slope(formula, arrays, alone)).sum())


FIRST = {CASES[case][0]: case for case in reversed(CASES)}  # a case of one dimension for each layer


@pytest.mark.core(5)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", FIRST)
def test_dtypes_and_batches(name, dtype):
    """Two batch axes, mapped by the function or by vmap, in the dtype that came."""
    _, grid, shapes, kwargs, loop = CASES[FIRST[name]]
    arrays = draw({"x": (2, 3, *grid, FEATURES), **shapes})
    small = {key: jnp.asarray(x, dtype) for key, x in arrays.items()}
    exact = {key: np.asarray(x, float) for key, x in small.items()}
    function = call(name, kwargs)
    with jax.numpy_dtype_promotion("strict"):
        y, mapped = compiled(lambda p: (function(p), jax.vmap(lambda x: function(p | {"x": x}))(p["x"])))(small)
    expected = MIX[name].loop(exact | {"x": exact["x"][1, 2]}, **loop).real
    tolerance = {jnp.float32: 1e-5, jnp.bfloat16: 5e-2}[dtype] * max(1, abs(expected).max())
    assert y.dtype == dtype
    assert y.shape == (2, 3, *expected.shape)
    assert abs(np.asarray(y[1, 2], float) - expected).max() < tolerance
    assert abs(np.asarray(mapped, float) - np.asarray(y, float)).max() < tolerance


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("padding", ["SAME", "VALID", [(1, 0), (0, 2)]])
@pytest.mark.parametrize(("window", "strides", "dilation"), [((3, 2), (2, 1), (1, 2)), ((2, 5), (3, 2), (1, 1))])
def test_conv_transpose_is_that_of_lax(window, strides, dilation, padding, transpose_kernel):
    arrays = draw({"x": (2, 4, 3, 4), "kernel": (*window, *((5, 4) if transpose_kernel else (4, 5)))})
    x, kernel = jnp.asarray(arrays["x"]), jnp.asarray(arrays["kernel"])
    y = zoo.conv_transpose(
        x, kernel, strides=strides, padding=padding, dilation=dilation, transpose_kernel=transpose_kernel
    )
    expected = jax.lax.conv_transpose(
        x, kernel, strides, padding, dilation, ("NHWC", "HWIO", "NHWC"), transpose_kernel=transpose_kernel
    )
    np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-10)


def test_conv_transpose_is_the_adjoint_of_conv():
    p = {name: jnp.asarray(x) for name, x in draw({"x": (5, 6, 4), "kernel": (3, 3, 4, 2), "y": (2, 2, 2)}).items()}
    conv = lambda x: zoo.conv(x, p["kernel"], strides=2, padding="VALID")
    there = zoo.conv_transpose(p["y"], p["kernel"], strides=2, padding="VALID", transpose_kernel=True)
    back = jax.vjp(conv, p["x"])[1](p["y"])[0]
    np.testing.assert_allclose(there, back[:5, :5], rtol=1e-10, atol=1e-10)
    np.testing.assert_array_equal(back[:, 5], 0)  # where no window of the convolution reached


@pytest.mark.parametrize(("name", "position"), [("aft", (5, 5)), ("aft_conv", (3, 2))])
def test_aft_is_stable(name, position):
    """Keys of ±50, whose exponentials are far outside float32 in a difference of a hundred."""
    arrays = draw({"x": (5, FEATURES), **channels(position)})
    arrays["key"] *= 50 / abs(arrays["x"] @ arrays["key"]).max()
    arrays["key_bias"] *= 0
    small = {key: jnp.asarray(x, jnp.float32) for key, x in arrays.items()}
    y, gradient = compiled(jax.value_and_grad(lambda p: call(name, {})(p).sum()))(small)
    np.testing.assert_allclose(y, MIX[name].loop(arrays).real.sum(), rtol=1e-4)
    assert all(np.isfinite(g).all() for g in gradient.values())


def test_a_lambda_layer_whose_window_is_all():
    """With 2n - 1 offsets every pair has its embedding: q_i · Σ_j (k̄_j + E_{j-i}) v_j."""
    n, arrays = 4, draw({"x": (4, FEATURES), **lambdas((7,), 1, bias=False)})
    q, k, v = (np.tensordot(arrays["x"], arrays[name], 1) for name in ("query", "key", "value"))
    e = np.exp(k) / np.exp(k).sum(0)
    pairs = [[e[j] + arrays["position"][j - i + n - 1] for j in range(n)] for i in range(n)]
    expected = np.einsum("ihk,ijku,jvu->ihv", q, pairs, v).reshape(n, -1)
    np.testing.assert_allclose(call("lambda_layer", {})(arrays), expected, rtol=1e-10, atol=1e-10)


def test_a_head_without_a_normaliser_is_two_pointwise_convolutions():
    """Keys are the first's filters, values the second's; with relu between, a feed-forward layer."""
    p = draw({"x": (5, 3, FEATURES), "key": (7, 1, FEATURES), "value": (7, 1, OUT)})
    x, filters, second = jnp.asarray(p["x"]), jnp.asarray(p["key"][:, 0].T[None, None]), jnp.asarray(p["value"])
    close = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)
    first = zoo.conv(x, filters)
    for normalize, between, count in (("none", first, 1), ("relu", jax.nn.relu(first), 7)):
        y = call("parameter_key_attention", {"normalize": normalize, "scale": 1.0})(p)
        close(count * y, zoo.conv(between, second[None, None, :, 0]))


ONES = {"x": (5, 5, 4)}


@pytest.mark.parametrize(
    ("name", "shapes", "kwargs", "message"),
    [(name, *refused) for name, layer in MIX.items() for refused in layer.errors],
)
def test_errors(name, shapes, kwargs, message):
    with pytest.raises(ValueError, match=message):
        call(name, kwargs)({key: jnp.ones(shape) for key, shape in (ONES | shapes).items()})


def test_every_layer_of_the_table_has_a_case():
    """A record in tests/layers, and in it geometries for the function and a step for the module, or tests elsewhere."""
    missing = set(zoo.ROWS) - set(LAYERS)
    assert not missing, f"tests/layers has no LayerCase of {', '.join(sorted(missing))}"
    for name, layer in LAYERS.items():
        assert layer.geometries or layer.family == "quadratic", f"the LayerCase of {name} has no geometries"

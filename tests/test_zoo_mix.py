"""The zoo's layers that are like convolutions, or driven by keys, against loops: values and every gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle_zoo_mix as oracle
import pytest

from jaxattn import zoo

compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # each is run once
FEATURES, HEADS, DIM, REDUCED, OUT = 4, 2, 3, 3, 5


def draw(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def bottleneck(size, last, bias=True):
    biases = {"reduce_bias": (REDUCED,), "span_bias": (*size, last)} if bias else {}
    return {"reduce": (FEATURES, REDUCED), "span": (REDUCED, *size, last), **biases}


def outlook(size, bias=True):
    shapes = {
        "value": (FEATURES, HEADS, DIM), "attention": (FEATURES, HEADS, *size, *size), "out": (HEADS, DIM, OUT),
        "value_bias": (HEADS, DIM), "attention_bias": (HEADS, *size, *size), "out_bias": (OUT,),
    }  # fmt: skip
    return {name: shape for name, shape in shapes.items() if bias or not name.endswith("bias")}


def both(**kwargs):
    return kwargs, kwargs


# name: the layer, the grid, its parameters' shapes, its keywords and the loop's
CASES = {
    "depthwise 1d": ("depthwise_conv", (5,), {"kernel": (3, 4)}, {}, {"strides": (1,), "dilation": (1,), "lows": (1,)}),
    "depthwise 2d": (
        "depthwise_conv",
        (5, 4),
        {"kernel": (3, 2, 8)},
        {"strides": (2, 1), "dilation": (1, 2)},
        {"strides": (2, 1), "dilation": (1, 2), "lows": (1, 1)},
    ),
    "depthwise 3d": (
        "depthwise_conv",
        (3, 2, 3),
        {"kernel": (2, 1, 3, 4)},
        {"padding": [(1, 0), 0, 1]},
        {"strides": (1, 1, 1), "dilation": (1, 1, 1), "lows": (1, 0, 1)},
    ),
    "transpose 1d": (
        "conv_transpose",
        (4,),
        {"kernel": (2, 4, 3)},
        {"strides": 3, "padding": "VALID"},
        {"strides": (3,), "dilation": (1,), "crop": [(0, -1)]},
    ),
    "transpose 2d": (
        "conv_transpose",
        (3, 4),
        {"kernel": (3, 4, 4, 2)},
        {"strides": (2, 1), "padding": [(1, 2), 2], "dilation": (1, 2)},
        {"strides": (2, 1), "dilation": (1, 2), "crop": [(1, 0), (4, 4)]},
    ),
    "transpose 3d": (
        "conv_transpose",
        (2, 3, 1),
        {"kernel": (2, 3, 1, 4, 2)},
        {"strides": (1, 2, 1)},
        {"strides": (1, 2, 1), "dilation": (1, 1, 1), "crop": [(0, 1), (0, 1), (0, 0)]},
    ),
    "light 1d causal": ("light_conv", (6,), {"kernel": (3, 2)}, {"causal": True}, {"lows": (2,)}),
    "light 2d": ("light_conv", (4, 3), {"kernel": (3, 2, 4)}, *both(dilation=(1, 2))),
    "light 3d": ("light_conv", (2, 3, 2), {"kernel": (1, 3, 2, 1)}, {}, {}),
    "dynamic 1d causal": (
        "dynamic_conv",
        (6,),
        {"kernel": (4, 3, 2)},
        {"causal": True, "dilation": 2},
        {"lows": (4,), "dilation": (2,)},
    ),
    "dynamic 2d": ("dynamic_conv", (3, 4), {"kernel": (4, 2, 3, 2)}, {}, {}),
    "dynamic 3d": ("dynamic_conv", (2, 1, 3), {"kernel": (4, 3, 1, 2, 4)}, {}, {}),
    "involution 1d": ("involution", (5,), bottleneck((3,), 2), {}, {"strides": (1,)}),
    "involution 2d": ("involution", (5, 4), bottleneck((3, 2), 4, False), *both(strides=(2, 2), dilation=(2, 1))),
    "involution 3d": ("involution", (2, 2, 3), bottleneck((1, 2, 3), 1), {}, {"strides": (1, 1, 1)}),
    "dynamic depthwise 1d": ("dynamic_depthwise_conv", (5,), bottleneck((4,), 4), {}, {}),
    "dynamic depthwise 2d": ("dynamic_depthwise_conv", (4, 3), bottleneck((3, 2), 4, False), *both(dilation=(1, 2))),
    "dynamic depthwise 3d": ("dynamic_depthwise_conv", (2, 3, 2), bottleneck((1, 3, 2), 4), {}, {}),
    "outlook 1d": ("outlook_attention", (5,), outlook((3,)), {}, {"strides": (1,)}),
    "outlook 1d apart": ("outlook_attention", (5,), outlook((1,)), *both(strides=(2,))),
    "outlook 2d": ("outlook_attention", (4, 3), outlook((3, 2), False), *both(strides=(2, 2), scale=0.7)),
    "outlook 3d": ("outlook_attention", (2, 1, 3), outlook((2, 1, 2)), {}, {"strides": (1, 1, 1)}),
}


def call(name, kwargs):
    """The layer as a function of one mapping; it takes a lone weight as an argument."""
    layer = getattr(zoo, name)
    return lambda p: layer(
        p["x"], p["kernel"] if p.keys() == {"x", "kernel"} else {k: v for k, v in p.items() if k != "x"}, **kwargs
    )


def flipped(name, arrays):
    """`conv_transpose`'s kernel as the loop takes it."""
    kernel = arrays.get("kernel")
    return arrays if name != "conv_transpose" else arrays | {"kernel": np.flip(kernel, range(kernel.ndim - 2))}


@pytest.mark.parametrize("case", CASES)
def test_the_formula(case):
    """Values, the derivative in a random direction of everything at once, and in one of each input and parameter."""
    name, grid, shapes, kwargs, loop = CASES[case]
    arrays = draw({"x": (*grid, FEATURES), **shapes})
    direction = draw({key: x.shape for key, x in arrays.items()}, seed=1)
    formula = lambda p: getattr(oracle, name)(flipped(name, p), **loop)
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
    close(tangent, oracle.slope(formula, arrays, direction))
    for key in arrays:
        alone = {k: d if k == key else np.zeros_like(d) for k, d in direction.items()}
        close((gradient[key] * direction[key]).sum(), (cotangent * oracle.slope(formula, arrays, alone)).sum())


FIRST = {CASES[case][0]: case for case in reversed(CASES)}  # a case of one dimension for each layer


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
    expected = getattr(oracle, name)(flipped(name, exact | {"x": exact["x"][1, 2]}), **loop).real
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


ONES = {"x": (5, 5, 4)}


@pytest.mark.parametrize(
    ("name", "shapes", "kwargs", "message"),
    [
        ("depthwise_conv", {"kernel": (3, 3, 6)}, {}, r"its last axis must be a multiple of the features of x \(=4\)"),
        ("depthwise_conv", {"kernel": (4,)}, {}, r"depthwise_conv: kernel has shape \[4\] .* must be \[\*window, fea"),
        ("depthwise_conv", {"kernel": (3, 3, 4)}, {"strides": 0}, r"depthwise_conv: strides=0 must be a positive int"),
        ("depthwise_conv", {"kernel": (3, 3, 4)}, {"padding": [1]}, r"depthwise_conv: padding=\[1\] must be 'SAME'"),
        ("conv_transpose", {"kernel": (3, 3, 5, 4)}, {}, r"must be \[\*window, features, out\] and \[\*batch"),
        (
            "conv_transpose",
            {"kernel": (3, 3, 4, 5)},
            {"transpose_kernel": True},
            r"must be \[\*window, out, features\]",
        ),
        ("conv_transpose", {"kernel": (3, 3, 4, 5)}, {"padding": "FULL"}, r"padding='FULL' must be 'SAME', 'VALID'"),
        ("light_conv", {"kernel": (3, 3, 3)}, {}, r"light_conv: the heads of kernel \(=3\) must divide .* \(=4\)"),
        ("dynamic_conv", {"kernel": (5, 3, 3, 2)}, {}, r"dynamic_conv: kernel has .* \[features, \*window, heads\]"),
        ("involution", {"reduce": (4, 3)}, {}, r"involution: params lack 'span'; needed are reduce, span"),
        ("involution", {**bottleneck((3, 3), 3)}, {}, r"the groups of params\['span'\] \(=3\) must divide"),
        ("involution", {**bottleneck((3,) * 4, 2)}, {}, r"x has shape \[5, 5, 4\]; expected .* with 4 grid axes"),
        (
            "dynamic_depthwise_conv",
            bottleneck((3, 3), 5),
            {},
            r"params\['span'\] has shape \[3, 3, 3, 5\]; expected \[reduced, \*window, features\] = \[3, \*window, 4\]",
        ),
        (
            "outlook_attention",
            outlook((3, 3)) | {"key": (4,)},
            {},
            r"outlook_attention: params have 'key'; allowed are",
        ),
        (
            "outlook_attention",
            outlook((3, 3)) | {"attention": (4, 2, 3, 3, 3, 2)},
            {},
            r"params\['attention'\] has shape \[4, 2, 3, 3, 3, 2\]; expected \[features, heads, \*window, \*window\] =",
        ),
    ],
)
def test_errors(name, shapes, kwargs, message):
    with pytest.raises(ValueError, match=message):
        call(name, kwargs)({key: jnp.ones(shape) for key, shape in (ONES | shapes).items()})


def test_every_layer_is_in_the_table():
    assert {case[0] for case in CASES.values()} <= set(zoo.ROWS)

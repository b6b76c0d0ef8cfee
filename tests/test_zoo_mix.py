"""The zoo's layers that are like convolutions, or driven by keys, against loops: values and every gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle_zoo_mix as oracle
import pytest
from test_zoo_attention import CASES as ATTENTION_CASES

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


def heads(bias=True, without=(), **more):
    """Projections by heads, and what else a layer has."""
    shapes = {
        "query": (FEATURES, HEADS, DIM), "key": (FEATURES, HEADS, DIM), "value": (FEATURES, HEADS, 2),
        "out": (HEADS, 2, OUT), "query_bias": (HEADS, DIM), "key_bias": (HEADS, DIM), "value_bias": (HEADS, 2),
        "out_bias": (OUT,),
    } | more  # fmt: skip
    return {name: s for name, s in shapes.items() if name not in without and (bias or not name.endswith("_bias"))}


def augmented(grid, size, bias=True):
    embeddings = {f"embedding_{axis}": (2 * n - 1, DIM) for axis, n in enumerate(grid)}
    return heads(bias, kernel=(*size, FEATURES, 3), kernel_bias=(3,), **embeddings)


def local(size, bias=True):
    return heads(bias, **{f"{name}_kernel": (*size, FEATURES) for name in ("query", "key", "value")})


def lambdas(size, depth, bias=True):
    return heads(
        bias, ("out", "out_bias"), key=(FEATURES, DIM, depth), key_bias=(DIM, depth), value=(FEATURES, 2, depth),
        value_bias=(2, depth), position=(*size, DIM, depth),
    )  # fmt: skip


def channels(position, bias=True):
    linear = dict.fromkeys(("query", "key", "value"), (FEATURES, 6)) | {"out": (6, OUT), "position": position}
    biases = dict.fromkeys(("query_bias", "key_bias", "value_bias"), (6,)) | {"out_bias": (OUT,)}
    return linear | biases if bias else linear


def asked(size, bias=True):
    return heads(bias, ("query_bias",), query=(HEADS, DIM)) | {"bias": (HEADS, *size)}


def remembered(bias=True, without=()):
    return heads(bias, ("key_bias", "value_bias", *without), key=(7, HEADS, DIM), value=(7, HEADS, 2))


def both(**kwargs):
    return kwargs, kwargs


# name: the layer, the grid, its parameters' shapes, its keywords and the loop's
CASES = {
    "conv 1d": ("conv", (6,), {"kernel": (4, 4, 3)}, {}, {"strides": (1,), "dilation": (1,), "lows": (1,)}),
    "conv 2d": (
        "conv",
        (5, 4),
        {"kernel": (3, 2, 2, 6)},
        {"strides": (2, 1), "dilation": (1, 2), "groups": 2},
        {"strides": (2, 1), "dilation": (1, 2), "lows": (1, 1), "groups": 2},
    ),
    "conv 3d": (
        "conv",
        (3, 2, 3),
        {"kernel": (2, 1, 3, 4, 2)},
        {"padding": [(1, 0), 0, 1]},
        {"strides": (1, 1, 1), "dilation": (1, 1, 1), "lows": (1, 0, 1)},
    ),
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
    "augmented 1d": ("augmented_conv", (5,), augmented((5,), (3,)), {}, {}),
    "augmented 2d": ("augmented_conv", (2, 3), augmented((2, 3), (2, 3), False), *both(query_scale=0.7)),
    "augmented 3d": ("augmented_conv", (2, 1, 2), augmented((2, 1, 2), (1, 1, 3)), {}, {}),
    "cvt 1d": ("cvt_attention", (5,), local((3,)), *both(strides=(1,), kv_strides=(2,))),
    "cvt 2d": ("cvt_attention", (3, 4), local((3, 2), False), *both(strides=(2, 1), kv_strides=(2, 2), scale=0.7)),
    "cvt 3d": ("cvt_attention", (2, 1, 3), local((1, 2, 3)), *both(strides=(1, 1, 1), kv_strides=(1, 1, 1))),
    "lambda 1d": ("lambda_layer", (5,), lambdas((3,), 2), {}, {}),
    "lambda 2d": ("lambda_layer", (3, 4), lambdas((5, 2), 1, False), {}, {}),
    "lambda 3d": ("lambda_layer", (2, 1, 3), lambdas((1, 3, 3), 2), {}, {}),
    "aft 1d": ("aft", (5,), channels((5, 5)), {}, {}),
    "aft 2d": ("aft", (2, 3), channels((2, 3, 2, 3), False), {}, {}),
    "aft conv 1d": ("aft_conv", (6,), channels((3, 2)), {}, {}),
    "aft conv 2d": ("aft_conv", (4, 3), channels((2, 3, 1), False), {}, {}),
    "aft conv 3d": ("aft_conv", (2, 1, 3), channels((1, 2, 3, 6)), {}, {}),
    "qna 1d": ("qna", (5,), asked((3,)), {}, {"strides": (1,)}),
    "qna 2d": ("qna", (4, 3), asked((3, 2), False), *both(strides=(2, 1), scale=0.7)),
    "qna 3d": ("qna", (2, 1, 3), asked((1, 2, 3)), {}, {"strides": (1, 1, 1)}),
    "parameter keys": ("parameter_key_attention", (5,), remembered(), {}, {}),
    "parameter keys 2d": ("parameter_key_attention", (2, 3), remembered(False), *both(normalize="relu", scale=0.7)),
    "parameter keys bare": (
        "parameter_key_attention",
        (4,),
        {"key": (7, HEADS, FEATURES), "value": (7, HEADS, DIM)},
        *both(normalize="none"),
    ),
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


@pytest.mark.core(10)
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


@pytest.mark.parametrize(("name", "position"), [("aft", (5, 5)), ("aft_conv", (3, 2))])
def test_aft_is_stable(name, position):
    """Keys of ±50, whose exponentials are far outside float32 in a difference of a hundred."""
    arrays = draw({"x": (5, FEATURES), **channels(position)})
    arrays["key"] *= 50 / abs(arrays["x"] @ arrays["key"]).max()
    arrays["key_bias"] *= 0
    small = {key: jnp.asarray(x, jnp.float32) for key, x in arrays.items()}
    y, gradient = compiled(jax.value_and_grad(lambda p: call(name, {})(p).sum()))(small)
    np.testing.assert_allclose(y, getattr(oracle, name)(arrays).real.sum(), rtol=1e-4)
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
    [
        ("depthwise_conv", {"kernel": (3, 3, 6)}, {}, r"features · m\] with x's features \(=4\)"),
        ("depthwise_conv", {"kernel": (4,)}, {}, r"depthwise_conv: kernel \(=\[4\]\) must be \[\*window, fea"),
        (
            "depthwise_conv",
            {"kernel": (3, 3, 4)},
            {"strides": 0},
            r"depthwise_conv: strides \(=0\) must be an int >= 1, or",
        ),
        (
            "depthwise_conv",
            {"kernel": (3, 3, 4)},
            {"padding": [1]},
            r"depthwise_conv: padding \(=\[1\]\) must be 'SAME'",
        ),
        ("conv_transpose", {"kernel": (3, 3, 5, 4)}, {}, r"must be \[\*window, features, out\] and \[\*batch"),
        (
            "conv_transpose",
            {"kernel": (3, 3, 4, 5)},
            {"transpose_kernel": True},
            r"must be \[\*window, out, features\]",
        ),
        (
            "conv_transpose",
            {"kernel": (3, 3, 4, 5)},
            {"padding": "FULL"},
            r"padding \(='FULL'\) must be 'SAME', 'VALID'",
        ),
        ("light_conv", {"kernel": (3, 3, 3)}, {}, r"light_conv: heads of kernel \(=3\) must divide .* \(=4\)"),
        (
            "dynamic_conv",
            {"kernel": (5, 3, 3, 2)},
            {},
            r"dynamic_conv: kernel .* must be \[features, \*window, heads\]",
        ),
        ("involution", {"reduce": (4, 3)}, {}, r"involution: params \(=.*\) must have 'span'; needed are reduce, span"),
        ("involution", {**bottleneck((3, 3), 3)}, {}, r"groups of params\['span'\] \(=3\) must divide"),
        ("involution", {**bottleneck((3,) * 4, 2)}, {}, r"x \(=\[5, 5, 4\]\) must be .* with 4 axes of a grid"),
        (
            "dynamic_depthwise_conv",
            bottleneck((3, 3), 5),
            {},
            r"params\['span'\] \(=\[3, 3, 3, 5\]\) must be \[reduced, \*window, features\] = \[3, \*window, 4\]",
        ),
        (
            "outlook_attention",
            outlook((3, 3)) | {"key": (4,)},
            {},
            r"outlook_attention: params .* must not have 'key'; allowed are",
        ),
        (
            "outlook_attention",
            outlook((3, 3)) | {"attention": (4, 2, 3, 3, 3, 2)},
            {},
            r"params\['attention'\] \(=\[4, 2, 3, 3, 3, 2\]\) must be \[features, heads, \*window, \*window\] =",
        ),
        (
            "augmented_conv",
            augmented((5, 5), (3, 3)) | {"embedding_1": (7, DIM)},
            {},
            r"params\['embedding_1'\] \(=\[7, 3\]\) must be \[offsets_1, head_dim\] = \[9, 3\]",
        ),
        ("cvt_attention", local((3, 3)), {"kv_strides": 0}, r"kv_strides \(=0\) must be an int >= 1, or one"),
        (
            "cvt_attention",
            local((3, 3)) | {"value": (4, 3, 2)},
            {},
            r"params\['value'\] \(=\[4, 3, 2\]\) must be",
        ),
        ("lambda_layer", lambdas((3, 3), 2) | {"position": (3, 3, DIM, 1)}, {}, r"params\['position'\] \(=.* must be"),
        (
            "aft",
            channels((5, 4, 5, 4)),
            {},
            r"aft: params\['position'\] \(=\[5, 4, 5, 4\]\) must be .* = \[5, 5, 5, 5\]",
        ),
        ("aft_conv", channels((3, 3, 4)), {}, r"heads of params\['position'\] \(=4\) must divide the hidden features"),
        ("qna", asked((3, 3)) | {"query": (3, DIM)}, {}, r"qna: params\['key'\] \(=\[4, 2, 3\]\) must be"),
        ("qna", asked((3, 3)), {"strides": (1, 2, 3)}, r"qna: strides \(=\(1, 2, 3\)\) must be an int >= 1, or one"),
        ("parameter_key_attention", remembered(without=("query", "query_bias")), {}, r"params\['key'\] \(=.* must be"),
        ("parameter_key_attention", remembered(), {"normalize": "max"}, r"normalize \(='max'\) must be one of"),
    ],
)
def test_errors(name, shapes, kwargs, message):
    with pytest.raises(ValueError, match=message):
        call(name, kwargs)({key: jnp.ones(shape) for key, shape in (ONES | shapes).items()})


def test_every_layer_of_the_table_has_a_case():
    """Here or in one of the other files."""
    elsewhere = {"quadratic_attention"}  # test_quadratic
    tested = {layer for layer, *_ in (*CASES.values(), *ATTENTION_CASES.values())}
    assert tested | elsewhere == set(zoo.ROWS)

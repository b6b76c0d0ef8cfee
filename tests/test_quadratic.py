"""`zoo.quadratic_attention` and its module against loops from the paper's formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from layers import quadratic as oracle

import jaxattn
from jaxattn import nn, zoo

# The same sums of a few hundred products in float64, in another order.
TOLERANCE = 1e-11
attend = jax.jit(zoo.quadratic_attention, static_argnames="window")


def make(seed, grid, *, heads=3, features=4, out=6, groups=1, head_dim=None, full=False, bias=True):
    rng = np.random.default_rng(seed)
    rank = len(grid)
    params = {"centre": rng.normal(size=(heads, rank))}
    if full:
        params["inverse_root"] = rng.normal(size=(heads, rank, rank))
    else:
        params["alpha"] = rng.uniform(0.3, 1.5, size=heads)
    columns = out if head_dim is None else groups * head_dim
    params["value"] = rng.normal(size=(features // groups, heads, columns))
    if head_dim is not None:
        params["out"] = rng.normal(size=(heads, columns, out // groups))
    if bias:
        params["bias"] = rng.normal(size=out)
    return rng.normal(size=(*grid, features)), params


def arrays(params):
    return {name: jnp.asarray(p) for name, p in params.items()}


GLOBAL = [
    ((7,), {}),
    ((1,), {"heads": 1}),
    ((4, 3), {"head_dim": 2}),
    ((3, 5), {"full": True, "groups": 2, "bias": False}),
    ((1, 4), {"full": True, "head_dim": 3, "groups": 2}),
    ((2, 3, 2), {"groups": 2}),
]


@pytest.mark.core(3)
@pytest.mark.parametrize(("grid", "kwargs"), GLOBAL)
def test_values_over_the_whole_grid(grid, kwargs):
    x, params = make(0, grid, **kwargs)
    y = attend(jnp.asarray(x), arrays(params))
    np.testing.assert_allclose(y, oracle.quadratic_attention(x, params), atol=TOLERANCE)


# (grid, size, strides, dilation, pads): odd, even, rectangular, size one, windows that barely fit, crops
SLIDES = [
    ((7,), (3,), (1,), (1,), ((1, 1),)),
    ((6,), (4,), (2,), (1,), ((1, 2),)),
    ((5,), (1,), (2,), (1,), ((0, 0),)),
    ((5, 4), (3, 2), (1, 2), (2, 1), ((2, 2), (0, 1))),
    ((3, 5), (3, 3), (1, 1), (1, 2), ((0, 0), (0, 0))),
    ((5, 4), (2, 3), (1, 1), (1, 1), ((-1, 2), (2, 0))),
    ((3, 2, 3), (3, 2, 1), (2, 1, 1), (1, 1, 1), ((1, 1), (1, 0), (0, 0))),
]


@pytest.mark.core(3)
@pytest.mark.parametrize("boundary", ["zero", "mask", "edge", "wrap", "reflect"])
@pytest.mark.parametrize(("grid", "size", "strides", "dilation", "pads"), SLIDES)
def test_values_in_a_sliding_window(grid, size, strides, dilation, pads, boundary):
    x, params = make(1, grid, head_dim=2, groups=2)
    tokens = oracle.Sliding(grid, size, strides, dilation, pads, boundary)
    slide = zoo.Slide(size, strides, pads, dilation, boundary)
    y = attend(jnp.asarray(x), arrays(params), window=slide)
    np.testing.assert_allclose(y, oracle.quadratic_attention(x, params, tokens), atol=TOLERANCE)


@pytest.mark.core(2)
@pytest.mark.parametrize("boundary", ["zero", "mask", None])
@pytest.mark.parametrize(("grid", "full"), [((6,), False), ((4, 5), True), ((3, 2, 3), False)])
def test_gradients(grid, full, boundary):
    """Of a random projection, along random directions, against central differences of the loops."""
    x, params = make(2, grid, head_dim=2, groups=2, full=full)
    rank = len(grid)
    size, ones = (3, 2, 2)[:rank], (1,) * rank
    pads = ((1, 1), (0, 1), (0, 1))[:rank]
    tokens = slide = None  # the whole grid
    if boundary is not None:
        tokens = oracle.Sliding(grid, size, ones, ones, pads, boundary)
        slide = zoo.Slide(size, padding=pads, boundary=boundary)
    rng = np.random.default_rng(3)
    y = oracle.quadratic_attention(x, params, tokens)
    cotangent = rng.normal(size=y.shape)

    def loss(x, params):
        return (zoo.quadratic_attention(x, params, window=slide) * cotangent).sum()

    by_x, by_params = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.asarray(x), arrays(params))
    for name in ["x", *params]:
        direction = rng.normal(size=(x if name == "x" else params[name]).shape)

        def at(step, name=name, direction=direction):
            moved = {k: p + step * direction if k == name else p for k, p in params.items()}
            there = x + step * direction if name == "x" else x
            return (oracle.quadratic_attention(there, moved, tokens) * cotangent).sum()

        h = 1e-3  # Richardson: the error is of order h⁴
        slope = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
        found = by_x if name == "x" else by_params[name]
        np.testing.assert_allclose((np.asarray(found) * direction).sum(), slope, rtol=1e-8, atol=1e-8, err_msg=name)


def test_the_papers_encoding_gives_the_same_weights():
    """v = -α(1, -2Δ₁, -2Δ₂) and r_δ = (‖δ‖², δ₁, δ₂): an encoding of dimension 3 (Theorem 1), through `attention`."""
    grid = (4, 5)
    x, params = make(4, grid, bias=False)
    alpha, centre = params["alpha"], params["centre"]
    v = -alpha[:, None] * np.concatenate([np.ones((3, 1)), -2 * centre], axis=1)
    delta = np.stack(np.meshgrid(np.arange(-3, 4), np.arange(-4, 5), indexing="ij"), -1)
    r = np.concatenate([(delta**2).sum(-1, keepdims=True), delta], axis=-1)
    mixed = jaxattn.attention(
        jnp.broadcast_to(v, (*grid, 3, 3)),
        jnp.zeros((*grid, 1, 3)),
        jnp.asarray(x)[..., None, :],
        window=jaxattn.Window(grid),
        key_embedding=jnp.asarray(r, float)[None],
    )
    y = np.einsum("...hc,cho->...o", mixed, params["value"])
    np.testing.assert_allclose(zoo.quadratic_attention(jnp.asarray(x), arrays(params)), y, atol=TOLERANCE)


def test_a_window_given_goes_before_the_one_carried():
    x, params = make(9, (5, 4))
    slide = zoo.Slide((3, 2))
    given = attend(jnp.asarray(x), {**arrays(params), "window": zoo.Slide((1, 1))}, window=slide)
    np.testing.assert_allclose(given, oracle_at(x, params, slide), atol=TOLERANCE)


@pytest.mark.core(1)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_transformations(implementation):
    x, params = make(5, (5, 4))
    slide = zoo.Slide((3, 3), strides=2, boundary="mask")
    batch = jnp.stack([jnp.asarray(x), 2 * jnp.asarray(x)])

    @jax.jit  # the window is static although it stands among the parameters
    def f(x, params):
        return zoo.quadratic_attention(x, params, implementation=implementation)

    carried = {**arrays(params), "window": slide}
    y = f(batch, carried)
    np.testing.assert_allclose(jax.vmap(f, in_axes=(0, None))(batch, carried), y, atol=TOLERANCE)
    np.testing.assert_allclose(y[0], oracle_at(x, params, slide), atol=TOLERANCE)
    _, tangent = jax.jvp(lambda x: f(x, carried), (batch,), (batch,))
    np.testing.assert_allclose(tangent, y - params["bias"], atol=TOLERANCE)  # linear in x


def oracle_at(x, params, slide):
    grid = x.shape[:-1]
    tokens = oracle.Sliding(grid, slide.size, slide.strides, slide.dilation, slide.pads(grid), slide.boundary)
    return oracle.quadratic_attention(x, params, tokens)


@pytest.mark.full
def test_transformations_over_the_whole_grid():
    x, params = make(5, (5, 4))
    batch, whole = jnp.stack([jnp.asarray(x), 2 * jnp.asarray(x)]), jax.jit(zoo.quadratic_attention)
    y = whole(batch, arrays(params))
    np.testing.assert_allclose(y[0], oracle.quadratic_attention(x, params), atol=TOLERANCE)
    np.testing.assert_allclose(jax.vmap(whole, in_axes=(0, None))(batch, arrays(params)), y, atol=TOLERANCE)
    _, tangent = jax.jvp(lambda x: whole(x, arrays(params)), (batch,), (batch,))
    np.testing.assert_allclose(tangent, y - params["bias"], atol=TOLERANCE)  # linear in x
    second = jax.hessian(lambda alpha: whole(x, {**arrays(params), "alpha": alpha}).sum())(params["alpha"])
    named = {"implementation": "reference"}  # mixes all axes at once
    other = jax.hessian(lambda a: zoo.quadratic_attention(x, {**arrays(params), "alpha": a}, **named).sum())
    np.testing.assert_allclose(second, other(params["alpha"]), atol=TOLERANCE)


@pytest.mark.core(1)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", 0.15)])
def test_narrow_types(dtype, tolerance):
    x, params = make(6, (5, 4))
    with jax.numpy_dtype_promotion("strict"):
        y = zoo.quadratic_attention(jnp.asarray(x, dtype), {k: jnp.asarray(p, dtype) for k, p in params.items()})
    assert y.dtype == dtype
    np.testing.assert_allclose(np.asarray(y, float), oracle.quadratic_attention(x, params), atol=tolerance)


REFUSED = [
    (lambda p: p.pop("centre"), "params .* must have 'centre'"),
    (lambda p: p.pop("alpha"), "must have one of 'alpha' and 'inverse_root'"),
    (lambda p: p.update(inverse_root=np.ones((3, 2, 2))), "must have one of 'alpha' and 'inverse_root', and not both"),
    (lambda p: p.update(keys=np.ones(3)), "params .* must not have 'keys'; allowed are"),
    (lambda p: p.update(centre=np.ones(3)), r"params\['centre'\] \(=\[3\]\) must be \[heads, axes\]"),
    (lambda p: p.update(alpha=np.ones(2)), r"params\['alpha'\] \(=\[2\]\) must be \[heads\] = \[3\]"),
    (lambda p: p.update(value=np.ones((4, 2, 6))), r"params\['value'\] \(=\[4, 2, 6\]\)"),
    (lambda p: p.update(value=np.ones((3, 3, 6))), r"must be \[features / groups, heads, .* with x's features \(=4\)"),
    (lambda p: p.update(value=np.ones((2, 3, 5))), r"\(=\[2, 3, 5\]\) must be .* with x's features \(=4\)"),
    (lambda p: p.update(bias=np.ones(5)), r"params\['bias'\] \(=\[5\]\) must be \[out_features\] = \[6\]"),
    (
        lambda p: p.update(out=np.ones((3, 5, 6))),
        r"params\['out'\] .* must be .* = \[3, 6, out_features/groups\]",
    ),
    (lambda p: p.update(window=zoo.Slide((3,))), r"window \(=\(3,\)\) must have as many axes as .*\[heads, 2\]"),
    (lambda p: p.update(centre=np.ones((3, 3))), r"x \(=\[4, 3, 4\]\) must be .* with 3 axes of a grid"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_bad_parameters(change, message):
    x, params = make(7, (4, 3))
    change(params)
    with pytest.raises(ValueError, match=f"quadratic_attention: .*{message}"):
        zoo.quadratic_attention(jnp.asarray(x), params)


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_an_empty_grid_is_refused(implementation):
    params = arrays(make(7, (4, 3))[1])
    with pytest.raises(ValueError, match=r"Window: size \(=0\) must be an integer >= 1 on axis 1"):
        zoo.quadratic_attention(jnp.ones((2, 4, 0, 4)), params, implementation=implementation)


def test_a_slide_of_one_axis():
    assert zoo.Slide(3, 2) == zoo.Slide((3,), strides=(2,))
    assert zoo.Slide((3, 3), padding=1) == zoo.Slide((3, 3), padding=[(1, 1), 1])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"padding": "FULL"}, r"Slide: padding \(='FULL'\) must be 'SAME', 'SAME_LOWER', 'VALID', an int, or"),
        ({"padding": (1, 2, 3)}, r"Slide: padding \(=\(1, 2, 3\)\) must be"),
        ({"padding": 1.5}, r"Slide: padding \(=1.5\) must be"),
        (
            {"boundary": "shift"},
            r"Slide: boundary \(='shift'\) must be one of 'zero', 'edge', 'reflect', 'wrap', 'mask'",
        ),
        ({"strides": 0}, r"Slide: strides \(=0\) must be an int >= 1"),
    ],
)
def test_bad_slides(kwargs, message):
    with pytest.raises(ValueError, match=message):
        zoo.Slide((3, 3), **kwargs)


@pytest.mark.core(1)
@pytest.mark.parametrize(
    ("kwargs", "dtype"),
    [
        ({"head_dim": 2, "groups": 2}, jnp.float32),
        ({"isotropic": False, "window": (3, 3)}, jnp.bfloat16),
        ({"rank": 1, "param_dtype": jnp.bfloat16}, jnp.bfloat16),
    ],
)
def test_module_trains(kwargs, dtype):
    layer = nn.QuadraticAttention(3, 4, 6, **kwargs, dtype=dtype, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 4, 4)), dtype)
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def step(params):
        def loss(params):
            return jnp.square(nnx.merge(graphdef, params, rest)(x).astype(jnp.float32) - 1).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        return value, gradient, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)

    value, gradient, params = step(params)
    assert jnp.isfinite(value)
    assert all((g != 0).any() for g in jax.tree.leaves(gradient))
    assert step(params)[0] < value


def test_module_is_the_function():
    layer = nn.QuadraticAttention(3, 4, 6, param_dtype=jnp.float64, window=zoo.Slide((3, 3), 2), rngs=nnx.Rngs(0))
    x, _ = make(8, (5, 4))
    params = {name: np.asarray(p) for name, p in nnx.to_pure_dict(nnx.state(layer, nnx.Param)).items()}
    np.testing.assert_allclose(layer(jnp.asarray(x)), oracle_at(x, params, layer.window), atol=TOLERANCE)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((0, 4), {}, r"num_heads \(=0\) must be an int >= 1"),
        ((3, 4), {"rank": 0}, r"rank \(=0\) must be an int >= 1"),
        ((3, 4), {"head_dim": 0}, r"head_dim \(=0\) must be an int >= 1"),
        ((3, 4), {"groups": 3}, r"groups \(=3\) must divide in_features \(=4\)"),
        ((3, 4, 3), {"groups": 2}, r"groups \(=2\) must divide out_features \(=3\)"),
    ],
)
def test_module_refuses(args, kwargs, message):
    with pytest.raises(ValueError, match=f"QuadraticAttention: {message}"):
        nn.QuadraticAttention(*args, **kwargs, rngs=nnx.Rngs(0))


def test_module_refuses_inputs():
    layer = nn.QuadraticAttention(3, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"inputs \(=\[5, 4\]\) must be .*2 axes of a grid"):
        layer(jnp.ones((5, 4)))


@pytest.mark.parametrize("batch", [(), (2,)])
def test_a_window_as_large_as_the_padded_grid(batch):
    """Under "mask" one token alone sees itself alone: its weight is one, whatever the window reaches."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(*batch, 1, 1, 2)))
    value = jnp.asarray(np.random.default_rng(1).normal(size=(2, 1, 3)))
    params = {"centre": jnp.ones((1, 2)), "alpha": jnp.ones(1), "value": value}
    got = zoo.quadratic_attention(x, params, window=zoo.Slide((3, 3), boundary="mask"))
    np.testing.assert_allclose(got, np.einsum("...c,cho->...o", x, value), rtol=1e-12)

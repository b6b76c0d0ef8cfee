"""Theorem 1 both ways: convolutions as quadratic attention, against `jax.lax`, within the bounds that are promised."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxattn import equivalence, zoo
from jaxattn.equivalence import attention_to_conv, conv_to_attention, error_bound, nearest_conv

# The same sums of up to a thousand products in float64, in another order.
TOLERANCE = 1e-11
attend = jax.jit(zoo.quadratic_attention)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


@functools.partial(jax.jit, static_argnames=("strides", "padding", "dilation", "groups"))
def lax_conv(x, kernel, strides=1, padding="SAME", dilation=1, groups=1):
    """XLA's convolution of one image."""
    rank = kernel.ndim - 2

    def each(value):
        return (value,) * rank if isinstance(value, int) else value

    letters = "XYZ"[:rank]
    return lax.conv_general_dilated(
        x[None],
        kernel,
        each(strides),
        [(padding, padding)] * rank if isinstance(padding, int) else padding,
        rhs_dilation=each(dilation),
        feature_group_count=groups,
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
    )[0]


# grid, window, features, out, and the convolution's options
CASES = [
    ((5,), (1,), 2, 3, {}),
    ((9,), (7,), 3, 2, {"strides": 2}),
    ((6,), (4,), 4, 2, {"groups": 2, "dilation": 2}),
    ((7,), (7,), 2, 2, {"padding": "VALID"}),
    ((8,), (3,), 2, 2, {"padding": ((2, 0),)}),
    ((5, 6), (3, 3), 4, 6, {"strides": 2, "groups": 2}),
    ((4, 1), (3, 2), 2, 2, {"strides": (1, 2)}),
    ((7, 6), (3, 2), 2, 2, {"dilation": (2, 3), "padding": 2}),
    ((8, 8), (7, 7), 2, 2, {"strides": 2, "padding": 3}),
    ((5, 5), (3, 3), 4, 4, {"groups": 4, "padding": "SAME_LOWER", "strides": 2}),
    ((6, 5), (2, 2), 2, 2, {"padding": ((-1, 2), (0, -1))}),
    ((4, 3, 5), (3, 2, 1), 4, 2, {"strides": (2, 1, 1), "groups": 2, "dilation": (1, 2, 1)}),
    ((5, 4, 6), (5, 3, 4), 1, 2, {"strides": (1, 2, 3)}),
]
case = pytest.mark.parametrize(("grid", "window", "features", "out", "options"), CASES)


def make(grid, window, features, out, options, seed=0):
    x = normal(seed, *grid, features)
    return x, normal(seed + 1, *window, features // options.get("groups", 1), out)


@pytest.mark.core(5)
@case
def test_the_hard_limit_is_the_convolution(grid, window, features, out, options):
    x, kernel = make(grid, window, features, out, options)
    params, bound = conv_to_attention(kernel, **options)
    assert bound == 0
    assert len(params["centre"]) == np.prod(window)
    expected = lax_conv(x, kernel, **{**options, "padding": lax_padding(options, grid, window)})
    np.testing.assert_allclose(attend(x, params), expected, atol=TOLERANCE)


def lax_padding(options, grid, window):
    """XLA has SAME_LOWER, but `lax.conv_general_dilated` only takes it spelled out."""
    padding = options.get("padding", "SAME")
    if padding != "SAME_LOWER":
        return padding
    pairs = lax.padtype_to_pads(grid, window, (options.get("strides", 1),) * len(grid), "SAME_LOWER")
    return tuple(pairs)


@pytest.mark.core(1)
@pytest.mark.parametrize("size", range(1, 8))
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_every_size(rank, size):
    """K from 1 to 7 in every rank, with strides, dilation and groups together: exact, back again, and in the bound."""
    options = {"strides": 1 + size % 2, "dilation": 2 if size % 3 == 1 else 1, "groups": 2}
    x, kernel = make((6, 4, 3)[:rank], (size,) * rank, 2, 4, options, seed=30 + size)
    expected, (params, _) = lax_conv(x, kernel, **options), conv_to_attention(kernel, **options)
    assert len(params["centre"]) == size**rank
    np.testing.assert_allclose(attend(x, params), expected, atol=TOLERANCE)
    back, found = attention_to_conv(params, groups=2)
    np.testing.assert_array_equal(back, kernel)
    assert (found["strides"], found["dilation"]) == ((options["strides"],) * rank, (options["dilation"],) * rank)
    soft, bound = conv_to_attention(kernel, alpha=1.5, **options)
    assert jnp.abs(attend(x, soft) - expected).max() <= bound * jnp.abs(x).max() + TOLERANCE


@pytest.mark.core(5)
@case
def test_there_and_back(grid, window, features, out, options):
    x, kernel = make(grid, window, features, out, options)
    params, _ = conv_to_attention(kernel, **options)
    back, found = attention_to_conv(params, groups=options.get("groups", 1))
    np.testing.assert_array_equal(back, kernel)
    if options.get("padding") != "SAME_LOWER":
        expected = lax_conv(x, kernel, **{**options, "padding": lax_padding(options, grid, window)})
        np.testing.assert_allclose(zoo.conv(x, back, **found), expected, atol=TOLERANCE)


@pytest.mark.core(4)
@case
def test_a_finite_alpha_is_within_its_bound(grid, window, features, out, options):
    alpha = 0.7
    _, kernel = make(grid, window, features, out, options)
    params, bound = conv_to_attention(kernel, alpha=alpha, **options)
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.choice([-1.0, 1.0], size=(*grid, features)))
    expected = lax_conv(x, kernel, **{**options, "padding": lax_padding(options, grid, window)})
    error = jnp.abs(attend(x, params) - expected).max()
    assert error <= bound + TOLERANCE
    assert (bound > 0) == (np.prod(window) > 1)
    assert bound <= 2 * error_bound(alpha, len(window)) * jnp.abs(kernel).sum(range(kernel.ndim - 1)).max()


@pytest.mark.core(1)
@pytest.mark.parametrize(
    ("window", "alpha", "options"),
    [
        ((7,), 0.1, {}),
        ((4,), 0.5, {"groups": 2, "dilation": 3}),
        ((3, 3), 8.0, {}),
        ((7, 7), 1.0, {}),
        ((2, 3, 2), 0.1, {"groups": 2, "dilation": (2, 1, 1)}),
    ],
)
def test_the_bound_is_reached(window, alpha, options):
    """By the x whose signs are those of the difference of the operators, which is measured by the attention itself."""
    groups, dilation = options.get("groups", 1), options.get("dilation", 1)
    kernel = normal(3, *window, 2, 4)
    params, bound = conv_to_attention(kernel, alpha=alpha, padding="VALID", **options)
    dilation = (dilation,) * len(window) if isinstance(dilation, int) else dilation
    grid = tuple((k - 1) * d + 1 for k, d in zip(window, dilation, strict=True))
    x = jnp.eye(entries := int(np.prod(grid)) * 2 * groups).reshape(entries, *grid, 2 * groups)

    direct = jax.vmap(lambda x: lax_conv(x, kernel, padding="VALID", **options))
    difference = (attend(x, params) - direct(x)).reshape(entries, 4)
    worst = jnp.abs(difference).sum(0).argmax()
    x = jnp.sign(difference[:, worst]).reshape(x.shape[1:])
    error = jnp.abs(attend(x, params) - lax_conv(x, kernel, padding="VALID", **options)).max()
    np.testing.assert_allclose(error, bound, rtol=1e-9)


@pytest.mark.core(6)
@pytest.mark.parametrize("rtol", [0.3, 1e-2, 1e-6])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("window", [(5,), (2, 3, 2)])
def test_rtol(window, rtol, dtype):
    kernel = normal(4, *window, 3, 2).astype(dtype)
    params, bound = conv_to_attention(kernel, rtol=rtol)
    norm = np.abs(np.asarray(kernel, float)).sum(tuple(range(kernel.ndim - 1))).max()
    assert bound <= rtol * norm
    assert bound >= rtol * norm / 10 or dtype == "bfloat16"  # it asks no more sharpness than it must
    assert params["alpha"].dtype == dtype


@pytest.mark.parametrize("alpha", [0.05, 1.0, 8.0, 16.0])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_error_bound(alpha, ndim):
    """What a head over a wide grid leaves off its own token, added up; over a narrower one it is less."""
    m = np.arange(-40, 41)
    line = np.exp(-alpha * m**2) / np.exp(-alpha * m**2).sum()
    others = 1 - line[40] ** ndim
    np.testing.assert_allclose(error_bound(alpha, ndim), others, atol=1e-15, rtol=1e-9)
    if alpha >= 8:
        np.testing.assert_allclose(error_bound(alpha, ndim), 2 * ndim * np.exp(-alpha), rtol=1e-2)
    grid = (9,) * ndim
    params = {"centre": jnp.zeros((1, ndim)), "alpha": jnp.array([alpha]), "value": jnp.ones((1, 1, 1))}
    middle = jnp.zeros((*grid, 1)).at[(4,) * ndim].set(1.0)
    seen = attend(middle, params)[(4,) * ndim][0]
    assert 1 - seen <= error_bound(alpha, ndim) + 1e-15


def test_error_bound_at_its_ends():
    assert error_bound(np.inf, 2) == 0
    assert error_bound(1e-6, 1) == pytest.approx(1 - np.sqrt(1e-6 / np.pi), rel=1e-6)  # θ(α) → √(π/α)
    assert f"{error_bound(8, 2):.1e} {error_bound(16, 2):.1e}" == "1.3e-03 4.5e-07"


@pytest.mark.core(2)
@pytest.mark.parametrize("boundary", ["zero", "edge", "reflect", "wrap"])
def test_boundaries(boundary):
    x, kernel = normal(5, 5, 6, 2), normal(6, 3, 4, 2, 3)
    params, _ = conv_to_attention(kernel, boundary=boundary)
    padded = jnp.pad(x, [(1, 1), (1, 2), (0, 0)], mode="constant" if boundary == "zero" else boundary)
    expected = lax_conv(padded, kernel, padding="VALID")
    np.testing.assert_allclose(attend(x, params), expected, atol=TOLERANCE)
    back, options = attention_to_conv(params)
    np.testing.assert_allclose(zoo.conv(x, back, **options), expected, atol=TOLERANCE)


@pytest.mark.core(1)
@pytest.mark.parametrize("window", [None, zoo.Slide((3, 3), boundary="mask")])
def test_weights_over_the_tokens_inside_are_edge_padding(window):
    """Normalised inside, over the whole grid or a window: with α the attention nears "edge", and never "zero"."""
    x, kernel = normal(7, 4, 5, 2), normal(8, 3, 3, 2, 2)
    edge = lax_conv(jnp.asarray(np.pad(x, [(1, 1), (1, 1), (0, 0)], mode="edge")), kernel, padding="VALID")
    zero = lax_conv(x, kernel)
    norm, errors = jnp.abs(kernel).sum((0, 1, 2)).max() * jnp.abs(x).max(), []
    for alpha in (2.0, 8.0, 16.0, np.inf):
        params, _ = conv_to_attention(kernel, alpha=alpha)
        y = attend(x, {**params, "window": window})
        errors.append(jnp.abs(y - edge).max())
        assert errors[-1] <= 2 * error_bound(alpha, 2) * norm + TOLERANCE
        assert jnp.abs(y - zero)[:, 0].max() > 0.1
        assert alpha < 8 or jnp.abs(y - zero)[1:-1, 1:-1].max() < 0.1  # away from the border they agree
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < TOLERANCE


@pytest.mark.parametrize(("grid", "kept"), [((4, 5), (slice(1, -1), slice(1, -1)))])
def test_zero_padding_by_padding_and_cropping(grid, kept):
    x, kernel = normal(9, *grid, 2), normal(10, 3, 3, 2, 2)
    params, _ = conv_to_attention(kernel)
    around = jnp.pad(x, [(1, 1), (1, 1), (0, 0)])
    y = attend(around, {**params, "window": None})[kept]
    np.testing.assert_allclose(y, lax_conv(x, kernel), atol=TOLERANCE)


def best(kernel, centres, alphas):
    """The least-squares values of quadratic heads that are given, and the residual of the kernel that they make."""
    taps = int(np.prod(kernel.shape[:2]))
    params = {"centre": centres, "alpha": alphas, "value": jnp.zeros((1, len(centres), 1))}
    slide = zoo.Slide(kernel.shape[:2])
    weights = [
        attention_to_conv({**params, "window": slide, "value": jnp.eye(len(centres))[None, :, h : h + 1]})[0]
        for h in range(len(centres))
    ]
    weights = np.stack(weights).reshape(len(centres), taps)  # [heads, taps]
    matrix = np.asarray(kernel).reshape(taps, -1)
    values = np.linalg.lstsq(weights.T, matrix, rcond=None)[0]
    value = jnp.moveaxis(jnp.asarray(values).reshape(len(centres), *kernel.shape[2:]), 0, 1)
    return {**params, "value": value, "window": slide}, np.linalg.norm(weights.T @ values - matrix)


@pytest.mark.full
def test_fewer_heads_than_taps_fail_by_the_singular_values():
    """8 heads leave at least a generic 3 × 3 kernel's smallest singular value, wherever they look; 9 leave none."""
    kernel = normal(11, 3, 3, 3, 4)
    singular = np.linalg.svd(np.asarray(kernel).reshape(9, 12), compute_uv=False)
    assert singular[-1] > 0.5
    rng = np.random.default_rng(12)
    for heads in (4, 8, 8, 8):
        centres = jnp.asarray(rng.uniform(-1.5, 1.5, size=(heads, 2)))
        params, residual = best(kernel, centres, jnp.asarray(rng.uniform(0.2, 3, size=heads)))
        assert residual >= np.sqrt((singular[heads:] ** 2).sum()) - 1e-9
        made, _ = attention_to_conv(params)
        assert np.linalg.norm(made - kernel) == pytest.approx(residual)  # and so the attention itself
    taps = conv_to_attention(kernel)[0]["centre"]
    assert best(kernel, taps, jnp.full(9, 0.7))[1] < 1e-9  # nine heads need not even be sharp
    largest = jnp.argsort(jnp.square(kernel).sum((2, 3)).ravel())[1:]
    _, residual = best(kernel, taps[largest], jnp.full(8, 1000.0))
    dropped = min(np.linalg.norm(kernel[r, s]) for r, s in itertools.product(range(3), range(3)))
    assert residual == pytest.approx(dropped)  # hard heads keep the largest taps
    assert residual > singular[-1]


def test_fewer_heads_fail_on_the_output_too():
    kernel = normal(13, 3, 3, 3, 4)
    params, residual = best(kernel, conv_to_attention(kernel)[0]["centre"][:8], jnp.full(8, 5.0))
    x = normal(14, 5, 5, 3)
    assert jnp.abs(attend(x, params) - lax_conv(x, kernel)).max() > 0.1 * residual


def test_one_head_is_a_gaussian_blur():
    line = np.exp(-0.4 * np.arange(-2, 3) ** 2)
    kernel = jnp.asarray(np.outer(line, line) / np.outer(line, line).sum())[..., None, None]
    params = {"centre": jnp.zeros((1, 2)), "alpha": jnp.array([0.4]), "value": jnp.ones((1, 1, 1))}
    x = normal(15, 6, 7, 1)
    y = attend(x, {**params, "window": zoo.Slide((5, 5))})
    np.testing.assert_allclose(y, lax_conv(x, kernel), atol=TOLERANCE)


@pytest.mark.full
@pytest.mark.parametrize("groups", [1, 2])
def test_head_dim(groups):
    """A kernel whose taps have rank 2 takes heads of 2, and no fewer."""
    left, right = normal(16, 3, 3, groups, 4, 2), normal(17, 3, 3, groups, 2, 5)
    kernel = jnp.moveaxis(left @ right, 2, 3).reshape(3, 3, 4, groups * 5)
    x = normal(18, 5, 4, 4 * groups)
    for head_dim in (2, 7):
        params, _ = conv_to_attention(kernel, head_dim=head_dim, groups=groups)
        assert params["value"].shape == (4, 9, groups * head_dim)
        assert params["out"].shape == (9, groups * head_dim, 5)
        y = attend(x, params)
        np.testing.assert_allclose(y, lax_conv(x, kernel, groups=groups), atol=TOLERANCE)
        np.testing.assert_allclose(attention_to_conv(params, groups=groups)[0], kernel, atol=TOLERANCE)
    with pytest.raises(ValueError, match=r"head_dim \(=1\) must be at least 2, the rank"):
        conv_to_attention(kernel, head_dim=1, groups=groups)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_transformations(implementation):
    """The way from kernel to attention to output is a function like any other: its gradient is the convolution's."""
    x, kernel = normal(19, 2, 5, 4, 2), normal(20, 3, 3, 2, 3)

    @jax.jit
    def through(x, kernel):
        params, bound = conv_to_attention(kernel, strides=2)
        return zoo.quadratic_attention(x, params, implementation=implementation) + bound

    def direct(x, kernel):
        return jax.vmap(lambda x: lax_conv(x, kernel, strides=2))(x)

    cotangent = normal(21, 2, 3, 2, 3)
    (y, pull), (expected, other) = jax.vjp(through, x, kernel), jax.vjp(jax.jit(direct), x, kernel)
    for a, b in zip((y, *pull(cotangent)), (expected, *other(cotangent)), strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE)


@pytest.mark.full
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_narrow_types(dtype, tolerance):
    x, kernel = normal(22, 6, 5, 4).astype(dtype), normal(23, 3, 3, 4, 4).astype(dtype)
    with jax.numpy_dtype_promotion("strict"):
        params, _ = conv_to_attention(kernel)
        y = zoo.quadratic_attention(x, params)
    expected = lax_conv(x.astype(float), kernel.astype(float))
    assert y.dtype == dtype
    np.testing.assert_allclose(np.asarray(y, float), expected, atol=tolerance * np.abs(expected).max())
    np.testing.assert_array_equal(attention_to_conv(params)[0], kernel)


def test_nearest_conv():
    """Against the operator of every query written out; a border that holds no token counts for nothing."""
    rng = np.random.default_rng(24)
    weights, value = rng.random((2, 5, 3, 4)), rng.normal(size=(3, 2, 6))
    mask = rng.random((5, 4)) < 0.7
    kernel, residual = nearest_conv(weights, value, mask)
    operators = np.einsum("bnhu,hco->bnuco", weights, value)
    held = np.broadcast_to(mask, (2, 5, 4))
    left, total = 0.0, 0.0
    for u in range(4):
        there = operators[:, :, u][held[:, :, u]]
        np.testing.assert_allclose(kernel[u], there.mean(0), atol=TOLERANCE)
        left, total = left + np.square(there - there.mean(0)).sum(), total + np.square(there).sum()
    np.testing.assert_allclose(residual, np.sqrt(left / total), atol=TOLERANCE)


def test_nearest_conv_of_a_convolution_is_itself():
    kernel = normal(25, 3, 3, 2, 4)
    taps = jnp.broadcast_to(jnp.eye(9), (5, 6, 9, 9))
    found, residual = nearest_conv(taps, kernel.reshape(9, 2, 4))
    np.testing.assert_array_equal(found.reshape(kernel.shape), kernel)
    assert residual == 0


@pytest.mark.full
def test_residual_of_the_border():
    """Masked at the border, even hard heads are no convolution with zeros: the mean over queries leaves a residual."""
    heads = zoo.Slide((3,), boundary="mask")
    params, _ = conv_to_attention(normal(26, 3, 1, 1))
    one = {**params, "value": jnp.ones((1, 3, 1)), "window": heads}
    grid = 5
    weights = np.zeros((grid, 3, 3))
    for h in range(3):
        alone = {**one, "value": jnp.eye(3)[None, :, h : h + 1]}
        for j in range(grid):
            row = attend(jnp.eye(grid)[:, j : j + 1], alone)[:, 0]
            for i in range(grid):
                if 0 <= j - i + 1 < 3:
                    weights[i, h, j - i + 1] = row[i]
    held = np.array([[0 <= i + u - 1 < grid for u in range(3)] for i in range(grid)])
    _, residual = nearest_conv(weights, params["value"].swapaxes(0, 1), held)
    assert residual > 0.05
    _, inside = nearest_conv(weights[1:-1], params["value"].swapaxes(0, 1), held[1:-1])
    assert inside < 1e-6
    with pytest.raises(ValueError, match=r"attention_to_conv: params\['window'\] \(=Slide\(.*boundary='mask'"):
        attention_to_conv(one)


@pytest.mark.parametrize(
    ("kernel", "kwargs", "message"),
    [
        (np.ones((3, 2)), {}, r"kernel \(=float64\[3, 2\]\) must be floating point, \[\*window, features / groups"),
        (np.ones((3, 2, 2), int), {}, r"kernel \(=int64\[3, 2, 2\]\) must be floating-point"),
        (np.ones((3, 2, 3)), {"groups": 2}, r"groups \(=2\) must be an int that divides out_features \(=3\)"),
        (np.ones((3, 2, 2)), {"alpha": 0}, r"alpha \(=0\) must be a number > 0, or inf"),
        (np.ones((3, 2, 2)), {"alpha": float("nan")}, r"alpha \(=nan\) must be"),
        (np.ones((3, 2, 2)), {"alpha": 1, "rtol": 1}, r"alpha \(=1\) and rtol \(=1\) must not both be given"),
        (np.ones((3, 2, 2)), {"rtol": 0}, r"rtol \(=0\) must be a number > 0 \(alpha=inf is exact\)"),
        (
            np.ones((3, 2, 2)),
            {"boundary": "mask"},
            r"boundary \(='mask'\) must be .* limit is the convolution with 'edge'",
        ),
        (np.ones((3, 2, 2)), {"head_dim": 0}, r"head_dim \(=0\) must be an int >= 1, or None"),
        (np.ones((3, 2, 2)), {"padding": "CIRCULAR"}, r"padding \(='CIRCULAR'. must be 'SAME', 'SAME_LOWER', 'VALID'"),
    ],
)
def test_bad_arguments(kernel, kwargs, message):
    with pytest.raises(ValueError, match=message):
        conv_to_attention(kernel, **kwargs)


def test_more_bad_arguments():
    params, _ = conv_to_attention(np.ones((3, 2, 3)))
    with pytest.raises(ValueError, match=r"attention_to_conv: params\['window'\] \(=None\) must be a zoo.Slide"):
        attention_to_conv({**params, "window": None})
    with pytest.raises(ValueError, match=r"attention_to_conv: groups \(=2\) must divide"):
        attention_to_conv(params, groups=2)
    with pytest.raises(ValueError, match=r"nearest_conv: weights \(=\[4, 3\]\)"):
        nearest_conv(np.ones((4, 3)), np.ones((4, 1, 1)))
    for alpha, ndim, name in ((0.0, 2, "alpha"), (-1.0, 2, "alpha"), (1.0, 0, "ndim")):
        with pytest.raises(ValueError, match=rf"error_bound: {name} \(="):
            error_bound(alpha, ndim)
    assert "error_bound" in dir(equivalence)

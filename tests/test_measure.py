"""Measurements against loops over queries and slots, closed forms, and what is known of convolutions and Gaussians."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxattn
from jaxattn import measure, nn, zoo
from jaxattn.window import Window

WINDOWS = [
    (Window((3,), boundary="mask"), (6,)),
    (Window((4,), boundary="zero", dilation=2), (5,)),
    (Window((1,)), (1,)),
    (Window((3, 3), boundary="mask"), (4, 5)),
    (Window((3, 5), boundary="shift"), (6, 5)),
    (Window((2, 3), boundary="wrap"), (4, 3)),
    (Window((3, 2), boundary="mask", stride=(2, 1)), (5, 4)),
    (Window((3, 3), boundary="zero", dilation=2), (5, 5)),
    (Window((2, 3, 2), boundary="mask"), (3, 2, 2)),
]


@pytest.mark.parametrize(
    ("window", "shape"),
    [
        (Window((3, 3), boundary="mask"), (4, 5)),
        (Window((3, 5), boundary="shift"), (6, 5)),
        (Window((2, 3), boundary="wrap"), (4, 3)),
        (Window((3, 2), boundary="mask", stride=2), (5, 4)),
        (Window((3, 3), boundary="zero", dilation=2), (5, 5)),
    ],
)
def test_maps_and_means_by_loops(window, shape):
    rng = np.random.default_rng(0)
    indices, grid = window.indices(shape), window.query_grid(shape)
    heads, slots, stride = 2, int(np.prod(window.sizes)), window.stride[0]
    weights = rng.random((3, *grid, heads, slots))

    maps = np.zeros((*grid, heads, *shape))
    sums, counts = {}, {}
    for i in np.ndindex(*grid):
        for u, key in enumerate(indices[i].reshape(-1, 2)):
            if (key < 0).any():
                continue
            maps[(*i, slice(None), *key)] += weights[(0, *i, slice(None), u)]
            offset = tuple(int(k - stride * q) for k, q in zip(key, i, strict=True))
            for image in range(3):
                sums[offset] = sums.get(offset, 0) + weights[(image, *i, slice(None), u)]
                counts[offset] = counts.get(offset, 0) + 1

    np.testing.assert_allclose(measure.attention_maps(weights[0], indices, shape), maps, rtol=1e-12)
    means, low = measure.mean_by_offset(weights, indices, stride)
    assert low == tuple(min(offset[axis] for offset in sums) for axis in range(2))
    for entry in np.ndindex(*means.shape[1:]):
        offset = tuple(e + m for e, m in zip(entry, low, strict=True))
        expected = sums[offset] / counts[offset] if offset in sums else np.full(heads, np.nan)
        np.testing.assert_allclose(means[(slice(None), *entry)], expected, rtol=1e-12)


# What each head looks at


def offsets_and_shares(weights, window, shape):
    """For each head, a list over the queries of (offset, share) of the slots that hold a key; weights of one image."""
    indices = window.indices(shape)
    heads = []
    for h in range(weights.shape[-2]):
        queries = []
        for i in np.ndindex(*window.query_grid(shape)):
            keys = indices[i].reshape(-1, len(shape))
            slots = [u for u in range(len(keys)) if keys[u].min() >= 0]
            total = sum(float(weights[(*i, h, u)]) for u in slots)
            if total > 0:
                delta = [keys[u] - np.multiply(window.stride, i) for u in slots]
                queries.append([(d, float(weights[(*i, h, u)]) / total) for d, u in zip(delta, slots, strict=True)])
        heads.append(queries)
    return heads


def mean_of(heads, value):
    """mean_i Σ_u p value(δ, p), for each head."""
    return np.array([sum(sum(p * value(d, p) for d, p in q) for q in queries) / len(queries) for queries in heads])


def random_weights(window, shape, batch=(), heads=3):
    rng = np.random.default_rng(0)
    weights = rng.random((*batch, *window.query_grid(shape), heads, math.prod(window.sizes)))
    weights[weights < 0.2] = 0.0  # as a softmax of -inf gives
    weights[..., -1] = rng.random(weights.shape[:-1]) + 0.1
    weights[..., 0] = rng.random(weights.shape[:-1]) + 0.1
    return weights


@pytest.mark.parametrize(("window", "shape"), WINDOWS)
def test_heads_by_loops(window, shape):
    weights, indices, rank = random_weights(window, shape, batch=(2,)), window.indices(shape), len(shape)
    stride = window.stride
    for image in range(2):
        heads = offsets_and_shares(weights[image], window, shape)
        distance = mean_of(heads, lambda d, p: math.sqrt(sum(float(each) ** 2 for each in d)))
        near = mean_of(heads, lambda d, p: float(all(-1 <= each <= 1 for each in d)))
        near_even = mean_of(heads, lambda d, p: float(all(-1 <= each <= 0 for each in d)))
        centers = mean_of(heads, lambda d, p: d.astype(float))
        spreads = np.stack(
            [mean_of(heads[h : h + 1], lambda d, p, c=centers[h]: np.outer(d - c, d - c))[0] for h in range(3)]
        )
        entropy = mean_of(heads, lambda d, p: -math.log(p) if p > 0 else 0.0)

        def close(measured, expected, image=image):
            np.testing.assert_allclose(measured[image], expected, rtol=1e-10, atol=1e-12)

        close(measure.attention_distance(weights, indices, stride), distance)
        close(measure.locality(weights, indices, 3, stride), near)
        close(measure.locality(weights, indices, (2,) * rank, stride), near_even)
        close(measure.head_centers(weights, indices, stride), centers)
        close(measure.head_spreads(weights, indices, stride), spreads)
        close(measure.entropy(weights, indices), entropy)


def every_measure(weights, indices):
    return {
        "attention_distance": measure.attention_distance(weights, indices),
        "locality": measure.locality(weights, indices, 3),
        "head_centers": measure.head_centers(weights, indices),
        "head_spreads": measure.head_spreads(weights, indices),
        "entropy": measure.entropy(weights, indices),
    }


def test_a_head_that_looks_at_one_offset():
    indices = Window((3, 5), boundary="valid").indices((6, 9))  # offsets 0..2 and 0..4
    weights = np.zeros((*indices.shape[:2], 2, 15))
    weights[..., 0, 0 * 5 + 0] = 1.0  # (0, 0)
    weights[..., 1, 2 * 5 + 3] = 0.5  # (2, 3), of weights that sum to a half
    expected = {
        "attention_distance": [0.0, math.sqrt(13)],
        "locality": [1.0, 0.0],
        "head_centers": [[0, 0], [2, 3]],
        "head_spreads": np.zeros((2, 2, 2)),
        "entropy": [0.0, 0.0],
    }
    for name, measured in every_measure(weights, indices).items():
        np.testing.assert_allclose(measured, expected[name], rtol=1e-14, err_msg=name)
    assert not np.signbit(measure.entropy(weights, indices)).any()


def test_uniform_weights_over_a_window():
    """Of the 9 offsets of a 3 × 3 window, four are at distance 1 and four at √2; covariance 2/3 along each axis."""
    indices = Window((3, 3), boundary="mask").indices((7, 6))
    weights = np.full((7, 6, 1, 9), 1 / 9)
    weights[[0, -1]], weights[:, [0, -1]] = 0.0, 0.0  # queries at the border look nowhere, and do not count
    np.testing.assert_allclose(measure.attention_distance(weights, indices), [(4 + 4 * math.sqrt(2)) / 9], rtol=1e-12)
    np.testing.assert_allclose(measure.locality(weights, indices, (1, 3)), [1 / 3], rtol=1e-12)
    np.testing.assert_allclose(measure.locality(weights, indices, 2), [4 / 9], rtol=1e-12)
    np.testing.assert_allclose(measure.head_centers(weights, indices), [[0, 0]], atol=1e-12)
    np.testing.assert_allclose(measure.head_spreads(weights, indices), [np.eye(2) * 2 / 3], atol=1e-12)
    np.testing.assert_allclose(measure.entropy(weights, indices), [math.log(9)], rtol=1e-12)


def test_global_attention():
    """n tokens that all see each other alike: mean |i - j| is (n² - 1) / 3n, and the variance of j - i (n² - 1) / 6."""
    n = 8
    indices, weights = Window(n).indices((n,)), np.full((n, 1, n), 1 / n)
    np.testing.assert_allclose(measure.attention_distance(weights, indices), [(n * n - 1) / (3 * n)], rtol=1e-12)
    np.testing.assert_allclose(measure.head_spreads(weights, indices), [[[(n * n - 1) / 6]]], rtol=1e-12)
    np.testing.assert_allclose(measure.entropy(weights, indices), [math.log(n)], rtol=1e-12)


def test_what_lies_outside_the_grid_is_left_out():
    """The first of three queries has half its weight on a slot outside; the last one has all of it there."""
    indices = Window(2, boundary="zero", offset=-1).indices((3,))  # slots -1 and 0 of every query
    indices[2] = -1
    weights = np.array([[[0.5, 0.5]], [[0.5, 0.5]], [[0.5, 0.5]]])
    np.testing.assert_allclose(measure.head_centers(weights, indices), [[(0 - 0.5) / 2]])
    np.testing.assert_allclose(measure.attention_distance(weights, indices), [(0 + 0.5) / 2])
    np.testing.assert_allclose(measure.entropy(weights, indices), [(0 + math.log(2)) / 2])


def test_a_head_without_weight_is_nan_and_the_others_are_not():
    indices = Window(3, boundary="mask").indices((4,))
    weights = np.stack([np.zeros((4, 3)), np.full((4, 3), 1 / 3)], axis=1)
    for name, measured in every_measure(weights, indices).items():
        assert np.isnan(measured[0]).all(), name
        assert np.isfinite(measured[1]).all(), name


def test_heads_of_quadratic_attention_are_where_their_parameters_say():
    """Gaussian weights by slot: the centre is Δ, and the covariance Σ but for the sum over whole offsets."""
    delta, sigma = np.array([1, -2]), np.array([[1.2, 0.4], [0.4, 0.9]])
    window = Window((17, 17), boundary="mask")
    indices = window.indices((17, 17))[8:9, 8:9]  # of the query in the middle
    away = indices.reshape(-1, 2) - 8 - delta
    scores = -0.5 * np.einsum("si,ij,sj->s", away, np.linalg.inv(sigma), away)
    weights = np.zeros((17, 17, 1, 289))
    weights[8, 8, 0] = np.exp(scores)
    np.testing.assert_allclose(measure.head_centers(weights, window.indices((17, 17))), [delta], atol=1e-4)
    np.testing.assert_allclose(measure.head_spreads(weights, window.indices((17, 17))), [sigma], atol=1e-3)


def test_heads_of_a_layer():
    """A layer that starts as a convolution: each head looks at its own of nine offsets."""
    layer = nn.Attention(9, 18, window=Window((3, 3), boundary="mask"), relative_bias=True, rngs=nnx.Rngs(0))
    jaxattn.equivalence.init_as_cnn(layer, "impulse", alpha=60.0)
    weights = np.array(layer.weights(jnp.ones((2, 5, 5, 18))))
    weights[:, [0, -1]], weights[:, :, [0, -1]] = 0.0, 0.0
    centers = measure.head_centers(weights, Window((3, 3), boundary="mask").indices((5, 5)))
    taps = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    np.testing.assert_allclose(centers, [taps, taps], atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_arrays_of_jax_in_any_precision(dtype):
    indices = Window(3, boundary="mask").indices((5,))
    weights = jax.nn.softmax(jax.random.normal(jax.random.key(0), (2, 5, 2, 3)), axis=-1).astype(dtype)
    same = every_measure(np.asarray(weights).astype(np.float64), indices)
    for name, measured in every_measure(weights, indices).items():
        assert isinstance(measured, np.ndarray)
        assert measured.dtype == np.float64
        np.testing.assert_array_equal(measured, same[name])


@pytest.mark.parametrize("name", ["attention_distance", "head_centers", "head_spreads", "entropy", "locality"])
def test_bad_input_to_the_measures_of_heads(name):
    indices, good = Window((3, 3)).indices((4, 5)), np.full((4, 5, 2, 9), 1 / 9)
    function = getattr(measure, name)
    rest = (3,) if name == "locality" else ()
    with pytest.raises(ValueError, match=rf"^{name}: indices \(=\[4, 5, 9, 2\]\) must be \[\*query_grid"):
        function(good, indices.reshape(4, 5, 9, 2), *rest)
    for weights in (good[:, :4], good[..., :8], good[0]):
        with pytest.raises(ValueError, match=rf"^{name}: weights .* must be \[\*batch, 4, 5, heads, 9\]"):
            function(weights, indices, *rest)
    for wrong in (-0.1, np.nan, np.inf):
        weights = good.copy()
        weights[0, 0, 0, 0] = wrong
        with pytest.raises(ValueError, match=f"^{name}: weights must be finite and at least 0, and one is {wrong}"):
            function(weights, indices, *rest)
    if name != "entropy":
        for stride in (0, (1, 2, 3)):
            with pytest.raises(ValueError, match=rf"^{name}: stride \(=.*\) must be an int >= 1, or one for each"):
                function(good, indices, *rest, stride)


@pytest.mark.parametrize("size", [0, (3, -1), (3, 3, 3)])
def test_bad_size(size):
    indices, weights = Window((3, 3)).indices((4, 5)), np.full((4, 5, 2, 9), 1 / 9)
    with pytest.raises(ValueError, match=r"^locality: size \(=.*\) must be an int >= 1, or one for each"):
        measure.locality(weights, indices, size)


# How far an output sees


@pytest.mark.parametrize(("size", "depth"), [(3, 1), (3, 8), (5, 2)])
def test_the_field_of_a_stack_of_box_filters_is_their_convolution(size, depth):
    kernel, n = jnp.ones((size, size, 1, 1)), 2 * size * depth + 1

    def stack(x):
        for _ in range(depth):
            x = zoo.conv(x, kernel)
        return x

    field = measure.effective_receptive_field(stack, jnp.ones((2, n, n, 1)))
    line = np.ones(1)
    for _ in range(depth):
        line = np.convolve(line, np.ones(size))
    reach = (size - 1) * depth // 2
    assert len(line) == 2 * reach + 1
    expected = np.pad(np.outer(line, line), n // 2 - reach)
    np.testing.assert_array_equal(field, expected)  # so exactly zero outside the theoretical receptive field
    # about a Gaussian of variance L (K² - 1) / 12: exactly that variance, and its height to the order 1 / L
    line = field.sum(0) / field.sum()
    away = np.arange(n) - n // 2
    variance = depth * (size**2 - 1) / 12
    np.testing.assert_allclose((line * away**2).sum(), variance, rtol=1e-12)
    np.testing.assert_allclose(
        line, np.exp(-(away**2) / 2 / variance) / math.sqrt(2 * np.pi * variance), atol=0.16 / depth
    )


def test_the_field_is_zero_exactly_outside_and_nowhere_inside():
    """Three convolutions of 3 × 5 with features, biases and tanh between: a support of 7 × 13."""
    rng = np.random.default_rng(0)
    kernels = [jnp.asarray(rng.normal(size=(3, 5, *io)) / 4) for io in ((2, 4), (4, 4), (4, 3))]

    def network(x):
        for kernel in kernels:
            x = jnp.tanh(zoo.conv(x, kernel))
        return x

    field = measure.effective_receptive_field(network, rng.normal(size=(2, 11, 17, 2)), (4, 9))
    support = np.zeros((11, 17), bool)
    support[4 - 3 : 4 + 4, 9 - 6 : 9 + 7] = True
    np.testing.assert_array_equal(field > 0, support)


def test_the_field_against_central_differences():
    """One-dimensional, strided, nonlinear: |∂ Σ_o y(i, o) / ∂ x(j, c)|, summed over c, the mean over the batch."""
    rng = np.random.default_rng(0)
    kernel, x = rng.normal(size=(3, 2, 4)), rng.normal(size=(3, 7, 2))

    def centre(x):  # output 1 of a "VALID" correlation with stride 2 sees tokens 2, 3 and 4
        return np.tanh(sum(x[:, 2 + u] @ kernel[u] for u in range(3))).sum(-1)

    expected = np.zeros(7)
    for j in range(7):
        for c in range(2):
            step = np.zeros_like(x)
            step[:, j, c] = 1e-5
            expected[j] += np.abs(centre(x + step) - centre(x - step)).mean() / 2e-5
    function = lambda x: jnp.tanh(zoo.conv(x, jnp.asarray(kernel), strides=2, padding="VALID"))
    np.testing.assert_allclose(measure.effective_receptive_field(function, x, (1,)), expected, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(measure.effective_receptive_field(function, x), expected, rtol=1e-8, atol=1e-12)


def test_the_field_of_global_attention_is_everywhere():
    layer = nn.Attention(2, 4, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 9, 4), jnp.float32)
    assert (measure.effective_receptive_field(layer, x) > 0).all()


def test_the_field_in_bfloat16():
    function = lambda x: zoo.conv(x, jnp.ones((3, 1, 1), jnp.bfloat16))
    field = measure.effective_receptive_field(function, jnp.ones((1, 5, 1), jnp.bfloat16))
    np.testing.assert_array_equal(field, [0, 1, 1, 1, 0])


def test_bad_input_to_the_field():
    same = lambda x: x
    with pytest.raises(ValueError, match=r"x \(=\[3, 4\]\) must be \[batch, \*grid, features\]"):
        measure.effective_receptive_field(same, np.ones((3, 4)))
    with pytest.raises(ValueError, match=r"function \(giving \[1, 2\] for an x of \[1, 5, 2\]\) must give \[1, 1 axes"):
        measure.effective_receptive_field(lambda x: x.mean(1), np.ones((1, 5, 2)))
    for position in ((5,), (-1,), (1, 1), ()):
        with pytest.raises(ValueError, match=r"position \(=.*\) must be an i"):
            measure.effective_receptive_field(same, np.ones((1, 5, 2)), position)


# What a head compares


def test_the_metric_scores_pairs_of_tokens():
    rng = np.random.default_rng(0)
    query, key, x = rng.normal(size=(5, 4, 3)), rng.normal(size=(5, 2, 3)), rng.normal(size=(6, 5))
    found = measure.query_key_metric(query, key)
    for h in range(4):
        scores = (x @ query[:, h]) @ (x @ key[:, h // 2]).T  # two query heads share a key head
        np.testing.assert_allclose(x @ found.metric[h] @ x.T, scores, rtol=1e-10, atol=1e-12)
        part = (found.metric[h] + found.metric[h].T) / 2
        values = np.linalg.eigvals(part)
        np.testing.assert_allclose(found.spectrum[h], np.sort(values), atol=1e-10)
        np.testing.assert_allclose(found.symmetry[h], (part**2).sum() / (found.metric[h] ** 2).sum(), rtol=1e-10)
        np.testing.assert_allclose(found.definiteness[h], values.sum() / np.abs(values).sum(), rtol=1e-10)
        # a product of rank 3 has a symmetric part with at most 3 positive and 3 negative directions
        assert (np.linalg.eigvalsh(part) > 1e-10).sum() <= 3


def test_equal_kernels_make_a_positive_semidefinite_metric():
    kernel = np.random.default_rng(0).normal(size=(6, 2, 4))
    same, opposite = measure.query_key_metric(kernel, kernel), measure.query_key_metric(kernel, -kernel)
    assert (same.spectrum > -1e-12).all()
    assert ((same.spectrum > 1e-6).sum(1) == 4).all()  # the rank is head_dim
    np.testing.assert_allclose(same.symmetry, 1.0, rtol=1e-12)
    np.testing.assert_allclose(same.definiteness, 1.0, rtol=1e-12)
    np.testing.assert_allclose(opposite.definiteness, -1.0, rtol=1e-12)
    np.testing.assert_allclose(opposite.spectrum, -same.spectrum[:, ::-1], atol=1e-12)


def test_an_antisymmetric_metric_and_a_zero_one():
    query, key = np.eye(2)[:, None], np.array([[0.0, -1.0], [1.0, 0.0]])[:, None]
    rotation = measure.query_key_metric(query, key)  # M = [[0, 1], [-1, 0]]
    np.testing.assert_array_equal(rotation.metric, [[[0, 1], [-1, 0]]])
    np.testing.assert_array_equal(rotation.symmetry, [0.0])
    assert np.isnan(rotation.definiteness).all()
    assert np.isnan(measure.query_key_metric(query, 0 * key).symmetry).all()


def test_random_kernels_are_half_symmetric():
    rng = np.random.default_rng(0)
    found = measure.query_key_metric(*(jnp.asarray(rng.normal(size=(200, 4, 32)), jnp.float32) for _ in range(2)))
    np.testing.assert_allclose(found.symmetry, 0.5, atol=0.02)
    np.testing.assert_allclose(found.definiteness, 0.0, atol=0.1)
    assert found.metric.dtype == np.float64


def test_bad_kernels():
    kernel = np.ones((5, 4, 3))
    with pytest.raises(
        ValueError,
        match=r"query_kernel \(=float64\[5, 12\]\) must be floating-point .*heads, head_dim\]",
    ):
        measure.query_key_metric(kernel.reshape(5, 12), kernel)
    for wrong in (np.ones((6, 4, 3)), np.ones((5, 4, 2)), np.ones((5, 3, 3)), np.ones((5, 0, 3))):
        with pytest.raises(ValueError, match=r"key_kernel .* must be \[5, key_heads, 3\], where key_heads divides 4"):
            measure.query_key_metric(kernel, wrong)

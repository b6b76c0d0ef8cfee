"""What `attention` does at the edges, and against other libraries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import quick

from jaxattn.attention import attention, merge_attentions
from jaxattn.window import Window

IMPLEMENTATIONS = ["reference", "xla"]


@pytest.mark.core(4)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("normalize", ["softmax", "relu", "sigmoid", "sparsemax", "none"])
@pytest.mark.parametrize("window", [Window(3, boundary="mask"), None])
def test_nothing_to_attend_to_is_zero_with_zero_gradient(window, normalize, implementation):
    x = 100 * jax.random.normal(jax.random.key(0), (5, 2, 4), jnp.float32)  # scores of some 1e4
    mask = jnp.ones((5, 1, 3) if window else (1, 5, 5), bool)
    mask = mask.at[2].set(False) if window else mask.at[:, 2].set(False)

    @functools.partial(jax.jit, compiler_options=quick)
    def run(query, key, value):
        f = lambda *x: attention(*x, mask=mask, window=window, normalize=normalize, implementation=implementation)
        output, pullback = jax.vjp(f, query, key, value)
        return output, pullback(jnp.ones_like(output))

    output, gradients = run(x, x, x)
    np.testing.assert_array_equal(output[2], 0)
    np.testing.assert_array_equal(gradients[0][2], 0)
    assert all(jnp.isfinite(x).all() for x in (output, *gradients))


@pytest.mark.core(1)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("low", [-jnp.inf, jnp.finfo(float).min])
def test_a_bias_of_minus_infinity_masks(low, implementation):
    """Or of the least number; also under a soft cap, which would make it finite. A row of it is an empty query."""
    x = jax.random.normal(jax.random.key(0), (6, 2, 4))
    mask = jax.random.bernoulli(jax.random.key(1), 0.5, (6, 2, 3)).at[3].set(False)
    run = functools.partial(
        attention, window=Window(3), logits_soft_cap=5.0, return_residuals=True, implementation=implementation
    )
    bias = jnp.where(mask, 0.0, low)
    for a, b in zip(run(x, x, x, bias), run(x, x, x, mask=mask), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-14)
    output, lse = run(x, x, x, bias)
    np.testing.assert_array_equal(output[3], 0)
    np.testing.assert_array_equal(lse[3], -jnp.inf)
    gradient = jax.grad(
        lambda bias: jnp.where(jnp.isfinite(run(x, x, x, bias)[1]), run(x, x, x, bias)[0][..., 0], 0).sum()
    )(bias)
    assert jnp.isfinite(gradient).all()


@pytest.mark.core(1)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [False, True])
def test_against_jax_nn(causal, implementation):
    q, k, v = (jax.random.normal(jax.random.key(n), (2, 9, heads, 8)) for n, heads in enumerate((4, 2, 2)))
    bias = jax.random.normal(jax.random.key(3), (1, 4, 9, 9))
    mask = jax.random.bernoulli(jax.random.key(4), 0.7, (2, 1, 9, 9)) | jnp.eye(9, dtype=bool)
    theirs = jax.nn.dot_product_attention(q, k, v, bias, mask, is_causal=causal)
    tril = jnp.tril(jnp.ones((9, 9), bool)) if causal else True
    ours = attention(q, k, v, bias, mask & tril, implementation=implementation)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)  # theirs has statistics in float32
    if causal:
        plain = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        np.testing.assert_allclose(attention(q, k, v, window=Window(9, causal=True)), plain, rtol=1e-6, atol=1e-7)
    else:
        far = jax.nn.dot_product_attention(q, k, v, local_window_size=2)
        np.testing.assert_allclose(attention(q, k, v, window=Window(5, boundary="mask")), far, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dropout_is_unbiased_and_zeroes_its_share(implementation):
    """With uniform weights and one-hot values, the output shows the weights: 0, or 1 / (n (1 - rate))."""
    n, rate = 16, 0.25
    q, v = jnp.zeros((64, n, 1, 8)), jnp.broadcast_to(jnp.eye(n)[:, None], (64, n, 1, n))
    weights = attention(q, q, v, dropout_rate=rate, dropout_key=jax.random.key(0), implementation=implementation)
    np.testing.assert_allclose(jnp.unique(weights), [0, 1 / (n * (1 - rate))], rtol=1e-12)
    kept = np.asarray(weights > 0)
    assert abs(kept.mean() - (1 - rate)) < 5 * (rate * (1 - rate) / kept.size) ** 0.5  # five standard deviations
    assert (kept[:, 1:] == kept[:, :-1]).mean() < 0.7  # neighbouring queries agree by chance alone: 0.625
    again = attention(q, q, v, dropout_rate=rate, dropout_key=jax.random.key(1), implementation=implementation)
    assert (weights != again).any()


@pytest.mark.full
@pytest.mark.parametrize("window", [Window((3, 3)), Window((4, 5), boundary="zero")])
def test_merging_windows_and_their_rest(window):
    """Two masks that part the keys, merged, are no mask at all; and derivatives pass through lse."""
    x = jax.random.normal(jax.random.key(0), (2, 5, 6, 2, 4))
    part = jax.random.bernoulli(jax.random.key(1), 0.5, (2, 5, 6, 2, *window.size))

    def merged(x):
        parts = [attention(x, x, x, mask=mask, window=window, return_residuals=True) for mask in (part, ~part)]
        return merge_attentions(*zip(*parts, strict=True), return_residuals=True)

    whole = lambda x: attention(x, x, x, window=window, return_residuals=True)
    for a, b in zip(merged(x), whole(x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11)
    gradient = lambda f: jax.grad(lambda x: sum(jnp.sin(y).sum() for y in f(x)))(x)
    np.testing.assert_allclose(gradient(merged), gradient(whole), rtol=1e-9, atol=1e-12)


@pytest.mark.full
def test_merging_nothing_gives_zeros_and_zero_gradients():
    outputs, lses = (
        [jnp.ones((3, 1, 2))] * 2,
        [jnp.array([[0.0], [-jnp.inf], [-jnp.inf]]), jnp.array([[0.0], [1.0], [-jnp.inf]])],
    )
    merged, lse = merge_attentions(outputs, lses, return_residuals=True)
    np.testing.assert_allclose(merged[:, 0, 0], [1, 1, 0])
    np.testing.assert_allclose(lse[:, 0], [np.log(2), 1, -np.inf])
    gradients = jax.grad(lambda o, l: merge_attentions(o, l).sum(), (0, 1))(outputs, lses)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradients))
    assert all((g[2] == 0).all() for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_score_mod_is_told(implementation):
    """Head, query and key indices: each written into the score, and read back through normalize="none"."""
    window = Window((2, 3), stride=(2, 1), boundary=("zero", "wrap"))
    key = jnp.zeros((4, 5, 1, 2))
    query = jnp.zeros((2, 5, 3, 2))
    tell = lambda s, h, i, j: s + h + 10 * i[0] + 100 * i[1] + 1000 * j[0] + 10000 * j[1]
    one_hot = lambda scores, mask: scores * (jnp.arange(scores.shape[-1]) == 3)
    value = jnp.ones((4, 5, 1, 1))
    output = attention(
        query, key, value, window=window, score_mod=tell, normalize=one_hot, implementation=implementation
    )
    for i0, i1, h in np.ndindex(2, 5, 3):  # slot 3 is (1, 0): row 2·i0, column i1 - 1 wrapped
        expected = h + 10 * i0 + 100 * i1 + 1000 * (2 * i0) + 10000 * ((i1 - 1) % 5)
        np.testing.assert_array_equal(output[i0, i1, h, 0], expected)


@pytest.mark.core(1)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_segments_from_one_array_are_those_of_the_keys_stood_on(implementation):
    x = jax.random.normal(jax.random.key(0), (1, 7, 2, 4))
    ids = jnp.array([[0, 0, 1, 1, 1, 2, 2]])
    run = functools.partial(
        attention, x[:, ::2], x, x, window=Window(3, stride=2, boundary="mask"), implementation=implementation
    )
    np.testing.assert_array_equal(run(segment_ids=ids), run(segment_ids=(ids[:, ::2], ids)))
    assert (run(segment_ids=ids) != run()).any()


def test_numpy_operands_any_number_of_batch_axes_and_empty_ones():
    x = np.random.default_rng(0).normal(size=(2, 3, 6, 2, 4))
    window = Window(3)
    whole = attention(x, x, x, window=window)
    np.testing.assert_allclose(whole[1, 2], attention(x[1, 2], x[1, 2], x[1, 2], window=window), rtol=1e-12)
    assert attention(x[:0], x[:0], x[:0], window=window).shape == (0, 3, 6, 2, 4)
    np.testing.assert_array_equal(attention(x, x[:, :, :0], x[:, :, :0]), np.zeros_like(x))


def test_a_finer_query_grid_is_folded_into_heads():
    fine, keys = jax.random.normal(jax.random.key(0), (8, 2, 3)), jax.random.normal(jax.random.key(1), (4, 2, 3))
    folded = fine.reshape(4, 2, 2, 3).swapaxes(1, 2).reshape(4, 4, 3)
    output = attention(folded, keys, keys, window=Window(3)).reshape(4, 2, 2, 3).swapaxes(1, 2).reshape(8, 2, 3)
    for parity in range(2):
        each = attention(fine[parity::2], keys, keys, window=Window(3))
        np.testing.assert_allclose(output[parity::2], each, rtol=1e-12)


def test_scale_none_is_not_scale_zero():
    x = jax.random.normal(jax.random.key(0), (6, 2, 4))
    np.testing.assert_allclose(attention(x, x, x, scale=0.0), jnp.broadcast_to(x.mean(0), x.shape), rtol=1e-12)
    np.testing.assert_allclose(attention(x, x, x, scale=0.5), attention(x, x, x), rtol=1e-14)
    gradient = jax.grad(lambda scale: attention(x, x, x, scale=scale).sum())(0.3)
    numeric = (attention(x, x, x, scale=0.3 + 1e-6) - attention(x, x, x, scale=0.3 - 1e-6)).sum() / 2e-6
    np.testing.assert_allclose(gradient, numeric, rtol=1e-7)


def test_memory_is_not_the_window_times_the_keys():
    """[1, 64, 64, 4, 32] at 7 × 7: gathered keys would be 103 MB, and weights 3.2 MB a head."""
    x = jax.ShapeDtypeStruct((1, 64, 64, 4, 32), jnp.float32)
    f = lambda q, k, v: attention(q, k, v, window=Window((7, 7)))
    backward = jax.grad(lambda *x: (f(*x) ** 2).sum(), (0, 1, 2))
    gathered = 64 * 64 * 49 * 4 * 32 * 4
    for function, share in ((f, 0.3), (backward, 0.6)):
        temporaries = jax.jit(function).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes
        assert temporaries < share * gathered, f"{temporaries / 1e6:.0f} MB"


@pytest.mark.full
def test_a_bias_of_rows_is_not_expanded_over_the_grid():
    x, bias = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 128, 128, 4, 8), (128, 1, 4, 7, 7)))

    def held(*given):
        loss = lambda x, *given: attention(x, x, x, *given, window=Window((7, 7))).sum()
        return jax.jit(jax.grad(loss)).lower(x, *given).compile().memory_analysis().temp_size_in_bytes

    expanded = 4 * 128 * 128 * 4 * 7 * 7
    assert held(bias) - held() < expanded / 5


def test_a_batch_in_chunks_drops_what_the_definition_drops():
    shape = (64, 4, 4, 4, 64)  # more than a step of the loop holds
    query, key, value = (np.random.default_rng(i).normal(size=shape) for i in range(3))

    def attend(implementation):
        options = dict(window=Window((3, 3)), dropout_rate=0.5, dropout_key=jax.random.key(7))
        return jax.jit(lambda *x: attention(*x, **options, implementation=implementation))(query, key, value)

    np.testing.assert_allclose(attend("xla"), attend("reference"), atol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_large_bias_is_not_a_mask(implementation):
    """-1e9 everywhere changes nothing, also where the window's own mask is added to it."""
    x = jax.random.normal(jax.random.key(0), (6, 2, 4))
    run = functools.partial(attention, x, x, x, window=Window(3, boundary="mask"), implementation=implementation)
    np.testing.assert_allclose(run(bias=jnp.full((6, 2, 3), -1e9)), run(), rtol=1e-5)

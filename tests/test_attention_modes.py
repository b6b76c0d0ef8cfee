"""`attention` under every transformation and dtype, what it does at the edges, and against other libraries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_attention import make, quick, tiling

from jaxattn.attention import attention, merge_attentions
from jaxattn.window import Window

IMPLEMENTATIONS = ["reference", "xla"]
# One bound for each dtype: some sixteen roundings of its epsilon for values of order one.
TOLERANCE = {jnp.float64: 1e-12, jnp.float32: 2e-6, jnp.float16: 4e-3, jnp.bfloat16: 3e-2}


def problem(seed=0, dtype=jnp.float64, grid=(7, 6)):
    """A window's problem with every term: its operands, and a function of them."""
    arguments = dict(
        size=(3, 2), dilation=(2, 1), boundary=("mask", "shift"), causal=False, block=1, stride=1, offset=None
    )
    arguments = {name: value if isinstance(value, tuple) else (value, value) for name, value in arguments.items()}
    features = {"bias", "relative_bias", "embedding", "extra", "mask", "logits_soft_cap"}
    operands, ours, theirs = make(grid, arguments, features=features, seed=seed)
    return {name: jnp.asarray(x, dtype) for name, x in operands.items()}, ours, theirs


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_dtype(dtype, implementation):
    operands, ours, theirs = problem(dtype=dtype)
    rounded = {name: np.asarray(x, np.float64) for name, x in operands.items()}
    expected, expected_lse = oracle.attention(**rounded, **theirs)
    with jax.numpy_dtype_promotion("strict"):
        run = lambda operands: attention(**operands, **ours, implementation=implementation, return_residuals=True)

        @functools.partial(jax.jit, compiler_options=quick)
        def value_and_gradient(operands):
            result, pullback = jax.vjp(run, operands)
            return *result, pullback(jax.tree.map(jnp.ones_like, result))[0]

        output, lse, gradients = value_and_gradient(operands)
    assert output.dtype == dtype
    assert lse.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)
    np.testing.assert_allclose(np.asarray(output, np.float64), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    np.testing.assert_allclose(lse, expected_lse, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert {name: x.dtype for name, x in gradients.items()} == dict.fromkeys(operands, jnp.dtype(dtype))
    assert all(jnp.isfinite(x).all() for x in gradients.values())


@pytest.mark.parametrize(("implementation", "tiled"), [("reference", "few"), ("xla", "few"), ("xla", "many")])
def test_transformations_agree(implementation, tiled):
    """jit, vmap, grad, jvp, checkpoint, and second derivatives forward over reverse and reverse over reverse."""
    operands, ours, _ = problem(grid=(8, 6))
    direction = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), operands)
    f = lambda operands: (attention(**operands, **ours, implementation=implementation) ** 2).sum()
    inner = lambda a, b: sum(jax.tree.leaves(jax.tree.map(lambda x, y: (x * y).sum(), a, b)))
    along = lambda x: jax.jvp(f, (x,), (direction,))[1]

    @functools.partial(jax.jit, compiler_options=quick)
    def everything(x):
        reverse, forward = inner(jax.grad(f)(x), direction), along(x)
        remat = inner(jax.grad(jax.checkpoint(f))(x), direction)
        forward_over_reverse = inner(jax.jvp(jax.grad(f), (x,), (direction,))[1], direction)
        reverse_over_reverse = inner(jax.grad(lambda x: inner(jax.grad(f)(x), direction))(x), direction)
        batched = jax.vmap(f)(jax.tree.map(lambda a, b: jnp.stack([a, b]), x, direction))
        return reverse, forward, remat, forward_over_reverse, reverse_over_reverse, batched, f(direction)

    with tiling(tiled):
        reverse, forward, remat, forward_over_reverse, reverse_over_reverse, batched, other = everything(operands)
        step = 1e-4
        ahead, behind = (jax.tree.map(lambda x, d, s=s: x + s * d, operands, direction) for s in (step, -step))
        second = (everything(ahead)[1] - everything(behind)[1]) / (2 * step)
        eager = f(operands)
    np.testing.assert_allclose(forward, reverse, rtol=1e-10)
    np.testing.assert_allclose(remat, reverse, rtol=1e-10)
    np.testing.assert_allclose(reverse_over_reverse, forward_over_reverse, rtol=1e-9)
    np.testing.assert_allclose(forward_over_reverse, second, rtol=1e-5)  # a difference of step 1e-4
    np.testing.assert_allclose(batched, [eager, other], rtol=1e-10)


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


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_bias_of_minus_infinity_masks(implementation):
    """Also under a soft cap, which would make it finite; and a whole row of it is an empty query."""
    x = jax.random.normal(jax.random.key(0), (6, 2, 4))
    mask = jax.random.bernoulli(jax.random.key(1), 0.5, (6, 2, 3)).at[3].set(False)
    run = functools.partial(
        attention, window=Window(3), logits_soft_cap=5.0, return_residuals=True, implementation=implementation
    )
    bias = jnp.where(mask, 0.0, -jnp.inf)
    for a, b in zip(run(x, x, x, bias), run(x, x, x, mask=mask), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-14)
    output, lse = run(x, x, x, bias)
    np.testing.assert_array_equal(output[3], 0)
    np.testing.assert_array_equal(lse[3], -jnp.inf)
    gradient = jax.grad(
        lambda bias: jnp.where(jnp.isfinite(run(x, x, x, bias)[1]), run(x, x, x, bias)[0][..., 0], 0).sum()
    )(bias)
    assert jnp.isfinite(gradient).all()


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


def test_dropout_drops_the_same_weights_everywhere():
    operands, ours, _ = problem(grid=(8, 6))
    key = jax.random.key(7)

    def run(operands, implementation):
        return attention(**operands, **ours, dropout_rate=0.4, dropout_key=key, implementation=implementation)

    @functools.partial(jax.jit, compiler_options=quick)
    def linear_in_value(operands):
        values = {name: operands[name] for name in ("value", "extra_value")}
        return jax.jvp(lambda values: run(operands | values, "xla"), (values,), (values,))

    reference = run(operands, "reference")
    with tiling("many"):
        output, tangent = linear_in_value(operands)
    np.testing.assert_allclose(output, reference, rtol=1e-10)
    np.testing.assert_allclose(tangent, output, rtol=1e-10)  # linear in the values, if the weights are the same


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dropout_is_the_definition(implementation):
    """Values and gradients against the loops. Which weights are dropped is read off where all scores are equal and the
    values are one-hot: it depends on the key and the shapes alone."""
    n, k, rate, window = 6, 3, 0.4, Window(3, boundary="mask")
    rng = np.random.default_rng(0)
    operands = {name: rng.normal(size=(2, n, 2, 4)) for name in ("query", "key", "value")}
    run = functools.partial(
        attention, window=window, dropout_rate=rate, dropout_key=jax.random.key(3), implementation=implementation
    )
    zeros = np.zeros((2, n, 2, 4))
    shown = np.asarray(run(zeros, zeros, np.broadcast_to(np.eye(n)[:, None], (2, n, 2, n))))
    keys = np.maximum(window.indices((n,))[..., 0], 0)  # outside, where the weight is zero whatever the factor
    factors = np.stack([shown[:, i][..., keys[i]] > 0 for i in range(n)], axis=1) / (1 - rate)
    visible = np.broadcast_to(window.mask((n,))[:, None], factors.shape)
    assert factors.shape == (2, n, 2, k)
    assert 0.3 < (factors[visible] > 0).mean() < 0.9
    weights = rng.normal(size=(2, n, 2, 4))

    def definition(**operands):
        geometry = dict(stride=(1,), dilation=(1,), block=(1,), causal=(False,), boundary=("mask",), offset=(None,))
        return oracle.attention(**operands, size=(k,), geometry=geometry, dropout=factors)[0]

    np.testing.assert_allclose(run(**operands), definition(**operands), rtol=1e-10, atol=1e-12)
    gradients = jax.grad(lambda operands: (run(**operands) * weights).sum())(operands)
    for name in operands:
        direction = rng.normal(size=operands[name].shape)
        loss = lambda **operands: (definition(**operands) * weights).sum()
        numeric = oracle.directional(loss, operands, name, direction)
        np.testing.assert_allclose((gradients[name] * direction).sum(), numeric, rtol=1e-6, atol=1e-6, err_msg=name)


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


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_over_batch_and_heads_it_gathers_neither(kind):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind), devices=jax.devices()[:4])
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 2, 4))
    run = lambda x: attention(x, x, x, window=Window((3, 3)))
    expected = run(x), jax.grad(lambda x: (run(x) ** 2).sum())(x)
    with jax.set_mesh(mesh), tiling("many"):
        sharded = jax.device_put(x, NamedSharding(mesh, P("data", None, None, "model")))
        step = jax.jit(lambda x: (run(x), jax.grad(lambda x: (run(x) ** 2).sum())(x)))
        compiled = step.lower(sharded).compile()
        result = step(sharded)
    assert "all-gather" not in compiled.as_text()
    for ours, theirs in zip(result, expected, strict=True):
        assert ours.sharding.is_equivalent_to(sharded.sharding, 5)
        np.testing.assert_allclose(ours, theirs, rtol=1e-10)


def test_inside_shard_map():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 2, 4))
    run = lambda x: attention(x, x, x, window=Window((3, 3)))
    mapped = jax.shard_map(run, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    np.testing.assert_allclose(jax.jit(mapped)(x), run(x), rtol=1e-12)
    gradient = lambda f: jax.jit(jax.grad(lambda x: (f(x) ** 2).sum()))(x)
    np.testing.assert_allclose(gradient(mapped), gradient(run), rtol=1e-10)

"""Normalisers: against loops, the simplex, and empty or enormous rows."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jaxattn.normalize import FEW, NORMALIZERS, logsumexp


def rows(seed=0, scale=1.0, dtype=np.float64, slots=9):
    rng = np.random.default_rng(seed)
    mask = rng.random((20, slots)) < 0.6
    mask[0], mask[1] = False, True
    return (scale * rng.normal(size=(20, slots))).astype(dtype), mask


@pytest.mark.core(6)
@pytest.mark.parametrize("name", NORMALIZERS)
@pytest.mark.parametrize("scale", [0.3, 3.0])
@pytest.mark.parametrize("slots", [1, 9, FEW, FEW + 1])
def test_against_loops(name, scale, slots):
    scores, mask = rows(scale=scale, slots=slots)
    scores[2:4] = np.round(scores[2:4])  # equal ones
    expected = [oracle.normalized(name, row, seen) for row, seen in zip(scores, mask, strict=True)]
    np.testing.assert_allclose(
        NORMALIZERS[name](jnp.asarray(scores), jnp.asarray(mask)), expected, rtol=1e-12, atol=1e-15
    )


@pytest.mark.core(1)
@pytest.mark.parametrize("name", NORMALIZERS)
def test_first_and_second_derivatives(name):
    """Along a direction, against central differences of the loops and of the first derivative."""
    scores, mask = rows(seed=3)
    rng = np.random.default_rng(4)
    direction, weights = rng.normal(size=scores.shape), rng.normal(size=scores.shape)
    ours = lambda x: (NORMALIZERS[name](x, jnp.asarray(mask)) * weights).sum()
    along = lambda x: jax.jvp(ours, (x,), (jnp.asarray(direction),))[1]
    expected = lambda x: sum(
        (oracle.normalized(name, *row) * w).sum() for *row, w in zip(x, mask, weights, strict=True)
    )
    numeric = (expected(scores + 1e-6 * direction) - expected(scores - 1e-6 * direction)) / 2e-6
    np.testing.assert_allclose(along(scores), numeric, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose((jax.grad(ours)(jnp.asarray(scores)) * direction).sum(), numeric, rtol=1e-7, atol=1e-8)
    second = (along(scores + 1e-5 * direction) - along(scores - 1e-5 * direction)) / 2e-5
    np.testing.assert_allclose(jax.jvp(along, (scores,), (direction,))[1], second, rtol=1e-6, atol=1e-7)


@pytest.mark.core(4)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", NORMALIZERS)
def test_enormous_scores_and_empty_rows_give_no_nan(name, dtype):
    scores, mask = rows(dtype=dtype)
    scores = jnp.asarray(np.sign(scores) * 1e4, dtype)
    weights = NORMALIZERS[name](scores, jnp.asarray(mask))
    gradient = jax.grad(lambda s: (NORMALIZERS[name](s, jnp.asarray(mask)) ** 2).sum())(scores)
    assert weights.dtype == dtype
    assert jnp.isfinite(weights).all()
    assert jnp.isfinite(gradient).all()
    np.testing.assert_array_equal(weights[0], 0)
    np.testing.assert_array_equal(gradient[0], 0)
    np.testing.assert_array_equal(np.asarray(weights)[~mask], 0)
    np.testing.assert_array_equal(np.asarray(gradient)[~mask], 0)


@pytest.mark.parametrize("name", ["softmax", "sparsemax"])
def test_rows_lie_on_the_simplex(name):
    scores, mask = rows(seed=5, scale=4)
    weights = NORMALIZERS[name](jnp.asarray(scores), jnp.asarray(mask))
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(-1), mask.any(-1), atol=1e-12)


def test_sparsemax_has_exact_zeros_and_keeps_what_is_on_the_simplex():
    mask = jnp.ones((3,), bool)
    np.testing.assert_array_equal(NORMALIZERS["sparsemax"](jnp.array([2.0, 0.5, -1.0]), mask), [1, 0, 0])
    np.testing.assert_allclose(NORMALIZERS["sparsemax"](jnp.array([0.5, 0.3, 0.2]), mask), [0.5, 0.3, 0.2], rtol=1e-15)
    np.testing.assert_allclose(NORMALIZERS["sparsemax"](jnp.ones(3), mask), 1 / 3 * np.ones(3), rtol=1e-15)


def test_logsumexp():
    scores, mask = rows(seed=6, scale=50)
    result = logsumexp(jnp.asarray(scores), jnp.asarray(mask))
    expected = [
        np.logaddexp.reduce(row[seen]) if seen.any() else -np.inf for row, seen in zip(scores, mask, strict=True)
    ]
    np.testing.assert_allclose(result, expected, rtol=1e-13)
    softmax = NORMALIZERS["softmax"](jnp.asarray(scores), jnp.asarray(mask))
    gradient = jax.grad(lambda s: logsumexp(s, jnp.asarray(mask))[1:].sum())(jnp.asarray(scores))
    np.testing.assert_allclose(gradient[1:], softmax[1:], rtol=1e-12, atol=1e-300)
    empty = jax.grad(lambda s: logsumexp(s, jnp.asarray(mask))[0])(jnp.asarray(scores))
    np.testing.assert_array_equal(empty, 0)

"""One query that sees every key, on a CPU: values and gradients against NumPy in float64, for any number of keys."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle_gradients
import pytest
from contract import quicker

import jaxattn
from jaxattn.attention import attention
from jaxattn.kernels import single

LEAST = single.LEAST


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Taken however few the keys are; every test must have taken it."""
    calls, forward = [], single.forward
    monkeypatch.setattr(single, "LEAST", 1)
    monkeypatch.setattr(single, "forward", lambda *given: calls.append(1) or forward(*given))
    jax.clear_caches()  # of calls in which it was not taken
    yield
    jax.clear_caches()
    assert calls


def problem(keys, heads, key_heads, *, bias=False, mask=False, segments=False, cap=None):
    rng = np.random.default_rng(keys)
    arrays = {"query": rng.normal(size=(3, 1, heads, 6))}
    arrays |= {name: rng.normal(size=(3, keys, key_heads, d)) for name, d in (("key", 6), ("value", 5))}
    arrays["scale"] = np.float64(0.7)
    if bias:
        arrays["bias"] = np.where(rng.random((3, 1, heads, keys)) < 0.1, -np.inf, rng.normal(size=(3, 1, heads, keys)))
    if cap:
        arrays["logits_soft_cap"] = np.float64(cap)
    seen = rng.random((3, 1, heads, keys)) < 0.6
    seen[1] = False  # a query that sees nothing
    rest = {"slot_mask": seen} if mask else {}
    if segments:
        rest["segment_ids"] = rng.integers(0, 2, (3, 1)), rng.integers(0, 2, (3, keys))
    return arrays, rest


def ours(arrays, slot_mask=None, **rest):
    by_head = lambda x: None if x is None else jnp.moveaxis(x, -3, -2)  # [batch, heads, 1, keys]
    arrays = arrays | ({"bias": by_head(arrays["bias"])} if "bias" in arrays else {})
    return attention(**arrays, mask=by_head(slot_mask), **rest, return_residuals=True)


@pytest.mark.core(1)
@pytest.mark.parametrize(
    "made",
    [
        problem(1, 1, 1),
        problem(7, 3, 3),
        problem(12, 4, 2, bias=True, mask=True, cap=1.5),
        problem(5, 4, 1, segments=True, bias=True),
    ],
    ids=["one key", "alone", "grouped heads and everything", "one key head"],
)
def test_values_and_gradients(made):
    arrays, rest = made
    rng = np.random.default_rng(1)
    cotangents = rng.normal(size=(*arrays["query"].shape[:-1], 5)), rng.normal(size=arrays["query"].shape[:-1])
    expected, gradients = oracle_gradients.attention(
        *(arrays[name] for name in ("query", "key", "value")),
        **{name: x for name, x in arrays.items() if name not in ("query", "key", "value")},
        **rest,
        cotangents=cotangents,
    )
    some = np.isfinite(expected[1])

    @jax.jit
    def run(arrays):
        found, pull = jax.vjp(lambda arrays: ours(arrays, **rest), arrays)
        return found, pull((cotangents[0], np.where(some, cotangents[1], 0)))[0]

    found, pulled = run(arrays)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-10)
    for name, x in pulled.items():
        np.testing.assert_allclose(x, gradients[name], rtol=1e-10, atol=1e-10, err_msg=name)


def test_a_nan_stays_with_its_head():
    """In the product of all heads at once it meets the zeros of the others, and so would an infinite number."""
    arrays, _ = problem(9, 4, 2)
    for bad in (np.nan, np.inf):
        arrays["key"][2, 3, 1] = bad
        y, _ = jax.jit(ours)(arrays)
        expected, _ = attention(**arrays, implementation="reference", return_residuals=True)
        np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-10)
        assert np.isnan(y[2, 0, 2:]).all()
        assert np.isfinite(y[:2]).all()
        assert np.isfinite(y[2, 0, :2]).all()


def test_nothing_is_copied():
    """16.8 MB of keys and of values: the program holds their scores, and not those again with the heads in front."""
    q, k = jax.ShapeDtypeStruct((8, 1, 8, 64), "float32"), jax.ShapeDtypeStruct((8, 1024, 8, 64), "float32")
    program = jax.jit(attention, compiler_options=quicker).lower(q, k, k).compile()
    assert program.memory_analysis().temp_size_in_bytes < 1e6


def test_transforms():
    arrays, rest = problem(6, 2, 2, mask=True)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x * 0.5]), arrays)
    halves = arrays, jax.tree.map(lambda x: x * 0.5, arrays)
    wanted = [attention(**half, implementation="reference") for half in halves]
    np.testing.assert_allclose(jax.jit(jax.vmap(lambda a: ours(a)[0]))(stacked), wanted, rtol=1e-10, atol=1e-10)
    loss = lambda f: lambda q: (f(arrays | {"query": q}, **rest)[0] ** 2).sum()
    reference = lambda arrays, slot_mask: attention(
        **arrays, mask=jnp.moveaxis(slot_mask, -3, -2), implementation="reference", return_residuals=True
    )
    second = lambda f: jax.jit(jax.hessian(loss(f)))(arrays["query"])
    np.testing.assert_allclose(second(ours), second(reference), rtol=1e-9, atol=1e-10)


def test_the_plan_counts_the_zeros_too(monkeypatch):
    q, k = jax.ShapeDtypeStruct((2, 1, 4, 8), jnp.float32), jax.ShapeDtypeStruct((2, 10, 2, 8), jnp.float32)
    cost = jaxattn.attention_plan(q, k, k).cost
    assert (cost.tile, cost.columns, cost.steps, cost.held) == ((1,), 10, 1, 2 * 10 * 4 * 4)
    assert cost.flops == 2 * 2 * 10 * 4 * (2 * 8 + 8)
    attention(*(jnp.ones(x.shape, x.dtype) for x in (q, k, k)))
    monkeypatch.setattr(single, "LEAST", LEAST)  # few keys are left to a batched product, which is quicker
    assert jaxattn.attention_plan(q, k, k).cost.flops == 2 * 2 * 10 * 4 * (8 + 8)

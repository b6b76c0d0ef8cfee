"""One token after another: what the whole sequence gives at once, in flax's cache or in a ring of a window's size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import quicker
from flax import nnx

from jaxattn.nn import Attention
from jaxattn.window import Window


def drawn(*shape, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


def layer_with(window, **settings):
    layer = Attention(4, 8, window=window, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **settings)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    return nnx.merge(graph, jax.tree.map(lambda p: 0.5 * drawn(*p.shape, dtype=p.dtype), params), rest)


def one_by_one(layer, x, max_length):
    """The outputs for the tokens of x `[batch, tokens, features]`, in one compiled step, and the cache's length."""
    layer.init_cache((x.shape[0], max_length, x.shape[-1]), x.dtype)
    graph, state = nnx.split(layer)

    def step(state, token):
        layer = nnx.merge(graph, state)
        y = layer(token[:, None], decode=True)
        return nnx.state(layer), y[:, 0]

    run = jax.jit(lambda state, x: jax.lax.scan(step, state, jnp.swapaxes(x, 0, 1)), compiler_options=quicker)
    _, y = run(state, x)
    return jnp.swapaxes(y, 0, 1), layer.cached_key.shape[1]


TABLES = {"relative_bias": True, "key_embedding": True}


@pytest.mark.parametrize(
    ("window", "settings", "held"),
    [
        (Window(5, causal=True), TABLES, 5),
        (Window(4, causal=True, dilation=3, boundary="mask"), {"num_kv_heads": 2, **TABLES}, 10),
        (Window(4, causal=True, boundary="zero"), {"normalize": "sigmoid", **TABLES}, 4),
        (Window(40, causal=True, boundary="mask"), {"logits_soft_cap": 2.0, **TABLES}, 23),  # longer than all of it
        (Window(23, causal=True), {}, 23),
        (None, {"normalize_qk": True}, 23),
    ],
    ids=str,
)
@pytest.mark.core(1)
def test_a_token_after_another(window, settings, held):
    layer, x = layer_with(window, **settings), drawn(2, 23, 8)
    expected = jax.jit(lambda x: layer(x, is_causal=window is None), compiler_options=quicker)(x)
    found, length = one_by_one(layer, x, 23)
    assert length == held
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


def test_two_thousand_tokens_through_a_ring():
    """In the memory of a few: one program, whose state is the ring."""
    layer, x = layer_with(Window(64, causal=True)), drawn(1, 2000, 8)
    expected = jax.jit(layer, compiler_options=quicker)(x)
    found, length = one_by_one(layer, x, 2000)
    assert length == 64
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)

    graph, state = nnx.split(layer)

    @jax.jit
    def step(state, token):
        layer = nnx.merge(graph, state)
        return layer(token, decode=True), nnx.state(layer)

    for n in range(3):
        _, state = step(state, x[:, n : n + 1])
    assert step._cache_size() == 1
    memory = step.lower(state, x[:, :1]).compile().memory_analysis()
    held = 2 * 64 * 8 * x.dtype.itemsize
    assert memory.temp_size_in_bytes < 4 * held  # keys, values, and both in the order of a product


@pytest.mark.full
def test_the_cache_is_flax_cache():
    """Token by token the same results, cache and index, from the same parameters; also with a mask, and by a view."""
    given = {"num_kv_heads": 2, "param_dtype": jnp.float64, "decode": True, "dropout_rate": 0.5, "deterministic": True}
    ours, theirs = (make(4, 8, **given, rngs=nnx.Rngs(0)) for make in (Attention, nnx.MultiHeadAttention))
    x, mask = drawn(2, 6, 8), jnp.arange(6) != 1
    for layer in (ours, theirs):
        layer.init_cache(x.shape, x.dtype)

    def steps(layer):
        graph, state = nnx.split(layer)

        def run(state, x):
            layer = nnx.merge(graph, state)
            found = [layer(x[:, n : n + 1], mask=jnp.broadcast_to(mask, (2, 1, 1, 6))) for n in range(4)]
            return jnp.stack(found), layer.cached_key[...], layer.cached_value[...], layer.cache_index[...]

        return jax.jit(run)(state, x)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), steps(ours), steps(theirs))
    plain = Attention(4, 8, num_kv_heads=2, rngs=nnx.Rngs(0))
    seen = nnx.view(plain, decode=True, batch_size=3, max_length=7)
    assert (seen.cached_key.shape, seen.decode) == ((3, 7, 2, 2), True)
    layer = Attention(2, 8, rngs=nnx.Rngs(0))
    layer.set_view(decode=True, batch_size=np.int64(3), max_length=np.int64(5))
    assert layer.cached_key.shape == (3, 5, 2, 4)
    for given in ({"batch_size": 1.5}, {"max_length": True}, {"decode": "yes"}, {"deterministic": 1}):
        with pytest.raises(ValueError, match=rf"Attention: {next(iter(given))} \(="):
            layer.set_view(**given)
    with pytest.raises(ValueError, match=r"Attention: input_shape must be \[\*batch, max_length, in_features\]"):
        layer.init_cache((8,))


@pytest.mark.parametrize(
    ("layer", "call", "message"),
    [
        ({"window": 3}, {}, r"window \(=.*\) must be causal and of one axis with decode, .*: Window\(3, causal=True\)"),
        ({"window": (3, 3)}, {}, r"window \(=.*\) must be causal and of one axis with decode"),
        ({"rank": 2}, {}, r"rank \(=2\) must be 1 with decode"),
        ({}, {"tokens": 2}, r"inputs_k \(=\[1, 2, 8\]\) must be one token with decode, \[1, 1, 8\]"),
        ({}, {"dtype": jnp.float64}, r"the cache \(=float64\) must have the keys' dtype, float32: init_cache"),
        ({}, {"segment_ids": jnp.zeros((1, 1), int)}, "segment_ids must be None with decode, whose cache"),
        ({"window": Window(3, causal=True)}, {"sow_weights": True}, "sow_weights .* with decode and a window"),
        ({}, {"cache": False}, r"decode \(=True\) must come after init_cache"),
    ],
)
def test_errors(layer, call, message):
    tokens, dtype, cache = call.pop("tokens", 1), call.pop("dtype", jnp.float32), call.pop("cache", True)

    def decode():
        made = Attention(2, 8, decode=True, **layer, rngs=nnx.Rngs(0))
        if cache:
            made.init_cache((1, 4, 8), dtype)
        return made(jnp.ones((1, tokens, 8), jnp.float32), **call)

    with pytest.raises(ValueError, match="Attention: " + message):
        decode()


def test_a_mask_of_keys_is_refused_and_not_passed_over():
    x, of_keys = jnp.ones((2, 6, 8)), (jnp.ones((2, 6), bool), None)
    layer = Attention(2, 8, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="mask of keys must be None with is_causal: give one by slot"):
        layer(x, mask=of_keys, is_causal=True)
    layer.init_cache(x.shape, x.dtype)
    with pytest.raises(ValueError, match="mask of keys must be None with decode"):
        layer(x[:, :1], mask=of_keys, decode=True)
    with pytest.raises(ValueError, match=r"sinks \(=True\) must be left out with an attention_fn"):
        Attention(2, 8, sinks=True, attention_fn=nnx.dot_product_attention, rngs=nnx.Rngs(0))

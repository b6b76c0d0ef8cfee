"""Sinks: a logit in the denominator of softmax. What the contract does not ask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import SMALL, bias, check, dropout, extra_tokens, nothing_visible, problem, residuals, score_mod, sinks

from jaxattn.attention import attention, merge_attentions
from jaxattn.window import Window

X = np.random.default_rng(0).normal(size=(2, 9, 4, 8))
SINKS = np.array([0.3, -1.0, 2.0, -np.inf])


@pytest.mark.full
@pytest.mark.parametrize(
    ("geometry", "arguments", "implementation"),
    [
        ("causal and not", [nothing_visible, sinks, residuals], SMALL),
        ("strided", [bias, extra_tokens, score_mod, sinks, residuals], SMALL),
        ("size 1", [sinks, residuals, dropout], "xla"),
    ],
)
def test_values_and_gradients(geometry, arguments, implementation):
    check(problem(geometry, arguments), implementation)


@pytest.mark.full
def test_bfloat16():
    check(problem("5 x 3", [sinks], head_dim=8, value_dim=8), SMALL, jnp.bfloat16)


def test_it_is_a_key_of_zeros_with_a_bias_and_no_value():
    """Of softmax over [scores, sink], as gpt-oss writes it: under every transformation."""
    window = Window(4, causal=True)

    def ours(x, sink, mask):
        return attention(x, x, x, mask=mask, window=window, sink_logits=sink, return_residuals=True)

    def theirs(x, sink, mask):
        seen = jnp.asarray(np.tril(np.ones((9, 9), bool)) & ~np.tril(np.ones((9, 9), bool), -4)) & mask
        scores = jnp.where(seen[:, None], jnp.einsum("qhd,khd->qhk", x, x) / 8**0.5, -jnp.inf)
        scores = jnp.concatenate([scores, jnp.broadcast_to(sink[:, None], (9, 4, 1))], -1)
        largest = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = weights.sum(-1, keepdims=True)
        return jnp.einsum("qhk,khd->qhd", (weights / total)[..., :-1], x), (jnp.log(total) + largest)[..., 0]

    mask, sink = np.arange(9) > 0, np.array([0.3, -1.0, 2.0, 0.5])  # the first query is left with the sink alone
    tangents = (np.roll(X, 1, 1), np.roll(sink, 1), np.zeros(9, jax.dtypes.float0))

    def all_of(f):
        g = lambda x, sink: jax.vmap(lambda x: f(x, sink, mask))(x)
        loss = lambda x, sink: sum(jnp.sin(y).sum() for y in g(x, sink))
        along = lambda x, sink: jax.jvp(jax.grad(loss, (0, 1)), (x, sink), tangents[:2])
        return jax.jit(lambda x, sink: (g(x, sink), along(x, sink), jax.grad(jax.checkpoint(loss))(x, sink)))(X, sink)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), all_of(ours), all_of(theirs))


@jax.jit
def merged(x, sinks):
    halves = [np.arange(9) < 4, np.arange(9) >= 4]
    given = [{"mask": (half, None), "window": Window(9)} for half in halves]
    parts = [attention(x, x, x, return_residuals=True, **options, **s) for options, s in zip(given, sinks, strict=True)]
    return merge_attentions(*zip(*parts, strict=True), return_residuals=True)


def test_merged_it_stands_in_one_part_and_minus_infinity_is_none():
    whole = jax.jit(lambda sinks: attention(X, X, X, window=Window(9), return_residuals=True, **sinks))
    for one in ([{"sink_logits": SINKS}, {}], [{}, {"sink_logits": SINKS}]):
        for a, b in zip(merged(X, one), whole({"sink_logits": SINKS}), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)
    np.testing.assert_allclose(whole({"sink_logits": SINKS})[0][..., 3, :], whole({})[0][..., 3, :], rtol=1e-14)


def test_a_normalizer_without_a_denominator_takes_none():
    with pytest.raises(ValueError, match=r"sink_logits \(=float64\[4\]\) must be None with normalize='relu': only"):
        attention(X, X, X, sink_logits=SINKS, normalize="relu")
    with pytest.raises(ValueError, match=r"sink_logits is float64\[3\]; expected floating point, \(4,\)"):
        attention(X, X, X, sink_logits=SINKS[:3])

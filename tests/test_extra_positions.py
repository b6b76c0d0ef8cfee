"""Extra tokens with positions: under a causal window no query sees those ahead of it. Beyond the contract."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import (
    SMALL,
    check,
    extra_tokens,
    nothing_visible,
    positions_of_extra_tokens,
    problem,
    residuals,
    score_mod,
    with_,
)

from jaxattn.attention import attention
from jaxattn.parts import attention_scores
from jaxattn.window import Window

X = np.random.default_rng(0).normal(size=(2, 12, 4, 8))


@pytest.mark.full
@pytest.mark.parametrize(
    ("geometry", "implementation", "others"),
    [
        ("causal twice", SMALL, [score_mod]),
        ("causal, block 3", "xla", [residuals]),
        ("causal, valid", "reference", [residuals]),
        ("causal, mask, stride 2", SMALL, [residuals]),
    ],
)
def test_where_nothing_else_is_visible(geometry, implementation, others):
    """The first queries see nothing, the others what stands behind them; a `score_mod` has tiles that JAX
    differentiates."""
    made = problem(geometry, [nothing_visible, with_(extra_tokens, 3), positions_of_extra_tokens, *others])
    check(made, implementation)


@pytest.mark.core(1)
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_the_first_tokens_for_every_later_one(implementation):
    """A decoder with a sliding window and tokens that all later ones see is dense attention under a mask."""
    first, i, j = 3, np.arange(12)[:, None], np.arange(12)

    def ours(x):
        extra = {"extra_key": x[:, :first], "extra_value": x[:, :first], "extra_positions": np.arange(first)[:, None]}
        window = Window(4, causal=True, boundary="mask")
        return attention(x, x, x, mask=(j >= first, None), window=window, **extra, implementation=implementation)

    def theirs(x):
        scores = jnp.einsum("bqhd,bkhd->bhqk", x, x) / 8**0.5
        seen = (j <= i) & ((j > i - 4) | (j < first))
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)), x)

    both = lambda f: jax.jit(lambda x: (f(x), jax.grad(lambda x: jnp.sin(f(x)).sum())(x)))(X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), both(ours), both(theirs))


def test_a_token_beyond_what_int32_holds_is_ahead_of_everyone():
    extra, places = np.full((2, 2, 4, 8), 1e3), np.array([[0], [2**32 - 1]], np.uint32)
    for far in (places, places.astype(np.int64) * 2**20):
        scores = attention_scores(
            X, X, window=Window(4, causal=True, boundary="mask"), extra_key=extra, extra_positions=far
        )
        np.testing.assert_array_equal(np.isfinite(scores[..., -2:]).all((0, 1, 2)), [True, False])
        assert not np.isfinite(scores[..., -1]).any()


EXTRA = {"extra_key": X[:, :2], "extra_value": X[:, :2]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"extra_positions": [[0]]}, "extra_positions (=int64[1, 1]) must be None without extra_key and extra_value"),
        (EXTRA | {"extra_positions": [[0], [1]]}, "must be None with window=None, which is causal along no axis"),
        (EXTRA | {"extra_positions": [[0], [1]], "window": Window(3)}, "which is causal along no axis"),
        (
            EXTRA | {"extra_positions": [0, 1], "window": Window(3, causal=True)},
            "extra_positions is int64[2]; expected integers (2, 1) or (2, 2, 1)",
        ),
        (EXTRA | {"extra_positions": [[0.0], [1]], "window": Window(3, causal=True)}, "expected integers"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        attention(X, X, X, **arguments)

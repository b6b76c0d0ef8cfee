"""Arguments of `attention` that count from the start of the grid, together: what a part gives is a part of the whole,
which the contract holds to the loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import Window, attention, attention_weights, mix

T, EXTRA = 12, 2
close = lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def drawn():
    draw = lambda seed, *shape: jnp.asarray(np.random.default_rng(seed).normal(size=shape))
    q, k, v = (draw(seed, 2, T, 4, 3) for seed in range(3))
    extra = {
        "extra_key": draw(3, 2, EXTRA, 4, 3),
        "extra_value": draw(4, 2, EXTRA, 4, 3),
        "extra_positions": jnp.array([[2], [7]]),
        "sink_logits": draw(5, 4),
    }
    return q, k, v, extra


def test_queries_from_anywhere_see_the_extra_tokens_behind_them():
    q, k, v, extra = drawn()
    window = Window(5, causal=True)

    @jax.jit
    def both(first):
        whole = attention(q, k, v, window=window, **extra)
        known = [attention(q[:, i : i + 3], k, v, window=window, query_offset=i, **extra) for i in (0, 6)]
        last = attention(q[:, -2:], k, v, window=window, query_offset="end", **extra)
        some = jax.lax.dynamic_slice_in_dim(q, first, 3, 1)
        return whole, known, last, attention(some, k, v, window=window, query_offset=first, **extra)

    for first in (0, 1, 6, 9):
        whole, known, last, traced = both(first)
        close(known[0], whole[:, :3])
        close(known[1], whole[:, 6:9])
        close(last, whole[:, -2:])
        close(traced, whole[:, first : first + 3])


def test_groups_of_heads_have_their_own_sinks():
    q, k, v, extra = drawn()
    windows = [Window(5, causal=True), Window(3, dilation=2, causal=True)]
    found = attention(q, k, v, window=windows, **extra)
    for n, window in enumerate(windows):
        mine = slice(2 * n, 2 * n + 2)
        given = {name: x if name == "extra_positions" else x[..., mine, :] for name, x in extra.items() if x.ndim > 1}
        alone = attention(
            *(x[..., mine, :] for x in (q, k, v)), window=window, **given, sink_logits=extra["sink_logits"][mine]
        )
        close(found[..., mine, :], alone)


def test_weights_beside_a_sink_mix_to_the_output():
    q, k, v, extra = drawn()
    window, values = Window(5, causal=True), extra.pop("extra_value")
    weights = attention_weights(q, k, window=window, **extra)
    assert (weights.sum(-1) < 1).all()
    close(
        mix(weights, v, window=window, extra_value=values),
        attention(q, k, v, window=window, extra_value=values, **extra),
    )
    hidden = attention_weights(q, k, window=window, mask=jnp.zeros((2, T), bool), sink_logits=extra["sink_logits"])
    assert (hidden == 0).all()


def test_what_cannot_meet_names_both():
    q, k, v, _ = drawn()
    sizes = jnp.array([[12], [7]])
    with pytest.raises(
        ValueError, match=r"grid_sizes \(=.*\) must be None with query_offset; queries of the whole grid"
    ):
        attention(q[:, :3], k, v, window=Window(5), query_offset=0, grid_sizes=sizes)

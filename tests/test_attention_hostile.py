"""What `attention` makes of numbers that are not, of masks that say two things, and of empty axes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from contract import IMPLEMENTATIONS, SMALL, problem

from jaxattn.attention import attention
from jaxattn.parts import attention_scores
from jaxattn.window import Window

NAN = np.float64("nan")
GRID = ((9, 8), dict(size=(3, 3), boundary=("mask", "shift"), dilation=(1, 2), causal=(True, False)))
VARIANTS = {
    "plain": {},
    "cap": {"logits_soft_cap": 5.0},
    "score_mod": {"score_mod": lambda score, head, query, key: score * 1.0},
    "bias": {"bias": np.zeros((9, 8, 1, 3, 3))},
}


def sees(grid, size, **options):
    """Which keys a query sees, [*queries, *keys]."""
    seen = np.zeros((*grid, *grid), bool)
    for query, (_, slots) in oracle.window_slots(grid, size, **options).items():
        for _, _, key, _, part in slots:
            if part and key is not None:
                seen[query + key] = True
    return seen


@pytest.mark.core(1)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("normalize", ["softmax", "relu", "sigmoid", "sparsemax", "none"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_in_nan_out(implementation, normalize, variant):
    """A NaN gives NaN where it is seen: to outputs, and to the gradient of what it meets."""
    made = problem(GRID, batch=(1,))
    token, seen = (4, 3), sees(*GRID[:1], **GRID[1])
    keep = np.ones((1, 9, 8), bool)
    keep[0, 2, 5] = False
    made.options |= VARIANTS[variant] | {"normalize": normalize, "mask": (keep, None)}
    run = jax.jit(lambda operands: jax.vjp(functools.partial(made.call, implementation), operands))
    reached = {"query": np.eye(72, dtype=bool).reshape(9, 8, 9, 8)[token], "key": seen[..., 4, 3]}
    for name in ("query", "key", "value"):
        operands = made.operands | {name: made.operands[name].copy()}
        operands[name][(0, *token)] = NAN
        output, pull = run(operands)
        found = np.isnan(output)[0].any((-1, -2))
        want = reached.get(name, reached["key"])
        assert found[want].all(), f"a NaN {name} is lost"
        if implementation == "reference":
            assert not found[~want].any(), f"a NaN {name} reaches those that do not see it"
        gradients = pull(jnp.ones_like(output))[0]
        if name == "query":  # every key that it sees is due something of it
            mine = seen[token] & keep[0]
            assert np.isnan(gradients["key"])[0].any((-1, -2))[mine].all()
    hidden = made.operands | {name: made.operands[name].copy() for name in ("key", "value")}
    hidden["key"][0, 2, 5] = hidden["value"][0, 2, 5] = NAN
    if implementation == "reference":
        output, pull = run(hidden)
        assert np.isfinite(output).all()
        assert np.isfinite(pull(jnp.ones_like(output))[0]["query"]).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_nan_bias_is_no_mask(implementation):
    made = problem(GRID, batch=(1,))
    bias = np.zeros((9, 8, 4, 3, 3))
    bias[4, 3, 1] = NAN
    for cap in ({}, {"logits_soft_cap": 5.0}):
        made.options = {"bias": bias} | cap
        found = np.isnan(made.call(implementation, made.operands))[0].any(-1)
        assert found[4, 3, 1]
        assert found.sum() == 1


@pytest.mark.core(1)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_the_least_number_of_a_bias_hides(implementation, dtype):
    """Also where the scores are wider: then it is not their own least number."""
    least = jnp.finfo(dtype).min
    for wide in (dtype, "float64"):
        x = jnp.ones((1, 6, 2, 4), wide)
        run = functools.partial(attention, x, x, x, window=Window(3), implementation=implementation)
        np.testing.assert_array_equal(run(jnp.full((6, 2, 3), least, dtype)), jnp.zeros_like(x))
        np.testing.assert_array_equal(run(relative_bias=jnp.full((2, 5), least, dtype)), jnp.zeros_like(x))
        few = jnp.zeros((6, 2, 3), dtype).at[..., 1].set(least)
        np.testing.assert_allclose(run(few, normalize="none"), 2 * 4 * 0.5 * jnp.ones_like(x), rtol=1e-2)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_score_mod_must_return_scores(implementation):
    x = jnp.ones((2, 6, 1, 4))
    run = functools.partial(attention, x, x, x, implementation=implementation)
    with pytest.raises(
        ValueError, match=r"score_mod \(=<.*must return scores, real numbers, and not bool: who attends"
    ):
        run(score_mod=lambda score, head, query, key: query[0] >= key[0])
    with pytest.raises(ValueError, match=r"score_mod .* not one of shape \(6, 6\): it is given tiles of scores"):
        run(score_mod=lambda score, head, query, key: jnp.zeros((6, 6)))
    distance = lambda score, head, query, key: -abs(query[0] - key[0])  # of indices alone, and of ints
    want = -np.abs(np.subtract.outer(np.arange(6), np.arange(6)))
    weights = np.exp(want) / np.exp(want).sum(-1, keepdims=True)
    v = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 1, 4)))
    found = attention(x, x, v, score_mod=distance, implementation=implementation)
    np.testing.assert_allclose(found, np.einsum("qk,bkhd->bqhd", weights, v), rtol=1e-6)
    none = attention(x, x, v, score_mod=lambda *_: 0.0, implementation=implementation)
    np.testing.assert_allclose(none, np.broadcast_to(np.mean(v, 1, keepdims=True), v.shape), rtol=1e-6)


def test_a_mask_that_reads_in_two_ways_is_refused():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 7, 1, 4)))
    keep = np.random.default_rng(1).random((7, 7)) < 0.6
    window = Window((7, 7), boundary="mask")
    message = (
        r"mask \(=bool\[{}\]\) must be one that can be read in one way, and the window \(7, 7\) on the grid \(7, 7\)"
    )
    for mask, shape in ((keep, "7, 7"), (keep[None], "1, 7, 7")):
        with pytest.raises(ValueError, match=message.format(shape) + r".*mask=\(mask, None\) says which keys"):
            attention(x, x, x, mask=mask, window=window)
    of_keys = attention(x, x, x, mask=np.broadcast_to(keep, (2, 7, 7)), window=window)  # one head, so it is of keys
    np.testing.assert_array_equal(attention(x, x, x, mask=(keep, None), window=window), of_keys)
    by_slot = attention(x, x, x, mask=keep[None, None, None, None], window=window)
    np.testing.assert_array_equal(attention(x, x, x, mask=(None, keep), window=window), by_slot)
    assert np.abs(of_keys - by_slot).max() > 0.1
    # the same keys, of every entry, at another grid; and both masks at once
    wider = jnp.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0), (0, 0)])
    keys = np.pad(keep, 1)[1:, 1:]
    run = functools.partial(attention, wider, wider, wider, window=window)
    np.testing.assert_array_equal(run(mask=keys), run(mask=np.broadcast_to(keys, (2, 8, 8))))
    every = np.ones((7, 7), bool)
    np.testing.assert_array_equal(run(mask=(keys, every)), run(mask=keys))
    index = window.indices((8, 8))
    both = keep & window.mask((8, 8)) & keys[index[..., 0], index[..., 1]]
    np.testing.assert_allclose(run(mask=(keys, keep)), run(mask=both[:, :, None]), rtol=1e-12)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ((np.ones(6, bool),), r"mask \(=1 arrays\) must be one, or a pair: of keys, and by slot"),
        ((np.ones(5, bool), None), r"mask\[0\] is bool\[5\]; expected a mask of keys \(2, 6\)"),
        ((np.ones(6), None), r"mask\[0\] is float64\[6\]; expected a bool array"),
        ((None, np.ones(3)), r"mask\[1\] is float64\[3\]; expected a bool array"),
    ],
)
def test_a_pair_of_masks_is_checked(mask, message):
    x = jnp.ones((2, 6, 4, 8))
    with pytest.raises(ValueError, match=message):
        attention(x, x, x, mask=mask, window=Window(3))
    with pytest.raises(ValueError, match=r"mask\[0\] must be None without a window|mask"):
        attention(x, x, x, mask=(np.ones(6, bool), None))


@pytest.mark.parametrize("call", [attention, attention_scores], ids=lambda call: call.__name__)
def test_a_function_must_return_numbers(call):
    x = jnp.ones((6, 1, 4))
    run = functools.partial(call, *(x,) * (3 if call is attention else 2), window=Window(3))
    for found, what in ((None, "None"), ("x", "'x'"), ((1.0, 2.0), r"\(1\.0, 2\.0\)"), (1j, "1j")):
        with pytest.raises(ValueError, match=rf"{call.__name__}: score_mod .* must return scores.*, and not {what}"):
            run(score_mod=lambda *_, found=found: found)
    for normalize, what in ((lambda s, m: None, "None"), (lambda s, m: s * 1j, "complex")):
        with pytest.raises(ValueError, match=rf"normalize .* must return weights, real numbers, and not {what}"):
            attention(x, x, x, normalize=normalize)


@pytest.mark.parametrize("name", ["scale", "logits_soft_cap"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, np.float32("nan"), np.array(np.inf)], ids=repr)
def test_a_number_must_be_finite(name, value):
    x = jnp.ones((2, 6, 4, 8))
    with pytest.raises(ValueError, match=rf"attention: {name} \(="):
        attention(x, x, x, **{name: value})


EMPTY = {
    "no keys": ((1, 3, 2, 4), (1, 0, 2, 4), (1, 0, 2, 5)),
    "no head_dim": ((1, 3, 2, 0), (1, 3, 2, 0), (1, 3, 2, 5)),
    "no value_dim": ((1, 3, 2, 4), (1, 3, 2, 4), (1, 3, 2, 0)),
    "no queries": ((1, 0, 2, 4), (1, 3, 2, 4), (1, 3, 2, 5)),
    "no batch": ((0, 3, 2, 4), (0, 3, 2, 4), (0, 3, 2, 5)),
}


@pytest.mark.core(1)
@pytest.mark.parametrize("implementation", ["xla", "reference", SMALL])
@pytest.mark.parametrize("shapes", EMPTY.values(), ids=EMPTY)
def test_empty_axes(shapes, implementation):
    """Scores of no dims are zero, so the weights are equal; of no keys there are the extra tokens, or nothing."""
    q, k, v = (jnp.asarray(np.random.default_rng(n).normal(size=shape)) for n, shape in enumerate(shapes))
    how = {"implementation": implementation} if implementation != SMALL else {"tile": 2} if q.shape[1] else {}
    extra = [jnp.full((len(q), 1, 2, x.shape[-1]), 2.0) for x in (k, v)]
    mean = v.mean(1, keepdims=True) if v.shape[1] else jnp.zeros((len(q), 1, *v.shape[2:]))
    want = jnp.broadcast_to(mean, (*q.shape[:-1], v.shape[-1]))
    calls = [{}, {"return_residuals": True}, {"mask": np.ones((3 if q.shape[1] else 0, k.shape[1]), bool)}]
    calls += [{"extra_key": extra[0], "extra_value": extra[1]}, {"dropout_rate": 0.5, "dropout_key": jax.random.key(0)}]
    for options in calls:
        found, pull = jax.vjp(lambda q, k, v, o=options: attention(q, k, v, **o, **how), q, k, v)
        output = found[0] if "return_residuals" in options else found
        assert output.shape == want.shape, options
        if "extra_key" in options and not k.shape[1]:
            np.testing.assert_allclose(output, 2 * jnp.ones_like(want))
        elif not k.shape[1] or (not q.shape[-1] and not {"extra_key", "dropout_rate"} & set(options)):
            np.testing.assert_allclose(output, want, rtol=1e-6)
        gradients = pull(jax.tree.map(jnp.ones_like, found))
        assert [x.shape for x in gradients] == [x.shape for x in (q, k, v)], options
        assert all(np.isfinite(x).all() for x in gradients), options

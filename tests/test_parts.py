"""Scores, weights and mix as functions: against loops in NumPy, in the memory of what they return."""

import dataclasses
import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from contract import Problem, by_axis, check, close, problem, quicker
from flax import nnx
from tiers import examples
from windows import grids

from jaxattn import attention_scores, attention_weights, machine, mix, nn
from jaxattn.kernels import loop, tiles
from jaxattn.window import Window

ROOM, LITTLE = 2**20, 400  # numbers of a step; little makes loops of small problems, over tiles and over entries
CASES = [
    ("causal, block 3", "segments", LITTLE),
    ("shift", "everything", LITTLE),
    ("dilation 3, mask", "everything, embedded by axis", ROOM),
    ("one token", "nothing visible", ROOM),
    ("Swin, ragged", "everything by slot", LITTLE),
    ("dilated", "a function normalizes", ROOM),
    ("global, more keys", "bias of -inf, capped, extra", LITTLE),
]


class InParts(Problem):
    """Attention as the mix of values by weights, and lse as that of the scores."""

    def call(self, implementation, operands):
        given = {**self.options, **operands, "window": self.window}
        tables = [given.pop(name) for name in by_axis(operands)]
        given |= {"key_embedding": tuple(tables)} if tables else {}
        residuals = given.pop("return_residuals", False)
        value, extra = given.pop("value"), given.pop("extra_value", None)
        weights = attention_weights(**given)
        output = mix(weights, value, window=self.window, extra_value=extra, precision=given.get("precision"))
        drop = ("normalize", "dropout_rate", "dropout_key", "sink_logits")
        scores = attention_scores(**{name: x for name, x in given.items() if name not in drop})
        if "sink_logits" in given:
            sink = jnp.broadcast_to(given["sink_logits"][:, None], (*scores.shape[:-1], 1))
            scores = jnp.concatenate([scores, sink], -1)
        return (output, jax.nn.logsumexp(scores, -1)) if residuals else output


@pytest.fixture
def room(monkeypatch):
    """Sets the room of a step."""
    yield lambda room: monkeypatch.setattr(tiles, "step_budget", lambda backend: room)
    loop._plan.__wrapped__.cache_clear()


@pytest.mark.core(1)
@pytest.mark.parametrize(("geometry", "arguments", "numbers"), CASES)
def test_the_mix_by_the_weights_is_attention(geometry, arguments, numbers, room):
    room(numbers)
    made = problem(geometry, arguments)
    check(InParts(*(getattr(made, field.name) for field in dataclasses.fields(made))), None)


@pytest.mark.full
@examples(0.25, phases=[hypothesis.Phase.generate])
@hypothesis.given(drawn=grids(rank=2, most=6, widest=3), seed=st.integers(0, 99))
def test_drawn(drawn, seed):
    made = problem(drawn, "everything, embedded by axis", seed=seed)
    check(InParts(*(getattr(made, field.name) for field in dataclasses.fields(made))), None)


def by_slot(made, weights, value):
    """Scores and the mix, in loops over queries and slots."""
    query, key, table = (made.operands[name] for name in ("query", "key", "relative_bias"))
    group = query.shape[-2] // key.shape[-2]
    windows = oracle.window_slots(made.grid, made.window.sizes, **made.geometry()["geometry"])
    scores, mixed = np.full(weights.shape, -np.inf), np.zeros((*weights.shape[:-1], value.shape[-1]))
    for i, (x, slots) in windows.items():
        for u, (_, positions, j, _, part) in enumerate(slots):
            entry = oracle.relative_entry(positions, x, made.window.sizes, made.window.dilation)
            for b, h in np.ndindex(len(query), query.shape[-2]):
                product = 0 if j is None else query[b][i][h] @ key[b][j][h // group] * query.shape[-1] ** -0.5
                scores[b][i][h, u] = product + table[h][entry] if part else -np.inf
                if j is not None and part:
                    mixed[b][i][h] += weights[b][i][h, u] * value[b][j][h // group]
    return scores, mixed


@pytest.mark.parametrize(
    "geometry",
    [
        "causal, zero, dilation 2",
        *(pytest.param(name, marks=pytest.mark.full) for name in ("reflect", "Swin", "all at once")),
    ],
)
def test_slots_are_the_windows_in_order(geometry, room):
    """And what a weight of a slot is that the window leaves out makes no difference."""
    room(LITTLE)
    made = problem(geometry, "relative bias")
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(*made.operands["query"].shape[:-1], math.prod(made.slots)))
    value = made.operands.pop("value")
    scores = jax.jit(functools.partial(attention_scores, window=made.window))(**made.operands)
    mixed = jax.jit(functools.partial(mix, window=made.window))(weights, value)
    expected = by_slot(made, weights, value)
    np.testing.assert_array_equal(np.isfinite(scores), np.isfinite(expected[0]))
    close(np.nan_to_num(scores, neginf=0), np.nan_to_num(expected[0], neginf=0), jnp.float64, "scores")
    close(mixed, expected[1], jnp.float64, "mix")


@pytest.mark.full
def test_transformations_and_bfloat16(room):
    """vmap over queries and keys, jvp against a difference of loops, remat; one program."""
    room(LITTLE)
    made = problem("shift", "relative bias")
    value, table = made.operands.pop("value"), made.operands.pop("relative_bias")
    weigh = functools.partial(attention_weights, relative_bias=table, window=made.window)
    rng = np.random.default_rng(2)
    direction = {name: rng.normal(size=x.shape) for name, x in made.operands.items()}

    @functools.partial(jax.jit, compiler_options=quicker)
    def run(operands, direction):
        one, along = jax.jvp(lambda operands: weigh(**operands), (operands,), (direction,))
        each = jax.vmap(lambda query, key: weigh(query[None], key[None])[0])(**operands)
        again = jax.grad(lambda operands: (jax.checkpoint(lambda x: weigh(**x))(operands) * along).sum())(operands)
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), operands)
        halved = attention_weights(**half, relative_bias=jnp.bfloat16(table), window=made.window)
        return one, along, each, again, halved, mix(halved, value.astype(jnp.bfloat16), window=made.window)

    one, along, each, again, halved, mixed = run(made.operands, direction)
    close(each, np.asarray(one), jnp.float64, "vmap")

    def loops(query, key):
        scores, _ = by_slot(problem_of(made, query, key, table), np.asarray(one), value)
        return np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)

    close(one, loops(**made.operands), jnp.float64, "weights")
    step = 1e-6
    moved = [loops(**{n: x + s * direction[n] for n, x in made.operands.items()}) for s in (step, -step)]
    np.testing.assert_allclose(along, (moved[0] - moved[1]) / (2 * step), rtol=1e-5, atol=1e-8)
    sent = sum((again[name] * direction[name]).sum() for name in again)  # the transpose of the same derivative
    np.testing.assert_allclose(sent, (np.asarray(along) ** 2).sum(), rtol=1e-10)
    assert (halved.dtype, mixed.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(halved, one, atol=2e-2)


def problem_of(made, query, key, table):
    return made.at({"query": query, "key": key, "relative_bias": table})


def megabytes(function, *arguments):
    """What a program holds besides what it is given, and what it returns."""
    found = jax.jit(function).lower(*arguments).compile().memory_analysis()
    return found.temp_size_in_bytes / 1e6, found.output_size_in_bytes / 1e6


VIT = ((8, 197, 12, 64), {})


@pytest.mark.parametrize(
    ("shape", "given"),
    [
        VIT,
        pytest.param((1, 4096, 4, 64), {"window": Window(255, causal=True, boundary="mask")}, marks=pytest.mark.full),
    ],
)
def test_memory_is_that_of_the_weights(shape, given):
    """On one device: forward, of the mix, and backward; 981 MB once, of ViT-B's size."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    weigh, mixed = functools.partial(attention_weights, **given), functools.partial(mix, **given)
    with machine.traced_for("cpu", 1):
        weights = jax.eval_shape(weigh, x, x)
        held, returned = megabytes(weigh, x, x)
        assert held <= 2 * returned
        held, output = megabytes(mixed, weights, x)
        assert held <= 2 * (returned + output)
        held, sent = megabytes(lambda w, *qk: jax.vjp(weigh, *qk)[1](w), weights, x, x)
        assert held <= 2 * (returned + sent)


def test_a_module_stores_its_weights_in_their_memory():
    graph, params = nnx.split(nnx.eval_shape(lambda: nn.Attention(12, 768, rngs=nnx.Rngs(0))))
    layer = lambda params, x: nnx.capture(nnx.merge(graph, params), nnx.Intermediate)(x, sow_weights=True)
    with machine.traced_for("cpu", 1):
        held, returned = megabytes(layer, params, jax.ShapeDtypeStruct((8, 197, 768), jnp.float32))
    assert held <= 2 * returned


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: attention_scores(x, x, window=Window(9)), r"Window: .*size"),
        (lambda x: attention_weights(x, x, normalize="max"), r"attention_weights: normalize \(='max'\) must be"),
        (lambda x: attention_scores(x, x[..., :2], window=Window(3)), r"attention_scores: key has head_dim 2"),
        (lambda x: mix(x, x, window=Window(3)), r"mix: weights \(=float64\[8, 2, 4\]\) .* = \[8, a multiple of 2, 3\]"),
        (lambda x: mix(x[0], x, window=Window(3)), r"mix: weights \(=float64\[2, 4\]\) must have at least 3 axes"),
        (lambda x: mix(x[..., :3], x, window=Window(3), extra_value=x[:, :1]), r"mix: extra_value .* must be"),
        (lambda x: mix(x[..., :3], x, window=3), r"mix: window \(=3\) must be"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((8, 2, 4), jnp.float64))

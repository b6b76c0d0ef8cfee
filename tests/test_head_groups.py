"""A window for each group of heads, against the loops of each group: values, lse, gradients, and transformations."""

from functools import partial
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle_gradients
import pytest
from contract import problem, quicker, residuals
from flax import nnx
from jax.sharding import PartitionSpec as P
from tiers import examples

from jaxattn import attention, attention_plan
from jaxattn.halo import split_attention
from jaxattn.nn import Attention
from jaxattn.window import Window

GRID = (5, 6)
GEOMETRIES = [{"boundary": "mask"}, {"dilation": (1, 2), "boundary": ("shift", "wrap")}]
SIZES = [(3, 3), (5, 2)]
WINDOWS = [Window(size, **geometry) for size, geometry in zip(SIZES, GEOMETRIES, strict=True)]
close = partial(np.testing.assert_allclose, rtol=0, atol=1e-10)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.core(1)
@pytest.mark.parametrize("key_heads", [2, 1])
def test_each_group_is_attention_in_its_window(key_heads):
    """Of its own key heads, or of one that all groups share; with all that comes by group, and all that serves each."""
    operands = {
        "query": draw(0, 2, *GRID, 4, 4), "key": draw(1, 2, *GRID, key_heads, 4),
        "value": draw(2, 2, *GRID, key_heads, 3), "extra_key": draw(3, 2, 1, key_heads, 4),
        "extra_value": draw(4, 2, 1, key_heads, 3),
    }  # fmt: skip
    tables = [draw(5 + n, 2, 2 * a - 1, 2 * b - 1) for n, (a, b) in enumerate(SIZES)]
    embeddings = [None, draw(8, 1, 9, 3, 4)]
    there, ids = draw(9, 2, *GRID) < 1, (draw(10, 2, *GRID) < 1).astype(np.int32)
    cotangent = draw(11, 2, *GRID, 4, 3)
    lean = lambda score, head, query, key: score + 0.1 * head

    @jax.jit
    def run(operands, tables):
        def attend(operands, tables):
            return attention(
                **operands, window=WINDOWS, relative_bias=tables, key_embedding=embeddings, mask=(there, None),
                segment_ids=ids, score_mod=lean, return_residuals=True, implementation="reference",
            )  # fmt: skip

        y, pull, lse = jax.vjp(attend, operands, tables, has_aux=True)
        return y, lse, pull(cotangent)

    y, lse, (by_operand, by_table) = run(operands, tables)
    summed = {name: np.zeros_like(x) for name, x in operands.items()}
    for n, (size, geometry) in enumerate(zip(SIZES, GEOMETRIES, strict=True)):
        first = n % key_heads
        of: dict[str, Any] = {name: (..., slice(first, first + 1), slice(None)) for name in operands} | {
            "query": (..., slice(2 * n, 2 * n + 2), slice(None))
        }
        own = {name: x[of[name]] for name, x in operands.items()} | {"relative_bias": tables[n]}
        own |= {} if embeddings[n] is None else {"key_embedding": embeddings[n]}
        result, gradients = oracle_gradients.attention(
            **own, size=size, geometry=geometry, key_mask=there, segment_ids=(ids, ids),
            score_mod=lambda score, h, i, j, n=n: score + 0.1 * (2 * n + h),
            cotangents=(cotangent[of["query"]], np.zeros(lse[..., :2].shape)),
        )  # fmt: skip
        close(y[of["query"]], result[0])
        close(lse[..., 2 * n : 2 * n + 2], result[1])
        close(by_table[n], gradients["relative_bias"])
        for name in operands:
            summed[name][of[name]] += gradients[name]
    for name in operands:
        close(by_operand[name], summed[name], err_msg=name)


@st.composite
def several(draw):
    """A grid, and the arguments of two windows on it, whatever its size."""
    grid = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=2)))
    each = lambda strategy: tuple(draw(strategy) for _ in grid)
    beyond = st.sampled_from(["mask", "zero", "edge", "reflect", "wrap"])
    given = lambda: {"size": each(st.integers(1, 4)), "dilation": each(st.integers(1, 2)), "boundary": each(beyond)}
    return grid, (given(), given())


@pytest.mark.full
@examples(0.25, phases=[hypothesis.Phase.generate])
@hypothesis.given(drawn=several(), seed=st.integers(0, 99))
def test_drawn(drawn, seed):
    """Values, lse and gradients, by the contract's oracle of each group."""
    grid, windows = drawn
    parts = [problem((grid, w), [residuals], heads=2, key_heads=1, seed=seed + n) for n, w in enumerate(windows)]
    operands = {name: np.concatenate([part.operands[name] for part in parts], -2) for name in parts[0].operands}
    sent = [part.cotangents() for part in parts]
    cotangents = [np.concatenate(x, axis) for x, axis in zip(zip(*sent, strict=True), (-2, -1), strict=True)]

    @partial(jax.jit, compiler_options=quicker)
    def run(operands):
        attend = lambda x: attention(**x, window=[part.window for part in parts], return_residuals=True)
        result, pull = jax.vjp(attend, operands)
        return result, pull(tuple(cotangents))[0]

    (y, lse), gradients = run(operands)
    expected = [part.expected(x) for part, x in zip(parts, sent, strict=True)]
    close(y, np.concatenate([result[0] for result, _ in expected], -2))
    close(lse, np.concatenate([result[1] for result, _ in expected], -1))
    for name in operands:
        close(gradients[name], np.concatenate([of[name] for _, of in expected], -2), err_msg=name)


@pytest.mark.full
def test_transformations_of_groups_and_what_they_cost():
    """vmap, jvp against vjp, remat, bfloat16, shards of the grid; and each group drops weights of its own."""
    x, tangent, cotangent = (jnp.asarray(draw(n, 2, 4, 6, 2, 4)) for n in range(3))
    windows = [Window((3, 3), boundary="mask"), Window((1, 5), boundary="wrap")]
    mesh = jax.make_mesh((2,), ("space",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])

    @jax.jit
    def run(x, key):
        attend = lambda x: attention(x, x, x, window=windows)
        y, moved = jax.jvp(jax.vmap(attend), (x,), (tangent,))
        whole, pull = jax.vjp(jax.checkpoint(attend), x)
        of = lambda x: split_attention(x, x, x, axis_name="space", window=windows)
        shards = jax.shard_map(of, mesh=mesh, in_specs=P(None, "space"), out_specs=P(None, "space"))(x)
        alone = jnp.concatenate([attention(*[x[..., n : n + 1, :]] * 3, window=w) for n, w in enumerate(windows)], -2)
        same = jnp.broadcast_to(x[..., :1, :], x.shape)
        dropped = attention(same, same, same, window=windows[:1] * 2, dropout_rate=0.5, dropout_key=key)
        return (y, whole, shards, alone), moved, pull(cotangent)[0], attend(x.astype(jnp.bfloat16)), dropped

    same, moved, back, narrow, dropped = run(x, jax.random.key(0))
    for y in same[1:]:
        close(y, same[0])
    close((moved * cotangent).sum(), (back * tangent).sum())
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype(float), same[0], atol=0.05)
    assert abs(dropped[..., 0, :] - dropped[..., 1, :]).max() > 0.1
    heads = jax.ShapeDtypeStruct((1, 32, 32, 4, 8), jnp.float32)
    flops = lambda window: jax.jit(partial(attention, window=window)).lower(*[heads] * 3).compile().cost_analysis()
    small, mixed, large = (flops([Window((a, a)), Window((b, b))])["flops"] for a, b in ((3, 3), (3, 11), (11, 11)))
    assert abs(mixed - (small + large) / 2) < 0.02 * large


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": []}, r"attention: window \(=\[\]\) must be None, a jaxattn.Window, or a sequence of them"),
        ({"window": [Window(3), 3]}, r"attention: window .* or a sequence of them, one for each group of heads"),
        ({"window": [Window(3), Window((3, 3))]}, r"attention: window .* must be windows of one number of axes"),
        ({"window": [Window(3)] * 4}, r"window \(=4 windows\) must be as many as divide the 6 heads of query"),
        (
            {"key": draw(1, 8, 2, 4)},
            r"key \(of 2 heads\) must have heads that divide those of each group, 2, or that some",
        ),
        (
            {"relative_bias": draw(1, 6, 5)},
            r"relative_bias \(=float64\[6, 5\]\) must be a list of 3, one for each window",
        ),
        (
            {"mask": [None, None]},
            r"mask \(=\[None, None\]\) must be a list of 3, one for each window; what serves every",
        ),
        ({"value": draw(1, 8, 12, 4)}, r"value \(=float64\[8, 12, 4\]\) must be of 6 heads, with 3 windows"),
        ({"sink_logits": draw(1, 7)}, r"sink_logits \(=float64\[7\]\) must be of 6 heads, with 3 windows"),
        ({"window": [Window(3), Window(3, stride=2), Window(3)]}, r"attention: query has the grid \(8,\)"),
        ({"query": np.ones(3)}, r"attention: query is float64\[3\]; expected"),
    ],
)
def test_errors(change, message):
    x = draw(0, 8, 6, 4)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: attention(**{"query": x, "key": x, "value": x, "window": [Window(3)] * 3, **change}))


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "grid"), [({"key_embedding": "factorized"}, GRID), ({"key_embedding": True, "clip": True}, (2, 6))]
)
def test_a_layer_learns_the_tables_of_each_group(kind, grid):
    """Each group is a layer of its own, with its part of the projections; also where windows are cut to the grid."""
    kind |= {"relative_bias": True, "sinks": True, "rotary": True, "out_projection": False, "use_bias": False}
    kind |= {"param_dtype": jnp.float64, "relative_init": nnx.initializers.normal(1.0), "implementation": "reference"}
    layer = Attention(4, 8, 16, num_kv_heads=2, window=WINDOWS, **kind, rngs=nnx.Rngs(0))
    x, there = draw(0, 2, *grid, 8), draw(2, 2, *grid) < 1
    graph, state = nnx.split(layer)

    @partial(jax.jit, compiler_options=quicker)
    def run(state, x):
        whole, parts = nnx.merge(graph, state), []
        for n, window in enumerate(WINDOWS):
            part = nnx.eval_shape(lambda w=window: Attention(2, 8, num_kv_heads=1, window=w, **kind, rngs=nnx.Rngs(0)))
            mine = {"query": slice(2 * n, 2 * n + 2), "key": slice(n, n + 1), "value": slice(n, n + 1)}
            for name, heads in mine.items():
                getattr(part, name).kernel = nnx.Param(getattr(whole, name).kernel[...][:, heads])
            part.sink_logits = nnx.Param(whole.sink_logits[...][mine["query"]])
            part.relative_bias, part.key_embedding = whole.relative_bias[n], whole.key_embedding[n]
            parts.append(part(x, mask=there))
        return whole(x, mask=there), jnp.concatenate(parts, -1)

    close(*run(state, x))
    assert [table.shape for table in layer.relative_bias] == [(2, 5, 5), (2, 9, 3)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"window": [Window(3), Window((3, 3))]},
            r"window \(=.*\) must be windows of one number of axes and one stride",
        ),
        (
            {"window": [Window(3), Window(3, stride=2)]},
            r"window .* must be windows of one number of axes and one stride",
        ),
        ({"window": [Window(3)] * 3}, r"window .* must be as many as divide num_heads \(=4\)"),
        ({"window": [Window(3)] * 2, "rank": 2}, r"rank \(=2\) must be None, or that of window"),
        ({"window": [Window(3), 5]}, r"window \(=.*\) must be a Window, .* or a sequence, each a Window"),
        ({"window": []}, r"window \(=.*\) must be"),
        ({"decode": True}, r"decode \(=True\) must be left out where window is a list, of one for each of 2 groups"),
    ],
)
def test_what_a_layer_refuses(given, message):
    with pytest.raises(ValueError, match="Attention: " + message):
        Attention(4, 8, **{"window": [Window(3, causal=True)] * 2, **given}, rngs=nnx.Rngs(0))


def test_what_a_layer_with_several_windows_does_not_show():
    layer, x = Attention(4, 8, window=[Window(3, causal=True)] * 2, rngs=nnx.Rngs(0)), jnp.ones((1, 6, 8))
    calls = [
        (lambda: layer.weights(x), "weights"),
        (lambda: layer(x, sow_weights=True), "sow_weights"),
        (lambda: layer(x, is_causal=True), r"is_causal \(=True\)"),
        (lambda: layer(x, decode=True), r"decode \(=True\)"),
        (lambda: layer.init_cache(x.shape), "init_cache"),
        (lambda: nnx.view(layer, decode=True, batch_size=1, max_length=4), "init_cache"),
    ]
    for call, what in calls:
        with pytest.raises(ValueError, match=f"Attention: {what} must be left out where window is a list"):
            call()


def test_a_plan_for_each_group():
    x, table = jax.ShapeDtypeStruct((1, 32, 32, 4, 8), jnp.float32), jax.ShapeDtypeStruct((2, 5, 5), jnp.float32)
    windows = [Window((3, 3)), Window((7, 7), dilation=2)]
    plans = attention_plan(x, x, x, window=windows, relative_bias=[table, None], sink_logits=np.zeros(4, np.float32))
    half = jax.ShapeDtypeStruct((1, 32, 32, 2, 8), jnp.float32)
    for plan, window, own in zip(plans, windows, [table, None], strict=True):
        alone = attention_plan(half, half, half, window=window, relative_bias=own, sink_logits=np.zeros(2, np.float32))
        assert plan == alone
    with pytest.raises(ValueError, match=r"window .* must be as many as divide the 4 heads"):
        attention_plan(x, x, x, window=windows[:1] * 3)

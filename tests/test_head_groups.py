"""A window for each group of heads, against the loops of each group: values, lse, gradients, and transformations."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle_gradients
import pytest
from jax.sharding import PartitionSpec as P

from jaxattn import attention
from jaxattn.halo import split_attention
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
        ({"window": [Window(3), Window(3, stride=2), Window(3)]}, r"attention: query has the grid \(8,\)"),
        ({"query": np.ones(3)}, r"attention: query is float64\[3\]; expected"),
    ],
)
def test_errors(change, message):
    x = draw(0, 8, 6, 4)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: attention(**{"query": x, "key": x, "value": x, "window": [Window(3)] * 3, **change}))

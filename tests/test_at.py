"""Attention of queries at given places: against loops in NumPy, and the grid's own at the grid's own places."""

import functools
import itertools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from contract import close, problem, quicker
from tiers import examples
from windows import grids

from jaxattn import attention_at
from jaxattn.window import Window

CASES = {
    "shift": ((7,), dict(size=4)),
    "zero and wrap, dilated": ((6, 5), dict(size=(3, 2), boundary=("zero", "wrap"), dilation=(2, 1))),
    "reflect, mask": ((4, 5), dict(size=(3, 5), boundary=("reflect", "mask"), offset=(0, -1))),
    "causal": ((8,), dict(size=3, causal=True, boundary="mask")),
    "edge, blocks": ((5, 6), dict(size=(2, 3), block=(1, 3), boundary=("edge", "shift"))),
    "valid, one token": ((6, 1), dict(size=(3, 1), boundary="valid")),
}


def interpolated(table, entry):
    """A table at a place between its entries; beyond the last of an axis, that one. Complex numbers pass through."""
    value = 0.0
    for corner in itertools.product((0, 1), repeat=len(entry)):
        weight, index = 1.0, []
        for e, side, n in zip(entry, corner, table.shape, strict=False):
            low = math.floor(np.real(e))
            weight = weight * ((e - low) if side else 1 - (e - low))
            index.append(min(max(low + side, 0), n - 1))
        value = value + weight * table[tuple(index)]
    return value


def nearest_rows(x, grid, sizes, geometry):
    """By axis: where the slots of the nearest token are, as (position, key, takes part), and the dilation."""
    rows = []
    for a, (n, k) in enumerate(zip(grid, sizes, strict=True)):
        here = {name: value[a] if isinstance(value, tuple) else value for name, value in geometry.items()}
        here["stride"] = 1
        table = oracle.axis_slots(n, k, **here)
        place = np.real(x[a])
        token = math.floor(place) if here["causal"] else math.floor(place + 0.5)
        turns = token // n if here["boundary"] == "wrap" else 0
        token = token - turns * n if here["boundary"] == "wrap" else min(max(token, 0), len(table) - 1)
        rows.append(([(p + turns * n, j, part) for p, j, part in table[token][1]], here["dilation"]))
    return rows


def loops(query, positions, key, value, relative_bias, key_embedding, bias, *, grid, sizes, geometry, key_mask, ids):
    batch, n, heads, dim = query.shape
    output = np.zeros((*query.shape[:-1], value.shape[-1]), complex)
    for b, i, h in np.ndindex(batch, n, heads):
        x, shared = positions[b, i], h // (heads // key.shape[-2])
        axes = nearest_rows(x, grid, sizes, geometry)
        scores, values = [], []
        for slot in itertools.product(*map(range, sizes)):
            picked = [row[u] for (row, _), u in zip(axes, slot, strict=True)]
            j = None if any(key_ is None for _, key_, _ in picked) else tuple(key_ for _, key_, _ in picked)
            if not all(part for _, _, part in picked):
                continue
            if j is not None and not (key_mask[b][j] and ids[0][b, i] == ids[1][b][j]):
                continue
            entry = [k - 1 + (p - at) / d for (p, _, _), at, k, (_, d) in zip(picked, x, sizes, axes, strict=True)]
            score = interpolated(relative_bias[h], entry) + query[b, i, h] @ interpolated(key_embedding[h], entry)
            score = score + bias[b, i, h][slot] + (0 if j is None else query[b, i, h] @ key[b][j][shared] * dim**-0.5)
            scores.append(score)
            values.append(np.zeros(value.shape[-1]) if j is None else value[b][j][shared])
        if scores:
            weights = np.exp(np.array(scores) - np.max(np.real(scores)))
            output[b, i, h] = weights @ np.array(values) / weights.sum()
    return output


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.full] * (k != 1)) for k, n in enumerate(CASES)])
def test_against_loops(name):
    against_loops(*CASES[name], seed=len(name))


@pytest.mark.full
@examples(0.25, phases=[hypothesis.Phase.generate])
@hypothesis.given(drawn=grids(rank=2, most=7, widest=3), seed=st.integers(0, 99))
def test_drawn(drawn, seed):
    """With tables, whose entries are offsets from 1-k to k-1."""
    grid, given = drawn
    axes = zip(*(given[name] for name in ("offset", "size", "dilation", "causal", "block")), strict=True)
    offset = tuple(None if o is None or causal or block > 1 else -d * (o % k) for o, k, d, causal, block in axes)
    against_loops(grid, given | {"stride": 1, "offset": offset}, seed)


def against_loops(grid, given, seed):
    """Values, and the gradient of every operand, positions too, along a direction: by a complex step, which is exact.
    Queries on the grid and off it, between tokens."""
    window, rng = Window(**given), np.random.default_rng(seed)
    n, heads, key_heads, dim = 5, 2, 1, 3
    tables = tuple(2 * k - 1 for k in window.sizes)
    operands = {
        "query": rng.normal(size=(1, n, heads, dim)),
        "positions": rng.uniform(-2, max(grid) + 1, size=(1, n, len(grid))),
        "key": rng.normal(size=(1, *grid, key_heads, dim)),
        "value": rng.normal(size=(1, *grid, key_heads, 2)),
        "relative_bias": rng.normal(size=(heads, *tables)),
        "key_embedding": rng.normal(size=(heads, *tables, dim)),
        "bias": rng.normal(size=(1, n, heads, *window.sizes)),
    }
    mask = rng.random((1, *grid)) < 0.8
    ids = rng.integers(0, 2, (1, n)), rng.integers(0, 2, (1, *grid))
    direction = {name: rng.normal(size=x.shape) for name, x in operands.items()}
    attend = lambda operands: attention_at(**operands, window=window, mask=(mask, None), segment_ids=ids)

    @functools.partial(jax.jit, compiler_options=quicker)
    def run(operands):
        output, tangent = jax.jvp(attend, (operands,), (direction,))
        return output, tangent, jax.vjp(jax.checkpoint(attend), operands)[1](tangent)[0]

    with jax.numpy_dtype_promotion("strict"):
        output, tangent, cotangents = run(operands)
    geometry = {name: getattr(window, name) for name in ("dilation", "block", "causal", "boundary", "offset")}
    told = dict(grid=grid, sizes=window.sizes, geometry=geometry, key_mask=mask, ids=ids)
    close(output, np.real(loops(**operands, **told)), jnp.float64, "output")
    for part in operands:
        step = loops(**operands | {part: operands[part] + 1e-30j * direction[part]}, **told).imag / 1e-30
        sent = (np.asarray(tangent) * step).sum()
        np.testing.assert_allclose((cotangents[part] * direction[part]).sum(), sent, rtol=1e-9, atol=1e-9, err_msg=part)
    moved = loops(**{part: x + 1e-30j * direction[part] for part, x in operands.items()}, **told).imag / 1e-30
    close(tangent, moved, jnp.float64, "tangent")


OWN = ["stride 2, dilation 3", "offset behind, wrap", "causal, block 3", "Swin, ragged", "3-D, all at once", "reflect"]


@pytest.mark.parametrize("geometry", [pytest.param(g, marks=[pytest.mark.full] * (g != OWN[0])) for g in OWN])
def test_at_the_grids_own_places_it_is_the_grids_own(geometry):
    """Of the contract, whose oracle knows only the grid; with integers, and with numbers that are whole."""
    made = problem(geometry, "everything, embedded by axis")
    stride = np.array(made.window.stride)
    places = np.indices(made.queries).reshape(len(made.queries), -1).T * stride
    expected = made.expected(made.cotangents())[0]
    options = dict(made.options)
    given, n = dict(made.operands), len(places)
    given["key_embedding"] = (
        tuple(given.pop(name) for name in sorted(given) if name.startswith("key_embedding_")) or None
    )
    given["query"] = given["query"].reshape(*made.batch, n, *given["query"].shape[-2:])
    if "bias" in given:
        given["bias"] = given["bias"].reshape(*made.batch, n, made.heads, *made.window.sizes)
    query_ids, key_ids = options["segment_ids"]
    options["segment_ids"] = (query_ids.reshape(*made.batch, n), key_ids)
    attend = functools.partial(attention_at, window=made.window, **options)

    @functools.partial(jax.jit, compiler_options=quicker)
    def run(given):
        places_ = jnp.broadcast_to(places, (*made.batch, *places.shape))
        whole = attend(positions=places_, **given)
        return whole, attend(positions=places_.astype(float), **given)

    for output, lse in run(given):
        close(output.reshape(expected[0].shape), expected[0], jnp.float64, "output")
        np.testing.assert_allclose(lse.reshape(expected[1].shape), expected[1], rtol=1e-10)


@pytest.mark.full
def test_vmap_and_bfloat16():
    rng = np.random.default_rng(0)
    key, places = rng.normal(size=(3, 6, 5, 2, 4)), rng.uniform(0, 5, (3, 8, 2))
    query, table = rng.normal(size=(3, 8, 2, 4)), rng.normal(size=(2, 5, 5))
    attend = functools.partial(attention_at, window=Window((3, 3)), relative_bias=table)

    @functools.partial(jax.jit, compiler_options=quicker)
    def run(query, places, key):
        half = [x.astype(jnp.bfloat16) for x in (query, key)]
        low = attention_at(half[0], places, half[1], half[1], window=Window((3, 3)), relative_bias=table)
        each = jax.vmap(lambda q, p, k: attend(q, p, k, k))(query, places, key)
        return attend(query, places, key, key), each, low

    whole, each, low = run(query, places, key)
    np.testing.assert_allclose(each, whole, rtol=1e-12)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low, whole, atol=3e-2)


@pytest.mark.parametrize("boundary", ["shift", "wrap"])
def test_who_stands_far_off_or_nowhere(boundary):
    """Infinitely far is the border of a grid, and no place on a torus; NaN is no place."""
    x, table = np.random.default_rng(0).normal(size=(8, 1, 4)), np.arange(5.0)[None]
    query = np.ones((1, 1, 4))
    run = jax.jit(lambda p: attention_at(query, p, x, x, window=Window(3, boundary=boundary), relative_bias=table))
    plain = jax.jit(lambda p: attention_at(query, p, x, x, window=Window(3, boundary=boundary)))
    place = lambda p, dtype=float: np.array([[p]], dtype)
    weigh = lambda keys, bias: (
        np.exp(keys[:, 0].sum(-1) / 2 + bias) @ keys[:, 0] / np.exp(keys[:, 0].sum(-1) / 2 + bias).sum()
    )
    for call in (run, plain):
        assert np.isnan(call(place(np.nan))).all()
    # every key is off the table at its lower end, or 800 is 0
    border, bias = (x[-3:], np.zeros(3)) if boundary == "shift" else (x[[7, 0, 1]], np.arange(1.0, 4))
    for far in (place(800.0), place(800, int), place(2**40, int), place(2**32 - 8, np.uint32)):
        np.testing.assert_allclose(run(far)[0, 0], weigh(border, bias), rtol=1e-9)
    for call in (run, plain):
        found = call(place(np.inf))
        assert np.isnan(found).all() if boundary == "wrap" else np.allclose(found[0, 0], weigh(border, 0 * bias))


def test_an_entry_that_hides_does_so_where_it_is_looked_up():
    x = np.random.default_rng(0).normal(size=(8, 1, 4))
    table = np.where(np.arange(5) == 3, -np.inf, 0.0)[None]  # who comes after a query
    run = lambda p: attention_at(x[:1], p, x, x, window=Window(3), relative_bias=table)
    score = x[1:4, 0] @ x[0, 0] / 2
    of = lambda keep: np.exp(score[keep]) @ x[1:4, 0][keep] / np.exp(score[keep]).sum()
    for place, seen in ((2, [0, 1]), (2.0, [0, 1]), (2.25, [0, 1]), (1.75, [0])):
        np.testing.assert_allclose(run(np.array([[place]]))[0, 0], of(seen), rtol=1e-9)


def test_places_between_tokens_and_extra_positions_under_strict_promotion():
    x, places = jnp.ones((8, 1, 4)), jnp.array([[2.5]])
    extra = {"extra_key": x[:1], "extra_value": 3 * x[:1], "extra_positions": np.array([[2]])}
    with jax.numpy_dtype_promotion("strict"):
        found = attention_at(x[:1], places, x, x, window=Window(3, causal=True), **extra)
    np.testing.assert_allclose(found, 1.5 * jnp.ones((1, 1, 4)), rtol=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"positions": jnp.zeros((4, 2))}, r"attention_at: positions \(=float\d+\[4, 2\]\) must be .* = \[5, 2\]"),
        ({"positions": jnp.zeros((5, 2), bool)}, r"attention_at: positions \(=bool\[5, 2\]\) must be integers or"),
        ({"window": None}, r"attention_at: window \(=None\) must be a jaxattn.Window"),
        ({"window": Window((9, 3))}, r"Window: the grid .* size .=9"),
        ({"window": Window(3)}, r"attention_at: positions .* = \[5, 1\]"),
        ({"query": jnp.zeros((1, 5, 2, 4))}, r"attention_at: positions .* = \[1, 5, 2\]"),
        ({"key": jnp.zeros((6, 7, 2, 3))}, r"attention_at: (value|key) "),
        ({"bias": jnp.zeros((4, 2, 3, 3))}, r"attention_at: bias .* \(5, 2, 3, 3\)"),
        ({"segment_ids": jnp.zeros((5,), int)}, r"attention_at: segment_ids"),
        ({"relative_bias": jnp.zeros((2, 5, 4))}, r"attention_at: relative_bias"),
        (
            {"window": Window((3, 3), boundary="mask", offset=5), "relative_bias": jnp.zeros((2, 5, 5))},
            r"Window: offset",
        ),
    ],
)
def test_refusals(changed, message):
    given = {"query": jnp.zeros((5, 2, 4)), "positions": jnp.zeros((5, 2))}
    given |= {"key": jnp.zeros((6, 7, 2, 4)), "value": jnp.zeros((6, 7, 2, 4)), "window": Window((3, 3))} | changed
    with pytest.raises(ValueError, match=message):
        attention_at(**given)


@pytest.mark.parametrize("grid", [(8,), (6, 7)])
def test_segments_of_every_entry(grid):
    """As many queries as an axis has tokens, of which each takes the segment of its nearest, in every entry."""
    rng = np.random.default_rng(0)
    shapes = dict(query=(3, 8, 2, 4), key=(3, *grid, 2, 4), value=(3, *grid, 2, 4))
    given = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    given |= dict(positions=rng.uniform(0, 5, (3, 8, len(grid))), window=Window((3,) * len(grid)))
    ids = rng.integers(0, 2, grid)
    shared, each = (attention_at(**given, segment_ids=x) for x in (ids, np.broadcast_to(ids, (3, *grid))))
    np.testing.assert_allclose(shared, each, rtol=1e-12)


def test_no_queries_and_no_batch():
    x, table = jnp.ones((2, 5, 6, 2, 3)), jnp.ones((2, 5, 5))
    given = {"window": Window((3, 3)), "relative_bias": table}
    for dtype in (int, float):
        for batch, n in ((2, 0), (0, 4)):
            places = jnp.zeros((batch, n, 2), dtype)
            found = attention_at(jnp.ones((batch, n, 2, 3)), places, x[:batch], x[:batch], **given)
            assert found.shape == (batch, n, 2, 3)

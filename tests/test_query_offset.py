"""Queries from some place of the grid on, static and traced, give what the loops give for all queries, cut."""

import functools

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import GEOMETRIES, SMALL, check, close, problem, quicker

from jaxattn.attention import attention
from jaxattn.attention_plan import attention_plan
from jaxattn.window import Window

LIGHT = [name for name, (_, given) in GEOMETRIES.items() if given and name != "21 x 21 of 24 x 24"]
# what says something of queries, of keys, of places, and of nothing
ARGUMENTS = ["everything", "one array of segments", "score_mod that masks", "sigmoid", "everything by slot"]
CASES = [(geometry, "everything", "traced") for geometry in LIGHT[1::3]]
CASES += [
    (geometry, "everything", how) for geometry, how in zip(LIGHT[::9], (SMALL, "xla", "reference") * 2, strict=False)
]
CASES += [("5 x 3", arguments, "traced") for arguments in ARGUMENTS]
CASES += [("block 2", "score_mod", how) for how in ("reference", SMALL)]  # which is told of the whole grid


@pytest.mark.full
@pytest.mark.parametrize(("geometry", "arguments", "how"), dict.fromkeys(CASES))
def test_a_part_of_the_queries(geometry, arguments, how):
    """More of the contract's geometries and arguments."""
    given = [add for add in contract.ARGUMENTS[arguments] if add is not contract.dropout]
    part = contract.with_(contract.part_of_the_queries, traced=how == "traced")
    check(problem(geometry, [*given, part], batch=(2,)), "xla" if how == "traced" else how)


def test_one_program_for_all_places():
    """Traced under jit; under vmap a place for each entry; jvp, remat and bfloat16 give what they give for a place that
    is known. "end" is the last place."""
    draw = lambda seed, *shape: jnp.asarray(np.random.default_rng(seed).normal(size=shape))
    query, key, table = draw(0, 2, 3, 4, 8), draw(1, 2, 40, 2, 8), draw(2, 4, 13)
    window = Window(7, causal=True, dilation=2)

    def attend(query, place, key=key):
        return attention(query, key, key, window=window, relative_bias=table.astype(key.dtype), query_offset=place)

    def slope(query, place):
        return jax.jvp(lambda query: jax.checkpoint(attend)(query, place), (query,), (query,))[1]

    places, jit = (5, 37), functools.partial(jax.jit, compiler_options=quicker)
    known = jit(lambda query: [(attend(query, 5), slope(query, 5)), (attend(query, "end"),)])(query)
    traced = jit(lambda query, n: (attend(query, n), slope(query, n)))
    for n, expected in zip(places, known, strict=True):
        jax.tree.map(near, traced(query, n)[: len(expected)], expected)
    assert traced._cache_size() == 1
    at_once = jit(jax.vmap(attend, (None, 0)))(query, jnp.asarray(places))
    near(at_once, jnp.stack([y for y, *_ in known]))
    half = jit(attend)(query.astype(jnp.bfloat16), jnp.asarray(5), key.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    close(half, np.asarray(known[0][0]), jnp.bfloat16, "bfloat16")
    near(traced(query, 99)[0], known[1][0])  # moved onto the grid


def near(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_token_costs_what_its_window_holds():
    """Wherever it stands: no table of places, and no key beyond the window."""
    x = jax.ShapeDtypeStruct((1, 131072, 2, 16), jnp.float32)
    token = jax.ShapeDtypeStruct((1, 1, 2, 16), jnp.float32)
    attend = lambda q, k, n: attention(q, k, k, window=Window(64, causal=True), query_offset=n)
    lowered = jax.jit(attend).lower(token, x, jax.ShapeDtypeStruct((), jnp.int32))
    assert len(lowered.as_text()) < 50_000
    memory = lowered.compile().memory_analysis()
    assert memory.temp_size_in_bytes < 10 * 64 * 2 * 16 * 4
    made = attention_plan(token, x, x, window=Window(64, causal=True), query_offset=jnp.asarray(3))
    assert (made.cost.columns, made.operands.key.shape) == (64, (1, 64, 2, 16))


def test_integers_of_any_kind():
    """NumPy's, in arrays as well; traced ones of few bits, which a long grid is not counted in; and enormous ones."""
    x, window = np.random.default_rng(0).normal(size=(600, 1, 2)), Window(301, causal=True)
    i, j = np.mgrid[:600, :600]
    scores = np.where((j <= i) & (j > i - 301), (x[:, 0] @ x[:, 0].T) / 2**0.5, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = (weights / weights.sum(-1, keepdims=True)) @ x[:, 0]
    run = functools.partial(attention, key=x, value=x, window=window)
    for offset in (np.array([100]), np.array(100, np.int8), jnp.array(100, jnp.uint8), jnp.array([100], jnp.int8)):
        np.testing.assert_allclose(run(x[100:102], query_offset=offset)[:, 0], want[100:102], rtol=1e-9)
    last = run(x[598:], query_offset=jnp.array(2**32 - 1, jnp.uint32))  # as far as there are queries
    np.testing.assert_allclose(last[:, 0], want[598:], rtol=1e-9)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"query_offset": -1},
            r"query_offset \(=-1\) must be None, 'end', or an int >= 0 for each of the window's axes",
        ),
        ({"query_offset": 1.0}, r"query_offset \(=1.0\) must be None, 'end', or an int"),
        ({"query_offset": "last"}, r"query_offset \(='last'\) must be"),
        ({"query_offset": jnp.ones(3, int)}, r"query_offset \(=int64\[3\]\) must be .* axes \(1\)"),
        ({"query_offset": 7}, r"query_offset \(=\(7,\)\) must leave query's grid \(4,\) within the \(10,\) queries"),
        (
            {"query_offset": 3, "window": None},
            r"query_offset \(=3\) must be None without a window, .* Window\(n, causal",
        ),
        (
            {"query_offset": jnp.asarray(3), "normalize": lambda scores, mask: scores},
            r"normalize \(=.*\) must be one of .* where query_offset is traced, .* with an int it does",
        ),
    ],
)
def test_errors(given, message):
    query, key = jnp.ones((4, 2, 8)), jnp.ones((10, 2, 8))
    with pytest.raises(ValueError, match="attention: " + message):
        attention(query, key, key, **{"window": Window(3, boundary="mask"), **given})

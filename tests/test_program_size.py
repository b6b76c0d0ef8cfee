"""How large the programs of `attention` are: what they hold must not grow as the square of a sequence."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import ARGUMENTS, GEOMETRIES, problem, scalar

from jaxattn.attention import attention
from jaxattn.window import Window

MOST = 1_000_000  # characters of a program; a number that it holds takes eight


@pytest.mark.core(3)
@pytest.mark.parametrize("arguments", ["plain", "everything"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_programs_are_small(geometry, arguments):
    assert arguments in ARGUMENTS
    made = problem(geometry, arguments)
    given = {name: made.options.pop(name) for name in ("mask", "segment_ids") if name in made.options}
    loss = scalar(made, "xla")

    def step(operands, given):
        made.options |= given
        return jax.grad(loss)(operands)

    text = jax.jit(step).lower(made.operands, given).as_text()
    assert len(text) < MOST


@pytest.mark.core(1)
@pytest.mark.parametrize(
    ("length", "window"),
    [
        (16384, Window(16384, causal=True)),
        (16384, Window(4096, causal=True, boundary="mask")),
        (8192, Window(8192, boundary="mask")),
        (8192, Window(8192, causal=True, boundary="zero")),
        (131072, Window(127)),
        (16384, Window(1025, dilation=3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("arguments", ["plain", "a mask of keys", "score_mod"])
def test_long_windows_make_no_table_of_pairs(length, window, arguments):
    x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
    keep = jax.ShapeDtypeStruct((1, length), bool)
    options = {"score_mod": lambda score, head, query, key: score - abs(query[0] - key[0])}

    def attend(query, key, value, keep):
        given = {"plain": {}, "a mask of keys": {"mask": (keep, None)}, "score_mod": options}[arguments]
        return attention(query, key, value, window=window, **given)

    loss = lambda *operands: attend(*operands).sum()
    assert len(jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, keep).as_text()) < MOST
    if arguments == "plain":
        assert bytes_of_constants(jax.jit(attend).lower(x, x, x, keep).compile()) < MOST


def test_who_sees_what_is_looked_up():
    """For a usual window the program holds it, and no step finds it anew."""
    x = jax.ShapeDtypeStruct((1, 64, 64, 8, 64), jnp.float32)
    text = jax.jit(lambda q, k, v: attention(q, k, v, window=Window((13, 13)))).lower(x, x, x).as_text()
    assert re.search(r'dense<"0x[01]+"> : tensor<\d+x1x1x320x32xi1>', text)


def bytes_of_constants(compiled):
    """Of all arrays that the compiler has folded into a program."""
    (module,) = compiled.runtime_executable().hlo_modules()
    found = re.findall(r" = (\w+)\[([\d,]+)\]\S* constant\(", module.to_string())
    assert found
    width = lambda kind: max(int("0" + kind.lstrip("abcdefghijklmnopqrstuvwxyz")) // 8, 1)
    return sum(width(kind) * math.prod(map(int, shape.split(","))) for kind, shape in found)


def test_a_long_causal_window_is_causal_attention():
    """The window is compared with, where a table of who sees whom would be too large."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 1500, 1, 4))) for _ in range(3))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / 2
    scores = np.where(np.tri(1500, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)
    for boundary in ("shift", "mask"):
        found = attention(q, k, v, window=Window(1500, causal=True, boundary=boundary))
        np.testing.assert_allclose(found, want, rtol=1e-10, atol=1e-12)

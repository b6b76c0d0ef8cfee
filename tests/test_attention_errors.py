"""What `attention` refuses, by its messages."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.attention import attention, merge_attentions
from jaxattn.window import Window

X = jnp.zeros((2, 6, 4, 8))
GRID = jnp.zeros((2, 5, 6, 4, 8))


def zeros(*shape, dtype=jnp.float64):
    return jnp.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("operands", "arguments", "message"),
    [
        ((zeros(2, 6, 4, 8, dtype=int), X, X), {}, "query is int64[2, 6, 4, 8]; expected a floating-point array"),
        ((X, X, zeros(2, 6, 4, 8, dtype=bool)), {}, "value is bool[2, 6, 4, 8]; expected a floating-point array"),
        (
            (zeros(4, 8), X, X),
            {},
            "query is float64[4, 8]; expected [*batch, *grid, heads, head_dim] with a grid of rank 1",
        ),
        ((X, X, X), {"window": Window((3, 3, 3))}, "query is float64[2, 6, 4, 8]; expected"),
        ((X, zeros(3, 6, 4, 8), X), {}, "key is float64[3, 6, 4, 8]; expected the batch axes of query, (2,)"),
        ((X, zeros(6, 4, 8), zeros(6, 4, 8)), {}, "key is float64[6, 4, 8]; expected the batch axes of query, (2,)"),
        ((X, X, zeros(2, 5, 4, 8)), {}, "value is float64[2, 5, 4, 8]; expected (2, 6, 4, 'value_dim'), like key"),
        (
            (X, zeros(2, 6, 3, 8), zeros(2, 6, 3, 8)),
            {},
            "key has 3 heads and query 4: query's heads must be a multiple",
        ),
        ((X, zeros(2, 6, 4, 7), X), {}, "key has head_dim 7 and query 8: they must be equal"),
        ((X, X, X), {"window": Window(3, stride=2)}, "query has the grid (6,); of key's grid (6,), Window(size=(3,)"),
        ((X, X, X), {"window": 3}, "window (=3) must be None or a jaxattn.Window"),
        ((X, X, X), {"window": Window(7)}, "the grid (=6 along axis 0) must have size (=7)"),
        (
            (X, X, X),
            {"bias": zeros(3, 6, 6)},
            "bias is float64[3, 6, 6]; expected what broadcasts against [*batch, heads, T, S] = (2, 4, 6, 6)",
        ),
        ((X, X, X), {"bias": zeros(6, 6, dtype=int)}, "bias is int64[6, 6]; expected a floating-point array"),
        (
            (X, X, X),
            {"bias": zeros(5), "window": Window(3)},
            "bias is float64[5]; expected what broadcasts against [*batch, *query_grid, heads, *k] = (2, 6, 4, 3)",
        ),
        ((X, X, X), {"mask": zeros(6, 6)}, "mask is float64[6, 6]; expected a bool array, True where a query attends"),
        ((X, X, X), {"mask": zeros(2, 6), "window": Window(3)}, "mask is float64[2, 6]; expected a bool array"),
        (
            (X, X, X),
            {"mask": zeros(5, dtype=bool), "window": Window(3)},
            "[*batch, *query_grid, heads, *k] = (2, 6, 4, 3), or a mask of keys (2, 6)",
        ),
        ((X, X, X), {"relative_bias": zeros(4, 5)}, "relative_bias needs a window"),
        ((X, X, X), {"key_embedding": zeros(4, 5, 8)}, "key_embedding needs a window"),
        (
            (X, X, X),
            {"relative_bias": zeros(4, 3), "window": Window(3)},
            "relative_bias is float64[4, 3]; expected floating point, (4, 5) for the window of size (3,)",
        ),
        ((X, X, X), {"relative_bias": zeros(1, 5), "window": Window(3)}, "relative_bias is float64[1, 5]; expected"),
        (
            (X, X, X),
            {"key_embedding": zeros(4, 5, 7), "window": Window(3)},
            "key_embedding is float64[4, 5, 7]; expected floating point, (4, 5, 8) or (1, 5, 8)",
        ),
        (
            (X, X, X),
            {"key_embedding": (zeros(4, 5, 8), zeros(4, 5, 8)), "window": Window(3)},
            "key_embedding is a sequence of 2; allowed: one table for all axes, or one for each of the window's 1",
        ),
        (
            (GRID, GRID, GRID),
            {"key_embedding": (zeros(4, 5, 8), zeros(4, 5, 3)), "window": Window((3, 3))},
            "key_embedding[1] is float64[4, 5, 3]; expected floating point, (4, 5, 8) or (1, 5, 8), or dims that make "
            "up head_dim",
        ),
        (
            (GRID, GRID, GRID),
            {"key_embedding": (zeros(4, 5, 6), zeros(2, 5, 2)), "window": Window((3, 3))},
            "key_embedding[1] is float64[2, 5, 2]; expected floating point, (4, 5, 2) or (1, 5, 2)",
        ),
        (
            (GRID, GRID, GRID),
            {"key_embedding": (zeros(4, 5, 8, dtype=int), zeros(1, 5, 8)), "window": Window((3, 3))},
            "key_embedding[0] is int64[4, 5, 8]; expected floating point",
        ),
        ((X, X, X), {"key_embedding": (zeros(4, 5, 8),)}, "key_embedding needs a window"),
        (
            (X, X, X),
            {"relative_bias": zeros(4, 5), "window": Window(3, boundary="mask", offset=1)},
            "offset (=1) must be a multiple of dilation (=1)",
        ),
        (
            (X, X, X),
            {"relative_bias": zeros(4, 5), "window": Window(3, boundary="mask", dilation=2, offset=-3)},
            "offset (=-3) must be a multiple of dilation (=2)",
        ),
        (
            (X, X, X),
            {"normalize": "soft"},
            "normalize (='soft') must be one of 'softmax', 'relu', 'sigmoid', 'sparsemax', 'none' or a function",
        ),
        (
            (X, X, X),
            {"normalize": "relu", "return_residuals": True},
            "return_residuals (=True) must be False with normalize='relu'",
        ),
        (
            (X, X, X),
            {"implementation": "cuda"},
            "implementation (='cuda') must be None or one of 'splash', 'xla',",
        ),
        ((X, X, X), {"implementation": "tpu"}, "implementation (='tpu') can't, since it runs on a tpu alone, and this"),
        ((X, X, X), {"dropout_rate": 1.0}, "dropout_rate (=1.0) must be a number >= 0 and < 1"),
        ((X, X, X), {"tile": 0}, "tile (=0) must be None, an int, or an int for each of the"),
        ((X, X, X), {"tile": True}, "tile (=True) must be"),
        ((X, X, X), {"tile": 2.0}, "tile (=2.0) must be"),
        ((X, X, X), {"tile": (1, 2, 3, 4)}, "tile (=(1, 2, 3, 4)) must be"),
        ((X, X, X), {"dropout_rate": -0.1}, "dropout_rate (=-0.1) must be"),
        ((X, X, X), {"dropout_rate": 0.1}, "dropout_key (=None) must be a jax.random.key"),
        ((X, X, X), {"extra_key": zeros(2, 1, 4, 8)}, "extra_value (=None) must be given where extra_key is"),
        ((X, X, X), {"extra_value": zeros(2, 1, 4, 8)}, "extra_key (=None) must be given where extra_value is"),
        (
            (X, X, X),
            {"extra_key": zeros(1, 1, 4, 8), "extra_value": zeros(1, 1, 4, 8)},
            "extra_key is float64[1, 1, 4, 8]; expected floating point, (2, 1, 4, 8)",
        ),
        (
            (X, X, X),
            {"extra_key": zeros(2, 1, 4, 8), "extra_value": zeros(2, 3, 4, 8)},
            "extra_value is float64[2, 3, 4, 8]; expected floating point, (2, 1, 4, 8)",
        ),
        ((X, X, X), {"segment_ids": zeros(2, 6)}, "segment_ids is float64[2, 6]; expected integers (2, 6)"),
        ((X, X, X), {"segment_ids": zeros(5, dtype=int)}, "segment_ids is int64[5]; expected integers (2, 6)"),
        (
            (X, X, X),
            {"segment_ids": zeros(3, 6, dtype=int)},
            "segment_ids is int64[3, 6]; expected integers (2, 6), or a pair of integers (2, 6) for query and (2, 6) "
            "for key, or without the batch (2,) for every entry",
        ),
        (
            (X, X, X),
            {"segment_ids": [zeros(2, 6, dtype=int)]},
            "segment_ids is a sequence of 1; allowed: one array, or a pair",
        ),
        (
            (X, zeros(2, 5, 4, 8), zeros(2, 5, 4, 8)),
            {"segment_ids": zeros(2, 6, dtype=int)},
            "segment_ids is int64[2, 6]; expected integers (2, 5)",
        ),
        ((X, X, X), {"logits_soft_cap": 0.0}, "logits_soft_cap (=0.0) must be None or a finite number > 0"),
        ((X, X, X), {"scale": zeros(4)}, "must be one real number"),
    ],
)
def test_refused(operands, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        attention(*operands, **arguments)


def test_it_is_refused_before_anything_is_compiled():
    """Under jit, at trace time; and from shapes alone."""
    shape = jax.ShapeDtypeStruct((2, 6, 4, 8), jnp.float32)
    with pytest.raises(ValueError, match="query's heads must be a multiple of key's"):
        jax.eval_shape(attention, shape, *[jax.ShapeDtypeStruct((2, 6, 3, 8), jnp.float32)] * 2)


def test_merging_what_does_not_fit():
    output, lse = np.zeros((6, 2, 4)), np.zeros((6, 2))
    with pytest.raises(ValueError, match=r"outputs \(=1 arrays\) must be as many as lses \(=2\)"):
        merge_attentions([output], [lse, lse])
    with pytest.raises(ValueError, match=r"outputs \(=\[\]\) must be a sequence of floating-point arrays"):
        merge_attentions([], [])
    with pytest.raises(ValueError, match=r"lses\[1\] \(=\[6\]\) must be \[6, 2\], as outputs\[0\] is"):
        merge_attentions([output, output], [lse, lse[:, 0]])


X = jnp.ones((2, 8, 2, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(scale="a"), r"scale \(='a'\) must be one real number"),
        (dict(logits_soft_cap=jnp.array(-1.0)), r"logits_soft_cap \(=-1.0\) must be None or a finite number > 0"),
        (dict(dropout_rate=0.5, dropout_key=3), r"dropout_key \(=3\) must be one jax.random.key"),
        (dict(dropout_rate=0.5, dropout_key=jax.random.split(jax.random.key(0))), "must be one jax.random.key"),
        (dict(implementation=["xla"]), r"implementation \(=\['xla'\]\) must be None or a name"),
        (dict(relative_bias=jnp.ones((2, 5, 5))), r"a table over 2 axes, .* write Window\(\(3, 3\)\)"),
        (dict(normalize=lambda s, m: s.sum(-1, keepdims=True)), "normalize returned shape"),
    ],
)
def test_more_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        attention(X, X, X, window=Window(3), **arguments)


def test_numbers_and_lists_are_taken_as_arrays():
    """A scale may be an integer or traced, a mask a list, sizes NumPy scalars, and a mask of keys needs no batch."""
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6)
    want = attention(X, X, X, scale=2.0, window=Window(3))
    close(jax.jit(lambda s: attention(X, X, X, scale=s, window=Window(np.array(3))))(2), want)
    keys = [True] * 5 + [False] * 3
    want = attention(X, X, X, mask=np.array([keys] * 2), window=Window(3))
    close(attention(X, X, X, mask=[keys] * 2, window=Window(3)), want)
    close(attention(X, X, X, mask=keys, window=Window(3)), want)
    assert Window(7).query_grid(10) == (10,)


def test_merging_leaves_out_what_an_empty_part_holds():
    empty, full = jnp.full((3, 1, 2), jnp.nan), jnp.ones((3, 1, 2))
    lses = [jnp.full((3, 1), -jnp.inf), jnp.zeros((3, 1))]
    np.testing.assert_array_equal(merge_attentions(iter([empty, full]), lses), full)


def test_tiles_are_whole_blocks():
    window = Window(4, block=4)
    x = jnp.ones((8, 1, 2))
    with pytest.raises(ValueError, match=r"tile \(=6\) must be .* positive multiples of the window's block \(4,\)"):
        attention(x, x, x, window=window, tile=6)

"""The table of the recipes: which keys the masks of other libraries leave a query, written down from their sources."""

import itertools

import jax
import numpy as np
import pytest

from jaxattn import attention
from jaxattn.window import Window


def seen(window, length):
    """The keys that each query sees along one axis."""
    keys, there = window.indices(length)[..., 0], window.mask(length)
    return [sorted(row[shown].tolist()) for row, shown in zip(keys, there, strict=True)]


def natten(length, size, stride, dilation, causal):
    """NATTEN's rule: each residue class by itself; queries in groups of `stride`, whose leader's window all share."""
    found = []
    for i in range(length):
        group = [j for j in range(length) if j % dilation == i % dilation]
        n, at = len(group), i // dilation
        first = at // stride * stride
        if causal:
            leader = min(first + stride - 1, n - 1)
            found.append([group[j] for j in range(max(leader - size + 1, 0), at + 1)])
        else:
            leader = min(first + stride // 2, n - 1)
            left, right = size // 2, size // 2 + size % 2 - 1
            centre = min(max(leader, left), n - 1 - right)
            found.append([group[j] for j in range(centre - left, centre + right + 1)])
    return found


CASES = [
    (n, k, d, s)
    for n, k, d, s in itertools.product((1, 2, 5, 9, 13), range(1, 6), range(1, 4), range(1, 5))
    if k * d <= n and s <= k
]


@pytest.mark.parametrize("causal", [False, True])
def test_natten(causal):
    """`kernel_size`, `dilation`, `stride` and `is_causal`, even windows too."""
    for n, size, dilation, stride in CASES:
        ours = Window(size, dilation=dilation, block=stride, causal=causal)
        assert seen(ours, n) == natten(n, size, stride, dilation, causal), (n, ours)


def test_flash_attention():
    """Query i sees the keys from i - left to i + right, both of them; queries fewer than keys end with them."""
    for keys, left, right in itertools.product((1, 5, 8), range(4), range(4)):
        window = Window(left + 1 + right, offset=-left, boundary="mask")
        for queries in range(1, keys + 1):
            last = keys - queries
            rule = [[j for j in range(keys) if i + last - left <= j <= i + last + right] for i in range(queries)]
            assert seen(window, keys)[last:] == rule
            assert right or seen(Window(left + 1, causal=True, boundary="mask"), keys)[last:] == rule


@pytest.mark.full
def test_jax():
    x = np.random.default_rng(0).normal(size=(2, 9, 4, 8)).astype(np.float32)
    for left, right in ((3, 0), (2, 1), (0, 4)):
        window = Window(left + 1 + right, offset=-left, boundary="mask")
        theirs = jax.nn.dot_product_attention(x, x, x, local_window_size=(left, right))
        np.testing.assert_allclose(attention(x, x, x, window=window), theirs, atol=1e-6)
    theirs = jax.nn.dot_product_attention(x, x, x, is_causal=True)
    np.testing.assert_allclose(attention(x, x, x, window=Window(9, causal=True)), theirs, atol=1e-6)

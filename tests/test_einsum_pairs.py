"""Three operands and more with windows, two at a time: values against loops, and the products that are spared."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_einsum import check, draw_arrays

import jaxattn

TABLE = {
    "convolution, then product": ("n i+r j+s c, r s c k, k o -> n i j o", [(2, 6, 5, 3), (3, 2, 3, 4), (4, 5)], {}),
    "CP kernel": (
        "n i+r j+s c, r f, s f, c f, o f -> n i j o",
        [(2, 5, 4, 3), (3, 4), (2, 4), (3, 4), (5, 4)],
        {"padding": "SAME", "boundary": ["wrap", "edge"]},
    ),
    "transposed": ("n i j c, r s c k, k o -> n 2*i+r j+2*s o", [(2, 3, 4, 3), (3, 2, 3, 4), (4, 5)], {}),
    "transposed, by parts": ("n i j f, r f, s f -> n 2*i+r j+s", [(2, 3, 4, 3), (3, 3), (2, 3)], {}),
    "grouped": ("n i+r (g c), r c g, g o -> n i o", [(2, 6, 4), (3, 2, 2), (2, 5)], {}),
    "local mix, projected": ("n i+r h, n i r h, h d -> n i d", [(2, 7, 3), (2, 5, 3, 3), (3, 4)], {}),
    "two windows": ("n i+r h, n i+r h, r h -> n i", [(2, 7, 3), (2, 7, 3), (3, 3)], {}),
    "windows over two operands": ("i+r, i+s, r s -> i", [(7,), (6,), (3, 2)], {}),
    "a sum of three": ("i+r+t, r, t, i -> i", [(9,), (3,), (2,), (6,)], {}),
    "a diagonal": ("a a i+r, r, a -> i a", [(2, 2, 7), (3,), (2,)], {}),
    "any batch": ("... i+r c, r c, c -> ... i", [(2, 3, 7, 4), (3, 4), (4,)], {"padding": "SAME"}),
    "six operands": ("i+r j+s, r a, a b, b d, s d, d -> i j", [(5, 4), (3, 2), (2, 3), (3, 2), (2, 2), (2,)], {}),
}  # fmt: skip


@pytest.mark.core(4)
@pytest.mark.parametrize("name", TABLE)
def test_pairs(name):
    equation, shapes, options = TABLE[name]
    check(equation, draw_arrays(shapes), options, lambda *x: jaxattn.einsum(equation, *x, **options))


def test_the_plan_says_the_order_and_what_it_costs():
    plan = jaxattn.plan("n i+r j+s c, r s c k, k o -> n i j o", (4, 34, 34, 32), (3, 3, 32, 32), (32, 64))
    assert plan.lowering == "pairs"
    assert plan.detail == "n i+r j+s c, r s c k -> n i j k (convolution); then k o, n i j k -> n i j o (plain)"
    tokens = 4 * 32 * 32
    assert plan.flops == 2 * tokens * 32 * (9 * 32 + 64)
    assert plan.temporaries >= 4 * tokens * 32
    # narrower in the middle or wider: the kernels first, where that is cheaper
    wide = jaxattn.plan("n i+r j+s c, r s c k, k o -> n i j o", (4, 34, 34, 32), (3, 3, 32, 256), (256, 32))
    assert wide.detail.startswith("r s c k, k o -> r s c o (plain); then n i+r j+s c, r s c o")
    # what two at a time does not make cheaper is done at once
    assert jaxattn.plan("n i+r h, n i+r h, r h -> n i", (2, 7, 3), (2, 7, 3), (3, 3)).lowering == "slices"


def test_half_precision_is_summed_in_float32():
    x, w, p = (jnp.asarray(a, jnp.bfloat16) for a in draw_arrays([(2, 9, 64), (3, 64, 64), (64, 8)]))
    found = jaxattn.einsum("n i+r c, r c k, k o -> n i o", x, w, p)
    assert found.dtype == jnp.bfloat16
    x, w, p = (np.asarray(a, np.float64) for a in (x, w, p))
    want = sum(x[:, r : r + 7] @ w[r] for r in range(3)) @ p
    np.testing.assert_allclose(np.asarray(found, np.float64), want, atol=2**-8 * np.abs(want).max())

"""The contract of `attention`, continued: half and single precision, batches, heads, and what broadcasts."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import (
    IMPLEMENTATIONS,
    SMALL,
    bias,
    check,
    extra_tokens,
    mask_by_slot,
    mask_of_keys,
    problem,
    residuals,
    with_,
)


@pytest.mark.core(2)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("geometry", "arguments"),
    [("5 x 3", "everything"), ("dilated", "plain"), ("129 of 300", "plain"), ("global, 700", "everything")],
)
def test_dtypes(geometry, arguments, dtype, implementation):
    check(problem(geometry, arguments, head_dim=8, value_dim=8), implementation, dtype)


def test_float16():
    check(problem("halo", "everything", head_dim=8, value_dim=8), SMALL, jnp.float16)


@pytest.mark.core(1)
@pytest.mark.parametrize("implementation", ["reference", SMALL])
@pytest.mark.parametrize(
    "shape",
    [
        dict(batch=()),
        dict(batch=(2, 1, 3)),
        dict(heads=1, key_heads=1),
        dict(heads=3, key_heads=3),
        dict(heads=6, key_heads=1),
        dict(head_dim=1, value_dim=5),
    ],
    ids=str,
)
def test_shapes(shape, implementation):
    check(problem("halo", "everything", **shape), implementation)


def broadcasts(full):
    """Every axis there or of length one, and every lower rank: with a shape, one that has what it lacks."""
    for there in itertools.product((False, True), repeat=len(full)):
        yield (
            tuple(n if is_ else 1 for n, is_ in zip(full, there, strict=True)),
            tuple(1 if is_ else n for n, is_ in zip(full, there, strict=True)),
        )
    for start in range(1, len(full) + 1):
        yield full[start:], full


WINDOWED, GLOBAL = problem("stride 2").full, problem("global, more keys").full


@pytest.mark.core(2)
@pytest.mark.parametrize(
    ("geometry", "of_bias", "of_mask"),
    [
        *(("stride 2", *shapes) for shapes in broadcasts(WINDOWED)),
        *(("global, more keys", *shapes) for shapes in broadcasts(GLOBAL)),
        *(("5 x 5, mask", shape, shape) for shape in [(13, 1, 1, 5, 1), (1, 12, 4, 1, 5), (3, 13, 12, 1, 1, 5)]),
    ],
)
def test_bias_and_mask_broadcast(geometry, of_bias, of_mask):
    check(problem(geometry, [with_(bias, of_bias), with_(mask_by_slot, of_mask), residuals]), SMALL)


def test_a_mask_of_keys_is_shared_by_the_batch():
    check(problem("halo", [with_(mask_of_keys, (1,)), extra_tokens]), SMALL)
    check(problem("halo", [with_(mask_of_keys, ()), residuals]), SMALL)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_empty_batch(implementation):
    made = problem("halo", "everything", batch=(0,))
    result, pullback = jax.vjp(functools.partial(made.call, implementation), made.operands)
    gradients = pullback(jax.tree.map(jnp.ones_like, result))[0]
    assert result[0].shape == (0, 13, 12, 4, 2)
    assert result[1].shape == (0, 13, 12, 4)
    for name, x in made.operands.items():
        np.testing.assert_array_equal(gradients[name], np.zeros_like(x))

"""`Conv` and `Attention` against Flax's own modules, values and gradients, and what only ours can do."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from jaxattn.attention import attention
from jaxattn.nn import Attention, Conv
from jaxattn.window import Window

# Two orders of the same float64 sums of a few hundred products; float32 and bfloat16 by their epsilons.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2}


def normal(seed, *shape, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def randomized(layer):
    """The layer with every parameter drawn anew, so that no zero bias hides a mistake."""
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    leaves, structure = jax.tree.flatten(params)
    leaves = [normal(n, *leaf.shape, dtype=leaf.dtype) for n, leaf in enumerate(leaves)]
    return nnx.merge(graphdef, jax.tree.unflatten(structure, leaves), rest)


def values_and_gradients(layer, *inputs, **kwargs):
    """The output, and the gradients of a fixed random projection of it, by parameter name and by input."""
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    @partial(jax.jit)  # each is run once
    def run(params, inputs):
        y, pull = jax.vjp(lambda params, inputs: nnx.merge(graphdef, params, rest)(*inputs, **kwargs), params, inputs)
        return y, pull(normal(99, *y.shape, dtype=y.dtype))  # drawn while tracing: a constant

    y, (by_param, by_input) = run(params, inputs)
    return y, nnx.to_pure_dict(by_param), by_input


def assert_same(ours, theirs, *inputs, **kwargs):
    mine, other = values_and_gradients(ours, *inputs, **kwargs), values_and_gradients(theirs, *inputs, **kwargs)
    assert jax.tree.structure(mine) == jax.tree.structure(other)
    assert mine[0].dtype == other[0].dtype
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(other), strict=True):
        assert_close(a, b, TOLERANCE[str(mine[0].dtype)])


def assert_close(ours, theirs, tolerance):
    """Within `tolerance` of the largest entry (or of one)."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    np.testing.assert_allclose(ours, theirs, atol=tolerance * max(1.0, np.abs(theirs).max()), rtol=0)


def conv_pair(*args, **kwargs):
    """Our layer and Flax's with the same parameters, drawn at random."""
    zeros = {"kernel_init": nnx.initializers.zeros, **kwargs, "rngs": nnx.Rngs(0)}
    ours, theirs = randomized(Conv(*args, **zeros)), nnx.Conv(*args, **zeros)
    nnx.update(theirs, nnx.state(ours))
    return ours, theirs


@st.composite
def convolutions(draw):
    rank = draw(st.integers(1, 3))

    def axes(low, high):
        return draw(st.one_of(st.integers(low, high), st.lists(st.integers(low, high), min_size=rank, max_size=rank)))

    kernel = draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank))
    dilation, stride = axes(1, 2), draw(st.sampled_from([None, 1, 2, (3, 1, 2)[:rank]]))
    groups = draw(st.sampled_from([1, 2, 4]))
    pads = st.one_of(st.integers(0, 2), st.tuples(st.integers(0, 2), st.integers(0, 2)))
    named = ["SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT"] + ["CAUSAL"] * (rank == 1)
    in_numbers = st.one_of(st.integers(0, 2), st.lists(pads, min_size=rank, max_size=rank))
    input_dilation = draw(st.sampled_from([None, 1, 1, 2, (2, 1, 3)[:rank]]))
    # Flax takes named paddings only without input dilation
    padding = draw(st.one_of(st.sampled_from(named), in_numbers) if input_dilation in (None, 1) else in_numbers)
    sizes = draw(st.lists(st.integers(7, 9) if rank < 3 else st.just(7), min_size=rank, max_size=rank))
    batch = draw(st.sampled_from([(), (2,), (2, 1)]))
    return (
        (*batch, *sizes, 4),
        (4, draw(st.sampled_from([4, 8])), kernel, stride),
        {
            "padding": padding,
            "input_dilation": input_dilation,
            "kernel_dilation": dilation,
            "feature_group_count": groups,
            "use_bias": draw(st.booleans()),
        },
    )


@settings(max_examples=30)
@given(convolutions())
def test_conv_is_nnx_conv(case):
    shape, args, kwargs = case
    assert_same(*conv_pair(*args, **kwargs, param_dtype=jnp.float64), normal(7, *shape))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("padding", ["SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", "CAUSAL", 1])
@pytest.mark.parametrize(("strides", "kernel_dilation"), [(1, 1), (2, 2)])
def test_conv_paddings(rank, padding, strides, kernel_dilation):
    """Every named padding in every rank, whatever hypothesis draws."""
    if padding == "CAUSAL" and rank > 1:
        with pytest.raises(ValueError, match="Conv: padding 'CAUSAL' is for one spatial axis, kernel_size has"):
            Conv(2, 3, (3,) * rank, padding=padding, rngs=nnx.Rngs(0))
        return
    kwargs = {"padding": padding, "kernel_dilation": kernel_dilation, "param_dtype": jnp.float64}
    assert_same(*conv_pair(2, 3, (3, 2, 4)[:rank], strides, **kwargs), normal(7, 2, *(7, 6, 8)[:rank], 2))


@pytest.mark.parametrize("padding", ["CIRCULAR", "REFLECT"])
def test_conv_kernel_longer_than_the_grid(padding):
    """Copies of copies: the torus goes around more than once, the mirror reflects again."""
    assert_same(*conv_pair(2, 3, (9, 4), padding=padding, param_dtype=jnp.float64), normal(7, 2, 3, 2, 2))


def test_conv_negative_padding_crops():
    assert_same(*conv_pair(2, 3, (2, 2), padding=((-1, 2), (0, -1)), param_dtype=jnp.float64), normal(7, 2, 6, 5, 2))


def test_conv_mask():
    mask = jnp.tril(jnp.ones((3, 2, 4)))
    ours, theirs = conv_pair(2, 4, 3, mask=mask, param_dtype=jnp.float64)
    assert_same(ours, theirs, normal(7, 2, 6, 2))
    with pytest.raises(ValueError, match=r"Conv: mask must have the kernel's shape \(3, 2, 4\), got \(2, 4\)"):
        Conv(2, 4, 3, mask=jnp.ones((2, 4)), rngs=nnx.Rngs(0))


DTYPES = [None, jnp.float32, jnp.bfloat16]


@pytest.mark.parametrize(("dtype", "param_dtype", "preferred"), itertools.product(DTYPES, DTYPES[1:], DTYPES[:2]))
def test_conv_dtypes(dtype, param_dtype, preferred):
    """The result has the dtype that Flax's has, whatever comes in."""
    kwargs = {"dtype": dtype, "param_dtype": param_dtype, "preferred_element_type": preferred}
    ours, theirs = conv_pair(2, 3, (3, 3), **kwargs)
    for input_dtype in (jnp.float32, jnp.bfloat16, jnp.int8):
        x = (4 * normal(7, 2, 5, 5, 2)).astype(input_dtype)
        y, expected = nnx.jit(ours)(x), nnx.jit(theirs)(x)
        assert y.dtype == expected.dtype
        computed = jnp.promote_types(input_dtype if input_dtype != jnp.int8 else jnp.float32, param_dtype)
        assert_close(y, expected, TOLERANCE[str(jnp.dtype(dtype or computed))])

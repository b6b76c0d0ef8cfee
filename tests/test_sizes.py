"""Sizes as users give them: NumPy's numbers and arrays are ints, and bools are none."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxattn import nn, zoo
from jaxattn.sizes import ints, per_axis


@pytest.mark.parametrize("two", [2, np.int64(2), np.array(2), (2, 2), [2, np.int8(2)], np.array([2, 2])])
def test_numpy_is_welcome(two):
    assert per_axis("f", "strides", two, 2) == (2, 2)
    assert all(type(n) is int for n in per_axis("f", "strides", two, 2))
    x = jnp.ones((4, 4, 2))
    assert zoo.depthwise_conv(x, jnp.ones((3, 3, 2)), strides=two).shape == (2, 2, 2)
    layer = nn.Involution(2, np.array([3, 3]), reduction=2, strides=two, rngs=nnx.Rngs(0))
    assert isinstance(hash(nnx.graphdef(layer)), int)
    assert layer(x).shape == (2, 2, 2)
    assert nn.Conv(2, 3, (np.int64(3), 3), two, rngs=nnx.Rngs(0))(x).shape == (2, 2, 3)


@pytest.mark.parametrize("value", [True, np.bool_(True), (1, True), 1.0, "2", None, 0, (2,), np.array([1.0, 1.0])])
def test_what_is_no_size(value):
    with pytest.raises(ValueError, match=r"^f: strides \(=.*\) must be an int >= 1, or one for each of the 2 axes$"):
        per_axis("f", "strides", value, 2)


@pytest.mark.parametrize("value", [True, (), 2.5, (3, 0)])
def test_what_is_no_size_of_any_rank(value):
    with pytest.raises(ValueError, match=r"^f: window \(=.*\) must be an int >= 1, or one for each axis$"):
        ints("f", "window", value)

"""The exact GELU: its values and derivatives, and that it can be differentiated inside shard_map."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxattn.models.gelu import gelu

X = np.linspace(-6, 6, 48)
CDF = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in X])
DENSITY = np.exp(-X * X / 2) / math.sqrt(2 * math.pi)
VALUE, FIRST, SECOND = X * CDF, CDF + X * DENSITY, (2 - X * X) * DENSITY  # by hand


@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float64, 1e-12), (jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_values_and_the_slope(dtype, rtol):
    x = jnp.asarray(X, dtype)
    value, slope = jax.jvp(gelu, (x,), (jnp.ones_like(x),))
    assert value.dtype == slope.dtype == dtype
    np.testing.assert_allclose(np.asarray(value, np.float64), VALUE, rtol, atol=rtol)
    np.testing.assert_allclose(np.asarray(slope, np.float64), FIRST, rtol, atol=rtol)


def test_inside_shard_map_as_often_as_one_likes():
    """JAX 0.12.0 refuses this for `jax.nn.gelu(x, approximate=False)`."""
    first = lambda x: jax.vmap(jax.grad(gelu))(x)
    second = lambda x: jax.jvp(first, (x,), (jnp.ones_like(x),))[1]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    options = dict(mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    for function, wanted in ((gelu, VALUE), (first, FIRST), (second, SECOND)):
        np.testing.assert_allclose(jax.jit(jax.shard_map(function, **options))(X), wanted, 1e-12, atol=1e-12)

"""The TPU's kernels on a mesh of Explicit axes, interpreted: each device computes its part, and nothing is gathered."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_tpu import interpreted

import jaxattn
from jaxattn.attention import attention
from jaxattn.machine import traced_for
from jaxattn.train.compile import find_devices

__all__ = ["interpreted"]
pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
GATHERED = re.compile("all-gather|all-to-all|collective-permute")


def put(mesh, x, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def mesh_of():
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)


def test_values(interpreted):
    """A batch of four and two heads, over eight devices."""
    mesh, x = mesh_of(), normal(4, 8, 2, 8)
    run = lambda how: lambda x: attention(x, x, x, window=jaxattn.Window(3), implementation=how)
    mine = jax.jit(run("tpu")).lower(put(mesh, x, "data", None, "model")).compile()
    found = mine(put(mesh, x, "data", None, "model"))
    assert not GATHERED.search(mine.as_text())
    assert found.sharding.spec == P("data", None, "model", None)
    np.testing.assert_allclose(found, run("reference")(x), rtol=1e-5, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("over", [("data", "model"), ("data", None), (None, "model")])
def test_gradients(interpreted, over):
    """Grouped heads and sinks; the gradients of what devices share are summed over them."""
    query, key, value = normal(4, 6, 8, 4, 8), normal(4, 6, 8, 2, 8), 2 * normal(4, 6, 8, 2, 8)
    given = (query, key, value, normal(4, 5, 5), normal(4), np.float32(0.7))
    (data, model), mesh = over, mesh_of()
    tokens = (data, None, None, model)
    specs = (tokens, tokens, tokens, (model,), (model,), ())

    def loss(how):
        def run(query, key, value, bias, sinks, scale):
            settings = dict(window=jaxattn.Window((3, 3)), return_residuals=True, implementation=how)
            y, lse = attention(query, key, value, relative_bias=bias, sink_logits=sinks, scale=scale, **settings)
            return (y * y * jnp.cos(y)).sum() + jnp.sin(lse).sum()

        return jax.value_and_grad(run, tuple(range(6)))

    expected = jax.jit(loss("reference"))(*given)
    parts = [put(mesh, x, *spec) for x, spec in zip(given, specs, strict=True)]
    mine = jax.jit(loss("tpu")).lower(*parts).compile()
    found = mine(*parts)
    assert not GATHERED.search(mine.as_text())
    assert [x.sharding.spec for x in found[1]] == [jax.typeof(x).sharding.spec for x in parts]
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.full
def test_compiled_for_four_chips():
    """A kernel each way, and the sums of what devices share."""
    pytest.importorskip("libtpu")
    devices = np.array(find_devices("v5e:2x2")).reshape(2, 2)
    mesh = jax.sharding.Mesh(devices, ("data", "model"), axis_types=(AxisType.Explicit,) * 2)

    def described(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))

    def loss(x, bias):
        y = attention(x, x, x, window=jaxattn.Window((3, 3)), relative_bias=bias, implementation="tpu")
        return (y.astype(jnp.float32) ** 2).sum()

    given = described((2, 16, 16, 4, 64), "data", None, None, "model"), described((4, 5, 5), "model")
    with traced_for("tpu", 4):
        text = jax.jit(jax.grad(loss, (0, 1))).trace(*given).lower(lowering_platforms=("tpu",)).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    assert "all-reduce" in text
    assert not GATHERED.search(text)

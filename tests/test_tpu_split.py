"""The TPU's kernels on a mesh of Explicit axes, interpreted: each device computes its part, and nothing is gathered."""

import importlib.util
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_splash import interpreted as splash_interpreted
from test_tpu import interpreted

import jaxattn
from jaxattn.attention import attention

__all__ = ["interpreted", "splash_interpreted"]
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


@pytest.mark.parametrize(("whose", "shape"), [("tpu", (4, 8)), pytest.param("splash", (1, 8), marks=pytest.mark.full)])
def test_masks_and_segments_go_with_the_batch(interpreted, splash_interpreted, whose, shape):
    """And are whole where they are one for all of it. Extra tokens have heads as well."""
    mesh, x = mesh_of(), normal(4, 8, 2, 8)
    mask, ids = normal(*shape) > 0, (normal(4, 8, 1)[..., 0] > 0).astype(np.int32)
    tpu = whose == "tpu"
    extra = dict.fromkeys(("extra_key", "extra_value"), normal(4, 1, 2, 8)) if tpu else {}
    window, mask = (jaxattn.Window(3), mask) if tpu else (None, mask[:, None, None])
    run = lambda how: (
        lambda x, ids, extra: attention(x, x, x, mask=mask, segment_ids=ids, window=window, implementation=how, **extra)
    )
    given = put(mesh, x, "data", None, "model"), put(mesh, ids, "data"), jax.tree.map(lambda x: put(mesh, x), extra)
    mine = jax.jit(run(whose)).lower(*given).compile()
    assert not GATHERED.search(mine.as_text())
    np.testing.assert_allclose(mine(*given), run("reference")(x, ids, extra), rtol=1e-5, atol=1e-5)


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
@pytest.mark.parametrize("over", [("data", "model"), (None, "model")])
def test_what_hides_and_what_all_see(interpreted, over):
    """Masks of keys, segments and extra tokens lie as batch and heads do; one mask for all is whole everywhere."""
    (data, model), mesh, drawn = over, mesh_of(), np.random.default_rng(0)
    given = dict(query=normal(4, 8, 4, 8), key=normal(4, 8, 2, 8), extra=normal(4, 3, 2, 8))
    hidden = dict(mask=drawn.random((4, 8)) > 0.3, one=drawn.random((1, 8)) > 0.2, ids=drawn.integers(0, 2, (4, 8)))

    def loss(how):
        def run(given, mask, ids):
            tokens, extra = (given["query"], given["key"], given["key"]), given["extra"]
            y = attention(
                *tokens,
                mask=mask,
                segment_ids=ids,
                extra_key=extra,
                extra_value=extra,
                window=jaxattn.Window(3),
                implementation=how,
            )
            return (y * jnp.cos(y)).sum()

        return jax.jit(jax.value_and_grad(run))

    parts = {name: put(mesh, x, data, None, model) for name, x in given.items()}
    for mask in ("mask", "one"):
        expected = loss("reference")(given, hidden[mask], hidden["ids"])
        for lying in ((data,), ()):
            found = loss("tpu")(parts, put(mesh, hidden[mask]), put(mesh, hidden["ids"], *lying))
            for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


ELSEWHERE = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import jaxattn
from jaxattn.train.compile import find_devices

mesh = Mesh(np.array(find_devices("v5e:2x2")).reshape(2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
tokens, heads = NamedSharding(mesh, P("data", None, None, "model")), NamedSharding(mesh, P("model"))
x = jax.ShapeDtypeStruct((2, 16, 16, 4, 64), jnp.bfloat16, sharding=tokens)
bias = jax.ShapeDtypeStruct((4, 5, 5), jnp.bfloat16, sharding=heads)

def loss(x, bias):
    y = jaxattn.attention(x, x, x, window=jaxattn.Window((3, 3)), relative_bias=bias, implementation="tpu")
    return (y.astype(jnp.float32) ** 2).sum()

with jaxattn.traced_for("tpu", 4):
    traced = jax.jit(jax.grad(loss, (0, 1))).trace(x, bias)
    print(traced.lower(lowering_platforms=("tpu",)).compile().as_text())
"""


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU's compiler is not installed")
def test_compiled_for_four_chips():
    """A kernel each way, one for the score table of both, one for the bias, and the sums of what devices share. In a
    process of its own, for libtpu ends the one whose XLA_FLAGS it does not know."""
    environment = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", ELSEWHERE], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count('custom_call_target="tpu_custom_call"') == 4
    assert "all-reduce" in run.stdout
    assert not GATHERED.search(run.stdout)

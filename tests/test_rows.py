"""Projections whose tokens lie in rows for the TPU's kernels, against flax's own, traced as they are for a TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxattn
from jaxattn.models.backbone import MixBlock
from jaxattn.nn.rows import RowLinear


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def pair(first, second, **kwargs):
    """Ours and flax's, of the same parameters."""
    ours, theirs = (
        make(first, second, axis=(-2, -1) if isinstance(first, tuple) else -1, rngs=nnx.Rngs(0), **kwargs, **more)
        for make, more in ((RowLinear, {"implementation": "tpu"}), (nnx.LinearGeneral, {}))
    )
    for layer in (ours, theirs):
        if layer.bias is not None:
            layer.bias[...] = normal(*layer.bias.shape)
    return ours, theirs


def call(layer, x):
    """What the layer gives, compiled here as it is traced for a TPU."""
    with jaxattn.traced_for("tpu"):
        return jax.jit(lambda x: layer(x))(x)


def in_rows(layer, x):
    """How many constraints on a layout there are."""
    with jaxattn.traced_for("tpu"):
        return str(jax.make_jaxpr(layer)(x)).count("layout_constraint")


@settings(deadline=None, max_examples=12)
@given(
    grid=st.lists(st.integers(0, 3), max_size=2),
    columns=st.sampled_from((8, 16)),
    heads=st.integers(1, 3),
    bias=st.booleans(),
    dtype=st.sampled_from((None, jnp.bfloat16)),
)
def test_values_and_gradients(grid, columns, heads, bias, dtype):
    shape = (2, *grid, columns)
    for first, second in ((5, (heads, 4)), ((heads, 4), 5)):
        ours, theirs = pair(first, second, use_bias=bias, dtype=dtype)
        x = normal(*shape, *np.ravel(first))
        graph, state = nnx.split(ours)
        weight = normal(*shape, *np.ravel(second))

        def loss(graph, state, x, weight=weight):
            y = nnx.merge(graph, state)(x)
            return (y * weight).sum(), y

        assert in_rows(ours, x) == (2 if first == 5 else 1)
        run = jax.value_and_grad(loss, (1, 2), has_aux=True)
        with jaxattn.traced_for("tpu"):
            found = jax.jit(functools.partial(run, graph))(state, x)
        expected = run(*nnx.split(theirs), x)
        most = 1e-5 if dtype is None else 2e-2
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            a, b = np.float64(a), np.float64(b)
            assert np.linalg.norm(a - b) <= most * np.linalg.norm(b)


def test_transformations():
    """vmap along any axis, forward derivatives, checkpoints, and the second derivative."""
    ours, theirs = pair(6, (2, 4))
    x = normal(3, 2, 8, 6)
    for transform in (
        lambda f: jax.vmap(f, 1, 2),
        lambda f: lambda x: jax.jvp(f, (x,), (x,))[1],
        lambda f: jax.grad(lambda x: (jax.checkpoint(f)(x) ** 2).sum()),
        lambda f: jax.grad(lambda x: (jax.grad(lambda x: (f(x) ** 3).sum())(x) ** 2).sum()),
    ):
        assert in_rows(transform(ours), x) >= 1
        np.testing.assert_allclose(call(transform(ours), x), transform(theirs)(x), 1e-4, 1e-4)


@pytest.mark.parametrize(
    ("how", "x", "kwargs"),
    [
        ("tpu", (2, 8, 7, 6), {}),  # columns that leave registers with gaps
        ("tpu", (2, 1, 6), {}),  # one token, of a cache
        ("tpu", (8, 6), {}),  # no grid
        ("tpu", (2, 8, 6), {"dot_general": lambda *args, **kwargs: lax.dot_general(*args, **kwargs)}),
        ("tpu", (2, 8, 6), {"dot_general_cls": lambda: lax.dot_general}),
        ("xla", (2, 8, 6), {}),
        (None, (2, 8, 6), {}),
    ],
)
def test_where_it_is_flax_s(how, x, kwargs):
    layer = RowLinear(6, (2, 4), implementation=how, rngs=nnx.Rngs(0), **kwargs)
    assert in_rows(layer, normal(*x)) == 0


def test_asked_for_by_the_environment(monkeypatch):
    layer, x = RowLinear(6, (2, 4), rngs=nnx.Rngs(0)), normal(2, 8, 6)
    monkeypatch.setenv("JAXATTN_IMPLEMENTATION", "tpu")
    assert in_rows(layer, x) == 2
    assert "layout_constraint" not in str(jax.make_jaxpr(layer)(x))  # for this machine


def test_attention_has_them():
    """Queries, keys, values and the output; but not without a window, for which these kernels are not."""
    layer = jaxattn.nn.NeighborhoodAttention(2, 8, window=(3, 3), implementation="tpu", rngs=nnx.Rngs(0))
    assert not isinstance(jaxattn.nn.Attention(2, 8, rngs=nnx.Rngs(0)).query, RowLinear)
    with jaxattn.traced_for("tpu"):
        program = str(jax.make_jaxpr(layer)(normal(1, 8, 8, 8)))
    assert program.count("layout_constraint") == 7


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_what_is_split_is_left_to_flax(kind):
    """Batch and heads over a mesh: the compiler or the types say where each part is, and a reshape might move it."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    ours, theirs = pair(6, (2, 4))
    x, (graph, state) = normal(4, 4, 8, 6), nnx.split(ours)
    state.kernel.set_value(put(ours.kernel[...], None, "model"))
    state.bias.set_value(put(ours.bias[...], "model"))
    with jax.set_mesh(mesh), jaxattn.traced_for("tpu", 8):
        run, split = jax.jit(lambda state, x: nnx.merge(graph, state)(x)), put(x, "data")
        assert "layout_constraint" not in str(run.trace(state, split).jaxpr)
        np.testing.assert_allclose(run(state, split), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tokens", "heads", "rows"), [((), (), 2), (("data",), (), 0), ((), (None, "data"), 0)])
def test_a_mesh_of_one_device(tokens, heads, rows):
    """Whose types say that arrays are split, and JAX then refuses to reshape them."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:1])
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    ours, theirs = pair(6, (2, 4))
    x, (graph, state) = normal(4, 4, 8, 6), nnx.split(ours)
    state.kernel.set_value(put(ours.kernel[...], *heads))
    state.bias.set_value(put(ours.bias[...], *heads[1:]))
    with jax.set_mesh(mesh), jaxattn.traced_for("tpu"):
        run, split = jax.jit(lambda state, x: nnx.merge(graph, state)(x)), put(x, *tokens)
        assert str(run.trace(state, split).jaxpr).count("layout_constraint") == rows
        np.testing.assert_allclose(run(state, split), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_inside_a_shard_map():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    ours, theirs = pair((2, 4), 6)
    x = normal(8, 8, 2, 4)
    run = jax.shard_map(ours, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert in_rows(run, x) == 1
    np.testing.assert_allclose(call(run, x), theirs(x), rtol=1e-5, atol=1e-5)


def test_a_block_in_one_axis(monkeypatch):
    """Its mix still sees the grid, and stochastic depth drops whole examples."""

    class Mix(nnx.Module):
        def __call__(self, x, *, sow_weights):
            assert x.shape == (5, 3, 8, 6)
            return jnp.roll(x, 1, -2) + x.mean((-3, -2), keepdims=True)

    kwargs = dict(layer_scale=0.5, drop_path_rate=0.4, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    block, x = MixBlock(6, 12, Mix(), by_kernels=True, **kwargs), normal(5, 3, 8, 6)

    def run(x):
        y = block(x, rngs=nnx.Rngs(dropout=1))
        return (y**2).sum(), y

    expected = jax.jit(jax.value_and_grad(run, has_aux=True))(x)
    monkeypatch.setenv("JAXATTN_IMPLEMENTATION", "tpu")
    with jaxattn.traced_for("tpu"):
        line = jax.jit(jax.value_and_grad(run, has_aux=True))
        assert "f32[120,6]" in str(line.trace(x).jaxpr)
        found = line(x)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

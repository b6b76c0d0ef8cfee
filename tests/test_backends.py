"""A backend comes in by a record and an entry: chosen where it supports the operands, with every derivative."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxattn
from jaxattn.attention import attention
from jaxattn.kernels import backends
from jaxattn.kernels.backend import Backend, Cost
from jaxattn.normalize import softmax

CALLS = []  # of the toy's functions


def scores(operands, options):
    return operands.scale * jnp.einsum("...qhd,...khd->...hqk", operands.query, operands.key)


def forward(operands, options):
    CALLS.append("forward")
    s = scores(operands, options)
    y = jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(s, -1), operands.value)
    lse = jnp.swapaxes(jax.scipy.special.logsumexp(s, -1), -1, -2)
    return (y, lse)[: 1 + options.residuals]


def backward(operands, cotangents, options, wanted):
    CALLS.append("backward")
    mine = {name: getattr(operands, name) for name in wanted}
    return jax.vjp(lambda mine: forward(operands._replace(**mine), options), mine)[1](cotangents)[0]


def supports(operands, options):
    given = {name for name, x in operands._asdict().items() if x is not None}
    if options.window is not None or given != {"query", "key", "value", "scale"}:
        return "it is dense attention of query, key and value alone"
    if operands.query.shape[-2] != operands.key.shape[-2] or options.normalize is not softmax:
        return "it has softmax and as many key heads as query heads alone"
    return None


def cost(operands, options):
    return Cost(options.queries, options.keys[0], steps=1, held=0, flops=0)


TOY = Backend("toy", supports, forward, backward, cost)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """The toy before all others."""
    monkeypatch.setattr(backends, "BACKENDS", (TOY, *backends.BACKENDS))
    jax.clear_caches()  # of calls in which another was chosen
    CALLS.clear()
    yield
    jax.clear_caches()


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


Q, K, V = draw(2, 5, 3, 4), draw(2, 7, 3, 4, seed=1), draw(2, 7, 3, 6, seed=2)
other = functools.partial(attention, implementation="reference")


def test_it_is_chosen_where_it_supports_the_operands():
    close(attention(Q, K, V), other(Q, K, V))
    assert CALLS == ["forward"]
    x = draw(1, 6, 2, 4)
    close(attention(x, x, x, window=jaxattn.Window(3)), other(x, x, x, window=jaxattn.Window(3)))
    assert CALLS == ["forward"]


def test_named_where_it_cannot_it_says_why():
    with pytest.raises(ValueError, match=r"implementation \(='toy'\) can't, since it is dense attention of query"):
        attention(Q, K, V, bias=draw(5, 7), implementation="toy")
    plan = jaxattn.attention_plan(Q, K, V, bias=draw(5, 7))
    assert plan.backend == "xla"
    assert plan.refused == {"toy": "it is dense attention of query, key and value alone"}
    assert "not toy: it is dense attention" in str(plan)


def close(ours, wanted):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-10), ours, wanted)


def test_derivatives():
    loss = lambda f: lambda *xs: (f(*xs) ** 2).sum()
    for transform in (jax.grad, jax.hessian, lambda f: jax.jacfwd(jax.grad(f))):
        close(transform(loss(attention))(Q, K, V), transform(loss(other))(Q, K, V))
    tangents = tuple(draw(*x.shape, seed=5) for x in (Q, K, V))
    close(jax.jvp(attention, (Q, K, V), tangents), jax.jvp(other, (Q, K, V), tangents))
    assert "backward" in CALLS
    close(jax.grad(jax.checkpoint(loss(attention)))(Q, K, V), jax.grad(loss(other))(Q, K, V))


@pytest.mark.parametrize("in_axes", [(0, 0, 0), (0, None, None), (None, 1, 0)])
def test_vmap(in_axes):
    arrays = [x if a is None else jnp.stack([x, 2 * x, -x], a) for x, a in zip((Q, K, V), in_axes, strict=True)]
    close(jax.vmap(attention, in_axes)(*arrays), jax.vmap(other, in_axes)(*arrays))


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_shard_map():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    cut = jax.shard_map(attention, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    loss = lambda f: lambda *xs: (f(*xs) ** 2).sum()
    close(
        jax.jit(jax.value_and_grad(loss(cut), (0, 1, 2)))(Q, K, V), jax.value_and_grad(loss(other), (0, 1, 2))(Q, K, V)
    )


def test_the_plan_of_a_call():
    """Bytes and FLOPs, counted by hand: every tile of a window as long as the grid meets all keys."""
    x = jax.ShapeDtypeStruct((2, 16, 3, 8), jnp.float32)
    plan = jaxattn.attention_plan(x, x, x, window=jaxattn.Window(16))
    assert (plan.backend, plan.cost.columns, plan.cost.steps) == ("xla", 16, 1)
    assert plan.cost.flops == 2 * 2 * 3 * 16 * 16 * (8 + 8)
    (t,) = plan.cost.tile
    assert plan.cost.held == 4 * 2 * 3 * (16 // t) * (t * 16 + (t + 16) * (8 + 8))
    assert f"{t} queries by 16 keys, in 1 step holding" in str(plan)
    dense = jaxattn.attention_plan(x, x, x, window=jaxattn.Window(5), implementation="reference")
    assert dense.cost.flops == 2 * 2 * 3 * 16 * 5 * (8 + 8)
    with pytest.raises(TypeError, match="unexpected keyword argument 'windows'"):
        jaxattn.attention_plan(x, x, x, windows=3)


@pytest.mark.parametrize("shape", [(0, 8, 2, 4), (2, 0, 2, 4)])
def test_the_plan_of_an_empty_call(shape):
    assert jaxattn.attention_plan(shape, shape, shape).cost[1:5] == (0, 0, 0, 0)
    assert attention(*[jnp.zeros(shape)] * 3).shape == shape


def test_the_plan_says_where_a_function_takes_part():
    x = (1, 8, 2, 4)
    plan = jaxattn.attention_plan(x, x, x, score_mod=lambda s, head, query, key: s, implementation="xla")
    assert "backend  xla, in tiles that JAX differentiates, for a function of yours takes part" in str(plan)


def test_a_call_like_an_earlier_one_is_not_checked_again(monkeypatch):
    from jaxattn import arguments

    checks, check = [], arguments.check
    monkeypatch.setattr(arguments, "check", lambda *given: checks.append(1) or check(*given))
    for n in range(3):
        attention(Q + n, K, V, scale=0.5 + n)
    assert len(checks) == 1
    attention(Q, K, V, scale=0.5, return_residuals=True)
    assert len(checks) == 2

"""What windows take besides the contract's arguments, under every transformation: the same as without. Each is held to
loops by a file of its own.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import agree, quicker

from jaxattn import attention, attention_at, attention_scores, attention_weights, mix, position
from jaxattn.window import Window

DRAWN = np.random.default_rng(0)
X = DRAWN.normal(size=(4, 7, 4, 4))  # [batch, tokens, heads, head_dim]
PLACES = DRAWN.uniform(0, 6, size=(4, 3, 1))
SIZES = np.array([[7], [3], [1], [6]])
SINKS, TABLE = DRAWN.normal(size=4), DRAWN.normal(size=(4, 5))
WINDOW = Window(3, causal=True)
GIVEN = (X, np.int32(2), PLACES, SIZES)


def scores(x, first, places, sizes):
    found = attention_scores(x, x, window=WINDOW, relative_bias=TABLE.astype(x.dtype))
    return jnp.where(jnp.isfinite(found), found, 0)


def turned(x, first, places, sizes):
    tables = position.rotary(7, 4, offset=first)
    return attention(position.rotate(x, tables), position.rotate(x, tables), x, window=WINDOW)


CALLS = {
    "query_offset": lambda x, *_: attention(x[:, :3], x, x, window=WINDOW, query_offset=2),
    "query_offset, traced": lambda x, first, *_: attention(x[:, :3], x, x, window=WINDOW, query_offset=first),
    "sink_logits": lambda x, *_: attention(x, x, x, window=WINDOW, sink_logits=SINKS.astype(x.dtype)),
    "extra_positions": lambda x, *_: attention(
        x, x, x, window=WINDOW, extra_key=x[:, :2], extra_value=x[:, :2], extra_positions=[[0], [4]]
    ),
    "grid_sizes": lambda x, first, places, sizes: attention(x, x, x, window=Window(3), grid_sizes=sizes),
    "attention_scores": scores,
    "attention_weights": lambda x, *_: attention_weights(x, x, window=Window(3, boundary="zero"), sink_logits=SINKS),
    "mix": lambda x, *_: mix(x[..., :3] * x[..., 1:], x[..., :2, :], window=Window(3, boundary="mask")),
    "attention_at": lambda x, first, places, sizes: attention_at(
        x[:, :3], places, x, x, window=WINDOW, relative_bias=TABLE.astype(x.dtype)
    ),
    "window=[...]": lambda x, *_: attention(x, x, x, window=[WINDOW, Window(3, dilation=2)]),
    "rotary": turned,
}

MESHES = [
    jax.make_mesh((2,), ("data",), axis_types=(kind,), devices=jax.devices()[:2])
    for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit)
]


@pytest.mark.core(1)
@pytest.mark.parametrize("name", CALLS)
def test_under_every_transformation(name):
    """vmap, jvp, remat, shard_map with the gradient through it and inside it, and bfloat16; in one program."""
    call = CALLS[name]
    data, every = jax.P("data"), jax.P()
    cut = functools.partial(jax.shard_map, mesh=MESHES[0])
    specs = (data, every, data, data)
    tangent = np.roll(X, 1, 1)

    def one(x, first, places, sizes):
        return call(x[None], first, places[None], sizes[None])[0]

    def with_gradient(f):
        def run(x, *others):
            y, pull = jax.vjp(lambda x: f(x, *others), x)
            return y, pull(jnp.cos(jnp.arange(y[0].size)).reshape(y[0].shape) * jnp.ones_like(y))[0]

        return run

    @functools.partial(jax.jit, compiler_options=quicker)
    def run(*given):
        inside = cut(with_gradient(call), in_specs=specs, out_specs=(data, data))
        ways = {
            "vmap": with_gradient(jax.vmap(one, (0, None, 0, 0))),
            "remat": with_gradient(jax.checkpoint(call)),
            "through shard_map": with_gradient(cut(call, in_specs=specs, out_specs=data)),
            "inside shard_map": inside,
        }
        x, *others = given
        moved = jax.jvp(lambda x: call(x, *others), (x,), (tangent,))[1]
        half = call(x.astype(jnp.bfloat16), *others)
        return with_gradient(call)(*given), {name: way(*given) for name, way in ways.items()}, moved, half

    (y, gradient), ways, moved, half = run(*GIVEN)
    for way, found in ways.items():
        agree(found, (y, gradient), way)
    sent = np.cos(np.arange(y[0].size)).reshape(y[0].shape)
    np.testing.assert_allclose((moved * sent).sum(), (gradient * tangent).sum(), rtol=1e-10)
    assert half.dtype == (jnp.float32 if name in ("attention_scores", "attention_weights") else jnp.bfloat16)
    np.testing.assert_allclose(half.astype(float), y, atol=0.08)


@pytest.mark.core(3)
@pytest.mark.parametrize("name", CALLS)
def test_under_a_mesh_with_explicit_axes(name):
    """The output and the gradient are sharded as the queries are."""
    with jax.set_mesh(mesh := MESHES[1]):
        over = [jax.NamedSharding(mesh, jax.P("data") if np.ndim(x) else jax.P()) for x in GIVEN]
        given = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s) for x, s in zip(GIVEN, over, strict=True)]
        y = jax.eval_shape(CALLS[name], *given)
        gradient = jax.eval_shape(jax.grad(lambda *x: (CALLS[name](*x) ** 2).sum()), *given)
    assert y.sharding.spec[0] == gradient.sharding.spec[0] == "data"


@pytest.mark.full
def test_no_batch_and_no_queries():
    """Of the right shapes, with gradients of zeros; beside no keys a sink is all there is."""
    none, some = jnp.zeros((2, 0, 4, 4)), jnp.asarray(X[:2])
    offset = {"window": WINDOW, "return_residuals": True}
    without_queries = {
        "known": lambda k: attention(none, k, k, query_offset=7, **offset),
        "the last": lambda k: attention(none, k, k, query_offset="end", sink_logits=SINKS, **offset),
        "traced": lambda k: attention(none, k, k, query_offset=jnp.asarray(3), **offset),
        "groups": lambda k: attention(none, k, k, query_offset=0, window=[WINDOW] * 2),
        "scores": lambda k: attention_scores(none, k),
        "weights": lambda k: attention_weights(none, k, sink_logits=SINKS),
        "the mix": lambda k: mix(jnp.zeros((2, 0, 4, 7)), k),
        "places": lambda k: attention_at(none, jnp.zeros((2, 0, 1)), k, k, window=WINDOW, relative_bias=TABLE),
    }

    @functools.partial(jax.jit, compiler_options=quicker)
    def run(k):
        found, pulled = {}, {}
        for name, call in without_queries.items():
            found[name], pull = jax.vjp(call, k)
            pulled[name] = pull(jax.tree.map(jnp.ones_like, found[name]))[0]
        alone = attention(k, none, none, sink_logits=SINKS, return_residuals=True)
        return found, pulled, alone

    for call in CALLS.values():
        whole, empty = (jax.eval_shape(call, *given) for given in (GIVEN, (X[:0], GIVEN[1], PLACES[:0], SIZES[:0])))
        assert empty.shape == (0, *whole.shape[1:])
    found, pulled, (y, lse) = run(some)
    output, of_slots = (2, 0, 4, 4), (2, 0, 4, 7)
    shapes = {"known": output, "the last": output, "traced": output, "groups": output, "the mix": output}
    shapes |= {"places": output, "scores": of_slots, "weights": of_slots}
    assert {name: jax.tree.leaves(found[name])[0].shape for name in without_queries} == shapes
    assert not any(gradient.any() for gradient in pulled.values())
    assert not y.any()
    np.testing.assert_allclose(lse, np.broadcast_to(SINKS, lse.shape))

"""Layers on a grid whose first axis is split over devices: what they give on the whole grid, values and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import layers
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from layers.case import Whole

from jaxattn import nn
from jaxattn.errors import InputError
from jaxattn.train.sharding import split_grid

GRID, FEATURES, SHARDS = (8, 5), 4, 4  # a halo of kernel_size=(5, 3) is as long as a shard
CASES = layers.LAYERS.values()
LAYERS = [(layer.module, kwargs) for layer in CASES if not isinstance(layer.split, Whole) for kwargs in layer.split]
WHOLE = [(layer.module, *layer.split) for layer in CASES if isinstance(layer.split, Whole)]
elsewhere = {nn.Attention, nn.Conv}  # test_sharding, test_halo


@pytest.mark.core(1)
@pytest.mark.parametrize(("module", "kwargs"), LAYERS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_shard_is_a_part_of_the_whole(module, kwargs):
    layer = module(**kwargs, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    params = jax.tree.map(lambda p: p + jnp.asarray(rng.normal(size=p.shape) / 4), params)
    split_grid(layer, "space")
    split = nnx.graphdef(layer)
    mesh = jax.make_mesh(
        (SHARDS,), ("space",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:SHARDS]
    )
    specs = {"mesh": mesh, "in_specs": (P(), P(None, "space")), "out_specs": P(None, "space")}
    call = lambda graph, params, x: nnx.merge(graph, params, rest, copy=True)(x)
    x = jnp.asarray(rng.normal(size=(2, *GRID, FEATURES)))

    def moved(function):
        def total(params, x):
            y = function(params, x)
            return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum(), y

        run = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
        (_, y), gradients = run(params, x)
        return y, gradients

    expected = moved(partial(call, graph))
    found = moved(jax.shard_map(partial(call, split), **specs))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10 * max(1, abs(b).max()))


@pytest.mark.parametrize(("module", "kwargs", "reason"), WHOLE, ids=lambda value: getattr(value, "__name__", ""))
def test_what_needs_the_whole_grid_says_why(module, kwargs, reason):
    layer = module(**kwargs, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match=f"{module.__name__} .the network itself. can't be computed on .*{reason}"):
        split_grid(layer, "space")


def test_a_window_that_a_shard_cuts():
    layer = nn.ShiftedWindowAttention(2, 4, window=3, rngs=nnx.Rngs(0))
    split_grid(layer, "space")
    mesh = jax.make_mesh((2,), ("space",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    run = jax.shard_map(layer, mesh=mesh, in_specs=P("space"), out_specs=P("space"))
    with pytest.raises(ValueError, match=r"window \(=\(3,\)\) must divide the 4 tokens of a shard"):
        run(jnp.ones((8, 4)))


def test_every_layer_is_here():
    public = {module for module in vars(nn).values() if isinstance(module, type)}
    assert {case[0] for case in (*LAYERS, *WHOLE)} | elsewhere == public

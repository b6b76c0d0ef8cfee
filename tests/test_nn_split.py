"""Layers on a grid whose first axis is split over devices: what they give on the whole grid, values and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxattn import nn
from jaxattn.errors import InputError
from jaxattn.train.sharding import split_grid
from jaxattn.window import Window

GRID, FEATURES, SHARDS = (8, 5), 4, 4
HEADS = {"num_heads": 2, "in_features": FEATURES}
WINDOW = {"kernel_size": (5, 3)}  # its halo is as long as a shard
LAYERS = [
    (nn.GlobalAttention, HEADS | {"rank": 2}),
    (nn.SASA, HEADS | {"window": Window((5, 3), boundary="mask")}),
    (nn.HaloAttention, HEADS | {"block": (2, 1), "halo": 1}),
    (nn.NeighborhoodAttention, HEADS | {"window": (5, 3)}),
    (nn.CoAtNetAttention, HEADS | {"grid": GRID}),
    (nn.BoTNetAttention, HEADS | {"grid": GRID}),
    (nn.LearnedRelativeAttention, HEADS | {"grid": GRID, "content": False}),
    (nn.GPSA, {"num_heads": 4, "in_features": FEATURES}),
    (nn.ShiftedWindowAttention, HEADS | {"window": (2, 3), "shift": 1}),
    (nn.ShiftedWindowAttention, HEADS | {"window": (2, 2)}),
    (nn.CvTAttention, HEADS | WINDOW | {"kv_strides": 2}),
    (nn.AugmentedConv, HEADS | WINDOW | {"out_features": 6, "grid": GRID, "value_features": 2}),
    (nn.QnA, HEADS | WINDOW | {"strides": 2}),
    (nn.ParameterKeyAttention, HEADS | {"num_keys": 3}),
    (nn.LambdaLayer, HEADS | WINDOW | {"key_dim": 3, "depth": 2}),
    (nn.AFTConv, HEADS | WINDOW),
    (nn.DepthwiseConv, WINDOW | {"in_features": FEATURES, "strides": 2}),
    (nn.DepthwiseConv, WINDOW | {"in_features": FEATURES, "dilation": (2, 1), "padding": [(5, 3), (0, 1)]}),
    (nn.LightConv, HEADS | WINDOW | {"causal": True}),
    (nn.DynamicConv, HEADS | WINDOW | {"dilation": (2, 1)}),
    (nn.Involution, WINDOW | {"in_features": FEATURES, "strides": 2}),
    (nn.DynamicDepthwiseConv, WINDOW | {"in_features": FEATURES}),
]
WHOLE = [
    (nn.AFT, {"in_features": FEATURES, "grid": GRID}, "its own weight for each token of the whole grid"),
    (nn.AxialAttention, HEADS | {"window": 3}, "does not know which axis of its input is split"),
    (nn.ConvTranspose, WINDOW | {"in_features": FEATURES, "out_features": 3}, "writes to its neighbours' outputs"),
    (nn.OutlookAttention, HEADS | WINDOW, "adds to its neighbours' outputs"),
    (nn.QuadraticAttention, HEADS, "look anywhere on the grid"),
]
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

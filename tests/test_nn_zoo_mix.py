"""The modules of the zoo's layers that are like convolutions, or driven by keys: each is its formula, and trains."""

from functools import partial

import jax
import jax.numpy as jnp
import layers
import numpy as np
import pytest
from flax import nnx

from jaxattn import nn

MIX = layers.of("mix").values()
# module: its arguments, the input's shape, and the loop that it is
LAYERS = {layer.module: layer.step for layer in MIX if layer.step is not None}
# The rounding of a few products of numbers near one, of the largest entry.
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 5e-2}


def drawn(state, seed=0):
    """A state whose parameters are moved at random, so that no zero bias hides a mistake."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: p + jnp.asarray(rng.normal(size=p.shape) / 4, p.dtype), state)


@pytest.mark.core(1)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("module", LAYERS, ids=lambda module: module.__name__)
def test_a_training_step(module, dtype):
    """A jitted step: its output is the formula's, its loss finite and then smaller; every parameter has a gradient."""
    kwargs, shape, loop = LAYERS[module]
    graphdef, params = nnx.split(module(**kwargs, dtype=dtype, rngs=nnx.Rngs(0)), nnx.Param)
    params = drawn(params)
    x = jnp.asarray(np.random.default_rng(9).normal(size=(1, *shape)), dtype)

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # run twice
    def step(params, x):
        def loss_of(params):
            y = nnx.merge(graphdef, params)(x)
            return (y.astype(jnp.float32) ** 2).mean(), y

        (loss, y), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        return loss, y, gradients, jax.tree.map(lambda p, g: p - 0.01 * g, params, gradients)

    loss, y, gradients, stepped = step(params, x)
    assert y.dtype == dtype
    assert step(stepped, x)[0] < loss < np.inf
    for path, gradient in nnx.to_flat_state(gradients):
        # softmax does not see the key's bias, which adds the same to all of a query's scores
        assert path == ("key_bias",) or abs(gradient[...]).max() > 0, path
    exact = {name: np.asarray(p, float) for name, p in nnx.to_pure_dict(params).items()}
    expected = loop({"x": np.asarray(x[0], float), **exact}).real
    assert abs(y[0].astype(float) - expected).max() < TOLERANCE[dtype] * max(1, abs(expected).max())


def test_every_module_is_here():
    """In a record, and in a training step by it or in one of the other files."""
    elsewhere = {nn.Conv, nn.Attention, nn.QuadraticAttention}  # test_nn, test_quadratic
    public = {module for module in vars(nn).values() if isinstance(module, type)}
    assert {layer.module for layer in layers.LAYERS.values()} | {nn.Attention} == public
    assert {layer.module for layer in layers.LAYERS.values() if layer.step is not None} == public - elsewhere


@pytest.mark.core(4)
@pytest.mark.parametrize(
    ("module", "kwargs"),
    [
        (nn.DepthwiseConv, {"in_features": 4, "strides": [2, 1], "padding": [(1, 0), 1], "dilation": [1, 2]}),
        (
            nn.ConvTranspose,
            {"in_features": 4, "out_features": 3, "strides": [2, 1], "padding": [(1, 0), 1], "kernel_dilation": [1, 2]},
        ),
        (nn.LightConv, {"num_heads": 2, "in_features": 4, "dilation": [1, 2]}),
        (nn.DynamicConv, {"num_heads": 2, "in_features": 4, "dilation": [1, 2]}),
        (nn.Involution, {"in_features": 4, "reduction": 2, "strides": [2, 1], "dilation": [1, 2]}),
        (nn.DynamicDepthwiseConv, {"in_features": 4, "dilation": [1, 2]}),
        (nn.OutlookAttention, {"num_heads": 2, "in_features": 4, "strides": [2, 1]}),
        (nn.CvTAttention, {"num_heads": 2, "in_features": 4, "strides": [2, 1], "kv_strides": [1, 2]}),
        (nn.QnA, {"num_heads": 2, "in_features": 4, "strides": [2, 1]}),
        (nn.HaloAttention, {"num_heads": 2, "in_features": 4, "block": [3, 3], "halo": [1, 1]}),
        (nn.ShiftedWindowAttention, {"num_heads": 2, "in_features": 4, "window": [3, 3], "shift": [1, 0]}),
    ],
)
def test_lists_are_sizes_too(module, kwargs):
    """And leave the module's graph what `jax.jit` can hash."""
    windowed = {} if "window" in kwargs or "block" in kwargs else {"kernel_size": [3, 3]}
    layer = module(**kwargs, **windowed, rngs=nnx.Rngs(0))
    assert isinstance(hash(nnx.graphdef(layer)), int)
    x = jnp.ones((6, 6, 4))
    tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in kwargs.items()}
    expected = jax.eval_shape(module(**tuples, **windowed, rngs=nnx.Rngs(0)), x)
    assert jax.eval_shape(layer, x).shape == expected.shape


@pytest.mark.parametrize("strides", [1, (2, 3)])
@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_conv_transpose_is_that_of_flax(strides, transpose_kernel):
    """The same parameters from the same seed, the same results."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 5, 3)))
    ours, theirs = (
        make(3, 6, (3, 2), strides, transpose_kernel=transpose_kernel, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        for make in (nn.ConvTranspose, nnx.ConvTranspose)
    )
    np.testing.assert_array_equal(ours.kernel[...], theirs.kernel[...])
    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_depthwise_conv_is_that_of_flax():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 5, 3)))
    ours = nn.DepthwiseConv(3, (3, 3), 2, strides=2, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    theirs = nnx.Conv(3, 6, (3, 3), 2, feature_group_count=3, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(ours.kernel[...], theirs.kernel[..., 0, :])
    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


@pytest.mark.full
def test_the_activation_may_be_a_module():
    """The batch normalisation that involution's paper has before its nonlinearity; it trains with the layer."""
    layer = nn.Involution(4, 3, reduction=2, activation=nnx.LayerNorm(2, rngs=nnx.Rngs(1)), rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)
    gradient = nnx.grad(lambda layer: (layer(x) ** 2).sum())(layer)
    assert abs(gradient["activation"]["scale"][...]).max() > 0


@pytest.mark.parametrize(("make", "message"), [refused for layer in MIX for refused in layer.refused])
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make(rngs=nnx.Rngs(0))

"""The network for volumes: against the mean of what a split grid says, a step of training, and what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from jaxattn.models import VolumeNet
from jaxattn.train.sharding import make_mesh, on_mesh

SIZES = {"in_features": 1, "num_classes": 3, "patch_size": (2, 2, 2), "width": 8, "depth": 2, "num_heads": 2}


def make(**kwargs):
    return VolumeNet(**{**SIZES, "mlp_dim": 8, "param_dtype": jnp.float64, "rngs": nnx.Rngs(0), **kwargs})


def volumes(batch=2):
    return jnp.asarray(np.random.default_rng(0).normal(size=(batch, 16, 6, 8, 1)))


@pytest.mark.full
def test_a_split_volume_gives_the_same_logits_and_gradients():
    model, x, mesh = make(depth=1), volumes(), make_mesh("data=2,space=4")
    whole, weights = nnx.split(model)
    on_mesh(model, mesh)
    split = nnx.graphdef(model)
    spec = PartitionSpec(("data", "fsdp"), "space")
    forward = jax.shard_map(
        lambda weights, x: nnx.merge(split, weights)(x),
        mesh=mesh,
        in_specs=(PartitionSpec(), spec),
        out_specs=PartitionSpec(("data", "fsdp")),
    )

    def of(f):
        return jax.jit(jax.value_and_grad(lambda weights, x: jnp.square(f(weights, x)).sum(), (0, 1)))(weights, x)

    for one, other in zip(
        jax.tree.leaves(of(lambda weights, x: nnx.merge(whole, weights)(x))), jax.tree.leaves(of(forward)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


def test_a_token_sees_its_window_alone():
    """Of one block with windows of 3 patches, a patch moves with the patches beside it and no farther."""
    model = make(depth=1)
    features = lambda x: model.blocks[0](model.patches(x))[0, :, 1, 2]  # along depth, [8, features]
    moved = jax.jacobian(features)(volumes(1))[..., 0, :, :, :, 0]  # [8, features, 16, 6, 8]
    seen = np.abs(moved).max((1, 3, 4)).reshape(8, 8, 2).max(-1)  # patches by patches
    middle = np.clip(np.arange(8), 1, 6)  # at the border the window is moved inwards
    np.testing.assert_array_equal(seen > 0, np.abs(middle[:, None] - np.arange(8)) <= 1)


@pytest.mark.core(1)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_step_moves_every_weight(dtype):
    model = make(dtype=dtype, param_dtype=jnp.float32, drop_path=0.2, remat=True)
    graph, weights, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def gradients(weights, x):
        logits = nnx.merge(graph, weights, rest)(x, rngs=nnx.Rngs(dropout=jax.random.key(0)))
        return -jax.nn.log_softmax(logits.astype(jnp.float32))[:, 0].mean()

    found = jax.grad(gradients)(weights, volumes().astype(jnp.float32))
    for path, gradient in nnx.to_flat_state(found):
        assert np.isfinite(gradient[...]).all()
        # softmax does not see what all keys have in common
        assert (np.abs(gradient[...]).max() > 0) or path[-2:] == ("key", "bias"), path


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"patch_size": (2, 2)}, r"patch_size \(=\(2, 2\)\) must be an int >= 1, or one for each of the 3"),
        ({"window": (3, 3, 0)}, r"window \(=\(3, 3, 0\)\) must be an int >= 1, or one for each"),
        ({"depth": 0}, r"depth \(=0\) must be an int >= 1"),
        ({"drop_path": 1.5}, r"drop_path"),
    ],
)
def test_a_bad_setting_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


@pytest.mark.parametrize("shape", [(2, 16, 6, 8, 2), (6, 8, 1), (2, 15, 6, 8, 1)])
def test_a_volume_that_does_not_fit(shape):
    with pytest.raises(ValueError, match=r"volumes \(=.*\) must be \[\*batch, depth, .*, in_features \(=1\)\]"):
        make()(jnp.zeros(shape))

"""Inference on images that are split over eight devices: the outputs, and the memory that each device needs."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxattn import models
from jaxattn.train.sharding import make_mesh, split_grid

SHAPE = (1, 1024, 16, 3)  # 256 × 4 tokens of the first stage, so that halos are a small part of what a device holds
NETWORKS = {
    "swin": functools.partial(models.Swin, (2, 1), 16, (2, 2), window=2, image_size=SHAPE[1:3]),
    "nat": functools.partial(models.NAT, (1, 1), 16, (2, 2), window=3),
    "convnext": functools.partial(models.ConvNeXt, (1, 1), (16, 32), layer_scale=1.0),
}


@pytest.mark.full
@pytest.mark.parametrize("name", NETWORKS)
def test_eight_devices_are_one_and_each_needs_an_eighth(name):
    model = NETWORKS[name](num_classes=5, rngs=nnx.Rngs(0))
    model.head.kernel.set_value(model.head.kernel[...] * 50)  # logits about one
    model.eval()
    graph, state = nnx.split(model)
    images = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    alone = jax.jit(lambda state, images: nnx.merge(graph, state)(images)).lower(state, images).compile()

    mesh, rows = make_mesh("space=8"), PartitionSpec(None, "space")
    split_grid(model, "space")
    split = nnx.graphdef(model)
    shards = jax.shard_map(
        lambda state, images: nnx.merge(split, state)(images),
        mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=PartitionSpec(),
    )  # fmt: skip
    state, parts = (
        jax.device_put(tree, NamedSharding(mesh, spec)) for tree, spec in ((state, PartitionSpec()), (images, rows))
    )
    together = jax.jit(shards).lower(state, parts).compile()

    expected = np.asarray(alone(jax.device_get(state), images))
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(together(state, parts), expected, atol=1e-5)
    one, eight = (program.memory_analysis().temp_size_in_bytes for program in (alone, together))
    assert 6.5 < one / eight < 9

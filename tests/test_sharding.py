"""Training over a mesh of eight virtual devices, against one device."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxattn import models
from jaxattn.models.resnet import ResNet
from jaxattn.nn import OutlookAttention
from jaxattn.train.sharding import (
    AXES,
    batch_sharding,
    check_batch,
    make_mesh,
    on_mesh,
    sharded,
    sharded_predict,
    split_grid,
    state_shardings,
    weight_specs,
)

CLASSES = 8


def resnet(stages=(1, 1), **kwargs):
    sizes = dict(block="basic", num_classes=CLASSES, in_features=2, width=8, window=3, num_heads=2)
    settings = {**sizes, "mix": ("conv", "attention")[: len(stages)], "zero_init_residual": False, **kwargs}
    return ResNet(stages, **settings, rngs=nnx.Rngs(0))


def vit():
    grid = dict(image_size=(16, 4), patch_size=2, in_features=2, window=(3, 2), mix=("local", "global"))
    return models.vit_tiny8(**grid, num_classes=CLASSES, width=16, depth=2, mlp_dim=16, rngs=nnx.Rngs(0))


def loss_of(graph):
    def loss_fn(weights, rest, key, images, targets):
        model = nnx.merge(graph, weights, rest, copy=True)
        logits = model(images, rngs=nnx.Rngs(dropout=key))
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        accuracy = (logits.argmax(-1) == targets.argmax(-1)).mean(dtype=jnp.float32)
        return loss, (nnx.state(model, nnx.Not(nnx.Param)), accuracy)

    return loss_fn


def batches(steps, size=8, side=16, width=4):
    """Noise, and for each class its own pattern of waves, along the axis that will be split.

    The images are small, for of many units one may come so near to zero that rounding decides whether its relu is
    open, and that changes a gradient by more than rounding does.
    """
    rng = np.random.default_rng(0)
    labels = rng.integers(CLASSES, size=(steps, size))
    waves = np.sin(np.arange(side) * (labels[..., None] + 1) * np.pi / side)
    images = 0.5 * rng.normal(size=(steps, size, side, width, 2)) + 2 * waves[..., None, None]
    return images.astype(np.float32), np.eye(CLASSES, dtype=np.float32)[labels]


def descent(model, mesh=None, steps=20):
    """Twenty steps of SGD in one compiled loop: losses, accuracies, the last gradients, the weights and the rest."""
    images, targets = batches(steps)
    if mesh is not None:
        on_mesh(model, mesh)
    graph, weights, rest = nnx.split(model, nnx.Param, ...)
    loss_fn = loss_of(graph)
    if mesh is not None:
        specs = weight_specs(mesh, weights)
        loss_fn = sharded(loss_fn, mesh, specs)
        weights = jax.device_put(weights, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))
        rest = jax.device_put(rest, NamedSharding(mesh, P()))
        image = batch_sharding(mesh)["image"]
        images = jax.device_put(images, NamedSharding(mesh, P(None, *image.spec)))
        targets = jax.device_put(targets, NamedSharding(mesh, P(None, *batch_sharding(mesh)["label"].spec)))

    def step(carry, batch):
        weights, rest, _ = carry
        key = jax.random.key(0)
        (loss, (rest, accuracy)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(weights, rest, key, *batch)
        weights = jax.tree.map(lambda w, g: w - 0.05 * g, weights, gradients)
        return (weights, rest, gradients), jnp.stack([loss, accuracy])

    run = jax.jit(lambda carry, batch: jax.lax.scan(step, carry, batch))
    run = jax.jit(functools.partial(jax.lax.scan, step))
    (weights, rest, gradients), measured = run(
        (weights, rest, jax.tree.map(jnp.zeros_like, weights)), (images, targets)
    )
    return measured, gradients, weights, rest


@functools.cache
def alone(make):
    return descent(make())


@pytest.mark.full
@pytest.mark.parametrize("text", ["data=8", "fsdp=8", "space=8", "data=2,fsdp=2,space=2"])
def test_twenty_steps_of_a_resnet(text):
    """Convolution, local attention, strides and BatchNorm: losses and gradients as on one device."""
    measured, gradients, weights, rest = descent(resnet(), make_mesh(text))
    expected = alone(resnet)
    assert expected[0][-1, 0] < 0.9 * expected[0][0, 0]
    chex.assert_trees_all_close(measured, expected[0], atol=1e-5)
    for got, want in ((gradients, expected[1]), (weights, expected[2]), (rest, expected[3])):
        chex.assert_trees_all_close(jax.tree.leaves(got), jax.tree.leaves(want), atol=1e-5)
    if "fsdp=8" in text:
        kernels = [leaf for leaf in jax.tree.leaves(gradients) if any(n % 8 == 0 for n in leaf.shape)]
        assert {leaf.addressable_shards[0].data.size / leaf.size for leaf in kernels} == {1 / 8}


def test_twenty_steps_of_a_vit():
    measured, gradients, *_ = descent(vit(), make_mesh("data=2,fsdp=2,space=2"))
    expected = alone(vit)
    chex.assert_trees_all_close(measured, expected[0], atol=1e-5)
    chex.assert_trees_all_close(jax.tree.leaves(gradients), jax.tree.leaves(expected[1]), atol=1e-5)


@pytest.mark.full
def test_blocks_that_are_left_out_and_computed_anew():
    """An image's parts leave out the same blocks."""

    def steps(devices):
        mesh = jax.make_mesh((1, 1, devices), AXES, (AxisType.Auto,) * 3, devices=jax.devices()[:devices])
        return descent(resnet(drop_path=0.5, remat=True), mesh, steps=2)

    one, two = steps(1), steps(2)
    chex.assert_trees_all_close(one[0], two[0], atol=1e-5)
    chex.assert_trees_all_close(jax.tree.leaves(one[1]), jax.tree.leaves(two[1]), atol=1e-5)


def memory(devices, axis, model, side):
    """What the compiler says of loss and gradients on a mesh with all of its devices on one axis."""
    sizes = [devices if axis == name else 1 for name in AXES]
    mesh = jax.make_mesh(sizes, AXES, (AxisType.Auto,) * 3, devices=jax.devices()[:devices])
    on_mesh(model, mesh)
    graph, weights, rest = nnx.split(model, nnx.Param, ...)
    specs = weight_specs(mesh, weights)

    def placed(spec, x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    everywhere = functools.partial(jax.tree.map, functools.partial(placed, P()))
    batch = batch_sharding(mesh)
    operands = (
        jax.tree.map(placed, specs, weights),
        everywhere(rest),
        everywhere(jax.eval_shape(jax.random.key, 0)),
        jax.ShapeDtypeStruct((8, side, side, 2), jnp.float32, sharding=batch["image"]),
        jax.ShapeDtypeStruct((8, CLASSES), jnp.float32, sharding=batch["label"]),
    )
    step = jax.jit(jax.value_and_grad(sharded(loss_of(graph), mesh, specs), has_aux=True))
    return step.lower(*operands).compile().memory_analysis()


@pytest.mark.full
def test_activations_fall_with_space():
    """As 1/n, but for a halo, and for attention the buffers of one tile."""
    one, two, eight = (memory(n, "space", resnet((1,), mix="conv"), 64).temp_size_in_bytes for n in (1, 2, 8))
    assert two < 1.2 * one / 2
    assert eight < 1.2 * one / 8
    assert eight < 1.1 * two / 4
    one, eight = (memory(n, "space", resnet(mix="attention"), 128).temp_size_in_bytes for n in (1, 8))
    assert eight < 1.3 * one / 8


@pytest.mark.full
def test_arguments_fall_with_fsdp():
    one, eight = (memory(n, "fsdp", resnet((1,), width=64), 8).argument_size_in_bytes for n in (1, 8))
    assert eight < 1.1 * one / 8


def test_meshes():
    assert dict(make_mesh("data=4, space=2").shape) == {"data": 4, "fsdp": 1, "space": 2}
    assert dict(make_mesh("").shape) == {"data": 8, "fsdp": 1, "space": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch=8", r"mesh \(='batch=8'\): 'batch=8' must be one of data=SIZE, fsdp=SIZE, space=SIZE"),
        ("data=4,data=2", "'data=2' must be one of .* each once"),
        ("data=0", "SIZE of at least 1"),
        ("data", "'data' must be one of"),
        ("data=4", "takes 4 devices and there are 8; this fits: data=8,fsdp=1,space=1"),
        ("data=3,space=2", "takes 6 devices and there are 8; this fits: data=4,fsdp=1,space=2"),
        ("data=3,space=3", "takes 9 devices and there are 8; this fits: data=8"),
    ],
)
def test_impossible_meshes(text, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(text)


def test_what_does_not_divide():
    mesh = make_mesh("data=2,fsdp=2,space=2")
    check_batch(mesh, 8, (16, 15, 3))
    with pytest.raises(ValueError, match=r"batch_size \(=6\) must be a multiple of data·fsdp \(=4\)"):
        check_batch(mesh, 6, (16, 16, 3))
    with pytest.raises(ValueError, match=r"height \(=15\) must be a multiple of space \(=2\)"):
        check_batch(mesh, 8, (15, 16, 3))
    model = resnet(mix="conv")
    with pytest.raises(ValueError, match=r"stride \(=2\) must divide the 1 tokens that each of 8 shards"):
        memory(8, "space", model, 8)


class Other(nnx.Module):
    """A network that says nothing of split grids."""

    def __init__(self, layer):
        self.layer = layer


def test_what_can_not_be_split():
    layer = OutlookAttention(2, 4, (3, 3), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"Other \(the network itself\) can't be computed"):
        split_grid(Other(nnx.Linear(2, 2, rngs=nnx.Rngs(0))), "space")
    model = resnet()
    model.blocks[0].layers[0].layer = layer
    with pytest.raises(ValueError, match=r"OutlookAttention \(blocks.0.layers.0.layer\) can't be .*: a window adds to"):
        split_grid(model, "space")
    with pytest.raises(ValueError, match="QuadraticAttention"):
        split_grid(models.vit_tiny8(mix="quadratic", num_heads=4, rngs=nnx.Rngs(0)), "space")
    with pytest.raises(ValueError, match="Dropout"):
        split_grid(models.vit_tiny8(dropout=0.1, rngs=nnx.Rngs(0)), "space")
    model = models.vit_tiny8(class_token=True, in_features=2, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"ViT: class_token \(=True\) must be False where the grid is split over 'space'"
    ):
        memory(2, "space", model, 8)


@pytest.mark.full
def test_a_network_becomes_whole_again():
    model = resnet()
    model.eval()
    graph = nnx.graphdef(model)
    split_grid(model, "space")
    assert nnx.graphdef(model) != graph
    split_grid(model, None)
    assert model(jnp.ones((2, 8, 8, 2))).shape == (2, CLASSES)


class State(NamedTuple):
    """As the training has it."""

    step: Any
    weights: Any
    rest: Any
    moments: Any
    average: Any


def test_where_the_state_lies():
    mesh = make_mesh("data=2,fsdp=4")
    weights, rest = nnx.state(resnet(), nnx.Param, ...)
    state = State(jnp.zeros((), int), weights, rest, optax.adamw(0.1).init(weights), weights)
    places = state_shardings(mesh, jax.eval_shape(lambda: state))
    placed = jax.device_put(state, places)
    kernel = placed.weights["blocks"][1]["layers"][0]["layer"]["query"]["kernel"][...]
    assert kernel.sharding.spec == P("fsdp")
    assert placed.moments[0].mu["blocks"][1]["layers"][0]["layer"]["query"]["kernel"][...].sharding.spec == P("fsdp")
    assert placed.rest["stem_norm"]["mean"][...].sharding.spec == P()
    assert placed.step.sharding.spec == P()
    chex.assert_trees_all_equal(placed, state)


@pytest.mark.full
def test_predictions():
    """With running statistics, from weights that are split."""
    mesh, model = make_mesh("data=2,fsdp=2,space=2"), resnet()
    model.eval()
    graph, weights, rest = nnx.split(model, nnx.Param, ...)
    (images,), _ = batches(1)
    expected = nnx.merge(graph, weights, rest)(images)
    on_mesh(model, mesh)
    graph = nnx.graphdef(model)
    predict = sharded_predict(lambda *x: nnx.merge(graph, *x[:2])(x[2]), mesh, weight_specs(mesh, weights))
    chex.assert_trees_all_close(jax.jit(predict)(weights, rest, images), expected, atol=1e-5)


def test_parts_of_the_batch_draw_apart_and_parts_of_an_image_together():
    mesh = make_mesh("data=2,fsdp=2,space=2")

    def loss_fn(weights, rest, key, images, targets):
        draw = jax.random.uniform(key, images.shape[:1])
        return draw.mean(), (rest, draw.mean())

    run = sharded(loss_fn, mesh, P())
    images, targets = jnp.zeros((8, 4, 4, 1)), jnp.zeros((8, 2))
    loss, (_, accuracy) = jax.jit(run)(jnp.zeros(4), {}, jax.random.key(0), images, targets)
    keys = [jax.random.fold_in(jax.random.key(0), part) for part in range(4)]
    expected = jnp.mean(jnp.concatenate([jax.random.uniform(key, (2,)) for key in keys]))
    np.testing.assert_allclose([loss, accuracy], expected, rtol=1e-6)

"""ResNets: their arithmetic against loops and Flax's layers, their shapes, and that they learn."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxattn.models import ResNet, resnet18, resnet50, tiny
from jaxattn.models.attention_stem import AttentionStem
from jaxattn.models.pooling import average_pool


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


FAST_COMPILATION = {"xla_backend_optimization_level": 0}  # each is run a few times at most


def run(model, images, **kwargs):
    """The model's output, compiled; its statistics move as they would without."""
    graphdef, state = nnx.split(model)

    @partial(jax.jit, compiler_options=FAST_COMPILATION)
    def forward(state, images):
        model = nnx.merge(graphdef, state)
        return model(images, **kwargs), nnx.state(model)

    y, state = forward(state, images)
    nnx.update(model, state)
    return y


def state_of(model):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))


@pytest.mark.parametrize("size", [(4, 6), (5, 4), (7, 3), (1, 1)])
def test_average_pool(size):
    """An odd edge averages what there is."""
    x = np.asarray(normal(0, 2, *size, 3, dtype=jnp.float64))
    rows, columns = -(-size[0] // 2), -(-size[1] // 2)
    expected = np.zeros((2, rows, columns, 3))
    for i, j in np.ndindex(rows, columns):
        expected[:, i, j] = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean(axis=(1, 2))
    np.testing.assert_allclose(average_pool(jnp.asarray(x)), expected, rtol=0, atol=1e-14)
    assert average_pool(jnp.ones((4, 4, 1), jnp.bfloat16)).dtype == jnp.bfloat16


def test_attention_stem_is_the_formula_of_the_paper():
    """One query, head, slot and mixture at a time, the values mixed as written, without merging attentions."""
    stem = AttentionStem(3, 8, num_heads=2, mixtures=3, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    x = np.asarray(normal(1, 5, 6, 3, dtype=jnp.float64))
    state, head_dim = state_of(stem), 4
    query, key = (np.tensordot(x, state[name]["kernel"], 1) for name in ("query", "key"))
    values = np.tensordot(x, state["value"]["kernel"], 1)  # [5, 6, mixtures, heads, head_dim]
    expected = np.zeros((5, 6, 2, head_dim))
    for i, j, head in np.ndindex(5, 6, 2):
        scores, mixed = [], []
        for a, b in np.ndindex(4, 4):
            u, v = i + a - 2, j + b - 2
            if 0 <= u < 5 and 0 <= v < 6:
                scores.append(head_dim**-0.5 * query[i, j, head] @ key[u, v, head])
                logits = state["mixture"] @ (state["row"][a] + state["column"][b]) * head_dim**-0.5
                p = np.exp(logits) / np.exp(logits).sum()
                mixed.append(p @ values[u, v, :, head])
        weights = np.exp(scores) / np.exp(scores).sum()
        expected[i, j, head] = weights @ np.array(mixed)
    np.testing.assert_allclose(jax.jit(stem)(jnp.asarray(x)), expected.reshape(5, 6, 8), rtol=0, atol=1e-12)


def torch_like_forward(state, images, *, block, strides):
    """A convolutional ResNet in eval mode from a state, by `lax` and textbook BatchNorm; the CIFAR stem."""

    def conv(x, kernel, stride, pad):
        pads = [(pad, pad)] * 2
        return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def norm(x, s):
        return (x - s["mean"]) / np.sqrt(s["var"] + 1e-5) * s["scale"] + s["bias"]

    x = jnp.maximum(norm(conv(images, state["stem"]["kernel"], 1, 1), state["stem_norm"]), 0)
    for n, stride in enumerate(strides):
        b, y = state["blocks"][n], x
        for m in range(len(b["layers"])):
            spatial = block == "basic" or m == 1
            kernel = b["layers"][m]["layer"]["kernel"] if spatial else b["layers"][m]["kernel"]
            # v1.5: the stride is the first 3 × 3's
            y = norm(conv(y, kernel, stride if m == (block == "bottleneck") else 1, int(spatial)), b["norms"][m])
            y = jnp.maximum(y, 0) if m + 1 < len(b["layers"]) else y
        if "shortcut" in b:
            x = norm(conv(x, b["shortcut"]["kernel"], stride, 0), b["shortcut_norm"])
        x = jnp.maximum(x + y, 0)
    return x.mean(axis=(1, 2)) @ state["head"]["kernel"] + state["head"]["bias"]


@pytest.mark.full
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_forward_is_a_resnet(block):
    model = ResNet((1, 2), block=block, width=4, num_classes=5, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    leaves, structure = jax.tree.flatten(state)
    # positive, so that variances are; in float64 also where Flax keeps statistics in float32
    leaves = [jnp.abs(normal(n, *leaf.shape, dtype=jnp.float64)) + 0.1 for n, leaf in enumerate(leaves)]
    model = nnx.merge(graphdef, jax.tree.unflatten(structure, leaves))
    model.eval()
    images = normal(0, 2, 7, 6, 3, dtype=jnp.float64)
    reference = partial(torch_like_forward, state_of(model), block=block, strides=(1, 2, 1))
    expected = jax.jit(reference, compiler_options=FAST_COMPILATION)(images)
    np.testing.assert_allclose(run(model, images), expected, rtol=1e-10)


@pytest.mark.full
@pytest.mark.parametrize("mix", ["conv", "attention"])
@pytest.mark.parametrize("stem_mix", ["conv", "attention"])
def test_grids(mix, stem_mix):
    """Both mixes and both stems reduce a grid alike, also an odd one."""
    model = nnx.eval_shape(lambda: resnet50(mix=mix, stem_mix=stem_mix, num_classes=3, rngs=nnx.Rngs(0)))
    abstract = lambda model, x: model.features(x)
    for side, expected in ((64, 2), (72, 3)):
        out = nnx.eval_shape(abstract, model, jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32))
        assert out.shape == (2, expected, expected, 2048)


@pytest.mark.parametrize(
    ("kwargs", "kinds"),
    [
        ({"mix": "conv"}, ["Conv"] * 4),
        ({"mix": "attention"}, ["Attention"] * 4),
        ({"mix": ("conv", "attention")}, ["Conv", "Conv", "Attention", "Attention"]),
    ],
)
def test_the_mix_is_chosen_by_stage(kwargs, kinds):
    model = nnx.eval_shape(lambda: tiny(**kwargs, rngs=nnx.Rngs(0)))
    assert [type(layer.layer).__name__ for block in model.blocks for layer in block.layers] == kinds
    assert nnx.eval_shape(lambda model, x: model(x), model, normal(0, 2, 8, 8, 1)).shape == (2, 10)


def test_attention_is_sasas():
    """Row and column embeddings, no bias, no projection out, the border left out; pooling where the stage strides."""
    first, second = nnx.eval_shape(lambda: tiny(mix="attention", rngs=nnx.Rngs(0))).blocks
    layer = first.layers[0].layer
    assert layer.window.boundary == ("mask", "mask")
    assert [table.shape for table in layer.key_embedding] == [(4, 9, 4), (4, 9, 4)]
    assert layer.out is None
    assert layer.query.bias is None
    assert [mixer.pool for block in (first, second) for mixer in block.layers] == [False, False, True, False]


@pytest.mark.core(1)
@pytest.mark.parametrize("mix", ["conv", "attention"])
def test_bfloat16(mix):
    """Computes in bfloat16 near what float32 gives, with float32 parameters, logits and statistics."""
    images = normal(0, 4, 8, 8, 1)
    single, half = (
        tiny(mix=mix, dtype=dtype, zero_init_residual=False, rngs=nnx.Rngs(0)) for dtype in (None, jnp.bfloat16)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half))} == {jnp.dtype("float32")}
    a, b = run(single, images), run(half, images)
    half.eval()
    assert jax.eval_shape(half.blocks[0], jax.nn.relu(half.stem(images))).dtype == jnp.bfloat16
    assert b.dtype == jnp.float32
    # ten roundings to 8 bits of numbers of order one, normalised by BatchNorm
    np.testing.assert_allclose(a, b, atol=0.1)
    assert not np.array_equal(a, b)


def test_blocks_begin_as_the_identity():
    """With the last scale at zero (Goyal et al. 2017), a block without projection returns what came in."""
    x = jax.nn.relu(normal(0, 2, 8, 8, 32))
    np.testing.assert_array_equal(tiny(mix="attention", rngs=nnx.Rngs(0)).blocks[0](x), x)
    assert not np.allclose(tiny(zero_init_residual=False, rngs=nnx.Rngs(0)).blocks[0](x), x)


def test_train_and_eval_switch_batch_norm():
    model, images = tiny(rngs=nnx.Rngs(0)), normal(0, 16, 8, 8, 1) + 3
    mean = lambda: np.asarray(model.stem_norm.mean[...])
    model.eval()
    before = run(model, images[:1])
    np.testing.assert_array_equal(mean(), 0)
    model.train()
    run(model, images)
    activations = np.asarray(model.stem(images)).mean(axis=(0, 1, 2))
    # running = 0.9 · 0 + 0.1 · batch, in float32
    np.testing.assert_allclose(mean(), 0.1 * activations, rtol=1e-4, atol=1e-6)
    model.eval()
    assert not np.allclose(run(model, images[:1]), before)
    np.testing.assert_allclose(run(model, images)[:1], run(model, images[:1]), rtol=1e-4, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("kwargs", [{}, {"mix": "attention", "stem_mix": "attention"}], ids=["conv", "attention"])
def test_training_lowers_the_loss(kwargs):
    """A jitted pure step, as the training loop's; every parameter has a gradient that is finite."""
    model = tiny(**kwargs, window=3, width=8, zero_init_residual=False, rngs=nnx.Rngs(0))
    graphdef, weights, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.adam(1e-2)
    images, labels = normal(0, 16, 8, 8, 1), jnp.arange(16) % 10

    @partial(jax.jit, compiler_options=FAST_COMPILATION)
    def step(weights, rest, moments):
        def loss_fn(weights):
            model = nnx.merge(graphdef, weights, rest, copy=True)
            loss = optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()
            return loss, nnx.state(model, nnx.BatchStat)

        (loss, rest_), gradients = jax.value_and_grad(loss_fn, has_aux=True)(weights)
        updates, moments = optimizer.update(gradients, moments, weights)
        return optax.apply_updates(weights, updates), rest_, moments, loss, gradients

    moments, losses = optimizer.init(weights), []
    for _ in range(8):
        weights, rest, moments, loss, gradients = step(weights, rest, moments)
        losses.append(loss)
    assert losses[-1] < 0.7 * losses[0]
    for path, gradient in nnx.to_flat_state(gradients):
        assert np.isfinite(gradient[...]).all(), path
        assert (gradient[...] != 0).any(), path


@pytest.mark.full
def test_weights_are_sown_by_every_attention():
    model = tiny(mix="attention", rngs=nnx.Rngs(0))
    _, sown = nnx.capture(model, nnx.Intermediate)(normal(0, 2, 8, 8, 1), sow_weights=True)
    shapes = [weights.get_value()[0].shape for _, weights in nnx.to_flat_state(sown)]
    # the stride is the pool's, after the attention
    assert shapes == [(2, 8, 8, 4, 25), (2, 8, 8, 4, 25), (2, 8, 8, 4, 25), (2, 4, 4, 4, 25)]


@pytest.mark.full
def test_any_batch_axes():
    model = tiny(mix="attention", rngs=nnx.Rngs(0))
    model.eval()
    images = normal(0, 2, 3, 8, 8, 1)
    expected = jnp.stack([run(model, image) for image in images])
    np.testing.assert_allclose(run(model, images), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run(model, images[0, 0]), expected[0, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"block": "wide"}, r"ResNet: block \(='wide'\) must be one of 'basic', 'bottleneck'"),
        ({"stem": "mnist"}, r"ResNet: stem \(='mnist'\) must be one of 'cifar', 'imagenet'"),
        ({"stem_mix": "pool"}, r"ResNet: stem_mix \(='pool'\) must be one of 'conv', 'attention'"),
        ({"mix": "mlp"}, r"ResNet: mix \(='mlp'\) must be one of 'conv', 'attention'"),
        ({"mix": ("conv", "mlp", "conv", "conv")}, r"ResNet: mix \(='mlp'\) must be one of 'conv', 'attention'"),
        ({"mix": ("conv", "conv")}, r"ResNet: mix \(=\('conv', 'conv'\)\) must be a string or one per stage \(4\)"),
        ({"mix": "attention", "num_heads": 3}, r"Attention: num_heads \(=3\) must divide qkv_features \(=64\)"),
        ({"stem_mix": "attention", "num_heads": 3}, r"AttentionStem: num_heads \(=3\) must divide features \(=64\)"),
    ],
)
def test_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: resnet18(**kwargs, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (8, 1)])
def test_image_errors(shape):
    with pytest.raises(ValueError, match=r"ResNet: images \(=.*\) must be .* in_features \(=1\)\]"):
        tiny(rngs=nnx.Rngs(0))(jnp.ones(shape))

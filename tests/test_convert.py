"""`convert`: layers and networks whose convolutions are attention give the same outputs, and come back as they were."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_nn import normal, randomized

from jaxattn import cli, models, nn, zoo
from jaxattn.equivalence import conv_to_attention, convert
from jaxattn.train import data, session
from jaxattn.train.augment import normalize
from jaxattn.train.run import read_config

# Two orders of the same float64 sums.
TOLERANCE = 1e-10


def conv(kind, *args, **kwargs):
    return randomized(kind(*args, param_dtype=jnp.float64, **kwargs, rngs=nnx.Rngs(0)))


@functools.partial(jax.jit, static_argnums=0)
def apply(graphdef, state, x):
    return nnx.merge(graphdef, state)(x)


def run(model, x):
    return apply(*nnx.split(model), x)


ALL = ("SAME", "VALID", "CIRCULAR", "REFLECT", 1)
LAYERS = [
    ((3,), {}, ("SAME", "CAUSAL")),
    ((4,), {"strides": 2, "kernel_dilation": 2}, (*ALL, "CAUSAL", [(2, 0)])),
    ((3, 2), {"strides": (2, 1), "feature_group_count": 2}, (*ALL, [(2, 0), 1])),
    ((3, 2, 3), {"strides": 2, "use_bias": False}, ("SAME", "CIRCULAR")),
]


@pytest.mark.core(1)
@pytest.mark.parametrize(("size", "kwargs", "padding"), [(s, k, p) for s, k, paddings in LAYERS for p in paddings])
def test_layers(size, kwargs, padding):
    kind = nnx.Conv if isinstance(padding, str) else nn.Conv
    layer = conv(kind, 4, 6, size, padding=padding, **kwargs)
    x = normal(1, 2, *(7, 6, 4)[: len(size)], 4)
    attends = convert(layer)
    assert type(attends) is nn.QuadraticAttention
    y = run(layer, x)
    np.testing.assert_allclose(run(attends, x), y, atol=TOLERANCE)
    back = convert(attends, to="conv")
    assert type(back) is nn.Conv
    np.testing.assert_array_equal(back.kernel[...], layer.kernel[...])
    np.testing.assert_allclose(run(back, x), y, atol=TOLERANCE)


@pytest.mark.core(1)
@pytest.mark.parametrize("kind", [nn.Conv, nnx.Conv])
def test_more_layers(kind):
    """SAME_LOWER, a mask, strides of None; and the model is left as it was."""
    mask = jnp.asarray(np.random.default_rng(2).integers(0, 2, (3, 3, 2, 2)), float)
    layer = conv(kind, 2, 2, (3, 3), None, padding="SAME_LOWER", mask=mask)
    before = nnx.to_pure_dict(nnx.state(layer))
    x = normal(3, 6, 5, 2)
    attends = convert(layer)
    np.testing.assert_allclose(attends(x), layer(x), atol=TOLERANCE)
    np.testing.assert_allclose(convert(attends, to="conv")(x), layer(x), atol=TOLERANCE)
    attends.value[...] = 0 * attends.value[...]
    attends.bias[...] = 0 * attends.bias[...]
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(layer)))


@pytest.mark.core(1)
@pytest.mark.parametrize(
    ("size", "kwargs"),
    [
        ((7,), {"padding": [(6, 0)]}),
        ((3, 2), {"multiplier": 3, "strides": (1, 2), "dilation": 2}),
        ((3, 3), {"use_bias": False, "padding": "VALID"}),
    ],
)
def test_depthwise_layers(size, kwargs):
    """They come back as convolutions of as many groups."""
    layer = conv(nn.DepthwiseConv, 4, size, **kwargs)
    x = normal(1, 2, *(7, 6)[: len(size)], 4)
    attends = convert(layer)
    assert type(attends) is nn.QuadraticAttention
    back = convert(attends, to="conv")
    np.testing.assert_array_equal(back.kernel[...], layer.kernel[...][..., None, :])
    for made in (attends, back):
        np.testing.assert_allclose(run(made, x), run(layer, x), atol=TOLERANCE)


class Mine(nnx.Module):
    """A user's network: a list, a layer that stands twice, BatchNorm, and a head that is no convolution."""

    def __init__(self, rngs):
        def layer(*args, **kwargs):
            return nnx.Conv(*args, **kwargs, param_dtype=jnp.float64, rngs=rngs)

        self.first = layer(3, 4, (3, 3), strides=2)
        self.twice = layer(4, 4, (3, 3), feature_group_count=4)
        self.again = self.twice
        self.more = nnx.List([layer(4, 4, (1, 1)), nnx.BatchNorm(4, param_dtype=jnp.float64, rngs=rngs)])
        self.block = nnx.Sequential(layer(4, 4, (2, 2), padding="VALID"), nnx.relu)
        self.head = nnx.Linear(4, 5, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.again(nnx.relu(self.twice(self.first(x)))))
        for layer in self.more:
            x = layer(x)
        return self.head(self.block(x).mean((-3, -2)))


@pytest.mark.full
def test_a_users_network():
    model = randomized(Mine(nnx.Rngs(0)))
    model.eval()
    x = normal(4, 2, 9, 8, 3)
    attends = convert(model)
    assert attends.again is attends.twice
    assert attends.first is not model.first
    kinds = [type(module).__name__ for _, module in nnx.iter_modules(attends)]
    assert kinds.count("QuadraticAttention") == 4
    assert kinds.count("Conv") == 0
    y = run(model, x)
    np.testing.assert_allclose(run(attends, x), y, atol=TOLERANCE)
    back = convert(attends, to="conv")
    assert back.again is back.twice
    np.testing.assert_allclose(run(back, x), y, atol=TOLERANCE)
    np.testing.assert_array_equal(back.twice.kernel[...], model.twice.kernel[...])


@functools.partial(jax.jit, static_argnums=0)
def gradient(graphdef, params, rest, x):
    def loss(params):
        model = nnx.merge(graphdef, params, rest, copy=True)
        return jnp.square(model(x)).sum(), model.layers[1].mean[...]

    return jax.grad(loss, has_aux=True)(params)


def test_training_goes_on():
    """In training mode too, statistics and gradients are those of the convolutions, and reach the heads' widths."""
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Conv(3, 4, (3, 3), strides=2, rngs=rngs), nnx.BatchNorm(4, rngs=rngs), jnp.tanh)
    x = normal(5, 2, 9, 8, 3, dtype=jnp.float32)
    direct, mean = gradient(*nnx.split(model, nnx.Param, ...), x)
    through, other = gradient(*nnx.split(convert(model), nnx.Param, ...), x)
    assert (mean != 0).all()
    np.testing.assert_allclose(other, mean, atol=1e-5 * np.abs(mean).max())
    kernel, value = direct["layers"][0]["kernel"][...], through["layers"][0]["value"][...]
    value = jnp.moveaxis(value, 1, 0).reshape(kernel.shape)
    np.testing.assert_allclose(value, kernel, atol=1e-4 * np.abs(kernel).max())
    soft, _ = gradient(*nnx.split(convert(model, alpha=2.0), nnx.Param, ...), x)
    assert (soft["layers"][0]["alpha"][...] != 0).all()
    assert (soft["layers"][0]["centre"][...] != 0).any()


@pytest.mark.core(1)
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda **kwargs: models.tiny(width=8, **kwargs), (8, 8, 1)),
        (lambda **kwargs: models.resnet18(width=4, num_classes=10, **kwargs), (16, 16, 3)),
        (models.resnet18, (64, 64, 3)),
        (models.convnext_atto, (64, 64, 3)),
    ],
    ids=["tiny", "resnet18", "resnet18 as published", "convnext_atto as published"],
)
def test_networks(make, shape):
    """In float32, as they are trained; with random statistics and no zero anywhere."""
    rng = np.random.default_rng(6)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))

    def draw(leaf):
        values = rng.normal(scale=0.3, size=leaf.shape) if leaf.ndim > 1 else rng.uniform(0.5, 1.5, leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    state = jax.tree.map(draw, state)
    model = nnx.merge(graphdef, state)
    model.eval()
    x = jnp.asarray(rng.normal(size=(2, *shape)), jnp.float32)
    y = run(model, x)
    attends = convert(model)
    assert not any(isinstance(module, nn.Conv) for _, module in nnx.iter_modules(attends))
    scale = np.abs(y).max()
    seen = run(attends, x)
    np.testing.assert_allclose(seen, y, atol=1e-5 * scale)
    np.testing.assert_array_equal(np.argsort(-seen)[:, :5], np.argsort(-y)[:, :5])
    back = convert(attends, to="conv")
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(back)), nnx.to_pure_dict(nnx.state(model)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The residual network that `jaxattn train` made, read from its run, and the test images and labels of its data."""
    run = tmp_path_factory.mktemp("runs") / "digits"
    cli.main(["train", "--mix", "conv", "--epochs", "8", "--out", str(run)])
    config = read_config(run)
    digits = data.load(config.data, config.seed)
    model = session.load_model(config, digits.image_shape, len(digits.class_names), run)
    images, labels = digits.test.fetch(np.arange(len(digits.test)))
    return model, normalize(images, digits.mean, digits.std), labels


@pytest.mark.full
def test_what_jaxattn_train_made(trained):
    """A trained network sees the same as attention, and again as convolutions: logits, classes and accuracy."""
    model, images, labels = trained
    model.eval()
    logits = np.asarray(run(model, images))
    assert (logits.argmax(-1) == labels).mean() > 0.9
    attends = convert(model)
    soft = convert(model, rtol=1e-3)  # heads of finite width, each layer within a thousandth of its norm
    kinds = [type(module) for _, module in nnx.iter_modules(attends)]
    assert nn.Conv not in kinds
    assert kinds.count(nn.QuadraticAttention) == [type(module) for _, module in nnx.iter_modules(model)].count(nn.Conv)
    for network, rtol in ((attends, 1e-5), (convert(attends, to="conv"), 1e-6)):
        seen = np.asarray(run(network, images))
        np.testing.assert_allclose(seen, logits, atol=rtol * np.abs(logits).max())
        np.testing.assert_array_equal(seen.argmax(-1), logits.argmax(-1))
    seen = np.asarray(run(soft, images))
    assert 1e-6 < np.abs(seen - logits).max() / np.abs(logits).max() < 1e-2
    assert (seen.argmax(-1) == labels).mean() > 0.9


def test_rtol():
    layer = conv(nn.Conv, 3, 4, (3, 3))
    x = jnp.asarray(np.random.default_rng(7).choice([-1.0, 1.0], size=(6, 6, 3)))
    norm = jnp.abs(layer.kernel[...]).sum((0, 1, 2)).max()
    for rtol in (1e-1, 1e-4):
        attends = convert(layer, rtol=rtol)
        error = jnp.abs(attends(x) - layer(x)).max()
        assert rtol * norm / 1000 < error <= rtol * norm
        np.testing.assert_allclose(convert(attends, to="conv")(x), attends(x), atol=TOLERANCE)
    assert (convert(layer, alpha=3.0).alpha[...] == 3).all()


class Scaled(nnx.Conv):
    def __call__(self, inputs, out_sharding=None):
        return 2 * super().__call__(inputs, out_sharding)


@pytest.mark.parametrize(
    ("layer", "kwargs", "message"),
    [
        (
            lambda r: nnx.ConvTranspose(2, 2, (3,), rngs=r),
            {},
            r"the model \(=ConvTranspose\) must be an nn.Conv",
        ),
        (lambda r: nn.ConvTranspose(2, 2, 3, rngs=r), {}, r"the model \(=ConvTranspose\) .* output is finer"),
        (
            lambda r: nnx.Sequential(Scaled(2, 2, 3, rngs=r)),
            {},
            r"layers/0 \(=Scaled\) must be an nn.Conv.* it calls something of its own",
        ),
        (
            lambda r: nn.Conv(2, 2, 3, axis_name="space", rngs=r),
            {},
            r"the model: axis_name \(='space'\) must be None",
        ),
        (lambda r: nnx.Conv(2, 2, 3, input_dilation=2, rngs=r), {}, r"the model: input_dilation \(=2\) must be 1"),
        (
            lambda r: nnx.Conv(2, 2, 3, preferred_element_type=jnp.float32, rngs=r),
            {},
            "the model: preferred_element_type .* must be the default",
        ),
        (
            lambda r: nnx.Linear(2, 2, rngs=r),
            {},
            r"model \(=Linear\) must hold a layer to convert: nn.Conv, ",
        ),
        (
            lambda r: nnx.Conv(2, 2, 3, rngs=r),
            {"to": "conv"},
            r"model \(=Conv\) must hold a layer to convert: nn.Q",
        ),
        (lambda r: nnx.Conv(2, 2, 3, rngs=r), {"to": "dense"}, r"to \(='dense'\) must be one of 'attention', 'conv'"),
        (lambda r: nnx.Conv(2, 2, 3, rngs=r), {"to": "conv", "alpha": 1.0}, r"alpha \(=1.0\) .* the way back is exact"),
        (
            lambda r: nn.QuadraticAttention(3, 2, rngs=r),
            {"to": "conv"},
            r"the model: attention_to_conv: .* \(=None\)",
        ),
        (
            lambda r: nn.QuadraticAttention(3, 2, window=zoo.Slide((3, 3), boundary="edge"), rngs=r),
            {"to": "conv"},
            r"the model: padding \(=SAME\) and boundary \(='edge'\) must be nn.Conv's: boundary 'zero'",
        ),
    ],
)
def test_refuses(layer, kwargs, message):
    with pytest.raises(ValueError, match=f"convert: {message}"):
        convert(layer(nnx.Rngs(0)), **kwargs)


def test_refuses_as_conv_to_attention_does():
    layer = nnx.Conv(2, 2, 3, rngs=nnx.Rngs(0))
    for function in (
        lambda **kwargs: convert(layer, **kwargs),
        lambda **kwargs: conv_to_attention(layer.kernel[...], **kwargs),
    ):
        with pytest.raises(ValueError, match=r"alpha \(=-1\.0\) must be a number > 0"):
            function(alpha=-1.0)

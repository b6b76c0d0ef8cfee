"""NAT and DiNAT against their equations, written over the authors' arrays: loops over neighbourhoods, and `jax.lax`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxattn import models, pretrained

SIZES = {"depths": (2, 1), "width": 8, "num_heads": (2, 2), "num_classes": 5}


def conv(x, weight, bias=None):
    """3 × 3 of stride 2, padded by one; channels last."""
    y = lax.conv_general_dilated(x, weight, (2, 2), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "OIHW", "NHWC"))
    return np.asarray(y if bias is None else y + bias)


def norm(x, weight, bias):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * weight + bias


def neighbours(n, window, dilation):
    """For each token of an axis, the tokens that it sees, and the offsets in the table (NATTEN's definition)."""
    tokens, offsets = np.zeros((n, window), int), np.zeros((n, window), int)
    for i in range(n):
        group, place = i % dilation, i // dilation
        count = len(range(group, n, dilation))
        start = min(max(place - window // 2, 0), count - window)
        tokens[i] = [(start + u) * dilation + group for u in range(window)]
        offsets[i] = [start + u - place + window - 1 for u in range(window)]
    return tokens, offsets


def attend(x, a, prefix, heads, window, dilation):
    """Zeros are added where the grid is smaller than the dilated window, and take part."""
    rows, columns = x.shape[1:3]
    side = window * dilation
    x = np.pad(x, [(0, 0), (0, max(0, side - rows)), (0, max(0, side - columns)), (0, 0)])
    batch, height, width, features = x.shape
    qkv = x @ a[f"{prefix}.qkv.weight"].T + a[f"{prefix}.qkv.bias"]
    query, key, value = np.moveaxis(qkv.reshape(batch, height, width, 3, heads, -1), 3, 0)
    (ri, ro), (ci, co) = neighbours(height, window, dilation), neighbours(width, window, dilation)
    out = np.zeros_like(query)
    for i in range(height):
        for j in range(width):
            near = np.ix_(range(batch), ri[i], ci[j])
            scores = np.einsum("nhd,nrchd->nhrc", query[:, i, j], key[near]) / np.sqrt(query.shape[-1])
            scores += a[f"{prefix}.rpb"][:, ro[i][:, None], co[j]]
            weights = np.exp(scores - scores.max((-2, -1), keepdims=True))
            weights /= weights.sum((-2, -1), keepdims=True)
            out[:, i, j] = np.einsum("nhrc,nrchd->nhd", weights, value[near])
    out = out.reshape(batch, height, width, features) @ a[f"{prefix}.proj.weight"].T + a[f"{prefix}.proj.bias"]
    return out[:, :rows, :columns]


def network(a, x, window, dilations, scaled, sizes=SIZES):
    """Logits, and the features of every stage."""

    def apply(function, name, x):
        return function(x, a[f"{name}.weight"], a[f"{name}.bias"])

    def linear(x, weight, bias):
        return x @ weight.T + bias

    x = apply(norm, "patch_embed.norm", apply(conv, "patch_embed.proj.1", apply(conv, "patch_embed.proj.0", x)))
    features = []
    for level, depth in enumerate(sizes["depths"]):
        for n in range(depth):
            block = f"levels.{level}.blocks.{n}"
            dilation = dilations[level] if n % 2 else 1
            y = apply(norm, f"{block}.norm1", x)
            y = attend(y, a, f"{block}.attn", sizes["num_heads"][level], window, dilation)
            x = x + (a[f"{block}.gamma1"] * y if scaled else y)
            y = apply(linear, f"{block}.mlp.fc1", apply(norm, f"{block}.norm2", x))
            y = apply(linear, f"{block}.mlp.fc2", np.asarray(jax.nn.gelu(y, approximate=False)))
            x = x + (a[f"{block}.gamma2"] * y if scaled else y)
        features.append(x)
        if level + 1 < len(sizes["depths"]):
            x = conv(x, a[f"levels.{level}.downsample.reduction.weight"])
            x = apply(norm, f"levels.{level}.downsample.norm", x)
    return apply(linear, "head", apply(norm, "norm", x).mean((1, 2))), features


@pytest.mark.core(1)
@pytest.mark.parametrize("size", [(32, 40), (33, 50), (24, 12)])
@pytest.mark.parametrize(("dilations", "scaled"), [((1, 1), True), ((2, 1), False)])
def test_the_equations(size, dilations, scaled):
    """Whole, ragged and too small grids, from 8 × 10 to 6 × 3 tokens and half of that."""
    make = functools.partial(models.NAT, **SIZES, window=3, dilations=dilations, layer_scale=1.0 if scaled else None)
    model = nnx.eval_shape(lambda: make(param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    entries = model.translations[0].entries(model)
    arrays = {name: rng.normal(size=entry.shape) / entry.shape[-1] ** 0.5 for name, entry in entries.items()}
    pretrained.fill(model, arrays)
    images = rng.normal(size=(2, *size, 3))
    logits, features = network(arrays, images, 3, dilations, scaled)
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, x: (lambda m: (m(x), m.pyramid(x)))(nnx.merge(graphdef, state)))
    mine, pyramid = run(state, images)
    np.testing.assert_allclose(mine, logits, rtol=0, atol=1e-10)
    for ours, theirs in zip(pyramid, features, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.full
def test_a_published_size():
    """DiNAT-Mini in float32, to 1e-5 of the largest logit."""
    sizes = {"depths": (3, 4, 6, 5), "num_heads": (2, 4, 8, 16)}
    model = nnx.eval_shape(lambda: models.dinat_mini(num_classes=5, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    entries = model.translations[0].entries(model)
    arrays = {name: rng.normal(size=entry.shape) / entry.shape[-1] ** 0.5 for name, entry in entries.items()}
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    pretrained.fill(model, arrays)
    images = rng.normal(size=(1, 96, 64, 3)).astype(np.float32)
    wide = {name: array.astype(np.float64) for name, array in arrays.items()}
    expected, _ = network(wide, images.astype(np.float64), 7, (8, 4, 2, 1), False, sizes)
    graphdef, state = nnx.split(model)
    found = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, images)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_names_of_hugging_face():
    """Queries, keys and values apart, and both layer scales in one array."""
    model = nnx.eval_shape(lambda: models.NAT(**SIZES, layer_scale=1.0, rngs=nnx.Rngs(0)))
    shapes = {name: entry.shape for name, entry in model.translations[2].entries(model).items()}
    assert shapes["dinat.encoder.levels.1.layers.0.layer_scale_parameters"] == (2, 16)
    assert shapes["dinat.encoder.levels.0.downsample.reduction.weight"] == (16, 8, 3, 3)
    assert shapes["dinat.encoder.levels.1.layers.0.attention.self.key.weight"] == (16, 16)
    assert shapes["dinat.encoder.levels.1.layers.0.attention.self.rpb"] == (2, 13, 13)
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    from transformers.models.dinat import modeling_dinat

    modeling_dinat.requires_backends = lambda *_: None  # its kernels are not called
    config = transformers.DinatConfig(
        embed_dim=8, depths=[2, 1], num_heads=[2, 2], dilations=[[1, 1], [1]], layer_scale_init_value=1.0, num_labels=5
    )
    config.mlp_ratio = 3.0
    theirs = transformers.DinatForImageClassification(config).state_dict()
    shapes = {name: entry.shape for name, entry in model.translations[2].entries(model).items()}
    assert {k: v for k, v in shapes.items() if "classifier" not in k} == {
        name: tuple(tensor.shape) for name, tensor in theirs.items() if "classifier" not in name
    }

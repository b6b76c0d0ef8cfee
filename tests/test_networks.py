"""What every network with published weights has: names in PyTorch that lead there and back, a pyramid of features, and
pooled features without a head. Nothing here needs PyTorch; `test_networks_timm` compares values with it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxattn import models, pretrained
from jaxattn.models.translation import Translation

STAGES = ((1, 3, 1, 1, 8), (2, 5, 2, 2, 12), (1, 3, 2, 3, 12), (1, 3, 1, 3, 16))
SMALL = {  # constructor, arguments, an image's size, timm's name of some array and its shape
    "resnet": (models.ResNet, {"stage_sizes": (1, 2), "stem": "imagenet"}, (32, 40), "layer2.1.conv3.weight",
               (512, 128, 1, 1)),
    "efficientnet": (models.EfficientNet, {"stages": STAGES}, (32, 40), "blocks.1.0.conv_dw.weight", (16, 1, 5, 5)),
    "convnext": (models.ConvNeXt, {"depths": (1, 2), "widths": (8, 16)}, (32, 40), "stages.1.blocks.1.mlp.fc1.weight",
                 (64, 16)),
    "convnextv2": (models.ConvNeXt, {"depths": (1, 1), "widths": (8, 16), "version": 2, "pointwise": True}, (32, 40),
                   "stages.1.blocks.0.mlp.fc1.weight", (64, 16, 1, 1)),
    "swin": (models.Swin, {"depths": (1, 2), "width": 8, "num_heads": (2, 2), "window": (4, 3)}, (32, 44),
             "layers.1.blocks.1.attn.relative_position_bias_table", (35, 2)),
    "swinv2": (models.Swin, {"depths": (1, 2), "width": 8, "num_heads": (2, 2), "window": 4, "version": 2}, (32, 44),
               "layers.1.blocks.1.attn.q_bias", (16,)),
    "nat": (models.NAT, {"depths": (1, 2), "width": 8, "num_heads": (2, 2), "window": 3, "layer_scale": 1.0}, (32, 40),
            "levels.1.blocks.1.attn.rpb", (2, 5, 5)),
}  # fmt: skip


def abstract(make, **kwargs):
    return nnx.eval_shape(lambda: make(**kwargs, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("name", SMALL)
def test_weights_go_there_and_back(name):
    """Each array of PyTorch's holds each of our numbers once: what was written is read, and all of it is used."""
    make, kwargs, _, key, shape = SMALL[name]
    model = abstract(make, **kwargs)
    rng = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))):
        variable.set_value(jnp.asarray(rng.normal(size=variable.shape), variable.dtype))
    arrays = pretrained.torch_arrays(model)
    assert arrays[key].shape == shape
    for translation in model.translations:
        entries = translation.entries(model)
        parts = [path for entry in entries.values() for path in entry.ours]
        assert len(parts) == len(set(parts)) == len(nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))))
        assert sum(math.prod(entry.shape) for entry in entries.values()) == sum(map(np.size, arrays.values()))
    other = abstract(make, **kwargs)
    pretrained.fill(other, arrays)
    states = [nnx.to_pure_dict(nnx.state(m, (nnx.Param, nnx.BatchStat))) for m in (model, other)]
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.parametrize("name", SMALL)
def test_features(name):
    """A pyramid of the sizes that `strides` and `widths` say, its last one pooled without a head, and bfloat16."""
    make, kwargs, size, _, _ = SMALL[name]
    images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    model = abstract(make, **kwargs, num_classes=0)
    pyramid, pooled = nnx.eval_shape(lambda m, x: (m.pyramid(x), m(x)), model, images)
    assert [f.shape for f in pyramid] == [
        (2, *(-(-n // stride) for n in size), width) for stride, width in zip(model.strides, model.widths, strict=True)
    ]
    assert pooled.ndim == 2
    assert make is models.EfficientNet or pooled.shape[-1] == model.widths[-1]
    half = abstract(make, **kwargs, num_classes=7, dtype=jnp.bfloat16)
    pyramid, logits = nnx.eval_shape(lambda m, x: (m.pyramid(x), m(x)), half, images)
    assert {f.dtype for f in pyramid} == {jnp.dtype(jnp.bfloat16)}
    assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)
    with pytest.raises(ValueError, match=rf"{make.__name__}: images \(=\(2, 8, 8, 1\)\) must be \[\*batch, "):
        nnx.eval_shape(lambda m: m(jnp.ones((2, 8, 8, 1))), model)


@pytest.mark.core(4)
@pytest.mark.parametrize("name", pretrained.names())
def test_published(name):
    """Each published network is built, has names in PyTorch, and says where its weights are and by which licence."""
    record = pretrained.published(name)
    assert record.source.count("/") == 1
    assert record.licence
    model = abstract(record.make, num_classes=0)
    assert all(isinstance(translation, Translation) for translation in model.translations)
    image = np.full((64, 80, 3), 255, np.uint8)
    expected = (1 - np.array(record.preprocess.mean)) / np.array(record.preprocess.std)
    seen = record.preprocess._replace(size=16)(image)
    assert seen.shape == (16, 16, 3)
    np.testing.assert_allclose(seen, np.broadcast_to(expected, seen.shape), atol=1e-5)

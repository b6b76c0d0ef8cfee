"""What every network with published weights has: names in PyTorch that lead there and back, a pyramid of features, and
pooled features without a head. Nothing here needs PyTorch; `test_networks_timm` compares values with it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxattn
from jaxattn import models, pretrained
from jaxattn.train.sharding import split_grid

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
    "maxvit": (models.MaxViT, {"depths": (1, 1), "widths": (32, 64), "stem": 8, "image_size": 64}, (32, 64),
               "stages.1.blocks.0.attn_grid.attn.rel_pos.relative_position_bias_table", (2, 3, 3)),
    "coatnet": (models.CoAtNet, {"depths": (1,) * 4, "widths": (8, 32, 32, 32), "stem": (4, 8), "image_size": (32, 64)},
                (32, 64), "stages.2.blocks.0.attn.qkv.weight", (96, 32, 1, 1)),
    **{
        mix: (models.BoTNet, {"depths": (1, 2), "widths": (16, 32), "mix": mix, "mixed": ((), (0, 1)), "halo": 1,
                              "num_heads": (1, 2), "stem": 8, "image_size": (32, 64), "window": 4 + (mix == "lambda")},
              (32, 64), f"stages.1.0.self_attn.{name}", shape)
        for mix, name, shape in (("botnet", "pos_embed.width_rel", (31, 4)), ("halo", "kv.weight", (16, 8, 1, 1)),
                                 ("lambda", "conv_lambda.weight", (16, 1, 5, 5, 1)))
    },
    "caformer": (models.MetaFormer, {"depths": (1, 1, 1), "widths": (8, 16, 32), "mix": ("pool", "conv", "attention"),
                                     "mlp_head": True}, (32, 48), "stages.2.blocks.0.token_mixer.qkv.weight", (96, 32)),
    "convmixer": (models.ConvMixer, {"width": 8, "depth": 2, "kernel_size": 5}, (35, 42), "blocks.1.0.fn.0.weight",
                  (8, 1, 5, 5)),
    "volo": (models.VOLO, {"depths": (1, 1, 1), "widths": (8, 16, 16), "num_heads": (2, 4, 4), "stem": 4,
                           "image_size": (32, 48)}, (32, 48), "network.0.0.attn.attn.weight", (162, 8)),
    "samvit": (models.SAMViT, {"depths": (2, 1), "width": 8, "num_heads": 2, "window": 3, "patch_size": 8, "neck": 4,
                               "image_size": (32, 40)}, (32, 40), "blocks.2.attn.rel_pos_w", (9, 4)),
    "vit": (models.vit_tiny8, {"image_size": (32, 40), "patch_size": 8, "in_features": 3, "class_token": True,
                               "registers": 2, "layer_scale": 1.0}, (32, 40), "pos_embed", (1, 21, 64)),
    "siglip": (models.vit_tiny8, {"image_size": (32, 40), "patch_size": 8, "in_features": 3, "pool": "attention"},
               (32, 40), "attn_pool.kv.weight", (128, 64)),
}  # fmt: skip


def abstract(make, **kwargs):
    return nnx.eval_shape(lambda: make(**kwargs, rngs=nnx.Rngs(0)))


def randomize(model):
    """Every parameter and statistic from N(0, 1/4)."""
    rng = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))):
        variable.set_value(jnp.asarray(rng.normal(size=variable.shape) / 2, variable.dtype))
    return model


@pytest.mark.parametrize("name", SMALL)
def test_weights_go_there_and_back(name):
    """Each array of PyTorch's holds each of our numbers once: what was written is read, and all of it is used."""
    make, kwargs, _, key, shape = SMALL[name]
    model = abstract(make, **kwargs)
    randomize(model)
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
    assert make in (models.EfficientNet, models.MetaFormer) or pooled.shape[-1] == model.widths[-1]
    half = abstract(make, **kwargs, num_classes=7, dtype=jnp.bfloat16)
    pyramid, logits = nnx.eval_shape(lambda m, x: (m.pyramid(x), m(x)), half, images)
    assert {f.dtype for f in pyramid} == {jnp.dtype(jnp.bfloat16)}
    assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)
    with pytest.raises(ValueError, match=rf"{type(model).__name__}: images \(=\(2, 8, 8, 1\)\) must be \[\*batch, "):
        nnx.eval_shape(lambda m: m(jnp.ones((2, 8, 8, 1))), model)


def test_published():
    """Each published network says where its weights are, by which licence, and what its images went through."""
    image = np.full((64, 80, 3), 255, np.uint8)
    for name in pretrained.names():
        record = pretrained.published(name)
        assert record.source.count("/") == 1, name
        assert record.licence, name
        make = record.make.func if isinstance(record.make, functools.partial) else record.make
        assert getattr(models, make.__name__) is make, name  # of the table of parameter counts
    for step in {record.preprocess._replace(size=16) for record in map(pretrained.published, pretrained.names())}:
        seen = step(image)
        expected = (1 - np.array(step.mean)) / np.array(step.std)
        np.testing.assert_allclose(seen, np.broadcast_to(expected, (16, 16, 3)), atol=1e-5)


SWIN: dict = {"depths": (2, 2), "width": 8, "num_heads": (2, 2), "window": 4, "image_size": 64, "num_classes": 5}
MESHED = {
    "swin": lambda: models.Swin(**SWIN, rngs=nnx.Rngs(0)),
    "swinv2": lambda: models.Swin(**SWIN, version=2, rngs=nnx.Rngs(0)),
    "nat": lambda: models.NAT((2,), 8, (2,), window=3, dilations=(2,), num_classes=5, rngs=nnx.Rngs(0)),
    "nat in windows": lambda: jaxattn.remix(
        models.NAT((2,), 8, (2,), window=2, dilations=(2,), num_classes=5, rngs=nnx.Rngs(0)), "window"
    ),
    "convnext": lambda: models.ConvNeXt((1, 1), (8, 16), version=2, num_classes=5, rngs=nnx.Rngs(0)),
    "botnet": lambda: models.BoTNet((1, 1), (16, 32), mixed=((), (0,)), num_heads=(1, 2), stem=8, image_size=64,
                                    num_classes=5, rngs=nnx.Rngs(0)),
    "samvit": lambda: models.SAMViT((2,), 8, 2, window=3, image_size=64, patch_size=4, neck=8, num_classes=5,
                                    rngs=nnx.Rngs(0)),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("name", MESHED)
def test_a_grid_that_is_split(name):
    """Over two devices, as over one."""
    model = randomize(MESHED[name]())
    model.eval()
    images = jnp.asarray(np.random.default_rng(0).normal(size=(1, 64, 64, 3)), jnp.float32)
    expected = model(images)
    split_grid(model, "space")
    graphdef, state = nnx.split(model)
    mesh = jax.sharding.Mesh(jax.devices()[:2], "space")
    run = jax.shard_map(
        lambda s, x: nnx.merge(graphdef, s)(x), mesh=mesh, in_specs=(P(), P(None, "space")), out_specs=P()
    )
    np.testing.assert_allclose(jax.jit(run)(state, images), expected, rtol=1e-4, atol=1e-4)

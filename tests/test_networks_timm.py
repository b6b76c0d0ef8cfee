"""Networks against timm's, from the same files of weights; where torch and timm are installed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch")
timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm")
safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed: pip install safetensors")

from flax import nnx  # noqa: E402

from jaxattn import models, pretrained  # noqa: E402
from jaxattn.models.layout import Entry, layout  # noqa: E402
from jaxattn.models.resize import resize_flat_table, resize_positions  # noqa: E402
from jaxattn.models.vit_blocks import quick_gelu  # noqa: E402

FAST_COMPILATION = {"xla_backend_optimization_level": 0}  # each is run a few times at most


def randomized(network):
    """timm's network in float64, every parameter and statistic drawn, of a size that keeps signals of order one."""
    torch.manual_seed(0)
    network = network.double().eval()
    for name, parameter in network.named_parameters():
        scale = parameter.ndim < 2 and name.endswith(("weight", "gamma"))
        fan = parameter[0].numel() if parameter.ndim > 1 else 4
        torch.nn.init.normal_(parameter, mean=float(scale), std=fan**-0.5)
    for name, statistic in network.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            torch.nn.init.uniform_(statistic, 0.2, 0.8)
    return network


def ours_from(make, path):
    """Our network in float64, filled from a file as `load` fills it."""
    model = nnx.eval_shape(lambda: make(param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.BatchStat)):
        variable.set_value(jax.ShapeDtypeStruct(variable.shape, jnp.float64))
    pretrained.fill(model, pretrained.read_weights(path))
    model.eval()
    return model


def features_of(network, images):
    """timm's logits and the features of its stages, channels last."""
    final, features = network.forward_intermediates(images)
    return network.forward_head(final), [feature.permute(0, 2, 3, 1) for feature in features]


def outputs_of(model, images):
    """Our logits and the features of all stages, in one program."""
    graphdef, state = nnx.split(model)

    def run(state, images):
        model = nnx.merge(graphdef, state)
        return model(images), model.pyramid(images)

    return jax.jit(run, compiler_options=FAST_COMPILATION)(state, images)


def images_of(size, seed=0):
    return np.random.default_rng(seed).normal(size=(2, *size, 3))


def assert_close(found, expected, tolerance, message=""):
    """To the tolerance, of the largest number where that is above one: lambda layers cube what they are given."""
    atol = tolerance * max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol, err_msg=message)


def assert_same(make, theirs, tmp_path, sizes, *, features=features_of, last=None, gradient=False):
    """Logits and features of every size, and the way back: timm loads what we save, strictly, and is as it was.

    `last`: how many of timm's features ours end with; None: all. `gradient`: compared too, at the first size.
    """
    theirs = randomized(theirs)
    torch.save({"epoch": 1, "state_dict": theirs.state_dict()}, tmp_path / "theirs.pth")
    ours = ours_from(make, tmp_path / "theirs.pth")
    for size in sizes:
        images = images_of(size)
        with torch.no_grad():
            logits, stages = features(theirs, torch.tensor(images).permute(0, 3, 1, 2))
        mine, pyramid = outputs_of(ours, jnp.asarray(images))
        assert np.ptp(logits.numpy(), axis=0).max() > 1e-3  # the two images are told apart
        assert_close(mine, logits.numpy(), 1e-10, str(size))
        stages = stages if last is None else stages[-last:]
        assert len(pyramid) == len(stages) == len(ours.strides)
        assert [stage.shape[-1] for stage in pyramid] == list(ours.widths)
        for stage, theirs_stage, stride in zip(pyramid, stages, ours.strides, strict=True):
            assert_close(stage, theirs_stage.numpy(), 1e-10, f"{size}, {stride}")
    if gradient:
        assert_same_gradient(ours, theirs, images_of(sizes[0]))
    pretrained.save(ours, tmp_path / "ours.safetensors")
    before = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    for parameter in theirs.parameters():
        torch.nn.init.zeros_(parameter)
    theirs.load_state_dict(safetensors.load_file(tmp_path / "ours.safetensors"), strict=True)
    for name, tensor in theirs.state_dict().items():
        assert name.endswith("num_batches_tracked") or torch.equal(tensor, before[name]), name
    return ours, theirs


def assert_same_gradient(ours, theirs, images):
    """The images' gradient of a random sum of the logits, to 1e-8."""
    tensor = torch.tensor(images, requires_grad=True)
    logits = theirs(tensor.permute(0, 3, 1, 2))
    cotangent = np.random.default_rng(1).normal(size=tuple(logits.shape))
    logits.backward(torch.tensor(cotangent))
    graphdef, state = nnx.split(ours)
    loss = lambda x: (nnx.merge(graphdef, state)(x) * cotangent).sum()
    found = jax.jit(jax.grad(loss), compiler_options=FAST_COMPILATION)(jnp.asarray(images))
    assert_close(found, tensor.grad.numpy(), 1e-8)


CNN_SIZES = [(64, 64), (96, 64), (50, 71)]


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_resnet(block, tmp_path):
    from timm.models import resnet

    kinds = {"basic": resnet.BasicBlock, "bottleneck": resnet.Bottleneck}
    theirs = resnet.ResNet(kinds[block], [1, 2, 1, 1], num_classes=5)
    make = functools.partial(models.ResNet, (1, 2, 1, 1), block=block, stem="imagenet", num_classes=5)
    assert_same(make, theirs, tmp_path, CNN_SIZES, last=4, gradient=block == "basic")


def test_efficientnet_lite(tmp_path):
    theirs = timm.create_model("tf_efficientnet_lite0", num_classes=5)
    assert_same(functools.partial(models.efficientnet_lite0, num_classes=5), theirs, tmp_path, CNN_SIZES[1:])


@pytest.mark.parametrize("version", [1, 2])
def test_convnext(version, tmp_path):
    from timm.models.convnext import ConvNeXt

    sizes = {"depths": (1, 2, 1, 1), "num_classes": 5}
    kwargs = {} if version == 1 else {"use_grn": True, "ls_init_value": None, "conv_mlp": True}
    theirs = ConvNeXt(dims=(8, 16, 24, 32), **sizes, **kwargs)
    make = functools.partial(models.ConvNeXt, widths=(8, 16, 24, 32), version=version, pointwise=version == 2, **sizes)
    assert_same(make, theirs, tmp_path, [(64, 64), (96, 160), (70, 90)], gradient=True)


SWIN = {"depths": (2, 2, 2), "num_heads": (1, 2, 2), "num_classes": 5}


def swin_features(network, images):
    features = network.forward_intermediates(images, intermediates_only=True)
    return network(images), [feature.permute(0, 2, 3, 1) for feature in features]


@pytest.mark.parametrize(("window", "size"), [(4, (64, 96)), ((4, 3), (48, 40)), (7, (52, 64))])
def test_swin(window, size, tmp_path):
    """Whole grids, ragged ones (timm rolls, then pads), and windows that reach the last stage's grid."""
    from timm.models.swin_transformer import SwinTransformer

    theirs = SwinTransformer(img_size=size, embed_dim=8, window_size=window, **SWIN)
    make = functools.partial(models.Swin, width=8, window=window, image_size=size, **SWIN)
    assert_same(make, theirs, tmp_path, [size], features=swin_features, gradient=window == (4, 3))


@pytest.mark.parametrize(("window", "pretrained", "size"), [(4, 0, (64, 96)), (5, 4, (56, 40))])
def test_swin_v2(window, pretrained, size, tmp_path):
    """timm makes its table of offsets in float32, so here it is made anew."""
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    windows = (pretrained,) * 3
    theirs = SwinTransformerV2(img_size=size, embed_dim=8, window_size=window, pretrained_window_sizes=windows, **SWIN)
    for module in theirs.modules():
        if hasattr(module, "relative_coords_table"):
            axes = [torch.arange(1 - k, k).double() * 8 / ((pretrained or k) - 1) for k in module.window_size]
            table = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)[None]
            module.relative_coords_table = table.sign() * (table.abs() + 1).log2() / 3
    make = functools.partial(
        models.Swin, width=8, window=window, image_size=size, version=2, pretrained_windows=windows, **SWIN
    )
    assert_same(make, theirs, tmp_path, [size], features=swin_features, gradient=window == 5)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch, of how timm interpolates
@pytest.mark.parametrize(("old", "new"), [(7, (12, 12)), (7, (5, 9)), (12, (7, 7))])
def test_relative_tables_are_resized_as_timm_does(old, new):
    """Of Swin, for another window; timm computes in float32."""
    from timm.layers import resize_rel_pos_bias_table

    table = np.random.default_rng(0).normal(size=((2 * old - 1) ** 2, 2))
    sizes = tuple(2 * k - 1 for k in new)
    theirs = resize_rel_pos_bias_table(torch.tensor(table), new, (sizes[0] * sizes[1], 2)).numpy()
    entry = Entry(["bias"], [(2, *sizes)], [layout("head row column -> (row column) head")])
    np.testing.assert_allclose(resize_flat_table(table, entry), theirs, atol=1e-5)


def from_hugging_face(theirs, make, tmp_path, sizes):
    """Logits of Hugging Face's network and ours, from its own file."""
    theirs = randomized(theirs)
    safetensors.save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, tmp_path / "hf.safetensors")
    ours = ours_from(make, tmp_path / "hf.safetensors")
    for size in sizes:
        images = images_of(size)
        with torch.no_grad():
            logits = theirs(torch.tensor(images).permute(0, 3, 1, 2)).logits.numpy()
        assert np.ptp(logits, axis=0).max() > 1e-3
        np.testing.assert_allclose(outputs_of(ours, jnp.asarray(images))[0], logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("version", [1, 2])
def test_convnext_of_hugging_face(version, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "num_labels": 5, "layer_norm_eps": 1e-6}
    names = ("ConvNextConfig", "ConvNextForImageClassification")
    config, network = (
        getattr(transformers, name.replace("Next", "NextV2" if version == 2 else "Next")) for name in names
    )
    make = functools.partial(models.ConvNeXt, (1, 2), (8, 16), version=version, num_classes=5)
    from_hugging_face(network(config(**sizes)), make, tmp_path, [(40, 32)])


@pytest.mark.parametrize(("image", "window"), [((64, 96), 4), ((52, 70), 3), ((48, 96), 6)])
def test_swin_of_hugging_face(image, window, tmp_path):
    """On ragged grids it pads, then rolls."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    sizes = {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": window, "num_labels": 5}
    theirs = transformers.SwinForImageClassification(transformers.SwinConfig(image_size=image, **sizes))
    make = functools.partial(
        models.Swin, (2, 2), 8, (2, 4), window=window, image_size=image, padding="before", num_classes=5
    )
    from_hugging_face(theirs, make, tmp_path, [image])


def test_swin_of_its_authors(tmp_path):
    """Whose merging is counted with the stage before: by timm's own translation of their names."""
    from timm.models.swin_transformer import SwinTransformer, checkpoint_filter_fn

    ours = models.Swin(**SWIN, width=8, window=4, image_size=64, rngs=nnx.Rngs(0))
    state = {path: np.asarray(value[...]) for path, value in nnx.to_flat_state(nnx.state(ours, nnx.Param))}
    state = {".".join(map(str, path)): value for path, value in state.items()}
    entries = ours.translations[1].entries(ours)
    arrays = {name: torch.tensor(entry.write([state[k] for k in entry.ours])) for name, entry in entries.items()}
    theirs = SwinTransformer(img_size=64, embed_dim=8, window_size=4, **SWIN).eval()
    theirs.load_state_dict(checkpoint_filter_fn({"model": arrays}, theirs), strict=True)
    images = images_of((64, 64)).astype(np.float32)
    expected = theirs(torch.tensor(images).permute(0, 3, 1, 2)).detach().numpy()
    np.testing.assert_allclose(outputs_of(ours, jnp.asarray(images))[0], expected, atol=1e-5)


VIT = {"patch_size": 4, "num_heads": 2, "num_classes": 5, "depth": 2}
VITS = {
    "deit": ({}, {}),
    "deit3": ({"init_values": 1.0, "no_embed_class": True}, {"layer_scale": 1.0, "class_position": False}),
    "dinov2": ({"init_values": 1.0}, {"layer_scale": 1.0}),
    "registers": (
        {"init_values": 1.0, "reg_tokens": 4, "no_embed_class": True},
        {"layer_scale": 1.0, "registers": 4, "class_position": False},
    ),
    "clip": (
        {"pre_norm": True, "act_layer": "quick_gelu", "norm_layer": functools.partial(torch.nn.LayerNorm, eps=1e-5)},
        {"norm_before": True, "activation": quick_gelu, "epsilon": 1e-5},
    ),
    "siglip": ({"class_token": False, "global_pool": "map"}, {"class_token": False, "pool": "attention"}),
}


def vit_features(network, images):
    features = network.forward_intermediates(images, indices=[1], norm=True, intermediates_only=True)
    return network(images), [feature.permute(0, 2, 3, 1) for feature in features]


@pytest.mark.parametrize("name", VITS)
def test_vit(name, tmp_path):
    from timm.models.vision_transformer import VisionTransformer

    their_kwargs, kwargs = VITS[name]
    theirs = VisionTransformer(img_size=(16, 24), embed_dim=8, **VIT, **their_kwargs)
    make = functools.partial(models.ViT, image_size=(16, 24), in_features=3, width=8, mlp_dim=32, **VIT, **kwargs)
    assert_same(make, theirs, tmp_path, [(16, 24)], features=vit_features, gradient=name in ("registers", "siglip"))


def test_convit(tmp_path):
    """Positions have a bias there, which changes nothing: it is passed over, and written as zeros."""
    from timm.models.convit import ConVit

    sizes = {"patch_size": 4, "num_heads": 4, "num_classes": 5, "depth": 3}
    theirs = randomized(ConVit(img_size=16, embed_dim=2, local_up_to_layer=2, **sizes))
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    mix = ("gpsa", "gpsa", "global")
    make = functools.partial(
        models.ViT, image_size=16, in_features=3, width=8, mlp_dim=32, mix=mix, qkv_bias=False, **sizes
    )
    ours, images = ours_from(make, tmp_path / "theirs.pth"), images_of((16, 16))
    expected = theirs(torch.tensor(images).permute(0, 3, 1, 2)).detach().numpy()
    np.testing.assert_allclose(outputs_of(ours, jnp.asarray(images))[0], expected, rtol=0, atol=1e-10)
    pretrained.save(ours, tmp_path / "ours.safetensors")
    theirs.load_state_dict(safetensors.load_file(tmp_path / "ours.safetensors"), strict=True)
    written = theirs(torch.tensor(images).permute(0, 3, 1, 2)).detach().numpy()
    np.testing.assert_allclose(written, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize(("old", "new"), [(4, (7, 5)), (7, (3, 4)), (5, (5, 8))])
def test_positions_are_resized_as_timm_does(prefix, old, new):
    """Larger and smaller, bicubic with antialiasing; timm computes in float32."""
    from timm.layers import resample_abs_pos_embed

    position = np.random.default_rng(0).normal(size=(1, prefix + old * old, 3))
    theirs = resample_abs_pos_embed(torch.tensor(position), list(new), num_prefix_tokens=prefix).numpy()
    np.testing.assert_allclose(resize_positions(position, prefix, new), theirs, atol=1e-5)


@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "SiglipVision"])
def test_vit_of_hugging_face(kind, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    sizes |= {} if kind == "Dinov2" else {"intermediate_size": 32}
    config = getattr(transformers, f"{kind}Config")(**sizes, num_labels=5, layer_norm_eps=1e-6)
    network = "ViTForImageClassification" if kind == "ViT" else f"{kind}Model"
    theirs = randomized(getattr(transformers, network)(config))
    safetensors.save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, tmp_path / "hf.safetensors")
    settings = {
        "ViT": {"num_classes": 5}, "Dinov2": {"num_classes": 0, "layer_scale": 1.0},
        "SiglipVision": {"num_classes": 0, "class_token": False, "pool": "attention", "activation": jax.nn.gelu},
    }[kind]  # fmt: skip
    make = functools.partial(models.ViT, image_size=16, in_features=3, width=8, mlp_dim=32, **(VIT | settings))
    images = images_of((16, 16))
    with torch.no_grad():
        found = theirs(torch.tensor(images).permute(0, 3, 1, 2))
    expected = found.logits if kind == "ViT" else found.pooler_output
    mine = outputs_of(ours_from(make, tmp_path / "hf.safetensors"), jnp.asarray(images))[0]
    np.testing.assert_allclose(mine, expected.numpy(), rtol=0, atol=1e-10)


def test_maxvit(tmp_path):
    """A window of 2, whole and oblong grids that it divides, and another size's tables."""
    from timm.models.maxxvit import MaxxVit, MaxxVitCfg, _tf_cfg

    config = MaxxVitCfg(
        embed_dim=(32, 64), depths=(1, 2), block_type=("M", "M"), stem_width=8, stem_bias=True, head_hidden_size=64,
        **_tf_cfg(),
    )  # fmt: skip
    theirs = MaxxVit(config, img_size=64, num_classes=5)
    make = functools.partial(models.MaxViT, (1, 2), (32, 64), stem=8, image_size=64, num_classes=5)
    assert_same(make, theirs, tmp_path, [(64, 64), (32, 80)], last=2, gradient=True)


COATNETS = {
    "0": ({"conv_attn_early": True, "transformer_shortcut_bias": False}, {}),
    "1": ({"stride_mode": "dw", "conv_attn_early": True, "transformer_shortcut_bias": False}, {"pool": False}),
    "2": (
        {"stride_mode": "dw", "conv_attn_act_layer": "silu"},
        {"pool": False, "early": False, "squeeze_activation": "silu", "bias": True},
    ),
}


@pytest.mark.parametrize("name", COATNETS)
def test_coatnet(name, tmp_path):
    from timm.models.maxxvit import MaxxVit, MaxxVitCfg, _rw_coat_cfg

    their_kwargs, kwargs = COATNETS[name]
    config = MaxxVitCfg(
        embed_dim=(8, 32, 64, 32), depths=(1, 2, 1, 2), stem_width=(4, 8), **_rw_coat_cfg(**their_kwargs)
    )
    theirs = MaxxVit(config, img_size=(64, 96), num_classes=5)
    make = functools.partial(
        models.CoAtNet, (1, 2, 1, 2), (8, 32, 64, 32), stem=(4, 8), image_size=(64, 96), num_classes=5, **kwargs
    )
    assert_same(make, theirs, tmp_path, [(64, 96)], last=4, gradient=name == "0")


@pytest.mark.parametrize(("mix", "layer"), [("botnet", "bottleneck"), ("halo", "halo"), ("lambda", "lambda")])
def test_botnet(mix, layer, tmp_path):
    """A mixer with a stride and one without, each in its way; oblong grids."""
    from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg, interleave_blocks

    own = {"botnet": {"num_heads": 2}, "halo": {"block_size": 4, "halo_size": 1, "num_heads": 2}}
    sizes = {"gs": 0, "br": 0.25}
    config = ByoModelCfg(
        blocks=(
            ByoBlockCfg(type="bottle", d=1, c=32, s=1, **sizes),
            interleave_blocks(types=("bottle", "self_attn"), d=2, c=64, s=2, **sizes),
            ByoBlockCfg(type="self_attn", d=2, c=96, s=2, **sizes),
        ),
        stem_chs=16, stem_type="tiered", stem_pool="maxpool", fixed_input_size=mix == "botnet", act_layer="silu",
        self_attn_layer=layer, self_attn_kwargs=own.get(mix, {"r": 5, "num_heads": 2}),
    )  # fmt: skip
    size = (64, 128)
    theirs = ByobNet(config, num_classes=5, **({"img_size": size} if mix == "botnet" else {}))
    window = {"halo": 4, "lambda": 5}.get(mix, 8)
    make = functools.partial(
        models.BoTNet, (1, 2, 2), (32, 64, 96), mix=mix, mixed=((), (1,), (0, 1)), num_heads=(2, 2, 2), stem=16,
        image_size=size, window=window, halo=1, activation="silu", num_classes=5,
    )  # fmt: skip
    others = [] if mix == "botnet" else [(128, 64)]
    assert_same(make, theirs, tmp_path, [size, *others], last=3, gradient=True)


METAFORMERS = {"poolformer": "pool", "poolformerv2": "pool", "convformer": "conv", "caformer": ("conv", "attention")}


@pytest.mark.parametrize("name", METAFORMERS)
def test_metaformer(name, tmp_path):
    from timm.models import metaformer as timms

    first, pools = name == "poolformer", name.startswith("pool")
    kwargs = {"downsample_norm": None, "mlp_act": torch.nn.GELU, "mlp_bias": True, "norm_layers": timms.GroupNorm1,
              "layer_scale_init_values": 1e-5, "res_scale_init_values": None} if first else {}  # fmt: skip
    if name == "poolformerv2":
        kwargs = {"norm_layers": timms.GroupNorm1NoBias}
    mixers = {"pool": timms.Pooling, "conv": timms.SepConv, "attention": timms.Attention}
    mix = METAFORMERS[name]
    mixes = (mix,) * 4 if isinstance(mix, str) else (mix[0], mix[0], mix[1], mix[1])
    if name == "caformer":
        kwargs = {"norm_layers": [timms.LayerNorm2dNoBias] * 2 + [timms.LayerNormNoBias] * 2}
    sizes, widths = {"depths": (1, 1, 2, 1), "num_classes": 5}, (8, 16, 32, 64)
    theirs = timms.MetaFormer(
        dims=widths, token_mixers=[mixers[each] for each in mixes], use_mlp_head=not pools, **kwargs, **sizes
    )
    make = functools.partial(
        models.MetaFormer, widths=widths, mix=mixes, version=1 if first else 2, mlp_head=not pools, **sizes
    )
    assert_same(make, theirs, tmp_path, [(64, 96), (50, 71)], gradient=True)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_convmixer(activation, tmp_path):
    from timm.models.convmixer import ConvMixer

    layer = {"gelu": torch.nn.GELU, "relu": torch.nn.ReLU}[activation]
    theirs = ConvMixer(8, 2, kernel_size=5, patch_size=4, num_classes=5, act_layer=layer)
    make = functools.partial(models.ConvMixer, 8, 2, kernel_size=5, patch_size=4, num_classes=5, activation=activation)
    assert_same(make, theirs, tmp_path, [(32, 48), (30, 43)], last=1, gradient=True)


def volo_features(network, images):
    features = network.forward_intermediates(images, intermediates_only=True)
    return network(images), [feature.permute(0, 2, 3, 1) for feature in features]


@pytest.mark.parametrize("size", [(64, 96), (80, 48)])
def test_volo(size, tmp_path):
    from timm.models.volo import VOLO

    sizes = {"num_heads": (2, 4, 4, 4), "num_classes": 5}
    theirs = VOLO((1, 2, 1, 1), size, embed_dims=(8, 16, 16, 16), stem_hidden_dim=4, **sizes)
    make = functools.partial(models.VOLO, (1, 2, 1, 1), (8, 16, 16, 16), stem=4, image_size=size, **sizes)
    assert_same(make, theirs, tmp_path, [size], features=volo_features, gradient=size == (64, 96))


SAM = {"patch_size": 4, "window": 5, "neck": 8, "num_classes": 5}


def sam(size):
    """timm's, whose last two of three blocks see the whole grid."""
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    return VisionTransformerSAM(
        size, embed_dim=8, depth=3, num_heads=2, patch_size=4, window_size=5, neck_chans=8, num_classes=5,
        use_rel_pos=True, global_attn_indexes=(1, 2),
    )  # fmt: skip


def sam_features(network, images):
    final, features = network.forward_intermediates(images, indices=[1, 2])
    return network.forward_head(final), [feature.permute(0, 2, 3, 1) for feature in (*features, final)]


@pytest.mark.parametrize("size", [(28, 44), (12, 80)])
def test_samvit(size, tmp_path):
    """Windows that do not part the grid, and that are larger than it: zeros take part. timm's epsilon is its own."""
    make = functools.partial(models.SAMViT, (2, 1), 8, 2, image_size=size, epsilon=1e-5, **SAM)
    assert_same(make, sam(size), tmp_path, [size], features=sam_features, gradient=size == (28, 44))


def test_samvit_of_hugging_face(tmp_path):
    """From a file of all of SAM."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 4}
    sizes |= {"window_size": 5, "global_attn_indexes": [1, 2], "output_channels": 8, "mlp_dim": 32}
    decoder = {"hidden_size": 8, "mlp_dim": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    prompt = {"hidden_size": 8, "image_size": 28, "patch_size": 4}
    theirs = randomized(transformers.SamModel(transformers.SamConfig(sizes, prompt, decoder)))
    torch.save(theirs.state_dict(), tmp_path / "theirs.bin")
    make = functools.partial(models.SAMViT, (2, 1), 8, 2, image_size=28, **(SAM | {"num_classes": 0}))
    images = images_of((28, 28))
    with torch.no_grad():
        expected = theirs.vision_encoder(torch.tensor(images).permute(0, 3, 1, 2)).last_hidden_state
    pooled, pyramid = outputs_of(ours_from(make, tmp_path / "theirs.bin"), jnp.asarray(images))
    assert_close(pyramid[-1], expected.permute(0, 2, 3, 1).numpy(), 1e-10)
    assert_close(pooled, expected.mean((2, 3)).numpy(), 1e-10)


def test_samvit_of_its_authors():
    """By timm's own translation of their names, and another image's size by timm's own resizing, in float32."""
    from timm.layers import resample_abs_pos_embed_nhwc
    from timm.models.vision_transformer_sam import checkpoint_filter_fn, get_rel_pos

    make = lambda size: models.SAMViT((2, 1), 8, 2, image_size=size, **(SAM | {"num_classes": 0}), rngs=nnx.Rngs(0))
    ours = make(28)
    state = {".".join(map(str, path)): value for path, value in nnx.to_flat_state(nnx.state(ours, nnx.Param))}
    for value in state.values():
        value.set_value(jnp.asarray(np.random.default_rng(0).normal(size=value.shape), jnp.float32))
    entries = ours.translations[1].entries(ours)
    arrays = {name: entry.write([np.asarray(state[k][...]) for k in entry.ours]) for name, entry in entries.items()}
    arrays["mask_decoder.iou_token.weight"] = np.ones((1, 8), np.float32)
    theirs = {name: torch.tensor(array) for name, array in pretrained.torch_arrays(ours).items()}
    filtered = checkpoint_filter_fn({name: torch.tensor(array) for name, array in arrays.items()}, None)
    assert theirs.keys() == filtered.keys() == {name for name in sam((28, 28)).state_dict() if "head" not in name}
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in filtered.items())
    for size in (36, (20, 44)):
        resized = make(size)
        pretrained.fill(resized, arrays)
        grid = tuple(resized.position.shape[:2])
        position = resample_abs_pos_embed_nhwc(theirs["pos_embed"], list(grid))[0].numpy()
        np.testing.assert_allclose(resized.position[...], position, atol=1e-5)
        mix, table = resized.stages[0].blocks[1].mix, theirs["blocks.1.attn.rel_pos_h"]
        rows = get_rel_pos(grid[0], grid[0], table).numpy()  # by query and key
        found = np.asarray(mix.rows[...])[np.arange(grid[0]) - np.arange(grid[0])[:, None] + grid[0] - 1]
        np.testing.assert_allclose(found, rows, atol=1e-5)


def test_positions_that_timm_does_not_resize():
    """VOLO's as those of ViT, and BoTNet's tables as those of SAM; timm has both for one size alone."""
    from timm.layers import resample_abs_pos_embed_nhwc

    def filled(make, name, **arrays):
        """The network for another size, with these for what its file's would be, and the array that it then has."""
        model = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
        entries = model.translations[0].entries(model)
        given = {key: np.zeros(entry.shape, np.float32) for key, entry in entries.items()} | arrays
        pretrained.fill(model, given)
        return pretrained.torch_arrays(model)[name]

    draw = lambda *shape: np.random.default_rng(0).normal(size=shape).astype(np.float32)
    make = functools.partial(models.VOLO, (1, 1), (8, 16), (2, 4), stem=4, image_size=(64, 96))
    found = filled(make, "pos_embed", pos_embed=draw(1, 3, 3, 16))
    theirs = resample_abs_pos_embed_nhwc(torch.tensor(draw(1, 3, 3, 16)), [4, 6]).numpy()
    np.testing.assert_allclose(found, theirs, atol=1e-5)
    make = functools.partial(
        models.BoTNet, (1, 1), (16, 32), mixed=((), (0,)), num_heads=(1, 2), stem=8, image_size=(64, 96)
    )
    name, table = "stages.1.0.self_attn.pos_embed.width_rel", draw(15, 4)
    theirs = torch.nn.functional.interpolate(torch.tensor(table.T[None]), size=47, mode="linear")[0].numpy().T
    np.testing.assert_allclose(filled(make, name, **{name: table}), theirs, atol=1e-5)


PUBLISHED = {
    "resnet18": "resnet18", "efficientnet_lite0": "tf_efficientnet_lite0", "convnext_atto": "convnext_atto",
    "swin_tiny": "swin_tiny_patch4_window7_224", "vit_ti": "deit_tiny_patch16_224",
    "halonet26t": "halonet26t", "poolformer_s12": "poolformer_s12", "caformer_s18": "caformer_s18",
    "volo_d1": "volo_d1_224", "maxvit_tiny": "maxvit_tiny_tf_224", "coatnet_0": "coatnet_0_rw_224",
    "convnextv2_atto": "convnextv2_atto", "swinv2_tiny": "swinv2_tiny_window8_256", "convit_ti": "convit_tiny",
    "deit3_small": "deit3_small_patch16_224", "dinov2_small": "vit_small_patch14_dinov2",
    "clip_b32": "vit_base_patch32_clip_quickgelu_224",
    "botnet26t": "botnet26t_256", "lambda_resnet26t": "lambda_resnet26t",
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_size(name, tmp_path):
    """By its name, in float32: to 1e-5 of the largest logit, and what float32 costs timm; a head of other classes."""
    size = {"image_size": 224} if name == "dinov2_small" else {}  # of 518, it takes a minute
    theirs = randomized(timm.create_model(PUBLISHED[name], **{f"img_{key[6:]}": n for key, n in size.items()}))
    images = images_of((size.get("image_size", pretrained.preprocess(name).size),) * 2).astype(np.float32)
    with torch.no_grad():
        exact = theirs(torch.tensor(images).permute(0, 3, 1, 2).double()).numpy()
    theirs = theirs.float()
    path = tmp_path / "weights.safetensors"
    safetensors.save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, path)
    with torch.no_grad():
        expected = theirs(torch.tensor(images).permute(0, 3, 1, 2)).numpy()
    graphdef, state = nnx.split(pretrained.load(name, path, **size))
    found = jax.jit(lambda s, x: nnx.merge(graphdef, s)(x))(state, images)
    # random weights make HaloNet's scores large: timm's own float32 is 7e-5 from its float64
    assert np.abs(found - exact).max() < 1e-5 * np.abs(exact).max() + 4 * np.abs(expected - exact).max()
    with pytest.warns(UserWarning, match="the head begins anew"):
        assert pretrained.load(name, path, num_classes=37) is not None


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch, of how timm interpolates
@pytest.mark.parametrize("name", ["vit", "swin", "maxvit"])
def test_another_image_size(name, tmp_path):
    """timm's own resizing of a file's positions and tables, against ours."""
    from timm.models import swin_transformer, vision_transformer
    from timm.models.maxxvit import MaxxVit, MaxxVitCfg, _tf_cfg, checkpoint_filter_fn

    if name == "vit":
        make_theirs = lambda size: vision_transformer.VisionTransformer(img_size=size, embed_dim=8, **VIT)
        make = functools.partial(models.ViT, image_size=24, in_features=3, width=8, mlp_dim=32, **VIT)
        filtered, old, new = vision_transformer.checkpoint_filter_fn, 16, 24
    elif name == "swin":
        make_theirs = lambda size: swin_transformer.SwinTransformer(
            img_size=size, embed_dim=8, window_size=4 if size == 64 else 6, **SWIN
        )
        make = functools.partial(models.Swin, width=8, window=6, image_size=96, **SWIN)
        filtered, old, new = swin_transformer.checkpoint_filter_fn, 64, 96
    else:
        config = dict(
            embed_dim=(32,), depths=(1,), block_type=("M",), stem_width=8, stem_bias=True, head_hidden_size=32
        )
        make_theirs = lambda size: MaxxVit(MaxxVitCfg(**config, **_tf_cfg()), img_size=size, num_classes=5)
        make = functools.partial(models.MaxViT, (1,), (32,), stem=8, image_size=96, num_classes=5)
        filtered, old, new = checkpoint_filter_fn, 64, 96
    before, after = randomized(make_theirs(old)), make_theirs(new).double().eval()
    after.load_state_dict(filtered(dict(before.state_dict()), after), strict=True)
    torch.save(before.state_dict(), tmp_path / "theirs.pth")
    images = images_of((new, new))
    with torch.no_grad():
        expected = after(torch.tensor(images).permute(0, 3, 1, 2)).numpy()
    found = outputs_of(ours_from(make, tmp_path / "theirs.pth"), jnp.asarray(images))[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)  # timm resizes in float32

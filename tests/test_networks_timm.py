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


def assert_same(make, theirs, tmp_path, sizes, *, features=features_of, last=None, atol=1e-10):
    """Logits and features of every size, and the way back: timm loads what we save, strictly, and is as it was.

    `last`: how many of timm's features ours end with; None: all.
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
        np.testing.assert_allclose(mine, logits.numpy(), rtol=0, atol=atol, err_msg=str(size))
        stages = stages if last is None else stages[-last:]
        assert len(pyramid) == len(stages) == len(ours.strides)
        assert [stage.shape[-1] for stage in pyramid] == list(ours.widths)
        for stage, theirs_stage, stride in zip(pyramid, stages, ours.strides, strict=True):
            np.testing.assert_allclose(stage, theirs_stage.numpy(), rtol=0, atol=atol, err_msg=f"{size}, {stride}")
    pretrained.save(ours, tmp_path / "ours.safetensors")
    before = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    for parameter in theirs.parameters():
        torch.nn.init.zeros_(parameter)
    theirs.load_state_dict(safetensors.load_file(tmp_path / "ours.safetensors"), strict=True)
    for name, tensor in theirs.state_dict().items():
        assert name.endswith("num_batches_tracked") or torch.equal(tensor, before[name]), name
    return ours, theirs


CNN_SIZES = [(64, 64), (96, 64), (50, 71)]


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_resnet(block, tmp_path):
    from timm.models import resnet

    kinds = {"basic": resnet.BasicBlock, "bottleneck": resnet.Bottleneck}
    theirs = resnet.ResNet(kinds[block], [1, 2, 1, 1], num_classes=5)
    make = functools.partial(models.ResNet, (1, 2, 1, 1), block=block, stem="imagenet", num_classes=5)
    assert_same(make, theirs, tmp_path, CNN_SIZES, last=4)


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
    assert_same(make, theirs, tmp_path, [(64, 64), (96, 160), (70, 90)])

"""`pretrained.load` and `save`: what a checkpoint may look like, what may differ, and what is said when it does."""

import argparse
import functools
import os
import warnings
from collections import OrderedDict, defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_parameters import TABLE
from test_torch_file import FORMATS, Tensor, torch, write  # noqa: F401  (a fixture)

from jaxattn import models, pretrained
from jaxattn.pretrained import registry
from jaxattn.torch_file import read_torch

make = functools.partial(models.ResNet, (1, 1), block="basic", width=8)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A network of two blocks among the published ones, and its arrays for 5 classes, in PyTorch's names."""
    row = pretrained.published("resnet18")._replace(make=make)
    monkeypatch.setitem(registry.PUBLISHED, "small", row)
    model = make(num_classes=5, rngs=nnx.Rngs(3))
    return pretrained.torch_arrays(model)


def tensors(arrays, prefix=""):
    return OrderedDict((prefix + name, Tensor(np.ascontiguousarray(array))) for name, array in arrays.items())


def assert_loaded(model, arrays):
    found = pretrained.torch_arrays(model)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


WRAPPINGS = {
    "plain": lambda content, _: content,
    "state_dict": lambda content, _: {"epoch": 300, "state_dict": content, "optimizer": {"state": {}}},
    "model": lambda content, _: {"model": content, "args": argparse.Namespace(lr=0.1), "scaler": None},
    "averaged": lambda content, other: {"state_dict": other, "state_dict_ema": content},
    "nested": lambda content, other: {"model_ema": {"module": content}, "model": other},
    "objects": lambda content, _: {"model": content, "best": np.float64(0.8), "log": defaultdict(list, a=[1, {2}])},
}


@pytest.mark.core(2)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_checkpoints_are_unwrapped(small, tmp_path, wrapping, form):
    other = tensors({name: array + 1 for name, array in small.items()})
    content = WRAPPINGS[wrapping](tensors(small, "module." if wrapping != "plain" else ""), other)
    path = write(tmp_path / "weights.pth", content, form)
    assert_loaded(pretrained.load("small", path), small)
    if wrapping in ("model", "averaged", "objects"):
        with pytest.raises(ValueError, match=r"read_torch: .*weights.pth: "):
            read_torch(path)  # which admits no other objects, and does not choose


class Hostile:
    """Writes into the pickle a call of what follows."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def test_nothing_is_called(small, tmp_path):
    """Whatever a file names, it is neither imported nor called, and its attributes, items and calls lead nowhere."""
    marker = tmp_path / "called"
    hostile = [Hostile(open, (str(marker), "w")), Hostile(eval, (f"open({str(marker)!r}, 'w')",))]
    hostile += [Hostile(getattr, (open, "__call__")), Hostile(argparse.Namespace, (), {"__class__": 1})]
    hostile += [Hostile(list, (), None, iter([1, 2])), Hostile(dict, (), None, None, iter([("a", 1)]))]
    path = write(tmp_path / "weights.pth", {"extra": hostile, "model": tensors(small)}, "zip")
    assert_loaded(pretrained.load("small", path), small)
    assert not marker.exists()
    path = write(tmp_path / "weights.pth", {"model": {**tensors(small), "fc.bias": hostile[0]}}, "zip")
    with pytest.raises(ValueError, match=r"weights.pth: holds what is no tensor: 'fc.bias' \(Inert\)"):
        pretrained.load("small", path)


def test_only_the_head_may_differ(small, tmp_path):
    path = write(tmp_path / "weights.pth", tensors(small), "zip")
    with pytest.warns(UserWarning, match=r"load: the head begins anew: num_classes \(=3\) differs from the 5 of .*pth"):
        model = pretrained.load("small", path, num_classes=3)
    body = {name: array for name, array in small.items() if not name.startswith("fc.")}
    arrays = pretrained.torch_arrays(model)
    assert 0.01 < arrays["fc.weight"].std() < 0.03
    assert arrays["fc.weight"].shape == (3, 16)
    assert not arrays["fc.bias"].any()
    assert_loaded(pretrained.load("small", path, num_classes=0), body)
    headless = write(tmp_path / "headless.pth", tensors(body), "zip")
    assert_loaded(pretrained.load("small", headless), body)
    with pytest.warns(UserWarning, match=r"num_classes \(=3\) differs from the 0 of"):
        pretrained.load("small", headless, num_classes=3)
    broken = {**small, "layer1.0.conv9.weight": small.pop("layer1.0.conv1.weight")}
    broken.pop("layer1.0.conv1.weight")
    path = write(tmp_path / "broken.pth", tensors({**broken, "bn1.bias": np.ones(7, np.float32)}), "zip")
    message = (
        r"load: .*broken.pth: the arrays lack layer1.0.conv1.weight \(8, 8, 3, 3\); the model has no "
        r"layer1.0.conv9.weight; bn1.bias has \(7,\), allowed is \(8,\)$"
    )
    with pytest.raises(ValueError, match=message):
        pretrained.load("small", path)


@pytest.mark.full
def test_dtypes_and_modes(small, tmp_path):
    """The state is evaluation's; parameters and statistics have the dtype asked for, statistics at least float32."""
    path = write(tmp_path / "weights.pth", tensors(small), "zip")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = pretrained.load("small", path, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert model.stem.kernel[...].dtype == jnp.bfloat16
    assert model.stem_norm.mean[...].dtype == jnp.float32
    assert pretrained.load("small", path, param_dtype=jnp.float64).stem_norm.mean[...].dtype == jnp.float64
    assert model.stem_norm.use_running_average
    assert model.pyramid(jnp.ones((1, 8, 8, 3)))[-1].dtype == jnp.bfloat16


def test_names():
    assert len(set(pretrained.names())) == len(pretrained.names())
    with pytest.raises(ValueError, match=r"published: name \(='resnet19'\) must be one of resnet18, "):
        pretrained.load("resnet19", "weights.pth")


def test_safetensors(small, tmp_path):
    """Written and read, and what is damaged is refused by name."""
    pytest.importorskip("safetensors", reason="safetensors is not installed: pip install 'jaxattn[pretrained]'")
    model = make(num_classes=5, rngs=nnx.Rngs(3))
    path = tmp_path / "weights.safetensors"
    pretrained.save(model, path)
    assert_loaded(pretrained.load("small", path), small)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 8, 3)), jnp.float32)
    model.eval()
    np.testing.assert_array_equal(pretrained.load("small", path)(images), model(images))
    whole = path.read_bytes()
    for damaged in (b"", whole[:7], whole[:100], whole[:-1], b"\xff" * 40, whole[:8] + b"[" + whole[9:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"read_weights: .*weights.safetensors: damaged, or not of safetensors: "):
            pretrained.load("small", path)
    header = b'{"w":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}'  # which NumPy lacks
    for content, message in (
        (len(header).to_bytes(8, "little") + header + b"8", "damaged, or not of safetensors: .*float8"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"read_weights: .*weights.safetensors: .*{message}"):
            pretrained.load("small", path)
    path.unlink()
    os.mkfifo(path)  # which would be waited for
    with pytest.raises(OSError, match=r"weights\.safetensors is a pipe"):
        pretrained.load("small", path)


def test_safetensors_is_named_where_it_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"safetensors.* is not installed.*pip install 'jaxattn\[pretrained\]'"):
        pretrained.read_weights(tmp_path / "weights.safetensors")


def test_save_needs_names():
    with pytest.raises(ValueError, match=r"save: model \(=Linear\) must have translations"):
        pretrained.torch_arrays(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    assert jax.tree.leaves(pretrained.torch_arrays(make(rngs=nnx.Rngs(0))))


def test_a_file_that_cannot_be_written_leaves_what_stood_there(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"before")

    def fails(arrays, file, metadata):
        file.write_bytes(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(safetensors, "save_file", fails)
    with pytest.raises(OSError, match="no space left"):
        pretrained.save(models.tiny(rngs=nnx.Rngs(0)), path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"before"


def test_the_table_has_every_network_and_its_size(monkeypatch):
    """The millions of parameters are those that `test_parameters` counts; what only features have is left blank."""
    monkeypatch.undo()  # without the small one
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in pretrained.table().splitlines()[2:]]
    assert [row[0].strip("`") for row in rows] == list(pretrained.names())
    counts = {make: count for make, settings, count in TABLE if not settings}
    compared = 0
    for name, parameters, _, top_1, *_, outputs, _, _ in rows:
        make = getattr(models, name.strip("`"), None)
        assert parameters, name
        if outputs in ("1000", "features") and make in counts:
            millions, compared = float(parameters.removesuffix(" M")), compared + 1
            assert abs(millions - counts[make] / 1e6) < (1 if "nat" in name else 0.06), name  # NAT's in whole millions
            assert outputs == "features" or 70 < float(top_1.removesuffix(" %")) < 90
    assert compared > 55

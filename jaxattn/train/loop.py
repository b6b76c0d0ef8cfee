"""The training loop: the schedule, one pure step, and the epochs around it."""

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxattn.models import resnet
from jaxattn.train.config import Config
from jaxattn.train.data import Dataset, batches
from jaxattn.train.evaluate import count_correct, make_predict
from jaxattn.train.extras import InputError, needs_extra

with needs_extra("train"):
    from tqdm import tqdm


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


def schedule(config: Config, steps: int) -> optax.Schedule:
    """The learning rate: a linear rise over the share `warmup` of all steps, then half a cosine down to zero."""
    rise = round(config.warmup * steps)
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, rise, max(steps, rise + 1))


def make_step(graph: nnx.GraphDef, optimizer: optax.GradientTransformation) -> jax.stages.Wrapped:
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


def train(config: Config, data: Dataset, log: Callable[[dict[str, int | float]], None]) -> nnx.Module:
    """Trains one network, and calls `log` with the measurements of every epoch. Returns the network as it ends."""
    model = build(config, data)
    steps = len(data.train_labels) // config.batch_size  # in an epoch
    if steps == 0:
        raise InputError(f"batch_size (={config.batch_size}) is more than the {len(data.train_labels)} training images")
    rate = schedule(config, config.epochs * steps)
    # biases and normalisation scales are vectors, and do not decay
    decaying = lambda weights: jax.tree.map(lambda weight: weight.ndim >= 2, weights)
    optimizer = optax.adamw(rate, weight_decay=config.weight_decay, mask=decaying)

    # Split once into structure, weights and the rest (BatchNorm's statistics), so that a step is a pure function of
    # arrays. It is compiled ahead of the epochs, so that images per second measures training alone.
    model.eval()
    predict = make_predict(nnx.graphdef(model))
    model.train()
    graph, weights, rest = nnx.split(model, nnx.Param, ...)
    moments = optimizer.init(weights)
    first = data.train_images[: config.batch_size], data.train_labels[: config.batch_size]

    rng = np.random.default_rng(config.seed)
    with tqdm(total=config.epochs * steps, desc=f"{config.mix}, compiling", unit="step") as bar:
        step = make_step(graph, optimizer).lower(weights, rest, moments, *first).compile()
        bar.reset()
        bar.set_description(config.mix)
        for epoch in range(1, config.epochs + 1):
            start, measured = time.perf_counter(), []
            for images, labels in batches(data.train_images, data.train_labels, config.batch_size, rng, config.shift):
                # images [batch, height, width, channels], labels [batch]
                weights, rest, moments, loss_and_accuracy = step(weights, rest, moments, images, labels)
                measured.append(loss_and_accuracy)
                bar.update()
            loss, accuracy = np.mean(jax.device_get(measured), axis=0, dtype=float)  # waits for the last step
            speed = steps * config.batch_size / (time.perf_counter() - start)
            trained = functools.partial(predict, weights, rest)
            correct = count_correct(trained, data.validation_images, data.validation_labels)
            validation = correct / len(data.validation_labels)
            bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{validation:.3f}", images_per_s=f"{speed:.0f}")
            log(
                {
                    "epoch": epoch,
                    "train_loss": loss,
                    "train_accuracy": accuracy,
                    "validation_accuracy": validation,
                    "images_per_second": speed,
                    "learning_rate": float(np.asarray(rate(epoch * steps))),
                }
            )
    nnx.update(model, weights, rest)
    model.eval()
    return model

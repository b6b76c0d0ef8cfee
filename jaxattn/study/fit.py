"""The smallest training loops that an experiment can have."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

from jaxattn.study.compiler import LOOP
from jaxattn.train.data import Dataset

TEST_BATCH = 500
HELD = 10_000  # composed images, which are kept if a training knows no more: each mixer is trained on the same
FRAMES = 24  # in which what is watched is seen


def fit(
    model: nnx.Module,
    loss: Callable[[nnx.Module, jax.Array], jax.Array],
    rate: float | optax.Schedule,
    steps: int,
    seed: int | jax.Array,
) -> jax.Array:
    """Trains a model in place, `steps` times by Adam, on `loss(model, key)`, whose key is new at each step.

    Returns:
      the loss of each step.

    >>> from flax import nnx
    >>> model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    >>> losses = fit(model, lambda m, key: (m(jnp.ones((1, 1))) - 3).sum() ** 2, 0.1, 200, 0)
    >>> bool(losses[-1] < 1e-2 * losses[0])
    True
    """
    graph, weights, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.adam(rate)

    def step(carry, key):
        weights, rest, moments = carry

        def value(weights):
            model = nnx.merge(graph, weights, rest, copy=True)
            return loss(model, key), nnx.split(model, nnx.Param, ...)[2]

        (loss_value, rest), gradient = jax.value_and_grad(value, has_aux=True)(weights)
        updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(weights, updates), rest, moments), loss_value

    keys = jax.random.split(jax.random.key(seed), steps)
    carry = (weights, rest, optimizer.init(weights))
    (weights, rest, _), losses = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))(carry)
    nnx.update(model, weights, rest)
    return losses


class Examples(NamedTuple):
    """Images `[n, height, width, channels]`, float32 with mean 0 and variance 1, and labels `[n]`."""

    images: jax.Array | np.ndarray
    labels: jax.Array | np.ndarray

    @property
    def size(self) -> int:
        return len(self.labels)

    def take(self, chosen: np.ndarray) -> "Examples":
        return Examples(self.images[chosen], self.labels[chosen])

    def shuffled(self, seed: int) -> "Examples":
        """The same images with each other's labels."""
        return self._replace(labels=np.random.default_rng(seed).permutation(self.labels))


class Streamed(NamedTuple):
    """The first `size` training images of a data set, of which only those are made that are taken, if they are many."""

    data: Dataset
    size: int
    labels_from: int = 0  # so many images on

    def take(self, chosen: np.ndarray) -> Examples:
        few = self.size <= HELD
        made = _ready(self.data, *(_first(self.data, self.size, chosen) if few else self.data.train.fetch(chosen)))
        if not self.labels_from:
            return made
        return made._replace(labels=self.data.train.fetch(chosen + self.labels_from)[1])

    def shuffled(self, seed: int) -> "Streamed":
        """The same images, each with the label of one that is not among them."""
        return self._replace(labels_from=self.size)


def _first(data: Dataset, size: int, chosen: np.ndarray) -> tuple[np.ndarray, ...]:
    """Those of the first `size` training images, all of which are made once."""
    images, labels = _made(data, size)
    return images[chosen], labels[chosen]


@functools.lru_cache(maxsize=1)
def _made(data: Dataset, size: int) -> tuple[np.ndarray, np.ndarray]:
    parts = [data.train.fetch(part) for part in np.array_split(np.arange(size), math.ceil(size / TEST_BATCH))]
    images, labels = map(np.concatenate, zip(*parts, strict=True))
    return images, labels


class Trained(NamedTuple):
    """What training gave: the network, its accuracy on the test images, and what was watched, now and then."""

    model: nnx.Module
    accuracy: float
    seen: list[Any]


def examples(data: Dataset, seed: int, count: int) -> tuple[Examples | Streamed, Examples]:
    """The first `count` training images, in an order that the seed draws, and the test images.

    Where there are fewer, all. Of an endless source, others for each seed. Composed images are as many as one asks for,
    and the data set's own seed draws them.
    """
    test = _ready(data, *data.test.fetch(np.arange(len(data.test))))
    if data.originals:
        return Streamed(data, count), test
    everything = len(data.train)
    first = seed * everything + np.arange(count)  # of an endless source, which is as random there as anywhere
    order = first if data.train.endless else np.random.default_rng(seed).permutation(everything)[:count]
    return _ready(data, *data.train.fetch(order)), test


def _ready(data: Dataset, images: np.ndarray, labels: np.ndarray) -> Examples:
    """As `augment.normalize` has them; by NumPy, for a batch at a time that takes longer on its way to JAX and back."""
    unit = images.astype(np.float32) / np.float32(255 if images.dtype == np.uint8 else 1)
    return Examples((unit - np.asarray(data.mean, np.float32)) / np.asarray(data.std, np.float32), labels)


def classifier(build: Callable[[nnx.Rngs], nnx.Module], steps: int, batch: int, rate: float) -> Callable[..., Trained]:
    """A training compiled once: `train(seed, known, test, watch=None)` gives `Trained`.

    The network that `build` makes is trained by Adam, `steps` times on `batch` of the known images, drawn anew each
    time. So trainings that differ in their data alone take the same steps. The rate rises for a tenth of them and then
    falls along half a cosine.
    """
    graph, *_ = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param, ...)
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 10), steps))

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2), compiler_options=LOOP)
    def step(weights, rest, moments, images, labels):
        def loss(weights):
            model = nnx.merge(graph, weights, rest, copy=True)
            value = optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()
            return value, nnx.split(model, nnx.Param, ...)[2]

        gradient, rest = jax.grad(loss, has_aux=True)(weights)
        updates, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(weights, updates), rest, moments

    @jax.jit
    def right(weights, rest, images, labels):
        model = nnx.merge(graph, weights, rest, copy=True)
        model.eval()
        return (model(images).argmax(-1) == labels).sum()

    def train(
        seed: int, known: Examples | Streamed, test: Examples, watch: Callable[[nnx.Module], Any] | None = None
    ) -> Trained:
        _, weights, rest = nnx.split(build(nnx.Rngs(seed)), nnx.Param, ...)  # compiled, this takes longer than the rest
        moments = optimizer.init(weights)
        seen, draw = [], np.random.default_rng(seed)
        # a loop in Python: a convolution in a compiled one is slow on the CPU
        for n in range(steps):
            if watch is not None and n % max(1, steps // FRAMES) == 0:
                seen.append(watch(nnx.merge(graph, weights, rest)))
            images, labels = known.take(draw.integers(known.size, size=batch))
            weights, rest, moments = step(weights, rest, moments, images, labels)
        found = sum(right(weights, rest, *part) for part in _parts(test))
        model = nnx.merge(graph, weights, rest, copy=True)
        seen += [] if watch is None else [watch(model)]
        return Trained(model, float(found) / len(test.labels), seen)

    return train


def _parts(test: Examples) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The test images, so many at a time; what fills up the last has no label."""
    for first in range(0, len(test.labels), TEST_BATCH):
        images, labels = (np.asarray(x)[first : first + TEST_BATCH] for x in test)
        lacking = TEST_BATCH - len(labels)
        yield (
            np.pad(images, [(0, lacking)] + [(0, 0)] * (images.ndim - 1)),
            np.pad(labels, (0, lacking), constant_values=-1),
        )

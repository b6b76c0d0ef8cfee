"""What a trained network says: its accuracy, what it costs, and where its attention looks."""

import functools
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from jaxattn.train.augment import normalize
from jaxattn.train.data import Dataset, Source


def make_predict(graph: nnx.GraphDef, data: Dataset) -> Callable:
    """The forward pass: (weights, rest, images [batch, *grid, channels] as `data` has them) -> classes [batch]."""

    def predict(weights, rest, images):
        return nnx.merge(graph, weights, rest)(normalize(images, data.mean, data.std)).argmax(-1)

    return predict


def count_correct(predict: Callable[[np.ndarray], jax.Array], source: Source, batch_size: int = 100) -> int:
    """How many images are classified rightly, in batches of one size: what fills up the last is not counted."""
    correct = 0
    for start in range(0, len(source), batch_size):
        images, truth = source.fetch(np.arange(start, min(start + batch_size, len(source))))
        filled = np.pad(images, [(0, batch_size - len(images))] + [(0, 0)] * (images.ndim - 1))
        correct += int((np.asarray(predict(filled))[: len(truth)] == truth).sum())
    return correct


def evaluate(model: nnx.Module, data: Dataset, source: Source) -> int:
    """How many images of one part of the data the trained network classifies rightly."""
    model.eval()
    graph, weights, rest = nnx.split(model, nnx.Param, ...)
    return count_correct(functools.partial(jax.jit(make_predict(graph, data)), weights, rest), source)


def count_parameters(model: nnx.Module) -> int:
    """The size of all that is learned."""
    return sum(weight.size for weight in jax.tree.leaves(nnx.state(model, nnx.Param)))


def flops_per_image(model: nnx.Module, data: Dataset) -> float:
    """XLA's count for the compiled forward pass of one image."""
    model.eval()
    graph, weights, rest = nnx.split(model, nnx.Param, ...)
    image, _ = data.test.fetch(np.arange(1))
    compiled = jax.jit(make_predict(graph, data)).lower(weights, rest, image).compile()
    return float((compiled.cost_analysis() or {}).get("flops", np.nan))  # not every backend counts


def attention_weights(model: nnx.Module, images: np.ndarray, path: tuple, batch_size: int = 10) -> np.ndarray:
    """The weights `[images, *query_grid, heads, slots]` of the attention layer that stands at `path` in the model."""
    model.eval()
    graph, state = nnx.split(model)

    @jax.jit
    def forward(state, images):
        _, sown = nnx.capture(nnx.merge(graph, state, copy=True), nnx.Intermediate)(images, sow_weights=True)
        return dict(nnx.to_flat_state(sown))[(*path, "attention_weights")].get_value()[0]

    # a few at a time, for the weights of large images are large
    starts = range(0, len(images), batch_size)
    return np.concatenate([forward(state, images[start : start + batch_size]) for start in starts])

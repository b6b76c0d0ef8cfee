"""What a trained network says: its accuracy, what it costs, and where its attention looks."""

import functools
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int


def make_predict(graph: nnx.GraphDef) -> jax.stages.Wrapped:
    """The jitted forward pass: (weights, rest, images [batch, height, width, channels]) -> classes [batch]."""
    return jax.jit(lambda weights, rest, images: nnx.merge(graph, weights, rest)(images).argmax(-1))


def count_correct(
    predict: Callable[[np.ndarray], jax.Array],
    images: Float[np.ndarray, "n height width channels"],
    labels: Int[np.ndarray, "n"],
    batch_size: int = 100,
) -> int:
    """How many images are classified rightly, in batches of one size: what fills up the last is not counted."""
    correct = 0
    for start in range(0, len(labels), batch_size):
        batch, truth = images[start : start + batch_size], labels[start : start + batch_size]
        filled = np.pad(batch, ((0, batch_size - len(batch)), (0, 0), (0, 0), (0, 0)))
        correct += int((np.asarray(predict(filled))[: len(truth)] == truth).sum())
    return correct


def evaluate(
    model: nnx.Module, images: Float[np.ndarray, "n height width channels"], labels: Int[np.ndarray, "n"]
) -> int:
    """How many images the trained network classifies rightly."""
    model.eval()
    graph, weights, rest = nnx.split(model, nnx.Param, ...)
    return count_correct(functools.partial(make_predict(graph), weights, rest), images, labels)


def count_parameters(model: nnx.Module) -> int:
    """The size of all that is learned."""
    return sum(weight.size for weight in jax.tree.leaves(nnx.state(model, nnx.Param)))


def flops_per_image(model: nnx.Module, image: np.ndarray) -> float:
    """XLA's count for the compiled forward pass of one image."""
    model.eval()
    graph, weights, rest = nnx.split(model, nnx.Param, ...)
    compiled = make_predict(graph).lower(weights, rest, image[None]).compile()
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

"""One step of training, as a pure function of arrays."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from jaxattn.train.augment import augment, normalize
from jaxattn.train.config import Config
from jaxattn.train.data import Dataset
from jaxattn.train.meter import METRICS


class State(NamedTuple):
    """All that a step changes, and so all that a checkpoint holds beside the position in the data."""

    step: Int[Array, ""]  # steps done
    weights: PyTree  # what is learned, float32
    rest: PyTree  # BatchNorm's statistics, and frozen weights
    moments: optax.OptState
    average: PyTree  # the mean of the weights that `ema` asks for, or None


def init_state(
    config: Config, model: nnx.Module, optimizer: optax.GradientTransformation, learned: Any = nnx.Param
) -> State:
    """The state before the first step; `learned` is an nnx filter, of the weights that change."""
    weights, rest = nnx.state(model, learned, ...)
    # a copy: a buffer can be given away to the compiled step only once
    average = jax.tree.map(jnp.copy, weights) if config.ema else None
    return State(jnp.zeros((), jnp.int32), weights, rest, optimizer.init(weights), average)


def make_loss(graph: nnx.GraphDef, config: Config, learned: Any = nnx.Param) -> Callable:
    """The loss of a batch: (weights, rest, key, images [batch, *grid, channels], targets [batch, classes])
    -> loss, (rest, accuracy). The weights are those that the nnx filter `learned` is of."""

    def loss_fn(weights, rest, key, images, targets):
        model = nnx.merge(graph, weights, rest, copy=True)
        logits = model(images, **({"rngs": nnx.Rngs(dropout=key)} if config.drop_path else {}))
        logits = logits.astype(jnp.float32)  # [batch, classes]
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        accuracy = (logits.argmax(-1) == targets.argmax(-1)).mean(dtype=jnp.float32)
        return loss, (nnx.state(model, nnx.Not(learned)), accuracy)

    return loss_fn


def make_step(
    config: Config, data: Dataset, loss_fn: Callable, optimizer: optax.GradientTransformation
) -> Callable[[State, dict[str, Any]], tuple[State, Float[Array, "metrics"]]]:
    """One step: (state, batch) -> the next state, and what METRICS names. To be jitted with the state donated.

    A batch is `{"image": [batch, *grid, channels], "label": int32 [batch]}` as the data set holds it; it is normalised
    and augmented here, so by the device. Whatever is random follows from the seed and the step alone, so a run that
    was interrupted draws the same again.
    """

    def step(state: State, batch):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        images = normalize(batch["image"], data.mean, data.std)
        targets = jax.nn.one_hot(batch["label"], len(data.class_names), dtype=jnp.float32)
        images, targets = augment(
            jax.random.fold_in(key, 0), images, optax.smooth_labels(targets, config.label_smoothing), config
        )
        (loss, (rest, accuracy)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
            state.weights, state.rest, jax.random.fold_in(key, 1), images, targets
        )
        updates, moments = optimizer.update(gradients, state.moments, state.weights)
        weights = optax.apply_updates(state.weights, updates)
        average = None
        if state.average is not None:
            # at first the mean is over fewer steps than the decay means: the initial weights are soon forgotten
            decay = jnp.minimum(config.ema, (1 + state.step) / (10 + state.step))
            average = optax.incremental_update(weights, state.average, 1 - decay)
        measured = {"loss": loss, "accuracy": accuracy, "gradient_norm": optax.global_norm(gradients)}
        metrics = jnp.stack([measured[name] for name in METRICS])
        return State(state.step + 1, weights, rest, moments, average), metrics

    return step

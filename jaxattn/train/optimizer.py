"""How weights are changed: the learning rate, the decay, and the optimiser around both, all optax's."""

import jax
import optax
from jaxtyping import PyTree

from jaxattn.train.config import Config
from jaxattn.train.finetune import by_layer

PLACES = ("position", "centre")


def schedule(config: Config, updates: int) -> optax.Schedule:
    """The learning rate: a linear rise over the share `warmup` of all updates, then half a cosine down to zero."""
    rise = round(config.warmup * updates)
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, rise, max(updates, rise + 1))


def decaying(weights: PyTree) -> PyTree:
    """Which weights decay: those that multiply features. Not biases and scales, nor what says where a token stands or a
    head looks, for which zero is a place like any other.

    >>> import numpy as np
    >>> decaying({"kernel": np.ones((2, 3)), "scale": np.ones(3), "centre": np.ones((9, 2)), "bias": np.ones((4, 8))})
    {'bias': False, 'centre': False, 'kernel': True, 'scale': False}
    """

    def decays(path, weight) -> bool:
        name = next((str(key.key) for key in reversed(path) if isinstance(key, jax.tree_util.DictKey)), "")
        return weight.ndim >= 2 and not name.endswith("bias") and name not in PLACES

    return jax.tree_util.tree_map_with_path(decays, weights)


def make_optimizer(config: Config, steps: int) -> optax.GradientTransformation:
    """Clipping, then AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) or SGD with Nesterov's momentum, whose decay
    is part of the gradient; each block's update is the smaller the nearer it is to the images, by `layer_decay`.
    `accumulate` steps make one update by the mean of their gradients.

    Args:
      config: of the run.
      steps: of the whole run, from which the schedule follows.
    """
    rate = schedule(config, steps // config.accumulate)
    if config.optimizer == "adamw":
        parts: list[optax.GradientTransformation] = [optax.adamw(rate, weight_decay=config.weight_decay, mask=decaying)]
    else:
        parts = [
            optax.add_decayed_weights(config.weight_decay, decaying),
            optax.sgd(rate, config.momentum, nesterov=True),
        ]
    if config.layer_decay < 1:
        parts.append(by_layer(config.layer_decay))
    if config.clip:
        parts.insert(0, optax.clip_by_global_norm(config.clip))
    optimizer = optax.chain(*parts)
    if config.accumulate == 1:
        return optimizer
    return optax.MultiSteps(optimizer, config.accumulate).gradient_transformation()

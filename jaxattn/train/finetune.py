"""Fine-tuning: training that begins with the weights of a file, keeps those of the first stages, and changes the others
the less the nearer they are to the images."""

from bisect import bisect
from collections.abc import Sequence
from typing import Any

import jax
import optax
from flax import nnx
from jaxtyping import PyTree

from jaxattn.errors import InputError
from jaxattn.files import path_of, reading
from jaxattn.pretrained import weights as pretrained
from jaxattn.pretrained.files import read_weights
from jaxattn.train.config import Config

Path = Sequence[Any]  # of a module or a weight in a network: names, and numbers within lists
# what networks have before their blocks, and what behind them
BEFORE = (
    "patches", "patch_norm", "stem", "stem1", "stem2", "stem_norm", "stem_norms", "position", "class_position",
    "class_token", "registers", "norm_before",
)  # fmt: skip
AFTER = (
    "norm", "token", "class_blocks", "latent_pool", "neck", "head", "head_norm", "hidden", "hidden_norm", "classifier",
)  # fmt: skip
LAST = 1 << 30


def fill(config: Config, model: nnx.Module):
    """Sets the weights of a model from the file that the settings name, if they name one; its head stays as it is,
    unless they say otherwise.

    Raises:
      ValueError: a file that cannot be read, or that is of another network, with its name.
    """
    if config.weights:
        path = path_of(config.weights)
        with reading(path):
            pretrained.fill(model, read_weights(path), new_head=config.new_head)


def place(path: Path) -> tuple[int, int]:
    """Where in a network something is, as a stage and a block in it, in the order of the computation: (0, 0) before all
    stages. What halves the grid is of its stage's first block; where there are no stages, each block is one.

    >>> place(("patches", "kernel")), place(("stages", 1, "blocks", 3, "norm", "scale")), place(("stages", 1, "down"))
    ((0, 0), (2, 3), (2, 0))
    >>> place(("blocks", 5, "mlp", "kernel"))
    (6, 0)
    """
    first, *rest = path
    if first in BEFORE:
        return 0, 0
    if first in AFTER:
        return LAST, 0
    if first in ("blocks", "stages", "merges") and rest:  # a merge is of the stage that it follows
        return rest[0] + 1, rest[2] if len(rest) > 2 and rest[1] == "blocks" else 0
    raise InputError(
        f"freeze and layer_decay must be off, by 0 and 1, for a network with {'.'.join(map(str, path))}: it is not "
        "known to be before or behind its blocks"
    )


def learned(config: Config, model: nnx.Module) -> Any:
    """The nnx filter of the weights that a run changes: all but those of frozen stages.

    Raises:
      ValueError: there are not so many stages.
    """
    if config.freeze == 0:
        return nnx.Param
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    stages = max(_stage(model, path) for path in paths if place(path)[0] < LAST)
    if config.freeze > stages:
        raise InputError(f"freeze (={config.freeze}) must be at most the {stages} stages of the model {config.model}")
    return nnx.All(nnx.Param, lambda path, _: _stage(model, path) > config.freeze)


def freeze(config: Config, model: nnx.Module):
    """Puts the frozen stages of a model into evaluation mode: their statistics stay, and no block is left out."""
    if config.freeze:
        for path, module in nnx.iter_modules(model):
            block = len(path) == 2 and path[0] in ("blocks", "stages")
            if (block or (len(path) == 1 and path[0] in BEFORE)) and _stage(model, path) <= config.freeze:
                module.eval()


def _stage(model: Any, path: Path) -> int:
    """The number of a stage, from 1; networks that number their blocks through say which are the last of theirs."""
    stage, _ = place(path)
    ends = getattr(model, "ends", None) if 0 < stage < LAST else None
    return stage if ends is None else bisect(_first_blocks(model, ends), stage - 1)


def _first_blocks(model: Any, ends: Sequence[int]) -> list[int]:
    """The number of the first block of every stage."""
    last = len(model.blocks) - ends[-1]  # whether `ends` counts from 0, and has the last block's own number, or from 1
    return [0, *(end + last for end in ends[:-1])]


def by_layer(decay: float) -> optax.GradientTransformation:
    """Multiplies each weight's update by `decay` for every block behind its own, where all that is behind the blocks
    counts as one, and so does all before them (Bao et al. 2022, BEiT, arXiv 2106.08254).

    >>> import jax.numpy as jnp
    >>> updates = {name: {"kernel": jnp.ones(1)} for name in ("patches", "norm", "head")}
    >>> updates |= {"blocks": {n: {"kernel": jnp.ones(1)} for n in range(2)}}
    >>> scaled, _ = by_layer(0.5).update(updates, optax.EmptyState())
    >>> [float(each["kernel"][0]) for each in (scaled["patches"], *scaled["blocks"].values(), scaled["head"])]
    [0.125, 0.25, 0.5, 1.0]
    """

    def scale(updates: PyTree, _: Any) -> PyTree:
        paths = jax.tree_util.tree_map_with_path(lambda path, _: place(_names(path)), updates)
        places = sorted(set(jax.tree.leaves(paths, is_leaf=lambda node: isinstance(node, tuple))))
        return jax.tree_util.tree_map_with_path(
            lambda path, update: update * decay ** (len(places) - 1 - places.index(place(_names(path)))), updates
        )

    return optax.stateless(scale)


def _names(path: Path) -> list[Any]:
    return [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]

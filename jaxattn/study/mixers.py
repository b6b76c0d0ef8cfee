"""The networks of the study: one small ViT, of which only the layer that mixes tokens differs."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxattn import nn
from jaxattn.attention import attention
from jaxattn.errors import InputError
from jaxattn.files import read_json
from jaxattn.models.vit import ViT
from jaxattn.study.claim import Profile, Setting
from jaxattn.study.fit import Trained, classifier, examples
from jaxattn.train.data import Dataset, load
from jaxattn.train.run import digest, write_json

HEADS = 4
ENDLESS = 20_000  # images of a source without end that a training may draw from


class Size(NamedTuple):
    """Of a network and of its training, the same for every layer that is compared."""

    width: int
    depth: int
    steps: int
    grid: int  # tokens along an axis that has so many pixels, at least
    batch: int = 64
    rate: float = 1e-2


SIZES: dict[Profile, Size] = {"quick": Size(32, 2, 250, 4), "full": Size(48, 2, 600, 4)}
SEARCH = {"depth": 1, "steps": 1500}  # of the networks that search: one comparison, which takes long to be found
Grid = tuple[int, int]


class DistanceAttention(nnx.Module):
    """Attention whose scores are -½‖W (x_i - x_j)‖² / √d, by one matrix for queries and keys: a metric by construction.

    Of the square, -½‖W x_i‖² is the same for all keys, which softmax does not see; so it is q·k with the bias -½‖k‖².
    """

    def __init__(self, num_heads: int, features: int, *, tied: bool = True, rngs: nnx.Rngs, **kwargs: Any):
        heads = (num_heads, features // num_heads)
        self.key, self.value = (nnx.LinearGeneral(features, heads, rngs=rngs, **kwargs) for _ in range(2))
        self.query = self.key if tied else nnx.LinearGeneral(features, heads, rngs=rngs, **kwargs)
        self.out = nnx.LinearGeneral(heads, features, axis=(-2, -1), rngs=rngs, **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        tokens = x.reshape(*x.shape[:-3], -1, x.shape[-1])
        query, key = self.query(tokens), self.key(tokens)
        scale = key.shape[-1] ** -0.5
        bias = -0.5 * scale * jnp.square(key).sum(-1)  # [*batch, keys, heads]
        y = attention(query, key, self.value(tokens), bias=jnp.moveaxis(bias, -1, -2)[..., None, :], scale=scale)
        return self.out(y).reshape(x.shape)


def biased(**settings: Any) -> Callable[..., nnx.Module]:
    """Attention with a learned bias for each offset."""
    return lambda width, **kwargs: nn.Attention(HEADS, width, relative_bias=True, **settings, **kwargs)


def relative(grid: Grid, content: bool) -> Callable[..., nnx.Module]:
    return lambda width, **kwargs: nn.LearnedRelativeAttention(HEADS, width, grid=grid, content=content, **kwargs)


MIXERS: dict[str, Callable[[Grid], Callable[..., nnx.Module]]] = {
    "convolution": lambda grid: lambda width, **kwargs: nn.Conv(width, width, (3, 3), **kwargs),
    "local attention": lambda grid: biased(window=(3, 3)),
    "gated attention": lambda grid: lambda width, **kwargs: nn.GPSA(HEADS, width, **kwargs),
    "global attention": lambda grid: biased(window=grid),
    "frozen": lambda grid: biased(window=grid, scale=0.0),  # of the scores, the bias of each offset is left
    "relu": lambda grid: biased(window=grid, normalize="relu"),
    "sigmoid": lambda grid: biased(window=grid, normalize="sigmoid"),
    "sparsemax": lambda grid: biased(window=grid, normalize="sparsemax"),
    "none": lambda grid: biased(window=grid, normalize="none"),
    "q·k and q·r": lambda grid: relative(grid, content=True),
    "q·r alone": lambda grid: relative(grid, content=False),
    "quadratic heads": lambda grid: lambda width, **kwargs: nn.QuadraticAttention(HEADS, width, **kwargs),
    "nine quadratic heads": lambda grid: lambda width, **kwargs: nn.QuadraticAttention(9, width, **kwargs),
    "distance": lambda grid: lambda width, **kwargs: DistanceAttention(HEADS, width, **kwargs),
    "two matrices": lambda grid: lambda width, **kwargs: DistanceAttention(HEADS, width, tied=False, **kwargs),
}


def network(mixer: str, shape: tuple[int, ...], classes: int, size: Size, rngs: nnx.Rngs) -> ViT:
    """A ViT for images of `shape`.

    A convolution of 3 × 3 has nine matrices where attention has four, so its network is three quarters as wide: the
    same number of parameters, within a few percent.
    """
    height, width, channels = shape
    patches = [p for p in range(1, height) if height % p == width % p == 0 and min(height, width) >= p * size.grid]
    patch = max(patches, default=1)
    features = size.width * 3 // 4 if mixer == "convolution" else size.width
    return ViT(
        image_size=(height, width),
        patch_size=patch,
        in_features=channels,
        num_classes=classes,
        width=features,
        depth=size.depth,
        num_heads=HEADS,
        mlp_dim=2 * size.width,
        mix=MIXERS[mixer]((height // patch, width // patch)),
        class_token=False,
        rngs=rngs,
    )


@functools.cache
def trainer(mixer: str, shape: tuple[int, ...], classes: int, size: Size) -> Callable[..., Trained]:
    """`fit.classifier` of that network; the same one, compiled once, for all who ask."""
    return classifier(lambda rngs: network(mixer, shape, classes, size, rngs), size.steps, size.batch, size.rate)


@functools.cache
def search() -> Dataset:
    """The task that asks for a comparison: does any of eight tokens hold what a marked one holds?"""
    return load("relational:match?size=3&bits=8")


@functools.lru_cache(maxsize=512)
def train(
    mixer: str,
    setting: Setting,
    data: Dataset,
    *,
    count: int | None = None,
    shuffled: bool = False,
    watch: Callable[[nnx.Module], Any] | None = None,
    **size: Any,
) -> Trained:
    """Trains the network of that mixer on the first `count` training images, by default all or `ENDLESS`.

    Whoever asks again is given the same.

    Args:
      mixer: a name in `MIXERS`.
      setting: its profile sizes the network, its seed draws weights, images and batches.
      data: the images.
      count: how many of them are known.
      shuffled: gives the training images each other's labels, so that nothing can be learned.
      watch: is shown the network now and then.
      **size: fields of `Size` that differ from the profile's.
    """
    known, test = examples(data, setting.seed, count or everything(data))
    if shuffled:
        known = known.shuffled(setting.seed)
    run = trainer(mixer, data.image_shape, len(data.class_names), sized(setting, data, **size))
    return run(setting.seed, known, test, watch)


def accuracy(mixer: str, setting: Setting, data: Dataset, *, count: int | None = None, **how: Any) -> float:
    """The test accuracy of what `train` gives. Other experiments, in other processes, find it in `setting.kept`."""
    count = count or everything(data)
    if setting.kept is None:
        return train(mixer, setting, data, count=count, **how).accuracy
    wanted = sized(setting, data, **{name: value for name, value in how.items() if name != "shuffled"})
    name = digest(mixer, data.name, data is search(), count, how.get("shuffled", False), tuple(wanted), setting.seed)
    path = setting.kept / f"network-{name}.json"
    if not _is_kept(path):
        mine = path.with_suffix(f".{os.getpid()}.json")  # another process may be at it too, and finds the same
        write_json(mine, {"mixer": mixer, "accuracy": train(mixer, setting, data, count=count, **how).accuracy})
        os.replace(mine, path)
    return float(read_json(path)["accuracy"])


def _is_kept(path: Path) -> bool:
    """Whether a file holds an accuracy; a damaged one is written anew."""
    try:
        return isinstance(read_json(path).get("accuracy"), float)
    except InputError:
        return False


def everything(data: Dataset) -> int:
    """How many images a network may know."""
    return ENDLESS if data.train.endless else len(data.train)


def sized(setting: Setting, data: Dataset, **size: Any) -> Size:
    """The size of the profile's networks, of those that search, and what is asked for."""
    return SIZES[setting.profile]._replace(**((SEARCH if data is search() else {}) | size))

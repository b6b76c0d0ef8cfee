"""Where each layer of the zoo looks: the weights A(i, j) of two pixels of a photograph, as the layer itself has them.

The features of a pixel are the colours around it and one more, which is zero everywhere. Queries, keys and values are
the features themselves (every linear map is the identity, times a factor that makes the softmax sharp). So the scores
never see the last feature, and the last output is Σ_j A(i, j) times the last input: its derivative is A. What
no data make, kernels and tables of positions, is drawn at random.
"""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import picture
from flax import nnx
from matplotlib.figure import Figure

import jaxattn
from jaxattn import nn, zoo
from jaxattn.plots import DIVERGING, QUERY, SEQUENTIAL, styled

SIDE, FEATURES, SHARP = 32, 28, 6.5
PIXELS = ((11, 12), (19, 20))


@functools.cache
def scene() -> tuple[np.ndarray, jax.Array]:
    """A piece of the photograph, and its features [1, SIDE, SIDE, FEATURES]."""
    photo = picture.photograph()[48 : 48 + 2 * SIDE, 100 : 100 + 2 * SIDE].reshape(SIDE, 2, SIDE, 2, 3).mean((1, 3))
    around = jaxattn.einsum("i+r j+s c -> i j (r s c)", jnp.asarray(photo), r=3, s=3, padding="SAME", boundary="edge")
    around = around - around.mean((0, 1))
    around = around / jnp.linalg.norm(around, axis=-1, keepdims=True)
    return photo, jnp.concatenate([around, jnp.zeros((SIDE, SIDE, 1))], -1)[None]


def same(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """The identity, for a linear map from features to features; anything else is drawn."""
    if np.prod(shape) == FEATURES**2:
        return SHARP * jnp.eye(FEATURES, dtype=dtype).reshape(shape)
    return jax.random.normal(key, shape, dtype)


WIDE = (15, 15)
# What a constructor is given of these, if it takes them; and what a layer has otherwise.
USUAL: dict[str, Any] = {
    "num_heads": 1,
    "in_features": FEATURES,
    "out_features": FEATURES,
    "kernel_size": WIDE,
    "window": WIDE,
    "grid": (SIDE, SIDE),
    "rank": 2,
}
UNSCALED = FEATURES**-0.5  # where the paper has no scale
normal = nnx.initializers.normal(1.0)
OTHERWISE: dict[str, dict[str, Any]] = {
    "outlook_attention": {"kernel_size": (5, 5)},
    "quadratic_attention": {"head_dim": FEATURES, "window": None},
    "aft": {"position_init": normal},
    "aft_conv": {"position_init": normal},
    "sasa": {"scale": UNSCALED},
    "halo_attention": {"block": 8, "halo": 4, "scale": UNSCALED},
    "global_attention": {"rank": 2},
    "axial_attention": {"window": SIDE},
    "cvt_attention": {"kernel_size": (3, 3)},
    "gpsa": {"num_heads": 4},
    "shifted_window_attention": {"window": (16, 16), "shift": 8},
    "augmented_conv": {"kernel_size": (9, 9), "out_features": 2 * FEATURES, "value_features": FEATURES},
}
NOT_DRAWN = {"parameter_key_attention": "Its keys are parameters and not pixels, so that there is nothing to draw."}
DRAWN = [name for name in zoo.ROWS if name not in NOT_DRAWN]
MODULES = {name.lower(): cls for name, cls in vars(nn).items() if inspect.isclass(cls)}


def module(name: str) -> type:
    """The class of `jaxattn.nn` of a function of the zoo: `aft_conv` and `AFTConv`."""
    return MODULES[name.replace("_", "")]


def made(name: str) -> nnx.Module:
    """The layer as it is drawn."""
    taken = inspect.signature(module(name).__init__).parameters
    usual = {argument: value for argument, value in USUAL.items() if argument in taken}
    return module(name)(**usual | OTHERWISE.get(name, {}), kernel_init=same, rngs=nnx.Rngs(0))


def weights(name: str) -> np.ndarray:
    """A(i, j) of the layer for i in PIXELS and every j, [pixels, SIDE, SIDE]."""
    graph, state = nnx.split(made(name))

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # it runs once
    @jax.jacrev
    def last(marks: jax.Array, x: jax.Array, state: nnx.State) -> jax.Array:
        y = nnx.merge(graph, state)(x.at[..., -1].add(marks))
        return jnp.stack([y[0, i, j, -1] for i, j in PIXELS])

    return np.asarray(last(jnp.zeros((SIDE, SIDE)), scene()[1], state))


def look(name: str) -> Figure:
    """The piece of the photograph, and beside it the weights of each of the pixels; of those that are all positive the
    root, so that the small ones show."""
    photo, found = scene()[0], weights(name)
    signed = found.min() < -1e-6 * abs(found).max()
    with styled(9):
        figure = Figure(figsize=(7.2, 2.6), layout="constrained")
        first, *others = figure.subplots(1, 1 + len(PIXELS))
        first.imshow(photo)
        for n, (axes, (i, j), a) in enumerate(zip(others, PIXELS, found, strict=True), 1):
            limit = abs(a).max()
            if signed:
                axes.imshow(a, cmap=DIVERGING, vmin=-limit, vmax=limit)
            else:
                axes.imshow(np.sqrt(a.clip(0)), cmap=SEQUENTIAL)
            axes.plot(j, i, "s", color="none", markeredgecolor=QUERY, markersize=6)
            first.plot(j, i, "s", color="none", markeredgecolor="white", markersize=6)
            first.text(j + 1.5, i, str(n), color="white", va="center_baseline")
            axes.set_title(f"what pixel {n} sees")
        for axes in (first, *others):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    return figure

"""Draws the README's picture, docs/weights.png: where two pixels of a photograph look, by three kinds of weights.

python docs/picture.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_image

import jaxattn
from jaxattn.plots import INK, SEQUENTIAL, styled

SIDE, PIXELS = 21, ((62, 140), (118, 96))  # of the window, and at its middle
KINDS = (
    "the window",
    "fixed at an offset:\nconvolution",
    "made from the pair:\nlocal attention",
    "a gate between them",
)


def photograph() -> np.ndarray:
    """Scikit-learn's flower, a quarter of its size."""
    photo = load_sample_image("flower.jpg").astype(np.float32)[26:426, 40:600] / 255
    return photo.reshape(200, 2, 280, 2, 3).mean((1, 3))


def weights(photo: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A(i, j) over the window of each pixel, `[..., SIDE, SIDE]`."""
    offsets = jnp.arange(SIDE) - SIDE // 2
    near = -(offsets[:, None] ** 2 + offsets**2) / 18.0
    fixed = jax.nn.softmax(near.ravel()).reshape(SIDE, SIDE)

    patches = jaxattn.einsum("i+r j+s c -> i j (r s c)", photo, r=3, s=3, padding="SAME", boundary="reflect")
    beta = 3.0  # q·k = -β‖x_i - x_j‖², but for a term that is the same for every j
    query = jnp.concatenate([2 * beta * patches, jnp.ones_like(patches[..., :1])], -1)
    key = jnp.concatenate([patches, -beta * jnp.square(patches).sum(-1, keepdims=True)], -1)
    scores = jaxattn.einsum(
        "i j d, i+u j+v d -> i j u v", query, key, u=SIDE, v=SIDE, padding="SAME", boundary="reflect"
    )
    paired = jax.nn.softmax(scores.reshape(*scores.shape[:2], -1)).reshape(scores.shape)
    return jnp.broadcast_to(fixed, paired.shape), paired, (fixed + paired) / 2


def draw() -> Figure:
    photo = photograph()
    kinds = weights(jnp.asarray(photo))
    with styled(11):
        figure = Figure(figsize=(8.4, 4.6), layout="constrained")
        for row, (i, j) in zip(figure.subplots(2, 4), PIXELS, strict=True):
            half = SIDE // 2
            around = photo[i - half : i + half + 1, j - half : j + half + 1]
            # their roots, so that the small ones show
            for axes, picture, title in zip(row, (around, *(np.sqrt(w[i, j]) for w in kinds)), KINDS, strict=True):
                axes.imshow(picture, cmap=SEQUENTIAL)
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
                if (i, j) == PIXELS[0]:
                    axes.set_title(title, color=INK, fontsize=11)
            row[0].plot(half, half, "s", color="none", markeredgecolor="white", markersize=8, markeredgewidth=2)
    return figure


if __name__ == "__main__":
    draw().savefig(Path(__file__).with_name("weights.png"), dpi=110, facecolor="white")

"""Claim 8: heads that learn at which offset to look."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxattn import nn
from jaxattn.study import figures
from jaxattn.study.animation import moving_centers
from jaxattn.study.claim import Measurement, Setting, claim, decide
from jaxattn.study.fit import fit
from jaxattn.study.mixers import train

N, OFFSET, STEPS = 24, 4, 400


@claim(
    number=8,
    author="吼吼",
    text="Attention learns its receptive field; a CNN's is set by hand.",
    chinese="注意力的感受野是学出来的，CNN 的感受野是人为设定的。",
    about="Each token must give the content of the token 4 to its right, and the layers are told nothing of "
    "the 4. One quadratic head, which looks at a centre that it learns, is trained on random tokens; so "
    "are a convolution of size 3, which sees 1 to each side, and one of size 9, which sees 4. The loss "
    "is the mean square error, of which the tokens' own variance is 1. To see the same on images, a network of nine "
    "such heads a layer is trained on the study's, and its heads' centres drawn as they move.",
    hypothesis="The head's centre goes to 4; the small convolution learns nothing.",
    threshold="Holds if the centre is within 0.25 of 4 and the head's error below 0.1, the convolution of size 3 "
    "keeps an error above 0.9, and that of size 9 has one below 0.1.",
    cost=14,
)
def planted_offset(setting: Setting, offset: int = OFFSET, steps: int = STEPS) -> Measurement:
    rngs = nnx.Rngs(setting.seed)

    def loss(layer: Callable[[jax.Array], jax.Array], key: jax.Array) -> jax.Array:
        x = jax.random.normal(key, (16, N, 4), jnp.float32)
        return jnp.mean((layer(x)[:, : N - OFFSET] - x[:, offset : N - OFFSET + offset]) ** 2)

    head = nn.QuadraticAttention(1, 4, rank=1, alpha_init=nnx.initializers.constant(0.02), rngs=rngs)
    layers = {"head": head, "size 3": nn.Conv(4, 4, 3, rngs=rngs), "size 9": nn.Conv(4, 4, 9, rngs=rngs)}
    curves = {name: [float(v) for v in fit(layer, loss, 0.03, steps, setting.seed)] for name, layer in layers.items()}
    errors = {name: float(loss(layer, jax.random.key(1000 + setting.seed))) for name, layer in layers.items()}
    centre = float(head.centre[0, 0])
    numbers = {"centre of the head": centre} | {f"error: {name}": error for name, error in errors.items()}
    found = abs(centre - OFFSET) <= 0.25 and errors["head"] < 0.1
    drawn = [
        figures.lines(
            range(0, steps, 50), {n: c[::50] for n, c in curves.items()}, "step", "mean square error", log=True
        )
    ]
    if setting.seed == 0:
        drawn += [moving_heads(setting)]
    return Measurement(numbers, decide(found and errors["size 3"] > 0.9 and errors["size 9"] < 0.1), drawn)


def moving_heads(setting: Setting) -> str:
    """Trains a network of nine quadratic heads a layer on the images: an SVG of their centres through training."""
    centres = lambda model: np.stack([block.mix.layer.centre[...] for block in model.blocks])
    tracks = np.stack(train("nine quadratic heads", setting, setting.data, watch=centres).seen)
    return moving_centers(tracks, [f"layer {n + 1}" for n in range(tracks.shape[1])])

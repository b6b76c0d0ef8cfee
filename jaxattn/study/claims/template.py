"""Claims 4 and 12: convolution's weights are fixed, attention's move with what is seen."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn import zoo
from jaxattn.attention import attention
from jaxattn.study.claim import Measurement, Setting, claim, decide
from jaxattn.study.claims.matrix import ROUNDING, relative
from jaxattn.window import Window

N, FEATURES = 12, 4


def attend(x: jax.Array, normalize: str = "softmax") -> jax.Array:
    """Local attention of one head, whose queries, keys and values are the tokens."""
    tokens = x[:, None]
    return attention(tokens, tokens, tokens, window=Window(3, boundary="mask"), normalize=normalize)[:, 0]


def moves(layer: Callable[[jax.Array], jax.Array], x: jax.Array, other: jax.Array) -> float:
    """How far the Jacobian ∂y/∂x at one input is from that at another, relative to its size."""
    here, there = jax.jacobian(layer)(x), jax.jacobian(layer)(other)
    return float(jnp.linalg.norm(here - there) / jnp.linalg.norm(here))


@claim(
    number=4,
    author="吼吼",
    text="Convolution extracts features, attention emphasises them.",
    chinese="卷积提取特征，注意力强调特征。",
    about="To emphasise is to choose among what is there: an output that lies among the values it is made of. "
    "For each output of local attention and of a random convolution over the same three tokens, we test "
    "whether it lies in the smallest box about them; what lies in their convex hull does. We also "
    "measure how the layers' Jacobians move with the input.",
    hypothesis="Attention stays in the box and moves with the input; convolution leaves the box and does not move.",
    threshold="Holds if no output of attention and more than half of the convolution's are outside the box, and "
    "the Jacobian moves by more than 1e-1 for attention and by less than 1e-5 for convolution.",
)
def emphasis(setting: Setting, normalize: str = "softmax") -> Measurement:
    keys = jax.random.split(jax.random.key(setting.seed), 3)
    x, other = jax.random.normal(keys[0], (2, N, FEATURES), jnp.float32)
    kernel = jax.random.normal(keys[1], (3, FEATURES, FEATURES), jnp.float32)
    window = np.stack([x[:-2], x[1:-1], x[2:]])  # of the queries that have three tokens
    low, high = window.min(0) - ROUNDING, window.max(0) + ROUNDING

    def outside(y):
        inner = y[1:-1]
        return float(((inner < low) | (inner > high)).any(-1).mean())

    numbers = {
        "outside: attention": outside(attend(x, normalize)),
        "outside: convolution": outside(zoo.conv(x, kernel)),
        "Jacobian moves: attention": moves(lambda x: attend(x, normalize), x, other),
        "Jacobian moves: convolution": moves(lambda x: zoo.conv(x, kernel), x, other),
    }
    inside, leaves, moving, still = numbers.values()
    return Measurement(numbers, decide(inside == 0 and leaves > 0.5 and moving > 0.1 and still < ROUNDING))


@claim(
    number=12,
    author="匿名用户",
    text="Convolution is an inner product with a fixed template.",
    chinese="卷积是与一个固定模板做内积。",
    about="Every output of a convolution is compared with the inner product of its patch and the kernel, in a "
    "NumPy loop. The template is fixed if the Jacobian is the same at two random inputs. That of "
    "attention is measured beside it.",
    hypothesis="The inner product is the definition, and the template does not move; attention's does.",
    threshold="Holds if the outputs agree and the Jacobian stays, both within 1e-5, while attention's moves by "
    "more than 1e-1.",
)
def fixed_template(setting: Setting, layer: Callable[[jax.Array, jax.Array], jax.Array] = zoo.conv) -> Measurement:
    keys = jax.random.split(jax.random.key(setting.seed), 2)
    x, other = jax.random.normal(keys[0], (2, N, FEATURES), jnp.float32)
    kernel = jax.random.normal(keys[1], (3, FEATURES, FEATURES), jnp.float32)
    padded = np.pad(np.asarray(x, np.float64), [(1, 1), (0, 0)])
    products = [np.tensordot(padded[i : i + 3], np.asarray(kernel, np.float64), 2) for i in range(N)]
    numbers = {
        "difference from the inner products": relative(layer(x, kernel), np.stack(products)),
        "Jacobian moves: convolution": moves(lambda x: layer(x, kernel), x, other),
        "Jacobian moves: attention": moves(attend, x, other),
    }
    error, still, moving = numbers.values()
    return Measurement(numbers, decide(error <= ROUNDING and still < ROUNDING and moving > 0.1))

"""Claims 1 and 11: a convolution as a matrix, and a line of text as an image of height one."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn import zoo
from jaxattn.attention import attention
from jaxattn.study.claim import Measurement, Setting, claim, decide
from jaxattn.window import Window

ROUNDING = 1e-5


def relative(a: jax.Array | np.ndarray, b: jax.Array | np.ndarray) -> float:
    """The largest difference, relative to the largest number of b."""
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


@claim(
    number=1,
    author="吼吼",
    text="A convolution is a weight-shared, locally connected, ordered fully-connected layer.",
    chinese="卷积是权值共享、局部连接、有顺序的全连接层。",
    about="The banded (Toeplitz) matrix of a convolution is built entry by entry in NumPy, and applied as a "
    "fully-connected layer. Its outputs are compared with the convolution's, its entries counted "
    "against the kernel's. For the order, the tokens are shuffled: a layer that ignored order would "
    "give the same outputs, shuffled.",
    hypothesis="The two are the same linear map.",
    threshold="Holds if the outputs agree within 1e-5 of the largest, and shuffled tokens give outputs that "
    "differ from the shuffled outputs by more than 1e-1.",
)
def banded_matrix(setting: Setting, shift: int = 0) -> Measurement:
    n, k, features, out = 32, 5, 4, 6
    keys = jax.random.split(jax.random.key(setting.seed), 3)
    x = jax.random.normal(keys[0], (n, features), jnp.float32)
    kernel = jax.random.normal(keys[1], (k, features, out), jnp.float32)
    matrix = np.zeros((n, features, n, out))  # from token j, feature c, to token i, output o
    for i in range(n):
        for tap in range(k):
            j = i + tap - k // 2 + shift
            if 0 <= j < n:
                matrix[j, :, i, :] = kernel[tap]
    y = zoo.conv(x, kernel)
    error = relative(np.einsum("jc,jcio->io", x, matrix), y)
    order = jax.random.permutation(keys[2], n)
    ordered = relative(zoo.conv(x[order], kernel), y[order])
    numbers = {
        "difference from the matrix": error,
        "difference when shuffled": ordered,
        "entries of the matrix": matrix.size,
        "of which not zero": np.count_nonzero(matrix),
        "parameters of the convolution": kernel.size,
    }
    return Measurement(numbers, decide(error <= ROUNDING and ordered > 0.1))


@claim(
    number=11,
    author="吼吼",
    text="Image against text is a false contrast.",
    chinese="“图像用卷积、文本用注意力”是一种错误的对立。",
    about="A line of tokens is given to the one-dimensional convolution and local attention, and as an image "
    "of height one to the two-dimensional ones. The weights are the same. The outputs are compared.",
    hypothesis="Rank is an argument of one function, so the outputs are the same.",
    threshold="Holds if both layers agree within 1e-5 of the largest output.",
)
def text_as_image(setting: Setting, along: int = 1) -> Measurement:
    keys = jax.random.split(jax.random.key(setting.seed), 2)
    x = jax.random.normal(keys[0], (16, 2, 8), jnp.float32)  # [tokens, heads, head_dim]
    image = jnp.expand_dims(x, 1 - along)
    kernel = jax.random.normal(keys[1], (5, 16, 8), jnp.float32)
    text_conv = zoo.conv(x.reshape(16, 16), kernel)
    image_conv = zoo.conv(image.reshape(*image.shape[:2], 16), kernel[None])
    text = attention(x, x, x, window=Window(5, boundary="mask"))
    window = Window((1, 5), boundary="mask")
    seen = attention(image, image, image, window=window)
    differences = {
        "convolution": relative(image_conv.reshape(text_conv.shape), text_conv),
        "local attention": relative(seen.reshape(text.shape), text),
    }
    return Measurement(differences, decide(max(differences.values()) <= ROUNDING))

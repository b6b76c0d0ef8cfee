"""Claims 15 and 18: which side of the pair comes from the data."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxattn import nn, zoo
from jaxattn.equivalence import nearest_conv
from jaxattn.study.claim import Measurement, Setting, claim, decide
from jaxattn.study.claims.matrix import ROUNDING, relative
from jaxattn.study.claims.similarity import scores_of
from jaxattn.window import Window


@claim(
    number=15,
    author="林建华",
    text="A convolution has parameters for keys and data for queries; attention has data for both.",
    chinese="卷积的 K 是参数、Q 是数据；注意力的 Q 和 K 都是数据。",
    about="Attention whose queries are patches, whose keys are filters, and whose values are unit vectors is "
    "compared with the convolution by these filters. Then the data are doubled: scores that have data "
    "on one side double, those with data on both grow fourfold. QnA, whose queries are parameters and "
    "whose keys are data, is the convolution's mirror.",
    hypothesis="The convolution is attention to parameters, of degree 1 in the data, as its mirror; attention has "
    "degree 2.",
    threshold="Holds if the outputs agree within 1e-5, and doubled data multiply the scores by 2, 2 and 4, within "
    "1e-5.",
)
def whose_keys(setting: Setting, normalize: str = "none") -> Measurement:
    n, k, features, out = 16, 3, 4, 6
    keys = jax.random.split(jax.random.key(setting.seed), 2)
    x = jax.random.normal(keys[0], (n, features), jnp.float32)
    kernel = jax.random.normal(keys[1], (k, features, out), jnp.float32)
    filters = kernel.reshape(k * features, out).T
    padded = jnp.pad(x, [(1, 1), (0, 0)])
    patches = jnp.concatenate([padded[tap : tap + n] for tap in range(k)], axis=-1)  # [n, k · features]
    params = {"key": filters[:, None], "value": jnp.eye(out, dtype=jnp.float32)[:, None]}
    made = zoo.parameter_key_attention(patches, params, normalize=normalize, scale=1.0)

    def growth(score):
        return float(jnp.linalg.norm(score(2 * patches)) / jnp.linalg.norm(score(patches)))

    how = {"normalize": "none", "scale": 1.0}
    numbers = {
        "difference from the convolution": relative(made, zoo.conv(x, kernel)),
        "growth of the scores: convolution": growth(lambda p: scores_of(p, filters, **how)),
        "growth of the scores: QnA": growth(lambda p: scores_of(filters, p, **how)),
        "growth of the scores: attention": growth(lambda p: scores_of(p, p, **how)),
    }
    error, *grown = numbers.values()
    degrees = all(abs(g - expected) <= ROUNDING for g, expected in zip(grown, (2, 2, 4), strict=True))
    return Measurement(numbers, decide(error <= ROUNDING and degrees))


@claim(
    number=18,
    author="阿良",
    text="At most, a convolution is local attention without the “self”.",
    chinese="卷积顶多是没有“自”的局部注意力。",
    about="A layer of local attention, 9 heads in windows of 3 × 3 with a learned bias by offset, is given random "
    "weights, the queries' sixfold, so that softmax is not nearly flat. Multiplying its queries by zero takes the "
    "data out of its scores, and leaves the window and the positions. We measure how much of the layer the nearest "
    "convolution leaves over, with and without.",
    hypothesis="Without data in its scores the layer is a convolution; with them it is not.",
    threshold="Holds if the residual is below 1e-5 without, and above 1e-1 with data in the scores.",
)
def without_self(setting: Setting, content: float = 0.0) -> Measurement:
    x = jax.random.normal(jax.random.key(setting.seed), (12, 12, 18), jnp.float32)

    def residual(content):
        window = Window((3, 3), boundary="zero")
        layer = nn.Attention(9, 18, window=window, relative_bias=True, use_bias=False, rngs=nnx.Rngs(setting.seed))
        layer.query.kernel[...] *= 6 * content
        params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
        value = jnp.einsum("chd,hdo->hco", params["value"]["kernel"], params["out"]["kernel"])
        return float(nearest_conv(layer.weights(x), value)[1])

    numbers = {"residual without data": residual(content), "residual with data": residual(1.0)}
    without, with_data = numbers.values()
    return Measurement(numbers, decide(without <= ROUNDING and with_data > 0.1))

"""Claim 5: a convolution is attention whose heads look at one offset each."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn import zoo
from jaxattn.equivalence import attention_to_conv, conv_to_attention
from jaxattn.study import figures
from jaxattn.study.claim import Measurement, Setting, claim, decide

SHARPNESS = (1, 2, 4, 8, 12, 16)
EXACT, SHORT = 1e-5, 1e-2


@claim(
    number=5,
    author="吼吼",
    text="A CNN is a special case of self-attention (Cordonnier, Loukas & Jaggi 2020, arXiv 1911.03584).",
    chinese="CNN 是自注意力的一个特例（arXiv 1911.03584）。",
    about="A 3 × 3 convolution with random weights is written as quadratic attention of 9 heads, and both are "
    "applied to images (of larger ones, 32 × 32 pixels). The sharpness α of the heads is swept, and the error "
    "compared with the bound that the theorem promises. Then one head is taken away: by Eckart and Young, 8 heads "
    "cannot come nearer to the kernel, a 9-row matrix of taps, than its smallest singular value.",
    hypothesis="With K² heads the error keeps its bound and vanishes in the limit; K² - 1 heads are not enough.",
    threshold="Holds if error ≤ bound (and rounding of 1e-5) at each α, the hard limit is within 1e-5 of the "
    "convolution, the way back gives the kernel within 1e-5, and with K² - 1 heads at least 1e-2 of the "
    "kernel is lost.",
)
def theorem(setting: Setting, heads: int = 9) -> Measurement:
    images = setting.data.train.fetch(np.arange(min(8, len(setting.data.train))))[0][:, :32, :32]
    x = jnp.asarray(images / max(images.max(), 1e-6), jnp.float32)
    kernel = jax.random.normal(jax.random.key(setting.seed), (3, 3, x.shape[-1], 16), jnp.float32)
    wanted = zoo.conv(x, kernel)

    def attend(alpha):
        params, bound = conv_to_attention(kernel, alpha=alpha)
        params = params | {"centre": params["centre"][:heads], "alpha": params["alpha"][:heads]}
        params |= {"value": params["value"][:, :heads]}
        error = jnp.abs(zoo.quadratic_attention(x, params) - wanted).max()
        return float(error), float(bound * jnp.abs(x).max()), params

    errors, bounds, _ = zip(*map(attend, SHARPNESS), strict=True)
    limit, _, params = attend(math.inf)
    back = float(jnp.abs(attention_to_conv(params)[0] - kernel).max())
    taps = np.linalg.svd(np.asarray(kernel).reshape(9, -1), compute_uv=False)
    lost = float(taps[-1] / np.linalg.norm(taps))
    kept = all(error <= bound + EXACT for error, bound in zip(errors, bounds, strict=True))
    numbers = {f"error at α = {a}": e for a, e in zip(SHARPNESS, errors, strict=True)}
    numbers |= {f"bound at α = {a}": b for a, b in zip(SHARPNESS, bounds, strict=True)}
    numbers |= {"error in the limit": limit, "error of the kernel, there and back": back, "lost with 8 heads": lost}
    figure = figures.lines(SHARPNESS, {"error": errors, "bound": bounds}, "sharpness α", "largest error", log=True)
    return Measurement(numbers, decide(kept and limit <= EXACT and back <= EXACT and lost >= SHORT), [figure])

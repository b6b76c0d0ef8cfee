"""Claims 7, 9 and 17: how far a layer sees, and a stack of them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxattn import nn, plots
from jaxattn.measure import effective_receptive_field
from jaxattn.study import figures
from jaxattn.study.claim import Measurement, Setting, claim, decide
from jaxattn.study.mixers import accuracy, search

DEPTHS = (1, 2, 4, 8, 16)


@claim(
    number=7,
    author="吼吼",
    text="A convolution sees its kernel, attention the whole picture.",
    chinese="卷积只看到卷积核范围，注意力看到整张图。",
    about="The gradient of the middle output with respect to each pixel says what the layer sees, exactly "
    "zero where it sees nothing. We count the pixels that are not zero on a 9 × 9 grid, for a 3 × 3 "
    "convolution, global attention, and local attention with a window of 5 × 5. All weights are random.",
    hypothesis="The convolution sees 9, global attention 81, local attention 25.",
    threshold="Holds if the convolution sees 9 pixels and both attentions 81; depends on the window if global "
    "attention sees 81 and local attention fewer; fails otherwise.",
)
def support(setting: Setting, everything: tuple[int, int] = (9, 9)) -> Measurement:
    x = jax.random.normal(jax.random.key(setting.seed), (1, 9, 9, 8), jnp.float32)
    rngs = nnx.Rngs(setting.seed)
    layers = {
        "convolution": nn.Conv(8, 8, (3, 3), rngs=rngs),
        "global attention": nn.Attention(2, 8, window=everything, rngs=rngs),
        "local attention": nn.Attention(2, 8, window=(5, 5), rngs=rngs),
    }
    fields = {name: effective_receptive_field(layer, x) for name, layer in layers.items()}
    numbers = {f"pixels seen: {name}": int(np.count_nonzero(field)) for name, field in fields.items()}
    conv, whole, local = numbers.values()
    verdict = decide(conv == 9 and whole == 81, "the window" if local < 81 else None)
    return Measurement(numbers, verdict, [plots.receptive_fields(np.stack(list(fields.values())), list(fields))])


@claim(
    number=9,
    author="吼吼",
    text="Stacked convolutions end up as global as attention.",
    chinese="卷积堆叠起来，最终和注意力一样是全局的。",
    about="L random convolutions of size 3 are stacked on 33 tokens, and the gradient of the middle output is "
    "measured. What they can see is its support, L(k - 1) + 1 in theory; what they do see is the narrowest window "
    "about the middle that holds nine tenths of it. Global attention is measured beside them. Then networks are "
    "trained on a search, does any of 8 tokens hold what a marked one holds: a stack of two blocks of "
    "convolutions, which has the whole grid in reach, and one block of attention.",
    hypothesis="All is in reach at depth 16, but the weight lies near the middle, in a width that grows as √L; and to "
    "have all in reach is not to search it.",
    threshold="Holds if at each depth the support is L(k - 1) + 1, at depth 16 all tokens, nine tenths of the "
    "gradient is then at least as wide as 90 % of attention's, and convolutions are right in the search within 5 "
    "points of attention; depends on what global means if only the first two are so.",
    cost=14,
)
def depth(setting: Setting, size: int = 3, steps: int | None = None) -> Measurement:
    n, features = 33, 64  # many, because one random channel says little
    x = jax.random.normal(jax.random.key(setting.seed), (1, n, features), jnp.float32)
    reach, width, rngs = [], [], nnx.Rngs(setting.seed)
    for layers in DEPTHS:
        stack = nnx.Sequential(*[nn.Conv(features, features, (size,), rngs=rngs) for _ in range(layers)])
        field = effective_receptive_field(stack, x)
        reach.append(int(np.count_nonzero(field)))
        width.append(_width(field))
    attention = _width(effective_receptive_field(nn.Attention(2, features, rngs=rngs), x))
    theory = all(r == layers * 2 + 1 for r, layers in zip(reach, DEPTHS, strict=True)) and reach[-1] == n
    numbers = {f"support at depth {d}": r for d, r in zip(DEPTHS, reach, strict=True)}
    numbers |= {f"nine tenths at depth {d}": w for d, w in zip(DEPTHS, width, strict=True)}
    numbers |= {"nine tenths of attention's": attention}
    how = {} if steps is None else {"steps": steps}
    right = {
        f"right in the search: {mixer}": accuracy(mixer, setting, search(), depth=deep, **how)
        for mixer, deep in (("convolution", 2), ("global attention", 1))
    }
    convs, attends = right.values()
    series = {"support": reach, "nine tenths": width, "nine tenths of attention's": [attention] * len(DEPTHS)}
    figure = figures.lines(DEPTHS, series, "depth", "tokens")
    as_global = width[-1] >= 0.9 * attention and convs >= attends - 0.05
    return Measurement(numbers | right, decide(theory, None if as_global else "what global means"), [figure])


def _width(field: np.ndarray) -> int:
    """Of the narrowest window about the middle that holds nine tenths of the field."""
    middle, total = len(field) // 2, field.sum()
    return next(2 * r + 1 for r in range(middle + 1) if field[middle - r : middle + r + 1].sum() >= 0.9 * total)


@claim(
    number=17,
    author="阿良",
    text="A CNN goes from local to global; attention lets the global help the local.",
    chinese="CNN 从局部走向全局，注意力让全局帮助局部。",
    about="One token is changed, 8 away from the token that we watch, and the response of that token is "
    "measured after each of 8 layers. The layers are convolutions of size 5, or global attention, with "
    "random weights. A response that is exactly zero has not heard of the change.",
    hypothesis="Two tokens a layer: the convolutions hear of it at layer 4, attention at layer 1.",
    threshold="Holds if the first layer that responds is ⌈8 / 2⌉ = 4 of the convolutions and 1 of attention.",
)
def far_token(setting: Setting, window: int | None = None) -> Measurement:
    n, far, size, layers = 17, 8, 5, 8
    x = jax.random.normal(jax.random.key(setting.seed), (1, n, 16), jnp.float32)
    rngs = nnx.Rngs(setting.seed)
    stacks = {
        "convolution": [nn.Conv(16, 16, (size,), rngs=rngs) for _ in range(layers)],
        "attention": [nn.Attention(2, 16, window=window, rngs=rngs) for _ in range(layers)],
    }
    responses, first = {}, {}
    for name, stack in stacks.items():
        here, there, change = x, x.at[0, far].add(1.0), []
        for layer in stack:
            here, there = layer(here), layer(there)
            change.append(float(jnp.linalg.norm(there[0, 0] - here[0, 0]) / jnp.linalg.norm(here[0, 0])))
        responses[name] = change
        first[f"first layer that responds: {name}"] = (
            1 + int(np.argmax(np.array(change) > 0)) if any(change) else math.inf
        )
    conv, attention = first.values()
    figure = figures.lines(range(1, layers + 1), responses, "layer", "relative response", log=True)
    return Measurement(first, decide(conv == 4 and attention == 1), [figure])

"""Claim 20: four candidates of which two pairs count, chosen by filters or by attention."""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxattn import nn
from jaxattn.attention import attention
from jaxattn.study import figures
from jaxattn.study.claim import Measurement, Setting, claim, decide
from jaxattn.study.compiler import LOOP
from jaxattn.study.fit import fit

PATTERNS = np.array(list(itertools.product((0.0, 1.0), repeat=4)), np.float32)  # which of a, b, c, d are there
USEFUL = (PATTERNS[:, 0] * PATTERNS[:, 2] + PATTERNS[:, 1] * PATTERNS[:, 3] > 0).astype(np.float32)  # ac or bd
SIZES = (1, 2, 3, 4)
RESTARTS = 16


class Filters(nnx.Module):
    """Filters of four taps, a ReLU, and a weighted sum: 6 parameters a filter and one."""

    def __init__(self, size: int, rngs: nnx.Rngs):
        self.filters = nn.Conv(1, size, 4, padding="VALID", rngs=rngs)
        self.read = nnx.Linear(size, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Of patterns `[batch, 4]`, a score each."""
        return self.read(jax.nn.relu(self.filters(x[..., None])))[:, 0, 0]


class Selecting(nnx.Module):
    """Heads whose learned queries choose among the four by what and where they are, a ReLU, and a weighted sum."""

    def __init__(self, size: int, rngs: nnx.Rngs):
        self.query = nnx.Param(rngs.params.normal((1, size, 4)))
        self.key, self.value = nnx.LinearGeneral(5, (size, 4), rngs=rngs), nnx.LinearGeneral(5, (size, 1), rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(size))
        self.read = nnx.Linear(size, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        places = jnp.broadcast_to(jnp.eye(4, dtype=x.dtype), (len(x), 4, 4))
        tokens = jnp.concatenate([x[..., None], places], axis=-1)
        query = jnp.broadcast_to(self.query[...], (len(x), *self.query.shape))
        chosen = attention(query, self.key(tokens), self.value(tokens), scale=1.0)  # [batch, 1, size, 1]
        return self.read(jax.nn.relu(chosen[:, 0, :, 0] + self.bias[...]))[:, 0]


def by_hand() -> np.ndarray:
    """The two filters (1, 0, 1, 0) and (0, 1, 0, 1) less 1, a ReLU, their sum less ½: positive for ac or bd."""
    filters = np.array([[1, 0, 1, 0], [0, 1, 0, 1]])
    return np.maximum(PATTERNS @ filters.T - 1, 0).sum(1) - 0.5


@functools.cache
def solver(network: type, size: int, steps: int):
    """Trains the network from many starts at once: the share of them that tell all sixteen patterns apart."""

    def solved(seed, labels):
        model = network(size, nnx.Rngs(jax.random.key(seed)))

        def loss(model, key):
            scores = model(jnp.asarray(PATTERNS))
            return jnp.logaddexp(0, jnp.where(labels > 0, -scores, scores)).mean()

        fit(model, loss, 0.03, steps, seed)
        return ((model(jnp.asarray(PATTERNS)) > 0) == (labels > 0)).all()

    return jax.jit(jax.vmap(solved, in_axes=(0, None)), compiler_options=LOOP)


@claim(
    number=20,
    author="aluea",
    text="Two convolution filters can do what selecting attention does (ac, bd).",
    chinese="两个卷积核就能做到注意力的选择（ac、bd）。",
    about="Of four candidates a, b, c, d any may be there, 16 patterns in all, and only the pairs ac and bd count: 7 "
    "patterns have one. Filters of four taps with a ReLU, and heads that select among the four with the same ReLU, "
    "are trained to tell these apart, from 16 starts each. By hand: the filters (1, 0, 1, 0) and (0, 1, 0, 1), less "
    "1, do it.",
    hypothesis="Two filters do; one cannot, since ac or bd is no threshold of a weighted sum; two heads do as well.",
    threshold="Holds if the filters by hand are right on all 16 patterns, training finds two filters that are and "
    "not one, and attention of some size up to four is right as well.",
    cost=5,
)
def pairs(setting: Setting, shift: int = 0, steps: int = 600, sizes: Sequence[int] = SIZES) -> Measurement:
    labels = np.roll(USEFUL, shift)
    starts = setting.seed * RESTARTS + np.arange(RESTARTS)
    share = {
        name: [float(solver(network, size, steps)(starts, labels).mean()) for size in sizes]
        for name, network in (("filters", Filters), ("heads", Selecting))
    }
    right = int(((by_hand() > 0) == (labels > 0)).sum())
    least = {
        name: next((n for n, found in zip(sizes, shares, strict=True) if found > 0), 0)
        for name, shares in share.items()
    }
    numbers = {"patterns right: two filters by hand": right}
    numbers |= {f"least {name} that solve it (0: none)": n for name, n in least.items()}
    numbers |= {
        f"starts that solve it: {n} {k}": v for k, shares in share.items() for n, v in zip(sizes, shares, strict=True)
    }
    figure = figures.lines(sizes, share, "filters, or heads", "share of starts that solve it")
    return Measurement(numbers, decide(right == 16 and least["filters"] == 2 and least["heads"] > 0), [figure])

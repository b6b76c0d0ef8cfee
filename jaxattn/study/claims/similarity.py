"""Claims 2, 16 and 19: what attention's scores are, and what its normaliser makes of them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.attention import attention
from jaxattn.normalize import NORMALIZERS
from jaxattn.study.claim import Measurement, Setting, claim, decide
from jaxattn.study.claims.matrix import ROUNDING, relative


def scores_of(query: jax.Array, key: jax.Array, **kwargs) -> jax.Array:
    """What multiplies the values, `[queries, keys]`: the output, where the values are unit vectors."""
    identity = jnp.eye(len(key), dtype=key.dtype)[:, None]
    return attention(query[:, None], key[:, None], identity, **kwargs)[:, 0]


@claim(
    number=2,
    author="吼吼",
    text="Attention is the similarity Q·K, scaled, under a softmax, times V.",
    chinese="注意力就是 Q 与 K 的相似度，缩放，softmax，再乘以 V。",
    about="jaxattn.attention is asked for its scores, its weights and its output, on random queries, keys and "
    "values. Each is computed again by NumPy loops in float64, from the sentence of the claim. The "
    "three are compared.",
    hypothesis="That sentence is the definition.",
    threshold="Holds if every step agrees within 1e-5 of its largest number.",
)
def three_steps(setting: Setting, normalize: str = "softmax") -> Measurement:
    n, d = 12, 8
    draws = jax.random.normal(jax.random.key(setting.seed), (3, n, d), jnp.float32)
    query, key, value = np.asarray(draws, np.float64)
    similarity = np.array([[sum(q * k) for k in key] for q in query]) / np.sqrt(d)
    exponential = np.exp(similarity)
    weights = np.array([row / row.sum() for row in exponential])
    output = np.array([sum(a * v for a, v in zip(row, value, strict=True)) for row in weights])
    made = attention(*draws[:, :, None], normalize=normalize)[:, 0]
    differences = {
        "scores": relative(scores_of(draws[0], draws[1], normalize="none"), similarity),
        "weights": relative(scores_of(draws[0], draws[1], normalize=normalize), weights),
        "output": relative(made, output),
    }
    return Measurement(differences, decide(max(differences.values()) <= ROUNDING))


@claim(
    number=16,
    author="林建华",
    text="Self-attention shows the data's autocorrelation in learned spaces.",
    chinese="自注意力反映的是数据在学到的空间里的自相关。",
    about="Queries and keys of random tokens are made by one matrix, W_Q = W_K. The scores are compared with "
    "the Gram matrix of the projected tokens. A Gram matrix is symmetric, and has no negative "
    "eigenvalue.",
    hypothesis="With one matrix the scores are the autocorrelation; with two they are a cross-correlation.",
    threshold="Holds if with one matrix the scores are the Gram matrix, symmetric, and no eigenvalue is below "
    "zero, all within 1e-5; depends on W_Q = W_K if two matrices give scores whose asymmetry is above "
    "1e-1.",
)
def gram_matrix(setting: Setting, tied: bool = True) -> Measurement:
    keys = jax.random.split(jax.random.key(setting.seed), 3)
    x = jax.random.normal(keys[0], (16, 8), jnp.float32)
    query, other = (x @ jax.random.normal(key, (8, 8), jnp.float32) for key in keys[1:])
    scores = np.asarray(scores_of(query, query if tied else other, normalize="none", scale=1.0), np.float64)
    untied = np.asarray(scores_of(query, other, normalize="none", scale=1.0), np.float64)
    wide = np.asarray(query, np.float64)
    eigenvalues = np.linalg.eigvalsh((scores + scores.T) / 2)
    numbers = {
        "difference from the Gram matrix": relative(scores, wide @ wide.T),
        "asymmetry": relative(scores.T, scores),
        "least eigenvalue, of the largest": eigenvalues[0] / eigenvalues[-1],
        "asymmetry with two matrices": relative(untied.T, untied),
    }
    gram, asymmetry, least, two = numbers.values()
    holds = gram <= ROUNDING and asymmetry <= ROUNDING and least >= -ROUNDING
    return Measurement(numbers, decide(holds, "W_Q = W_K" if two > 0.1 else None))


@claim(
    number=19,
    author="aluea",
    text="Attention must suppress what does not contribute ([a, 0, c]).",
    chinese="注意力必须抑制没有贡献的部分（[a, 0, c]）。",
    about="The scores (2, -2, 2) go through each normaliser, and so do a thousand rows of random scores. The "
    "share of weights that are exactly zero is counted. By hand: softmax gives the middle 1 / (1 + 2 "
    "exp(4)) = 0.0091, sparsemax gives (½, 0, ½), ReLU (⅔, 0, ⅔).",
    hypothesis="Softmax never gives a zero; sparsemax and ReLU do.",
    threshold="Holds if every normaliser zeroes the middle of (2, -2, 2) and some of the random scores; depends "
    "on the normaliser if some do; fails if none does.",
)
def exact_zeros(setting: Setting, normalizers: Sequence[str] = ("softmax", "sparsemax", "relu")) -> Measurement:
    rows = 2 * jax.random.normal(jax.random.key(setting.seed), (1000, 3), jnp.float32)
    example = jnp.array([2.0, -2.0, 2.0], jnp.float32)
    numbers, zeroes = {}, []
    for name in normalizers:
        middle = float(NORMALIZERS[name](example, jnp.ones(3, bool))[1])
        share = float((NORMALIZERS[name](rows, jnp.ones(3, bool)) == 0).mean())
        numbers |= {f"{name}: weight of the middle": middle, f"{name}: share of zeros": share}
        zeroes.append(middle == 0 and share > 0)
    return Measurement(numbers, decide(any(zeroes), None if all(zeroes) else "the normaliser"))

"""The layers that are like convolutions, or driven by keys, as NumPy loops from their papers' formulas.

One image `[*grid, features]` each. Everything is analytic in its inputs and keeps complex numbers, so that
`slope` has derivatives without a rounding error: f(x + iεd) = f(x) + iε f'(x)·d + O(ε²) (Squire & Trapp 1998).
"""

import numpy as np


def slope(f, arrays, direction, step=1e-30):
    """The derivative of f(arrays) in a direction; both are dicts of arrays by name."""
    return f({name: x + 1j * step * direction[name] for name, x in arrays.items()}).imag / step


def softmax(scores):
    e = np.exp(scores - scores.real.max())
    return e / e.sum()


def relu(x):
    return x * (x.real > 0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def slots(i, size, grid, strides=None, dilation=None, lows=None):
    """(slot, token) of the window of position i: token s·i + d·r - low; None outside the grid."""
    strides, dilation = strides or (1,) * len(size), dilation or (1,) * len(size)
    lows = [d * (k - 1) // 2 for k, d in zip(size, dilation, strict=True)] if lows is None else lows
    for r in np.ndindex(*size):
        j = tuple(s * a + d * b - low for s, a, d, b, low in zip(strides, i, dilation, r, lows, strict=True))
        yield r, j if all(0 <= a < n for a, n in zip(j, grid, strict=True)) else None


def mean_of_patch(x, u, strides):
    patch = x[tuple(slice(s * a, s * a + s) for s, a in zip(strides, u, strict=True))]
    return patch.reshape(-1, x.shape[-1]).mean(0)


def positions(grid, strides):
    return tuple(-(-n // s) for n, s in zip(grid, strides, strict=True))


def _mix(x, size, heads, weight, dilation, lows):
    """y_i = Σ_r weight(i, head)[r] · x_{i + d·r - low}, zeros outside."""
    grid, width = x.shape[:-1], x.shape[-1] // heads
    y = np.zeros(x.shape, complex)
    for i in np.ndindex(*grid):
        for h in range(heads):
            w, channels = weight(i, h), slice(h * width, (h + 1) * width)
            for r, j in slots(i, size, grid, None, dilation, lows):
                y[(*i, channels)] += 0 if j is None else w[r] * x[(*j, channels)]
    return y


def project(x, p, name):
    return np.tensordot(x, p[name], 1) + p.get(f"{name}_bias", 0)


def out(z, p):
    """Σ_hd z[..., h, d] out[h, d, o]"""
    return np.tensordot(z, p["out"], 2) + p.get("out_bias", 0)


def attend(query, keys, values, scale, bias=None):
    """One query's output, from lists of keys and values."""
    weights = softmax(np.array([scale * (query @ k) for k in keys]) + (0 if bias is None else bias))
    return sum(w * v for w, v in zip(weights, values, strict=True))


# The parameters of geometries.
FEATURES, HEADS, DIM, REDUCED, OUT = 4, 2, 3, 3, 5


def draw(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def heads(bias=True, without=(), **more):
    """Projections by heads, and what else a layer has."""
    shapes = {
        "query": (FEATURES, HEADS, DIM), "key": (FEATURES, HEADS, DIM), "value": (FEATURES, HEADS, 2),
        "out": (HEADS, 2, OUT), "query_bias": (HEADS, DIM), "key_bias": (HEADS, DIM), "value_bias": (HEADS, 2),
        "out_bias": (OUT,),
    } | more  # fmt: skip
    return {name: s for name, s in shapes.items() if name not in without and (bias or not name.endswith("_bias"))}


def both(**kwargs):
    return kwargs, kwargs

"""The attention layers of the zoo as loops in NumPy float64, written from their papers' formulas. No JAX.

Each takes x `[*grid, features]`, without a batch, and params as the library does. Complex numbers pass through, for
derivatives.
"""

import itertools

import numpy as np


def attend(x, params, neighbours, score, value=None, weights=None):
    """For every token i and head h, the softmax over `neighbours(i)` of `score(h, q_i, k_j, j - i)`, on values.

    A neighbour is where it stands, and whether it is a token there or zeros. `value(h, v_j, j - i)` replaces v_j;
    `weights(h, i, js, a)` replaces the softmax a.
    """
    grid = x.shape[:-1]
    q, k, v = (project(x, params, name) for name in ("query", "key", "value"))
    y = np.zeros(v.shape, np.result_type(x, *params.values()))
    for i in np.ndindex(*grid):
        for h in range(v.shape[-2]):
            js = list(neighbours(i))
            if not js:  # all of them masked
                continue
            scores, values = [], []
            for j, inside in js:
                delta = tuple(b - a for a, b in zip(i, j, strict=True))
                key = k[j][h] if inside and k is not None else np.zeros_like(q[i][h])
                vector = v[j][h] if inside else np.zeros_like(v[i][h])
                scores.append(score(h, q[i][h], key, delta))
                values.append(vector if value is None else value(h, vector, delta))
            a = softmax(np.array(scores))
            y[i][h] = (a if weights is None else weights(h, i, [j for j, _ in js], a)) @ np.array(values)
    return join(y, params)


def project(x, params, name):
    if name not in params:
        return None
    return np.tensordot(x, params[name], 1) + params.get(f"{name}_bias", 0)


def join(y, params):
    if "out" not in params:
        return y.reshape(*y.shape[:-2], -1)
    return np.tensordot(y, params["out"], 2) + params.get("out_bias", 0)


def softmax(scores):
    exponential = np.exp(scores - scores.max())
    return exponential / exponential.sum()


def entry(table, h, index):
    """An entry of a table that the heads may share."""
    return table[(h if len(table) > 1 else 0, *index)]


def embedding(params, h, delta, size):
    """An offset's embedding: its axes' ones added, or where they are narrower one after the other."""
    rows = [entry(params[f"embedding_{a}"], h, (k - 1 + d,)) for a, (d, k) in enumerate(zip(delta, size, strict=True))]
    return sum(rows) if len(rows[0]) == params["query"].shape[-1] else np.concatenate(rows)


def bias(params, h, delta, size, dilation=None):
    steps = zip(delta, size, dilation or (1,) * len(size), strict=True)
    return params["relative_bias"][(h, *(k - 1 + d // step for d, k, step in steps))]


def everywhere(grid):
    return lambda i: [(j, True) for j in np.ndindex(*grid)]


def standing(ranges, grid, zeros):
    """The places of a box; outside the grid zeros stand, or nothing, on each axis or on some."""
    for j in itertools.product(*ranges):
        there = [0 <= p < n for p, n in zip(j, grid, strict=True)]
        filled = zeros if isinstance(zeros, tuple) else (zeros,) * len(grid)
        if all(map(max, there, filled)):
            yield j, all(there)


def usual(scale, params):
    return params["query"].shape[-1] ** -0.5 if scale is None else scale


def directional(function, array, direction):
    """The derivative of `function(array)` along a direction, exactly: by a step into the complex numbers."""
    return function(array + 1e-30j * direction).imag / 1e-30


# The parameters of geometries.
NO_OUT = ("query_bias", "key_bias", "value_bias", "out", "out_bias")
HEADS, DIM, VALUE, FEATURES, OUT = 2, 6, 3, 4, 5


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def projections(*without, heads=HEADS):
    shapes = {
        "query": (FEATURES, heads, DIM), "key": (FEATURES, heads, DIM), "value": (FEATURES, heads, VALUE),
        "query_bias": (heads, DIM), "key_bias": (heads, DIM), "value_bias": (heads, VALUE),
        "out": (heads, VALUE, OUT), "out_bias": (OUT,),
    }  # fmt: skip
    return {name: draw(n, *shape) for n, (name, shape) in enumerate(shapes.items()) if name not in without}


def tables(size, width, heads=HEADS):
    return {f"embedding_{axis}": draw(20 + axis, heads, 2 * k - 1, width) for axis, k in enumerate(size)}


def biases(size, heads=HEADS):
    return {"relative_bias": draw(30, heads, *(2 * k - 1 for k in size))}

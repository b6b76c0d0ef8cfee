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


def global_attention(x, params, scale=None):
    scale = usual(scale, params)
    return attend(x, params, everywhere(x.shape[:-1]), lambda h, q, k, delta: scale * q @ k)


def coatnet_attention(x, params, scale=None):
    grid, scale = x.shape[:-1], usual(scale, params)
    return attend(x, params, everywhere(grid), lambda h, q, k, delta: scale * q @ k + bias(params, h, delta, grid))


def botnet_attention(x, params, query_scale=None):
    grid, scale = x.shape[:-1], usual(query_scale, params)
    score = lambda h, q, k, delta: scale * q @ (k + embedding(params, h, delta, grid))
    return attend(x, params, everywhere(grid), score)


learned_relative_attention = botnet_attention  # without a key, k is zeros


def sasa(x, params, size, zeros: bool | tuple = False, scale=1.0, stride=1):
    """Windows of `size` around each token, or every stride-th one; at the border cut off, or filled with zeros."""
    grid = x.shape[:-1]
    ranges = lambda i: [range(a - k // 2, a - k // 2 + k) for a, k in zip(i, size, strict=True)]
    score = lambda h, q, k, delta: q @ (scale * k + embedding(params, h, delta, size))
    y = attend(x, params, lambda i: standing(ranges(i), grid, zeros), score)
    return y[tuple(slice(None, None, stride) for _ in grid)]


def halo_attention(x, params, block, halo, zeros=True, scale=1.0):
    grid, size = x.shape[:-1], [b + 2 * a for b, a in zip(block, halo, strict=True)]

    def neighbours(i):
        first = [p // b * b for p, b in zip(i, block, strict=True)]
        ranges = [range(f - a, f + b + a) for f, b, a in zip(first, block, halo, strict=True)]
        return standing(ranges, grid, zeros)

    return attend(x, params, neighbours, lambda h, q, k, delta: q @ (scale * k + embedding(params, h, delta, size)))


def nearest(i, n, k, dilation):
    """The run of k tokens, `dilation` apart and in step with i, whose middle is nearest to i."""
    runs = [range(s, s + dilation * k, dilation) for s in range(i % dilation, n, dilation)]
    return min((run for run in runs if run[-1] < n), key=lambda run: abs(run[k // 2] - i))


def neighborhood_attention(x, params, size, dilation: int | tuple = 1, stride: int | tuple = 1, scale=None, sees=None):
    """`sees`: how many tokens along each axis, where there are not as many as `size`."""
    grid, scale = x.shape[:-1], usual(scale, params)
    dilation, stride = (v if isinstance(v, tuple) else (v,) * len(grid) for v in (dilation, stride))

    def neighbours(i):
        runs = [nearest(*along) for along in zip(i, grid, size if sees is None else sees, dilation, strict=True)]
        return [(j, True) for j in itertools.product(*runs)]

    learned = lambda h, delta: bias(params, h, delta, size, dilation) if "relative_bias" in params else 0.0
    y = attend(x, params, neighbours, lambda h, q, k, delta: scale * q @ k + learned(h, delta))
    return y[tuple(slice(None, None, step) for step in stride)]


def shifted_window_attention(x, params, size, shift, scale=None, wrap=None):
    """Tokens of one window of the grid that begins at `shift`, and goes on before it. An axis that wraps is a ring,
    which may begin anywhere: at `shift`."""
    if wrap is not None:
        turn = [s * w for s, w in zip(shift, wrap, strict=True)]
        axes, still = range(len(size)), [s * (not w) for s, w in zip(shift, wrap, strict=True)]
        y = shifted_window_attention(np.roll(x, [-s for s in turn], axes), params, size, still, scale)
        return np.roll(y, turn, axes)
    grid, scale = x.shape[:-1], usual(scale, params)
    window = lambda i: tuple((a - s) // k for a, s, k in zip(i, shift, size, strict=True))
    neighbours = lambda i: [(j, True) for j in np.ndindex(*grid) if window(j) == window(i)]
    return attend(x, params, neighbours, lambda h, q, k, delta: scale * q @ k + bias(params, h, delta, size))


def axial_attention(x, params, axis=-2, window=None):
    """Along one axis, line by line."""
    lines = np.moveaxis(x, axis, -2)
    n = lines.shape[-2]
    m = n if window is None else window

    def row(name, h, delta):
        return entry(params[f"{name}_embedding"], h, (m - 1 + delta[0],))

    def neighbours(i):
        return standing([range(n) if window is None else range(i[0] - m // 2, i[0] - m // 2 + m)], (n,), False)

    score = lambda h, q, k, delta: q @ k + q @ row("query", h, delta) + k @ row("key", h, delta)
    value = lambda h, v, delta: v + row("value", h, delta)
    y = [attend(lines[at], params, neighbours, score, value) for at in np.ndindex(*lines.shape[:-2])]
    return np.moveaxis(np.reshape(y, (*lines.shape[:-1], -1)), -2, axis)


def gpsa(x, params, scale=None):
    grid, scale = x.shape[:-1], usual(scale, params)

    def weights(h, i, js, content):
        gate = 1 / (1 + np.exp(-params["gate"][h]))
        offsets = np.array(js) - np.array(i)
        r = np.stack([(offsets**2).sum(1), *offsets.T], axis=1)
        return (1 - gate) * content + gate * softmax(r @ params["position"][h])

    return attend(x, params, everywhere(grid), lambda h, q, k, delta: scale * q @ k, weights=weights)


def directional(function, array, direction):
    """The derivative of `function(array)` along a direction, exactly: by a step into the complex numbers."""
    return function(array + 1e-30j * direction).imag / 1e-30

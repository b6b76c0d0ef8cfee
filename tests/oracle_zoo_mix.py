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


def conv(p, strides, dilation, lows, groups=1):
    x, w = p["x"], p["kernel"]
    grid, size, (width, out) = x.shape[:-1], w.shape[:-2], w.shape[-2:]
    y = np.zeros((*positions(grid, strides), out), complex)
    for i in np.ndindex(*y.shape[:-1]):
        for r, j in slots(i, size, grid, strides, dilation, lows):
            for o in range(out if j is not None else 0):
                g = o // (out // groups)
                y[(*i, o)] += x[j][g * width : (g + 1) * width] @ w[r][:, o]
    return y


def depthwise_conv(p, strides, dilation, lows):
    x, w = p["x"], p["kernel"]
    grid, size, m = x.shape[:-1], w.shape[:-1], w.shape[-1] // x.shape[-1]
    y = np.zeros((*positions(grid, strides), w.shape[-1]), complex)
    for i in np.ndindex(*y.shape[:-1]):
        for r, j in slots(i, size, grid, strides, dilation, lows):
            for c in range(y.shape[-1]):
                y[(*i, c)] += 0 if j is None else x[(*j, c // m)] * w[(*r, c)]
    return y


def conv_transpose(p, strides, dilation, crop):
    """All that is written, s·(n-1) + d·(k-1) + 1, then cropped; a negative number at the end appends zeros."""
    x, w = p["x"], p["kernel"]
    grid, size = x.shape[:-1], w.shape[:-2]
    full = [s * (n - 1) + d * (k - 1) + 1 for s, n, d, k in zip(strides, grid, dilation, size, strict=True)]
    y = np.zeros((*(n - min(high, 0) for (_, high), n in zip(crop, full, strict=True)), w.shape[-1]), complex)
    for i in np.ndindex(*grid):
        for r in np.ndindex(*size):
            at = tuple(s * a + d * b for s, a, d, b in zip(strides, i, dilation, r, strict=True))
            y[at] += x[i] @ w[r]
    return y[tuple(slice(low, n - high) for (low, high), n in zip(crop, full, strict=True))]


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


def light_conv(p, dilation=None, lows=None):
    w = p["kernel"]
    return _mix(p["x"], w.shape[:-1], w.shape[-1], lambda i, h: softmax(w[..., h]), dilation, lows)


def dynamic_conv(p, dilation=None, lows=None):
    x, w = p["x"], p["kernel"]
    size, heads = w.shape[1:-1], w.shape[-1]
    return _mix(x, size, heads, lambda i, h: softmax(np.tensordot(x[i], w[..., h], 1)), dilation, lows)


def bottleneck(x, p):
    reduced = relu(x @ p["reduce"] + p.get("reduce_bias", 0))
    return np.tensordot(reduced, p["span"], 1) + p.get("span_bias", 0)


def involution(p, strides, dilation=None):
    x, size, groups = p["x"], p["span"].shape[1:-1], p["span"].shape[-1]
    grid, width = x.shape[:-1], x.shape[-1] // groups
    y = np.zeros((*positions(grid, strides), x.shape[-1]), complex)
    for i in np.ndindex(*y.shape[:-1]):
        w = bottleneck(mean_of_patch(x, i, strides), p)
        for r, j in slots(i, size, grid, strides, dilation):
            for c in range(x.shape[-1]):
                y[(*i, c)] += 0 if j is None else w[(*r, c // width)] * x[(*j, c)]
    return y


def dynamic_depthwise_conv(p, dilation=None):
    x, size = p["x"], p["span"].shape[1:-1]
    w = bottleneck(x.reshape(-1, x.shape[-1]).mean(0), p)
    return _mix(x, size, x.shape[-1], lambda i, h: w[..., h], dilation, None)


def project(x, p, name):
    return np.tensordot(x, p[name], 1) + p.get(f"{name}_bias", 0)


def out(z, p):
    """Σ_hd z[..., h, d] out[h, d, o]"""
    return np.tensordot(z, p["out"], 2) + p.get("out_bias", 0)


def outlook_attention(p, strides, scale=None):
    x, size = p["x"], p["attention"].shape[2 : 2 + p["x"].ndim - 1]
    value, grid = project(x, p, "value"), x.shape[:-1]
    heads, head_dim = value.shape[-2:]
    scale = head_dim**-0.5 if scale is None else scale
    z = np.zeros(value.shape, complex)
    for u in np.ndindex(*positions(grid, strides)):
        scores = scale * project(mean_of_patch(x, u, strides), p, "attention")
        inside = list(slots(u, size, grid, strides))
        for h in range(heads):
            for r, i in inside:
                a = softmax(scores[(h, *r)])
                for t, j in inside:
                    if i is not None and j is not None:
                        z[(*i, h)] += a[t] * value[(*j, h)]
    return out(z, p)


def attend(query, keys, values, scale, bias=None):
    """One query's output, from lists of keys and values."""
    weights = softmax(np.array([scale * (query @ k) for k in keys]) + (0 if bias is None else bias))
    return sum(w * v for w, v in zip(weights, values, strict=True))


def augmented_conv(p, query_scale=None):
    x, kernel, rank = p["x"], p["kernel"], p["x"].ndim - 1
    grid, size = x.shape[:-1], kernel.shape[:-2]
    convolved = np.zeros((*grid, kernel.shape[-1]), complex) + p.get("kernel_bias", 0)
    query, key, value = (project(x, p, name) for name in ("query", "key", "value"))
    scale = query.shape[-1] ** -0.5 if query_scale is None else query_scale
    z = np.zeros(value.shape, complex)
    tokens = list(np.ndindex(*grid))
    for i in tokens:
        for r, j in slots(i, size, grid):
            convolved[i] += 0 if j is None else x[j] @ kernel[r]
        for h in range(query.shape[-2]):
            keys = [
                key[(*j, h)] + sum(p[f"embedding_{a}"][j[a] - i[a] + grid[a] - 1] for a in range(rank)) for j in tokens
            ]
            z[(*i, h)] = attend(query[(*i, h)], keys, [value[(*j, h)] for j in tokens], scale)
    return np.concatenate([convolved, out(z, p)], axis=-1)


def cvt_attention(p, strides, kv_strides, scale=None):
    def tokens(name, strides):
        local = depthwise_conv({"x": p["x"], "kernel": p[f"{name}_kernel"]}, strides, (1,) * len(size), None)
        return project(local, p, name)

    size = p["query_kernel"].shape[:-1]
    query, key, value = tokens("query", strides), tokens("key", kv_strides), tokens("value", kv_strides)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    z = np.zeros((*query.shape[:-1], value.shape[-1]), complex)
    for i in np.ndindex(*query.shape[:-1]):
        keys, values = (x[..., i[-1], :].reshape(-1, x.shape[-1]) for x in (key, value))
        z[i] = attend(query[i], keys, values, scale)
    return out(z, p)


def lambda_layer(p):
    x, size = p["x"], p["position"].shape[:-2]
    grid = x.shape[:-1]
    query, key, value = (project(x, p, name) for name in ("query", "key", "value"))
    (heads, dim), (width, depth) = query.shape[-2:], value.shape[-2:]
    y = np.zeros((*grid, heads * width), complex)
    content = np.zeros((dim, width), complex)
    for k, u in np.ndindex(dim, depth):
        weights = softmax(key[..., k, u])
        for j in np.ndindex(*grid):
            content[k] += weights[j] * value[(*j, slice(None), u)]
    for i in np.ndindex(*grid):
        here = content.copy()
        for r, j in slots(i, size, grid):
            here += 0 if j is None else np.einsum("ku,vu->kv", p["position"][r], value[j])
        y[i] = (query[i] @ here).reshape(-1)
    return y


def _aft(p, w):
    """w(i, j), of as many channels as there are, or one."""
    x = p["x"]
    query, key, value = (project(x, p, name) for name in ("query", "key", "value"))
    largest = key.real.reshape(-1, key.shape[-1]).max(0)
    y = np.zeros(query.shape, complex)
    for i in np.ndindex(*x.shape[:-1]):
        weights = {j: np.exp(key[j] - largest + w(i, j)) for j in np.ndindex(*x.shape[:-1])}
        total = sum(weights.values())
        y[i] = sigmoid(query[i]) * sum(a * value[j] for j, a in weights.items()) / total
    return y @ p["out"] + p.get("out_bias", 0)


def aft(p):
    return _aft(p, lambda i, j: p["position"][(*i, *j)])


def aft_conv(p):
    size, heads, hidden = p["position"].shape[:-1], p["position"].shape[-1], p["value"].shape[-1]

    def w(i, j):
        near = {token: r for r, token in slots(i, size, p["x"].shape[:-1])}
        return np.repeat(p["position"][near[j]], hidden // heads) if j in near else np.zeros(hidden)

    return _aft(p, w)


def qna(p, strides, scale=None):
    x, query, size = p["x"], p["query"], p["bias"].shape[1:]
    key, value = project(x, p, "key"), project(x, p, "value")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    z = np.zeros((*positions(x.shape[:-1], strides), *value.shape[-2:]), complex)
    for i in np.ndindex(*z.shape[:-2]):
        inside = [
            (r, j) for r, j in slots(i, size, x.shape[:-1], strides, lows=[k // 2 for k in size]) if j is not None
        ]
        for h in range(len(query)):
            keys, values = ([of[(*j, h)] for _, j in inside] for of in (key, value))
            z[(*i, h)] = attend(query[h], keys, values, scale, np.array([p["bias"][(h, *r)] for r, _ in inside]))
    return out(z, p)


def parameter_key_attention(p, scale=None, normalize="softmax"):
    x, heads = p["x"], p["key"].shape[1]
    query = project(x, p, "query") if "query" in p else np.stack([x] * heads, -2)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    z = np.zeros((*query.shape[:-1], p["value"].shape[-1]), complex)
    for i in np.ndindex(*query.shape[:-1]):
        scores = scale * p["key"][:, i[-1]] @ query[i]
        weights = {"softmax": softmax, "none": lambda s: s, "relu": lambda s: relu(s) / len(s)}[normalize](scores)
        z[i] = weights @ p["value"][:, i[-1]]
    return out(z, p) if "out" in p else z.reshape(*x.shape[:-1], -1)

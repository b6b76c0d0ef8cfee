"""`quadratic_attention`: its loops, and what the tests know of it."""

import itertools

import numpy as np

from jaxattn import nn, zoo

from .case import LayerCase, Whole, named


def quadratic_attention(x, params, tokens=None):
    """y_i = bias + Σ_h Σ_δ softmax_δ(-α_h‖δ - Δ_h‖²) x_{i+δ} V_h O_h, for x [*grid, features].

    `tokens`, a `Sliding`, lists what query i sees: pairs of an offset δ and a token's index, or None for a zero token.
    Without it, every query sees the whole grid.
    """
    rank = params["centre"].shape[1]
    grid, features = x.shape[:rank], x.shape[-1]
    everything = list(itertools.product(*map(range, grid)))
    queries = everything
    queries = everything if tokens is None else tokens.queries
    rows = []
    for i in queries:
        seen = [(np.subtract(j, i), j) for j in everything] if tokens is None else tokens(i)
        total = 0.0
        for h in range(len(params["centre"]) if seen else 0):  # a query that sees nothing: zeros
            scores = np.array([score(params, h, delta) for delta, _ in seen])
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            mixed = sum(
                w * (np.zeros(features) if j is None else x[tuple(j)]) for w, (_, j) in zip(weights, seen, strict=True)
            )
            total = total + project(mixed, params, h)
        rows.append(total + params.get("bias", 0.0) + np.zeros(out_features(params, features)))
    shape = tuple(max(i[axis] for i in queries) + 1 for axis in range(rank))
    return np.array(rows).reshape(*shape, -1)


def out_features(params, features):
    groups = features // len(params["value"])
    return groups * params["out"].shape[2] if "out" in params else params["value"].shape[2]


def score(params, head, delta):
    away = np.asarray(delta, float) - params["centre"][head]
    if "alpha" in params:
        return -params["alpha"][head] * away @ away
    return -0.5 * np.sum((params["inverse_root"][head] @ away) ** 2)


def project(mixed, params, head):
    """x V_h O_h, group by group."""
    value = params["value"][:, head]
    size, groups = len(value), len(mixed) // len(value)
    columns = value.shape[1] // groups
    parts = []
    for g in range(groups):
        part = mixed[g * size : (g + 1) * size] @ value[:, g * columns : (g + 1) * columns]
        parts.append(part @ params["out"][head, g * columns : (g + 1) * columns] if "out" in params else part)
    return np.concatenate(parts)


class Sliding:
    """The tokens of a window that slides as a convolution's does, `low` before the first token."""

    def __init__(self, grid, size, strides, dilation, pads, boundary):
        self.grid, self.size, self.strides, self.dilation = grid, size, strides, dilation
        self.low, self.boundary = [low for low, _ in pads], boundary
        counts = [
            (n + low + high - d * (k - 1) - 1) // s + 1
            for n, (low, high), k, s, d in zip(grid, pads, size, strides, dilation, strict=True)
        ]
        self.queries = list(itertools.product(*map(range, counts)))

    def __call__(self, i):
        seen = []
        for slot in itertools.product(*map(range, self.size)):
            delta = np.array([u - (k - 1) // 2 for u, k in zip(slot, self.size, strict=True)])
            at = [
                s * p + d * u - low
                for s, p, d, u, low in zip(self.strides, i, self.dilation, slot, self.low, strict=True)
            ]
            inside = all(0 <= p < n for p, n in zip(at, self.grid, strict=True))
            if inside:
                seen.append((delta, at))
            elif self.boundary == "zero":
                seen.append((delta, None))
            elif self.boundary == "edge":
                seen.append((delta, [min(max(p, 0), n - 1) for p, n in zip(at, self.grid, strict=True)]))
            elif self.boundary == "wrap":
                seen.append((delta, [p % n for p, n in zip(at, self.grid, strict=True)]))
            elif self.boundary == "reflect":
                pairs = zip(at, self.grid, strict=True)
                seen.append((delta, [int(np.pad(np.arange(n), 8, "reflect")[p + 8]) for p, n in pairs]))
        return seen


QUADRATIC_ATTENTION = LayerCase(
    zoo.quadratic_attention,
    nn.QuadraticAttention,
    family="quadratic",
    loop=quadratic_attention,
    geometries={},  # test_quadratic
    step=None,
    call={"params": named(centre=(2, 2), alpha=(2,), value=(8, 2, 6), bias=(6,)), "window": zoo.Slide((3, 3))},
    arguments={"num_heads": 2, "in_features": 8, "head_dim": 4},
    # 9 centres and widths, 9 heads of 8·4 and 4·6, and 6; the full form has 2·2 for each width; 9·(8/2)·6 without `out`
    counts=[
        ({"num_heads": 9, "in_features": 8, "out_features": 6, "head_dim": 4}, 9 * 3 + 9 * 56 + 6),
        ({"num_heads": 9, "in_features": 8, "isotropic": False}, 9 * 6 + 9 * 64 + 8),
        ({"num_heads": 9, "in_features": 8, "out_features": 6, "groups": 2}, 9 * 3 + 216 + 6),
    ],
    split=Whole({"num_heads": 2, "in_features": 4}, "look anywhere on the grid"),
)

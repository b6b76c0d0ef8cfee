"""`axial_attention`: its loops, and what the tests know of it."""

from functools import partial

import numpy as np

from jaxattn import nn, zoo

from .attention_loops import DIM, HEADS, NO_OUT, VALUE, attend, draw, entry, projections, standing
from .case import PROJECTIONS, Geometry, LayerCase, Refused, Step, Whole, named


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


def axial(n, heads=HEADS):
    widths = {"query": DIM, "key": DIM, "value": VALUE}
    return {f"{name}_embedding": draw(40 + w, heads, 2 * n - 1, w) for name, w in widths.items()}


AXIAL_ATTENTION = LayerCase(
    zoo.axial_attention,
    nn.AxialAttention,
    family="attention",
    loop=axial_attention,
    geometries={
        "axial 1d": Geometry((5,), projections() | axial(5)),
        "axial 2d": Geometry((3, 2), projections(*NO_OUT) | axial(3, heads=1), {"axis": -3}, {"axis": -3}),
        "axial 2d window": Geometry((2, 5), projections() | axial(3), {"window": 3}, {"window": 3}),
        "axial 1d even window": Geometry((4,), projections() | axial(2), {"window": 2}, {"window": 2}),
    },
    step=Step(
        {"num_heads": 2, "in_features": 6, "window": 3, "axis": -3},
        (4, 2, 6),
        partial(axial_attention, axis=-3, window=3),
    ),
    call={
        "params": PROJECTIONS | named(query_embedding=(2, 11, 4), key_embedding=(2, 11, 4), value_embedding=(2, 11, 4)),
        "axis": -2,
        "window": 6,
    },
    arguments={"num_heads": 2, "in_features": 8, "window": 3},
    counts=[  # a table for each of query, key and value
        ({"num_heads": 2, "in_features": 8, "length": 5}, 192 + 3 * 9 * 4),
        ({"num_heads": 2, "in_features": 8, "window": 3}, 192 + 3 * 5 * 4),
    ],
    split=Whole({"num_heads": 2, "in_features": 4, "window": 3}, "does not know which axis of its input is split"),
    errors=[
        Refused(axial(5), {"axis": -1}, r"axis \(=-1\) must be an axis of x, which has 3, and not the last"),
        Refused(axial(4), {}, r"\['query_embedding'\] .* must be \[heads, offsets, head_dim\] = \[2, 9, 6\]"),
        Refused(axial(4), {"window": 0}, r"window \(=0\) must be an int >= 1, or None"),
    ],
    refused=[(partial(nn.AxialAttention, 2, 8), r"AxialAttention: give one of length \(=None\) and window \(=None\)")],
)

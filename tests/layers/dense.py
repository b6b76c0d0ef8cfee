"""`conv`: its loops, and what the tests know of it."""

import numpy as np

from jaxattn import nn, zoo

from .case import Geometry, LayerCase, numbers
from .mix_loops import positions, slots


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


CONV = LayerCase(
    zoo.conv,
    nn.Conv,
    family="mix",
    loop=conv,
    geometries={
        "conv 1d": Geometry((6,), {"kernel": (4, 4, 3)}, {}, {"strides": (1,), "dilation": (1,), "lows": (1,)}),
        "conv 2d": Geometry(
            (5, 4),
            {"kernel": (3, 2, 2, 6)},
            {"strides": (2, 1), "dilation": (1, 2), "groups": 2},
            {"strides": (2, 1), "dilation": (1, 2), "lows": (1, 1), "groups": 2},
        ),
        "conv 3d": Geometry(
            (3, 2, 3),
            {"kernel": (2, 1, 3, 4, 2)},
            {"padding": [(1, 0), 0, 1]},
            {"strides": (1, 1, 1), "dilation": (1, 1, 1), "lows": (1, 0, 1)},
        ),
    },
    step=None,  # test_nn
    call={"kernel": numbers(3, 3, 4, 6), "strides": 2, "dilation": 1, "padding": "SAME", "groups": 2},
    arguments={"in_features": 8, "out_features": 6, "kernel_size": (3, 3), "feature_group_count": 2},
    counts=[  # (3·3·8 / 2)·6 + 6
        ({"in_features": 8, "out_features": 6, "kernel_size": (3, 3), "feature_group_count": 2}, 222)
    ],
    split=[],  # test_halo
)

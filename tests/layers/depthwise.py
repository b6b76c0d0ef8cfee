"""`depthwise_conv` and `light_conv`: their loops, and what the tests know of them."""

from functools import partial

import numpy as np

from jaxattn import nn, zoo

from .case import Geometry, LayerCase, Refused, Step, numbers
from .mix_loops import _mix, both, positions, slots, softmax


def depthwise_conv(p, strides, dilation, lows):
    x, w = p["x"], p["kernel"]
    grid, size, m = x.shape[:-1], w.shape[:-1], w.shape[-1] // x.shape[-1]
    y = np.zeros((*positions(grid, strides), w.shape[-1]), complex)
    for i in np.ndindex(*y.shape[:-1]):
        for r, j in slots(i, size, grid, strides, dilation, lows):
            for c in range(y.shape[-1]):
                y[(*i, c)] += 0 if j is None else x[(*j, c // m)] * w[(*r, c)]
    return y


def light_conv(p, dilation=None, lows=None):
    w = p["kernel"]
    return _mix(p["x"], w.shape[:-1], w.shape[-1], lambda i, h: softmax(w[..., h]), dilation, lows)


DEPTHWISE_CONV = LayerCase(
    zoo.depthwise_conv,
    nn.DepthwiseConv,
    family="mix",
    loop=depthwise_conv,
    geometries={
        "depthwise 1d": Geometry((5,), {"kernel": (3, 4)}, {}, {"strides": (1,), "dilation": (1,), "lows": (1,)}),
        "depthwise 2d": Geometry(
            (5, 4),
            {"kernel": (3, 2, 8)},
            {"strides": (2, 1), "dilation": (1, 2)},
            {"strides": (2, 1), "dilation": (1, 2), "lows": (1, 1)},
        ),
        "depthwise 3d": Geometry(
            (3, 2, 3),
            {"kernel": (2, 1, 3, 4)},
            {"padding": [(1, 0), 0, 1]},
            {"strides": (1, 1, 1), "dilation": (1, 1, 1), "lows": (1, 0, 1)},
        ),
    },
    step=Step(
        {"in_features": 4, "kernel_size": (3, 3), "multiplier": 2},
        (4, 3, 4),
        lambda p: depthwise_conv(p, strides=(1, 1), dilation=(1, 1), lows=(1, 1)) + p["bias"],
    ),
    call={"kernel": numbers(3, 3, 16), "strides": 2, "dilation": 1, "padding": 1, "boundary": "edge"},
    arguments={"in_features": 8, "kernel_size": (3, 3), "multiplier": 2},
    counts=[
        ({"in_features": 8, "kernel_size": (7, 7)}, 49 * 8 + 8),
        ({"in_features": 8, "kernel_size": 3, "multiplier": 2, "use_bias": False}, 3 * 16),
    ],
    split=[
        {"in_features": 4, "kernel_size": (5, 3), "strides": 2},
        {"in_features": 4, "kernel_size": (5, 3), "dilation": (2, 1), "padding": [(5, 3), (0, 1)]},
    ],
    errors=[
        Refused({"kernel": (3, 3, 6)}, {}, r"features · m\] with x's features \(=4\)"),
        Refused({"kernel": (4,)}, {}, r"depthwise_conv: kernel \(=\[4\]\) must be \[\*window, fea"),
        Refused({"kernel": (3, 3, 4)}, {"strides": 0}, r"depthwise_conv: strides \(=0\) must be an int >= 1, or"),
        Refused({"kernel": (3, 3, 4)}, {"padding": [1]}, r"depthwise_conv: padding \(=\[1\]\) must be 'SAME'"),
    ],
    refused=[(partial(nn.DepthwiseConv, 8, 3, 0), r"multiplier \(=0\) must be an int >= 1")],
)


LIGHT_CONV = LayerCase(
    zoo.light_conv,
    nn.LightConv,
    family="mix",
    loop=light_conv,
    geometries={
        "light 1d causal": Geometry((6,), {"kernel": (3, 2)}, {"causal": True}, {"lows": (2,)}),
        "light 2d": Geometry((4, 3), {"kernel": (3, 2, 4)}, *both(dilation=(1, 2))),
        "light 3d": Geometry((2, 3, 2), {"kernel": (1, 3, 2, 1)}),
    },
    step=Step(
        {"num_heads": 2, "in_features": 4, "kernel_size": 3, "causal": True}, (6, 4), partial(light_conv, lows=(2,))
    ),
    call={"kernel": numbers(3, 3, 2), "dilation": (2, 1), "causal": True},
    arguments={"num_heads": 2, "in_features": 8, "kernel_size": (3, 3)},
    counts=[({"num_heads": 2, "in_features": 8, "kernel_size": 7}, 7 * 2)],
    split=[{"num_heads": 2, "in_features": 4, "kernel_size": (5, 3), "causal": True}],
    errors=[Refused({"kernel": (3, 3, 3)}, {}, r"light_conv: heads of kernel \(=3\) must divide .* \(=4\)")],
    refused=[(partial(nn.LightConv, 3, 8, 3), r"LightConv: num_heads \(=3\) must divide in_features \(=8\)")],
)

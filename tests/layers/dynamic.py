"""`dynamic_conv`, `involution` and `dynamic_depthwise_conv`: their loops, and what the tests know of them."""

from functools import partial

import jax
import numpy as np

from jaxattn import nn, zoo

from .case import Geometry, LayerCase, Refused, Step, named, numbers
from .mix_loops import FEATURES, REDUCED, _mix, both, mean_of_patch, positions, relu, slots, softmax


def bottleneck(x, p):
    reduced = relu(x @ p["reduce"] + p.get("reduce_bias", 0))
    return np.tensordot(reduced, p["span"], 1) + p.get("span_bias", 0)


def dynamic_conv(p, dilation=None, lows=None):
    x, w = p["x"], p["kernel"]
    size, heads = w.shape[1:-1], w.shape[-1]
    return _mix(x, size, heads, lambda i, h: softmax(np.tensordot(x[i], w[..., h], 1)), dilation, lows)


def dynamic_depthwise_conv(p, dilation=None):
    x, size = p["x"], p["span"].shape[1:-1]
    w = bottleneck(x.reshape(-1, x.shape[-1]).mean(0), p)
    return _mix(x, size, x.shape[-1], lambda i, h: w[..., h], dilation, None)


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


def narrow(size, last, bias=True):
    biases = {"reduce_bias": (REDUCED,), "span_bias": (*size, last)} if bias else {}
    return {"reduce": (FEATURES, REDUCED), "span": (REDUCED, *size, last), **biases}


BOTTLENECK = named(reduce=(8, 2), span=(2, 3, 3, 4))


DYNAMIC_CONV = LayerCase(
    zoo.dynamic_conv,
    nn.DynamicConv,
    family="mix",
    loop=dynamic_conv,
    geometries={
        "dynamic 1d causal": Geometry(
            (6,), {"kernel": (4, 3, 2)}, {"causal": True, "dilation": 2}, {"lows": (4,), "dilation": (2,)}
        ),
        "dynamic 2d": Geometry((3, 4), {"kernel": (4, 2, 3, 2)}),
        "dynamic 3d": Geometry((2, 1, 3), {"kernel": (4, 3, 1, 2, 4)}),
    },
    step=Step(
        {"num_heads": 2, "in_features": 4, "kernel_size": (3, 3), "dilation": (2, 1)},
        (5, 4, 4),
        partial(dynamic_conv, dilation=(2, 1)),
    ),
    call={"kernel": numbers(8, 3, 3, 2), "dilation": (2, 1), "causal": True},
    arguments={"num_heads": 2, "in_features": 8, "kernel_size": (3, 3)},
    counts=[({"num_heads": 2, "in_features": 8, "kernel_size": 7}, 8 * 7 * 2)],
    split=[{"num_heads": 2, "in_features": 4, "kernel_size": (5, 3), "dilation": (2, 1)}],
    errors=[Refused({"kernel": (5, 3, 3, 2)}, {}, r"dynamic_conv: kernel .* must be \[features, \*window, heads\]")],
    refused=[(partial(nn.DynamicConv, 3, 8, 3), r"DynamicConv: num_heads \(=3\) must divide in_features \(=8\)")],
)


INVOLUTION = LayerCase(
    zoo.involution,
    nn.Involution,
    family="mix",
    loop=involution,
    geometries={
        "involution 1d": Geometry((5,), narrow((3,), 2), {}, {"strides": (1,)}),
        "involution 2d": Geometry((5, 4), narrow((3, 2), 4, False), *both(strides=(2, 2), dilation=(2, 1))),
        "involution 3d": Geometry((2, 2, 3), narrow((1, 2, 3), 1), {}, {"strides": (1, 1, 1)}),
    },
    step=Step(
        {"in_features": 4, "kernel_size": (3, 3), "groups": 2, "reduction": 2, "strides": 2},
        (5, 4, 4),
        partial(involution, strides=(2, 2)),
    ),
    call={"params": BOTTLENECK, "strides": 2, "dilation": 1, "activation": jax.nn.relu},
    arguments={"in_features": 8, "kernel_size": (3, 3), "groups": 2},
    counts=[  # a bottleneck of 8 / 4, and biases
        ({"in_features": 8, "kernel_size": (3, 3), "groups": 2}, 8 * 2 + 2 + 2 * 9 * 2 + 9 * 2)
    ],
    split=[{"in_features": 4, "kernel_size": (5, 3), "strides": 2}],
    errors=[
        Refused({"reduce": (4, 3)}, {}, r"involution: params \(=.*\) must have 'span'; needed are reduce, span"),
        Refused({**narrow((3, 3), 3)}, {}, r"groups of params\['span'\] \(=3\) must divide"),
        Refused({**narrow((3,) * 4, 2)}, {}, r"x \(=\[5, 5, 4\]\) must be .* with 4 axes of a grid"),
    ],
    refused=[(partial(nn.Involution, 8, 3, groups=3), r"Involution: groups \(=3\) must divide in_features \(=8\)")],
)


DYNAMIC_DEPTHWISE_CONV = LayerCase(
    zoo.dynamic_depthwise_conv,
    nn.DynamicDepthwiseConv,
    family="mix",
    loop=dynamic_depthwise_conv,
    geometries={
        "dynamic depthwise 1d": Geometry((5,), narrow((4,), 4)),
        "dynamic depthwise 2d": Geometry((4, 3), narrow((3, 2), 4, False), *both(dilation=(1, 2))),
        "dynamic depthwise 3d": Geometry((2, 3, 2), narrow((1, 3, 2), 4)),
    },
    step=Step({"in_features": 4, "kernel_size": 3, "reduction": 1}, (5, 4), dynamic_depthwise_conv),
    call={"params": BOTTLENECK | named(span=(2, 3, 3, 8)), "dilation": 1},
    arguments={"in_features": 8, "kernel_size": (3, 3)},
    counts=[({"in_features": 8, "kernel_size": (3, 3)}, 8 * 2 + 2 + 2 * 9 * 8 + 9 * 8)],
    split=[{"in_features": 4, "kernel_size": (5, 3)}],
    errors=[
        Refused(
            narrow((3, 3), 5),
            {},
            r"params\['span'\] \(=\[3, 3, 3, 5\]\) must be \[reduced, \*window, features\] = \[3, \*window, 4\]",
        )
    ],
    refused=[(partial(nn.DynamicDepthwiseConv, 6, 3), r"reduction \(=4\) must divide in_features \(=6\)")],
)

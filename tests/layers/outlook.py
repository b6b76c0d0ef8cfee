"""`outlook_attention`: its loops, and what the tests know of it."""

from functools import partial

import numpy as np

from jaxattn import nn, zoo

from .case import Geometry, LayerCase, Refused, Step, Whole, named
from .mix_loops import DIM, FEATURES, HEADS, OUT, both, mean_of_patch, out, positions, project, slots, softmax


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


def outlook(size, bias=True):
    shapes = {
        "value": (FEATURES, HEADS, DIM), "attention": (FEATURES, HEADS, *size, *size), "out": (HEADS, DIM, OUT),
        "value_bias": (HEADS, DIM), "attention_bias": (HEADS, *size, *size), "out_bias": (OUT,),
    }  # fmt: skip
    return {name: shape for name, shape in shapes.items() if bias or not name.endswith("bias")}


OUTLOOK_ATTENTION = LayerCase(
    zoo.outlook_attention,
    nn.OutlookAttention,
    family="mix",
    loop=outlook_attention,
    geometries={
        "outlook 1d": Geometry((5,), outlook((3,)), {}, {"strides": (1,)}),
        "outlook 1d apart": Geometry((5,), outlook((1,)), *both(strides=(2,))),
        "outlook 2d": Geometry((4, 3), outlook((3, 2), False), *both(strides=(2, 2), scale=0.7)),
        "outlook 3d": Geometry((2, 1, 3), outlook((2, 1, 2)), {}, {"strides": (1, 1, 1)}),
    },
    step=Step(
        {"num_heads": 2, "in_features": 4, "kernel_size": (3, 3), "strides": 2, "use_bias": True},
        (4, 3, 4),
        partial(outlook_attention, strides=(2, 2)),
    ),
    call={"params": named(value=(8, 2, 4), attention=(8, 2, 3, 3, 3, 3), out=(2, 4, 6)), "strides": 2, "scale": 0.5},
    arguments={"num_heads": 2, "in_features": 8, "kernel_size": (3, 3)},
    counts=[  # the paper's: value without a bias, 3² × 3² weights of each head, out
        ({"num_heads": 2, "in_features": 8, "kernel_size": (3, 3)}, 64 + 9 * 2 * 81 + 72)
    ],
    split=Whole({"num_heads": 2, "in_features": 4, "kernel_size": (5, 3)}, "adds to its neighbours' outputs"),
    errors=[
        Refused(outlook((3, 3)) | {"key": (4,)}, {}, r"outlook_attention: params .* must not have 'key'; allowed are"),
        Refused(
            outlook((3, 3)) | {"attention": (4, 2, 3, 3, 3, 2)},
            {},
            r"params\['attention'\] \(=\[4, 2, 3, 3, 3, 2\]\) must be \[features, heads, \*window, \*window\] =",
        ),
    ],
    refused=[(partial(nn.OutlookAttention, 3, 8, 3), r"OutlookAttention: num_heads \(=3\) must divide in_features")],
)

"""`lambda_layer`: its loops, and what the tests know of it."""

from functools import partial

import numpy as np

from jaxattn import nn, zoo

from .case import Geometry, LayerCase, Refused, Step, named
from .mix_loops import DIM, FEATURES, heads, project, slots, softmax


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


def lambdas(size, depth, bias=True):
    return heads(
        bias,
        ("out", "out_bias"),
        key=(FEATURES, DIM, depth),
        key_bias=(DIM, depth),
        value=(FEATURES, 2, depth),
        value_bias=(2, depth),
        position=(*size, DIM, depth),
    )


LAMBDA_LAYER = LayerCase(
    zoo.lambda_layer,
    nn.LambdaLayer,
    family="mix",
    loop=lambda_layer,
    geometries={
        "lambda 1d": Geometry((5,), lambdas((3,), 2)),
        "lambda 2d": Geometry((3, 4), lambdas((5, 2), 1, False)),
        "lambda 3d": Geometry((2, 1, 3), lambdas((1, 3, 3), 2)),
    },
    step=Step(
        {"num_heads": 2, "in_features": 4, "kernel_size": (3, 5), "key_dim": 3, "depth": 2, "use_bias": True},
        (3, 4, 4),
        lambda_layer,
    ),
    call={"params": named(query=(8, 4, 3), key=(8, 3, 1), value=(8, 2, 1), position=(5, 5, 3, 1))},
    arguments={"num_heads": 2, "in_features": 8, "kernel_size": (3, 3)},
    counts=[  # queries of 4 heads, one key and a value of 2
        ({"num_heads": 4, "in_features": 8, "kernel_size": (5, 5), "key_dim": 3}, 96 + 24 + 16 + 75)
    ],
    split=[{"num_heads": 2, "in_features": 4, "kernel_size": (5, 3), "key_dim": 3, "depth": 2}],
    errors=[Refused(lambdas((3, 3), 2) | {"position": (3, 3, DIM, 1)}, {}, r"params\['position'\] \(=.* must be")],
    refused=[
        (partial(nn.LambdaLayer, 2, 8, 3, 7), r"LambdaLayer: num_heads \(=2\) must divide out_features \(=7\)"),
        (partial(nn.LambdaLayer, 2, 8, 3, depth=0), r"LambdaLayer: depth \(=0\) must be an int >= 1"),
    ],
)

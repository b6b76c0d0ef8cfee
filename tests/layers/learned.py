"""`qna` and `parameter_key_attention`: their loops, and what the tests know of them."""

from functools import partial

import numpy as np

from jaxattn import nn, zoo

from .case import Geometry, LayerCase, Refused, Step, named
from .mix_loops import DIM, FEATURES, HEADS, attend, both, heads, out, positions, project, relu, slots, softmax


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


def asked(size, bias=True):
    return heads(bias, ("query_bias",), query=(HEADS, DIM)) | {"bias": (HEADS, *size)}


def remembered(bias=True, without=()):
    return heads(bias, ("key_bias", "value_bias", *without), key=(7, HEADS, DIM), value=(7, HEADS, 2))


QNA = LayerCase(
    zoo.qna,
    nn.QnA,
    family="mix",
    loop=qna,
    geometries={
        "qna 1d": Geometry((5,), asked((3,)), {}, {"strides": (1,)}),
        "qna 2d": Geometry((4, 3), asked((3, 2), False), *both(strides=(2, 1), scale=0.7)),
        "qna 3d": Geometry((2, 1, 3), asked((1, 2, 3)), {}, {"strides": (1, 1, 1)}),
    },
    step=Step(
        {"num_heads": 2, "in_features": 4, "kernel_size": (3, 3), "strides": 2, "scale": 0.7},
        (3, 4, 4),
        partial(qna, strides=(2, 2), scale=0.7),
    ),
    call={
        "params": named(query=(2, 4), key=(8, 2, 4), value=(8, 2, 4), bias=(2, 3, 3), out=(2, 4, 6)),
        "strides": 2,
        "scale": 0.5,
    },
    arguments={"num_heads": 2, "in_features": 8, "kernel_size": (3, 3)},
    counts=[  # learned queries of 8 in the place of a projection of 72
        ({"num_heads": 2, "in_features": 8, "kernel_size": (3, 3)}, 288 - 72 + 8 + 18)
    ],
    split=[{"num_heads": 2, "in_features": 4, "kernel_size": (5, 3), "strides": 2}],
    errors=[
        Refused(asked((3, 3)) | {"query": (3, DIM)}, {}, r"qna: params\['key'\] \(=\[4, 2, 3\]\) must be"),
        Refused(asked((3, 3)), {"strides": (1, 2, 3)}, r"qna: strides \(=\(1, 2, 3\)\) must be an int >= 1, or one"),
    ],
    refused=[(partial(nn.QnA, 3, 8, 3), r"QnA: num_heads \(=3\) must divide qkv_features \(=8\)")],
)


PARAMETER_KEY_ATTENTION = LayerCase(
    zoo.parameter_key_attention,
    nn.ParameterKeyAttention,
    family="mix",
    loop=parameter_key_attention,
    geometries={
        "parameter keys": Geometry((5,), remembered()),
        "parameter keys 2d": Geometry((2, 3), remembered(False), *both(normalize="relu", scale=0.7)),
        "parameter keys bare": Geometry(
            (4,), {"key": (7, HEADS, FEATURES), "value": (7, HEADS, DIM)}, *both(normalize="none")
        ),
    },
    step=Step(
        {"num_heads": 2, "in_features": 4, "num_keys": 5, "qkv_features": 6, "use_bias": True},
        (3, 4),
        parameter_key_attention,
    ),
    call={"params": named(query=(8, 2, 4), key=(5, 2, 4), value=(5, 2, 4)), "normalize": "relu", "scale": 0.5},
    arguments={"num_heads": 2, "in_features": 8, "num_keys": 5},
    counts=[({"num_heads": 2, "in_features": 8, "num_keys": 10}, 128 + 2 * 80)],
    split=[{"num_heads": 2, "in_features": 4, "num_keys": 3}],
    errors=[
        Refused(remembered(without=("query", "query_bias")), {}, r"params\['key'\] \(=.* must be"),
        Refused(remembered(), {"normalize": "max"}, r"normalize \(='max'\) must be one of"),
    ],
    refused=[(partial(nn.ParameterKeyAttention, 3, 8, 5), r"num_heads \(=3\) must divide qkv_features \(=8\)")],
)

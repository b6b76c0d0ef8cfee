"""`aft` and `aft_conv`: their loops, and what the tests know of them."""

from functools import partial

import numpy as np

from jaxattn import nn, zoo

from .case import GRID, Geometry, LayerCase, Refused, Step, Whole, named
from .mix_loops import FEATURES, OUT, project, sigmoid, slots


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


def channels(position, bias=True):
    linear = dict.fromkeys(("query", "key", "value"), (FEATURES, 6)) | {"out": (6, OUT), "position": position}
    biases = dict.fromkeys(("query_bias", "key_bias", "value_bias"), (6,)) | {"out_bias": (OUT,)}
    return linear | biases if bias else linear


LINEAR = named(query=(8, 6), key=(8, 6), value=(8, 6), out=(6, 8))


AFT = LayerCase(
    zoo.aft,
    nn.AFT,
    family="mix",
    loop=aft,
    geometries={"aft 1d": Geometry((5,), channels((5, 5))), "aft 2d": Geometry((2, 3), channels((2, 3, 2, 3), False))},
    step=Step({"in_features": 4, "hidden_features": 6, "grid": (3, 2)}, (3, 2, 4), aft),
    call={"params": LINEAR | named(position=(*GRID, *GRID))},
    arguments={"in_features": 8, "grid": (4, 6)},
    counts=[({"in_features": 8, "grid": (5, 7)}, 288 + 35 * 35)],
    split=Whole({"in_features": 4, "grid": (8, 5)}, "its own weight for each token of the whole grid"),
    errors=[
        Refused(
            channels((5, 4, 5, 4)), {}, r"aft: params\['position'\] \(=\[5, 4, 5, 4\]\) must be .* = \[5, 5, 5, 5\]"
        )
    ],
)


AFT_CONV = LayerCase(
    zoo.aft_conv,
    nn.AFTConv,
    family="mix",
    loop=aft_conv,
    geometries={
        "aft conv 1d": Geometry((6,), channels((3, 2))),
        "aft conv 2d": Geometry((4, 3), channels((2, 3, 1), False)),
        "aft conv 3d": Geometry((2, 1, 3), channels((1, 2, 3, 6))),
    },
    step=Step(
        {"num_heads": 2, "in_features": 4, "kernel_size": (3, 3), "hidden_features": 6, "out_features": 3},
        (3, 4, 4),
        aft_conv,
    ),
    call={"params": LINEAR | named(position=(3, 3, 2))},
    arguments={"num_heads": 2, "in_features": 8, "kernel_size": (3, 3)},
    counts=[({"num_heads": 2, "in_features": 8, "kernel_size": (3, 3), "hidden_features": 6}, 3 * 54 + 56 + 18)],
    split=[{"num_heads": 2, "in_features": 4, "kernel_size": (5, 3)}],
    errors=[Refused(channels((3, 3, 4)), {}, r"heads of params\['position'\] \(=4\) must divide the hidden features")],
    refused=[(partial(nn.AFTConv, 3, 8, 3), r"AFTConv: num_heads \(=3\) must divide hidden_features \(=8\)")],
)

"""`gpsa`: its loops, and what the tests know of it."""

from functools import partial

import numpy as np

from jaxattn import nn, zoo

from .attention_loops import HEADS, attend, draw, everywhere, projections, softmax, usual
from .case import PROJECTIONS, Geometry, LayerCase, Refused, Step, named


def gpsa(x, params, scale=None):
    grid, scale = x.shape[:-1], usual(scale, params)

    def weights(h, i, js, content):
        gate = 1 / (1 + np.exp(-params["gate"][h]))
        offsets = np.array(js) - np.array(i)
        r = np.stack([(offsets**2).sum(1), *offsets.T], axis=1)
        return (1 - gate) * content + gate * softmax(r @ params["position"][h])

    return attend(x, params, everywhere(grid), lambda h, q, k, delta: scale * q @ k, weights=weights)


def positions(rank, heads=HEADS):
    return {"position": draw(50, heads, rank + 1), "gate": draw(51, heads)}


GPSA = LayerCase(
    zoo.gpsa,
    nn.GPSA,
    family="attention",
    loop=gpsa,
    geometries={
        "gpsa 1d": Geometry((5,), projections() | positions(1)),
        "gpsa 2d": Geometry((3, 4), projections() | positions(2)),
    },
    step=Step({"num_heads": 4, "in_features": 8}, (3, 4, 8), gpsa),
    call={"params": PROJECTIONS | named(position=(2, 3), gate=(2,)), "scale": 0.5},
    arguments={"num_heads": 4, "in_features": 8},
    counts=[  # the output projection's bias, 3 numbers for the position and a gate for each head
        ({"num_heads": 4, "in_features": 8}, 256 + 8 + 4 * 3 + 4)
    ],
    split=[{"num_heads": 4, "in_features": 4}],
    errors=[
        Refused(
            positions(2) | {"gate": None},
            {},
            "gpsa: params .* must have 'gate'; needed are query, key, value, position, gate",
        ),
        Refused(positions(2) | {"gait": np.ones(2)}, {}, "gpsa: params .* must not have 'gait'; allowed are query, "),
        Refused(positions(2) | {"out": None}, {}, "gpsa: params .* must have 'out', to which 'out_bias' belongs"),
        Refused(
            positions(2) | {"key": np.ones((4, 3, 6))},
            {},
            r"gpsa: params\['key'\] \(=\[4, 3, 6\]\) must be \[features, heads, head_dim\] = \[4, 2, 6\]",
        ),
        Refused(
            positions(2) | {"position": np.ones((3, 3))},
            {},
            r"gpsa: params\['position'\] .* must be \[heads, coordinates\] = \[2, 3\]",
        ),
        Refused(
            positions(2) | {"position": np.ones((2, 6))},
            {},
            r"gpsa: x \(=\[4, 5, 4\]\) must be .* with 5 axes of a grid",
        ),
    ],
    takes={"locality_strength": ("0", "-1", "1.5")},
    refused=[
        (partial(nn.GPSA, 8, 8), r"GPSA: num_heads \(=8\) must be K\^2 for a grid of 2 axes \(rank=2\)"),
        (partial(nn.GPSA, 4, 8, 16), r"GPSA: with identity_value, qkv_features \(=16\) must be in_features \(=8\)"),
    ],
)

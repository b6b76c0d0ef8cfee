"""`augmented_conv`: its loops, and what the tests know of it."""

from functools import partial

import numpy as np

from jaxattn import nn, zoo

from .case import PROJECTIONS, Geometry, LayerCase, Refused, Step, named
from .mix_loops import DIM, FEATURES, attend, both, heads, out, project, slots


def augmented_conv(p, query_scale=None):
    x, kernel, rank = p["x"], p["kernel"], p["x"].ndim - 1
    grid, size = x.shape[:-1], kernel.shape[:-2]
    convolved = np.zeros((*grid, kernel.shape[-1]), complex) + p.get("kernel_bias", 0)
    query, key, value = (project(x, p, name) for name in ("query", "key", "value"))
    scale = query.shape[-1] ** -0.5 if query_scale is None else query_scale
    z = np.zeros(value.shape, complex)
    tokens = list(np.ndindex(*grid))
    for i in tokens:
        for r, j in slots(i, size, grid):
            convolved[i] += 0 if j is None else x[j] @ kernel[r]
        for h in range(query.shape[-2]):
            keys = [
                key[(*j, h)] + sum(p[f"embedding_{a}"][j[a] - i[a] + grid[a] - 1] for a in range(rank)) for j in tokens
            ]
            z[(*i, h)] = attend(query[(*i, h)], keys, [value[(*j, h)] for j in tokens], scale)
    return np.concatenate([convolved, out(z, p)], axis=-1)


def augmented(grid, size, bias=True):
    embeddings = {f"embedding_{axis}": (2 * n - 1, DIM) for axis, n in enumerate(grid)}
    return heads(bias, kernel=(*size, FEATURES, 3), kernel_bias=(3,), **embeddings)


AUGMENTED_CONV = LayerCase(
    zoo.augmented_conv,
    nn.AugmentedConv,
    family="mix",
    loop=augmented_conv,
    geometries={
        "augmented 1d": Geometry((5,), augmented((5,), (3,))),
        "augmented 2d": Geometry((2, 3), augmented((2, 3), (2, 3), False), *both(query_scale=0.7)),
        "augmented 3d": Geometry((2, 1, 2), augmented((2, 1, 2), (1, 1, 3))),
    },
    step=Step(
        {
            "num_heads": 2,
            "in_features": 4,
            "out_features": 9,
            "kernel_size": (3, 3),
            "grid": (3, 2),
            "value_features": 2,
        },
        (3, 2, 4),
        augmented_conv,
    ),
    call={
        "params": PROJECTIONS | named(kernel=(3, 3, 8, 6), embedding_0=(7, 4), embedding_1=(11, 4)),
        "query_scale": 0.5,
    },
    arguments={
        "num_heads": 2,
        "in_features": 8,
        "out_features": 8,
        "kernel_size": (3, 3),
        "grid": (4, 6),
        "value_features": 4,
    },
    # 9·8·12 + 12 for the convolution; query and key of 8, value and out of 4, and biases; 9 and 13 offsets of 4
    counts=[
        (
            {
                "num_heads": 2,
                "in_features": 8,
                "out_features": 16,
                "kernel_size": (3, 3),
                "grid": (5, 7),
                "value_features": 4,
            },
            876 + 2 * 72 + 36 + 20 + 22 * 4,
        )
    ],
    split=[
        {
            "num_heads": 2,
            "in_features": 4,
            "out_features": 6,
            "kernel_size": (5, 3),
            "grid": (8, 5),
            "value_features": 2,
        }
    ],
    errors=[
        Refused(
            augmented((5, 5), (3, 3)) | {"embedding_1": (7, DIM)},
            {},
            r"params\['embedding_1'\] \(=\[7, 3\]\) must be \[offsets_1, head_dim\] = \[9, 3\]",
        )
    ],
    refused=[
        (
            partial(nn.AugmentedConv, 2, 8, 16, (3, 3), grid=(5,), value_features=4),
            r"AugmentedConv: grid \(=\(5,\)\) must have an axis for each of kernel_size \(=\(3, 3\)\)",
        ),
        (
            partial(nn.AugmentedConv, 2, 8, 4, 3, grid=(5,), value_features=4),
            r"value_features \(=4\) must be below out_features",
        ),
    ],
)

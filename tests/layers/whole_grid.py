"""Attention over the whole grid, four layers: their loops, and what the tests know of them."""

from functools import partial

import numpy as np

from jaxattn import nn, zoo

from .attention_loops import DIM, NO_OUT, attend, bias, biases, embedding, everywhere, projections, tables, usual
from .case import PROJECTIONS, Geometry, LayerCase, Refused, Step, named


def global_attention(x, params, scale=None):
    scale = usual(scale, params)
    return attend(x, params, everywhere(x.shape[:-1]), lambda h, q, k, delta: scale * q @ k)


def coatnet_attention(x, params, scale=None):
    grid, scale = x.shape[:-1], usual(scale, params)
    return attend(x, params, everywhere(grid), lambda h, q, k, delta: scale * q @ k + bias(params, h, delta, grid))


def botnet_attention(x, params, query_scale=None):
    grid, scale = x.shape[:-1], usual(query_scale, params)
    score = lambda h, q, k, delta: scale * q @ (k + embedding(params, h, delta, grid))
    return attend(x, params, everywhere(grid), score)


learned_relative_attention = botnet_attention  # without a key, k is zeros


TABLES = named(embedding_0=(2, 7, 4), embedding_1=(2, 11, 4))


GLOBAL_ATTENTION = LayerCase(
    zoo.global_attention,
    nn.GlobalAttention,
    family="attention",
    loop=global_attention,
    geometries={
        "global": Geometry((5,), projections(), {"rank": 1}),
        "global bare": Geometry((1,), projections(*NO_OUT), {"scale": 0.3}, {"scale": 0.3}),
        "global over a grid": Geometry((3, 2), projections(), {"rank": 2}),
    },
    step=Step(
        {"num_heads": 2, "in_features": 6, "qkv_features": 8, "out_features": 5, "rank": 2}, (3, 2, 6), global_attention
    ),
    call={"params": PROJECTIONS, "rank": 2, "mask": np.ones((24, 24), bool), "scale": 0.5},
    arguments={"num_heads": 2, "in_features": 8, "rank": 2},
    counts=[  # 8·8 for each of query, key, value and out, 8 for each bias, 2 heads of 4
        ({"num_heads": 2, "in_features": 8}, 288),
        ({"num_heads": 2, "in_features": 8, "qkv_features": 4, "out_features": 6}, 3 * 36 + 24 + 6),
    ],
    split=[{"num_heads": 2, "in_features": 4, "rank": 2}],
    errors=[
        Refused({"query": np.ones(4)}, {}, r"\['query'\] \(=\[4\]\) must be \[features, he"),
        Refused({"out": np.ones((2, 6, 5))}, {}, r"must be .* = \[2, 3, out_features\]"),
    ],
    refused=[(partial(nn.GlobalAttention, 3, 8), r"GlobalAttention: num_heads \(=3\) must divide qkv_features \(=8\)")],
)


COATNET_ATTENTION = LayerCase(
    zoo.coatnet_attention,
    nn.CoAtNetAttention,
    family="attention",
    loop=coatnet_attention,
    geometries={
        "coatnet 1d": Geometry((4,), projections() | biases((4,))),
        "coatnet 2d": Geometry((3, 4), projections() | biases((3, 4))),
    },
    step=Step({"num_heads": 2, "in_features": 6, "grid": (3, 2)}, (3, 2, 6), coatnet_attention),
    call={"params": PROJECTIONS | named(relative_bias=(2, 7, 11)), "scale": 0.5},
    arguments={"num_heads": 2, "in_features": 8, "grid": (4, 6)},
    counts=[({"num_heads": 2, "in_features": 8, "grid": (3, 4)}, 288 + 2 * 5 * 7)],
    split=[{"num_heads": 2, "in_features": 4, "grid": (8, 5)}],
    errors=[Refused(biases((4, 4)), {}, r"params\['relative_bias'\] .* must be \[heads, \*offsets\] = \[2, 7, 9\]")],
    refused=[
        (partial(nn.CoAtNetAttention, 2, 8, grid=(3,), window=3), r"CoAtNetAttention: window \(=3\) must be None where")
    ],
)


BOTNET_ATTENTION = LayerCase(
    zoo.botnet_attention,
    nn.BoTNetAttention,
    family="attention",
    loop=botnet_attention,
    geometries={
        "botnet 1d": Geometry((4,), projections() | tables((4,), DIM)),
        "botnet 2d": Geometry((2, 4), projections(*NO_OUT) | tables((2, 4), DIM, heads=1)),
    },
    step=Step({"num_heads": 2, "in_features": 6, "grid": (3, 2)}, (3, 2, 6), botnet_attention),
    call={"params": PROJECTIONS | TABLES, "query_scale": 0.5},
    arguments={"num_heads": 2, "in_features": 8, "grid": (4, 6)},
    counts=[({"num_heads": 2, "in_features": 8, "grid": (3, 4)}, 192 + 4 * (5 + 7))],
    split=[{"num_heads": 2, "in_features": 4, "grid": (8, 5)}],
    errors=[
        Refused({}, {}, "botnet_attention: params .* must have 'embedding_0'"),
        Refused(
            tables((4, 5), 2), {}, r"\['embedding_0'\] \(of width 2\) must be of width head_dim \(=6\), or head_dim / 2"
        ),
    ],
)


LEARNED_RELATIVE_ATTENTION = LayerCase(
    zoo.learned_relative_attention,
    nn.LearnedRelativeAttention,
    family="attention",
    loop=learned_relative_attention,
    geometries={
        "learned 1d": Geometry((4,), projections() | tables((4,), DIM)),
        "learned 2d": Geometry((3, 3), projections() | tables((3, 3), DIM)),
        "learned 2d without content": Geometry((3, 1), projections("key", "key_bias") | tables((3, 1), DIM)),
    },
    step=Step(
        {"num_heads": 2, "in_features": 6, "grid": (3, 2), "content": False}, (3, 2, 6), learned_relative_attention
    ),
    call={"params": PROJECTIONS | TABLES, "query_scale": 0.5},
    arguments={"num_heads": 2, "in_features": 8, "grid": (4, 6)},
    counts=[
        ({"num_heads": 2, "in_features": 8, "grid": (3, 4)}, 256 + 8 + 2 * 4 * (5 + 7)),
        ({"num_heads": 2, "in_features": 8, "grid": (3,), "content": False}, 192 + 8 + 40),
    ],
    split=[{"num_heads": 2, "in_features": 4, "grid": (8, 5), "content": False}],
    errors=[
        Refused(tables((4, 5), 6) | {"key": None}, {}, "params .* must have 'key', to which 'key_bias' belongs"),
        Refused(tables((4, 4), 6), {}, r"\['embedding_1'\] .* must be \[heads, offsets_1, width\] = \[2, 9, 6\]"),
    ],
)

"""`sasa`, `halo_attention` and `neighborhood_attention`: their loops, and what the tests know of them."""

import itertools
from functools import partial

from jaxattn import nn, zoo
from jaxattn.window import Window

from .attention_loops import DIM, NO_OUT, attend, bias, biases, embedding, projections, standing, tables, usual
from .case import PROJECTIONS, Geometry, LayerCase, Refused, Step, named


def sasa(x, params, size, zeros: bool | tuple = False, scale=1.0, stride=1):
    """Windows of `size` around each token, or every stride-th one; at the border cut off, or filled with zeros."""
    grid = x.shape[:-1]
    ranges = lambda i: [range(a - k // 2, a - k // 2 + k) for a, k in zip(i, size, strict=True)]
    score = lambda h, q, k, delta: q @ (scale * k + embedding(params, h, delta, size))
    y = attend(x, params, lambda i: standing(ranges(i), grid, zeros), score)
    return y[tuple(slice(None, None, stride) for _ in grid)]


def halo_attention(x, params, block, halo, zeros=True, scale=1.0):
    grid, size = x.shape[:-1], [b + 2 * a for b, a in zip(block, halo, strict=True)]

    def neighbours(i):
        first = [p // b * b for p, b in zip(i, block, strict=True)]
        ranges = [range(f - a, f + b + a) for f, b, a in zip(first, block, halo, strict=True)]
        return standing(ranges, grid, zeros)

    return attend(x, params, neighbours, lambda h, q, k, delta: q @ (scale * k + embedding(params, h, delta, size)))


def nearest(i, n, k, dilation):
    """The run of k tokens, `dilation` apart and in step with i, whose middle is nearest to i."""
    runs = [range(s, s + dilation * k, dilation) for s in range(i % dilation, n, dilation)]
    return min((run for run in runs if run[-1] < n), key=lambda run: abs(run[k // 2] - i))


def neighborhood_attention(x, params, size, dilation: int | tuple = 1, stride: int | tuple = 1, scale=None, sees=None):
    """`sees`: how many tokens along each axis, where there are not as many as `size`."""
    grid, scale = x.shape[:-1], usual(scale, params)
    dilation, stride = (v if isinstance(v, tuple) else (v,) * len(grid) for v in (dilation, stride))

    def neighbours(i):
        runs = [nearest(*along) for along in zip(i, grid, size if sees is None else sees, dilation, strict=True)]
        return [(j, True) for j in itertools.product(*runs)]

    learned = lambda h, delta: bias(params, h, delta, size, dilation) if "relative_bias" in params else 0.0
    y = attend(x, params, neighbours, lambda h, q, k, delta: scale * q @ k + learned(h, delta))
    return y[tuple(slice(None, None, step) for step in stride)]


def masked(size, **kwargs):
    return {"window": Window(size, boundary="mask", **kwargs)}


SASA = LayerCase(
    zoo.sasa,
    nn.SASA,
    family="attention",
    loop=sasa,
    geometries={
        "sasa 1d": Geometry((5,), projections() | tables((3,), DIM), masked((3,)), {"size": (3,)}),
        "sasa 2d": Geometry((4, 3), projections() | tables((3, 2), 3), masked((3, 2)), {"size": (3, 2)}),
        "sasa 2d zeros": Geometry(
            (3, 4),
            projections(*NO_OUT) | tables((2, 3), DIM, heads=1),
            {"window": Window((2, 3), boundary="zero"), "scale": None},
            {"size": (2, 3), "zeros": True, "scale": DIM**-0.5},
        ),
        "sasa 1d strided": Geometry(
            (6,), projections() | tables((3,), DIM), masked(3, stride=2), {"size": (3,), "stride": 2}
        ),
        "sasa 3d": Geometry((2, 2, 3), projections() | tables((2, 1, 3), 2), masked((2, 1, 3)), {"size": (2, 1, 3)}),
    },
    step=Step(
        {
            "num_heads": 2,
            "in_features": 6,
            "qkv_features": 8,
            "out_features": 5,
            "window": Window((3, 3), boundary="zero"),
            "scale": None,
            "use_bias": True,
            "out_projection": True,
        },
        (4, 3, 6),
        partial(sasa, size=(3, 3), zeros=True, scale=0.5),
    ),
    call={"params": PROJECTIONS | named(embedding_0=(2, 5, 4), embedding_1=(2, 5, 4)), "window": (3, 3), "scale": 1.0},
    arguments={"num_heads": 2, "in_features": 8, "window": 3, "rank": 2},
    counts=[
        ({"num_heads": 2, "in_features": 8, "window": (7, 7)}, 192 + 104),
        ({"num_heads": 2, "in_features": 8, "window": 7, "use_bias": True, "out_projection": True}, 288 + 104),
    ],
    split=[{"num_heads": 2, "in_features": 4, "window": Window((5, 3), boundary="mask")}],
    errors=[
        Refused(tables((3,), 6), {"window": (3, 3)}, "sasa: params .* must have 'embedding_1'"),
        Refused(tables((3, 9), 6), {"window": (3, 9)}, r"Window: the grid \(=5 along axis 1\)"),
    ],
    refused=[
        (partial(nn.SASA, 2, 8, None, 6, window=3), r"SASA: without an output projection, out_features \(=6\) must be"),
        (partial(nn.SASA, 2, 8, window=(3, 3, 3)), r"SASA: .*the window's 3 axes must divide head_dim \(=4\)"),
    ],
)


HALO_ATTENTION = LayerCase(
    zoo.halo_attention,
    nn.HaloAttention,
    family="attention",
    loop=halo_attention,
    geometries={
        "halo 1d": Geometry(
            (6,), projections() | tables((5,), DIM), {"block": 3, "halo": 1}, {"block": (3,), "halo": (1,)}
        ),
        "halo 1d ragged": Geometry(
            (5,),
            projections() | tables((6,), DIM),
            {"block": 2, "halo": 2, "boundary": "mask"},
            {"block": (2,), "halo": (2,), "zeros": False},
        ),
        "halo 2d": Geometry(
            (4, 3),
            projections(*NO_OUT) | tables((4, 3), 3),
            {"block": (2, 1), "halo": 1},
            {"block": (2, 1), "halo": (1, 1)},
        ),
        "halo 3d": Geometry(
            (2, 2, 2),
            projections() | tables((4, 1, 2), 2),
            {"block": (2, 1, 2), "halo": (1, 0, 0)},
            {"block": (2, 1, 2), "halo": (1, 0, 0)},
        ),
    },
    step=Step(
        {"num_heads": 2, "in_features": 6, "qkv_features": 8, "block": 3, "halo": 1, "boundary": "mask"},
        (6, 6),
        partial(halo_attention, block=(3,), halo=(1,), zeros=False),
    ),
    call={
        "params": PROJECTIONS | named(embedding_0=(2, 7, 4), embedding_1=(2, 7, 4)),
        "block": 2,
        "halo": 1,
        "boundary": "zero",
        "scale": 1.0,
    },
    arguments={"num_heads": 2, "in_features": 8, "block": (2, 3), "halo": 1},
    counts=[({"num_heads": 2, "in_features": 8, "block": (4, 2), "halo": 1}, 192 + 2 * 2 * (11 + 7))],
    split=[{"num_heads": 2, "in_features": 4, "block": (2, 1), "halo": 1}],
    errors=[
        Refused({}, {"block": (2, 2), "halo": (1, 1, 1)}, r"halo \(=\(1, 1, 1\)\) must be an int >= 0, or one"),
        Refused({}, {"block": 2, "halo": -1}, r"halo_attention: halo \(=-1\) must be an int >= 0, or one"),
    ],
    refused=[(partial(nn.HaloAttention, 2, 8, block=4, halo=(1, 1)), r"halo \(=\(1, 1\)\) must be an int >= 0, or")],
)


NEIGHBORHOOD_ATTENTION = LayerCase(
    zoo.neighborhood_attention,
    nn.NeighborhoodAttention,
    family="attention",
    loop=neighborhood_attention,
    geometries={
        "nat 1d": Geometry((6,), projections() | biases((4,)), {"window": 4}, {"size": (4,)}),
        "nat 1d fits barely": Geometry(
            (6,), projections(), {"window": Window(3, dilation=2)}, {"size": (3,), "dilation": 2}
        ),
        "nat 2d strided": Geometry(
            (5, 4), projections() | biases((3, 2)), {"window": Window((3, 2), stride=2)}, {"size": (3, 2), "stride": 2}
        ),
        "nat 2d": Geometry((4, 3), projections() | biases((3, 2)), {"window": (3, 2)}, {"size": (3, 2)}),
        "dinat 2d": Geometry(
            (4, 7),
            projections() | biases((2, 3)),
            {"window": Window((2, 3), dilation=2)},
            {"size": (2, 3), "dilation": 2},
        ),
        "nat 3d": Geometry((1, 3, 3), projections() | biases((1, 2, 3)), {"window": (1, 2, 3)}, {"size": (1, 2, 3)}),
    },
    step=Step(
        {"num_heads": 2, "in_features": 6, "window": Window((2, 1), dilation=2)},
        (4, 3, 6),
        partial(neighborhood_attention, size=(2, 1), dilation=2),
    ),
    call={"params": PROJECTIONS | named(relative_bias=(2, 5, 5)), "window": 3, "scale": 0.5},
    arguments={"num_heads": 2, "in_features": 8, "window": (3, 3)},
    counts=[
        ({"num_heads": 2, "in_features": 8, "window": (7, 7)}, 288 + 2 * 169),
        ({"num_heads": 2, "in_features": 8, "window": (7, 7), "relative_bias": False}, 288),
    ],
    split=[{"num_heads": 2, "in_features": 4, "window": (5, 3)}],
    errors=[Refused(biases((3, 5)), {"window": (3, 3)}, r"must be \[heads, \*offsets\] = \[2, 5, 5\]")],
)

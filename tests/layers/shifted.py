"""`shifted_window_attention`: its loops, and what the tests know of it."""

from functools import partial

import numpy as np

from jaxattn import nn, zoo

from .attention_loops import attend, bias, biases, projections, usual
from .case import PROJECTIONS, Geometry, LayerCase, Refused, Step, named


def shifted_window_attention(x, params, size, shift, scale=None, wrap=None):
    """Tokens of one window of the grid that begins at `shift`, and goes on before it. An axis that wraps is a ring,
    which may begin anywhere: at `shift`."""
    if wrap is not None:
        turn = [s * w for s, w in zip(shift, wrap, strict=True)]
        axes, still = range(len(size)), [s * (not w) for s, w in zip(shift, wrap, strict=True)]
        y = shifted_window_attention(np.roll(x, [-s for s in turn], axes), params, size, still, scale)
        return np.roll(y, turn, axes)
    grid, scale = x.shape[:-1], usual(scale, params)
    window = lambda i: tuple((a - s) // k for a, s, k in zip(i, shift, size, strict=True))
    neighbours = lambda i: [(j, True) for j in np.ndindex(*grid) if window(j) == window(i)]
    return attend(x, params, neighbours, lambda h, q, k, delta: scale * q @ k + bias(params, h, delta, size))


SHIFTED_WINDOW_ATTENTION = LayerCase(
    zoo.shifted_window_attention,
    nn.ShiftedWindowAttention,
    family="attention",
    loop=shifted_window_attention,
    geometries={
        "swin 1d": Geometry(
            (6,), projections() | biases((3,)), {"window": 3, "shift": 1}, {"size": (3,), "shift": (1,)}
        ),
        "swin 2d": Geometry(
            (4, 4),
            projections() | biases((2, 4)),
            {"window": (2, 4), "shift": (1, 2), "shift_whole": True},
            {"size": (2, 4), "shift": (1, 2)},
        ),
        "swin, a window covers an axis": Geometry(
            (4, 4),
            projections() | biases((2, 4)),
            {"window": (2, 4), "shift": (1, 2)},
            {"size": (2, 4), "shift": (1, 0)},
        ),
        "swin 2d ragged": Geometry(
            (4, 3),
            projections() | biases((3, 2)),
            {"window": (3, 2), "shift": (2, 0)},
            {"size": (3, 2), "shift": (2, 0)},
        ),
        "swin on a cylinder": Geometry(
            (4, 5),
            projections() | biases((2, 3)),
            {"window": (2, 3), "shift": (1, 2), "boundary": ("wrap", "mask")},
            {"size": (2, 3), "shift": (1, 2), "wrap": (True, False)},
        ),
        "swin 3d": Geometry(
            (2, 2, 3), projections() | biases((1, 2, 2)), {"window": (1, 2, 2)}, {"size": (1, 2, 2), "shift": (0, 0, 0)}
        ),
    },
    step=Step(
        {"num_heads": 2, "in_features": 6, "window": (2, 3), "shift": 1},
        (4, 6, 6),
        partial(shifted_window_attention, size=(2, 3), shift=(1, 1)),
    ),
    call={"params": PROJECTIONS | named(relative_bias=(2, 3, 5)), "window": (2, 3), "shift": 1, "scale": 0.5},
    arguments={"num_heads": 2, "in_features": 8, "window": (2, 3), "shift": 1},
    counts=[  # torchvision's and timm's: 4·(96·96 + 96) + 3 heads' 13² numbers
        ({"num_heads": 3, "in_features": 96, "window": (7, 7), "shift": 3}, 37_248 + 507)
    ],
    split=[
        {"num_heads": 2, "in_features": 4, "window": (2, 3), "shift": 1},
        {"num_heads": 2, "in_features": 4, "window": (2, 2)},
    ],
    errors=[
        Refused(biases((3, 3)), {"window": (3, 3), "shift": 3}, r"shift \(=3\) must be below window \(=\(3, 3\)\)"),
        Refused({}, {"window": (3, 3)}, "params .* must have 'relative_bias'"),
    ],
)

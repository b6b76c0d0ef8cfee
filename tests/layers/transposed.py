"""`conv_transpose`: its loops, and what the tests know of it."""

import numpy as np

from jaxattn import nn, zoo

from .case import Geometry, LayerCase, Refused, Step, Whole, numbers


def conv_transpose(p, strides, dilation, crop):
    """All that is written, s·(n-1) + d·(k-1) + 1, then cropped; a negative number at the end appends zeros."""
    x, w = p["x"], p["kernel"]
    grid, size = x.shape[:-1], w.shape[:-2]
    full = [s * (n - 1) + d * (k - 1) + 1 for s, n, d, k in zip(strides, grid, dilation, size, strict=True)]
    y = np.zeros((*(n - min(high, 0) for (_, high), n in zip(crop, full, strict=True)), w.shape[-1]), complex)
    for i in np.ndindex(*grid):
        for r in np.ndindex(*size):
            at = tuple(s * a + d * b for s, a, d, b in zip(strides, i, dilation, r, strict=True))
            y[at] += x[i] @ w[r]
    return y[tuple(slice(low, n - high) for (low, high), n in zip(crop, full, strict=True))]


def flipped(kernel):
    """The function's kernel as the loop takes it, which writes its first slot first."""
    return np.flip(kernel, range(kernel.ndim - 2))


CONV_TRANSPOSE = LayerCase(
    zoo.conv_transpose,
    nn.ConvTranspose,
    family="mix",
    loop=lambda p, **kwargs: conv_transpose(p | {"kernel": flipped(p["kernel"])}, **kwargs),
    geometries={
        "transpose 1d": Geometry(
            (4,),
            {"kernel": (2, 4, 3)},
            {"strides": 3, "padding": "VALID"},
            {"strides": (3,), "dilation": (1,), "crop": [(0, -1)]},
        ),
        "transpose 2d": Geometry(
            (3, 4),
            {"kernel": (3, 4, 4, 2)},
            {"strides": (2, 1), "padding": [(1, 2), 2], "dilation": (1, 2)},
            {"strides": (2, 1), "dilation": (1, 2), "crop": [(1, 0), (4, 4)]},
        ),
        "transpose 3d": Geometry(
            (2, 3, 1),
            {"kernel": (2, 3, 1, 4, 2)},
            {"strides": (1, 2, 1)},
            {"strides": (1, 2, 1), "dilation": (1, 1, 1), "crop": [(0, 1), (0, 1), (0, 0)]},
        ),
    },
    step=Step(
        {"in_features": 4, "out_features": 3, "kernel_size": 2, "strides": 2, "transpose_kernel": True},
        (4, 4),
        lambda p: conv_transpose(p | {"kernel": p["kernel"].swapaxes(-1, -2)}, (2,), (1,), [(0, 0)]) + p["bias"],
    ),
    call={"kernel": numbers(3, 3, 8, 6), "strides": 2, "dilation": 1, "padding": "SAME", "transpose_kernel": False},
    arguments={"in_features": 8, "out_features": 6, "kernel_size": (3, 3)},
    counts=[({"in_features": 8, "out_features": 6, "kernel_size": (3, 3)}, 9 * 48 + 6)],
    split=Whole({"in_features": 4, "out_features": 3, "kernel_size": (5, 3)}, "writes to its neighbours' outputs"),
    errors=[
        Refused({"kernel": (3, 3, 5, 4)}, {}, r"must be \[\*window, features, out\] and \[\*batch"),
        Refused({"kernel": (3, 3, 4, 5)}, {"transpose_kernel": True}, r"must be \[\*window, out, features\]"),
        Refused({"kernel": (3, 3, 4, 5)}, {"padding": "FULL"}, r"padding \(='FULL'\) must be 'SAME', 'VALID'"),
    ],
)

"""`cvt_attention`: its loops, and what the tests know of it."""

from functools import partial

import numpy as np

from jaxattn import nn, zoo

from .case import PROJECTIONS, Geometry, LayerCase, Refused, Step, named
from .depthwise import depthwise_conv
from .mix_loops import FEATURES, attend, both, heads, out, project


def cvt_attention(p, strides, kv_strides, scale=None):
    def tokens(name, strides):
        local = depthwise_conv({"x": p["x"], "kernel": p[f"{name}_kernel"]}, strides, (1,) * len(size), None)
        return project(local, p, name)

    size = p["query_kernel"].shape[:-1]
    query, key, value = tokens("query", strides), tokens("key", kv_strides), tokens("value", kv_strides)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    z = np.zeros((*query.shape[:-1], value.shape[-1]), complex)
    for i in np.ndindex(*query.shape[:-1]):
        keys, values = (x[..., i[-1], :].reshape(-1, x.shape[-1]) for x in (key, value))
        z[i] = attend(query[i], keys, values, scale)
    return out(z, p)


def local(size, bias=True):
    return heads(bias, **{f"{name}_kernel": (*size, FEATURES) for name in ("query", "key", "value")})


CVT_ATTENTION = LayerCase(
    zoo.cvt_attention,
    nn.CvTAttention,
    family="mix",
    loop=cvt_attention,
    geometries={
        "cvt 1d": Geometry((5,), local((3,)), *both(strides=(1,), kv_strides=(2,))),
        "cvt 2d": Geometry((3, 4), local((3, 2), False), *both(strides=(2, 1), kv_strides=(2, 2), scale=0.7)),
        "cvt 3d": Geometry((2, 1, 3), local((1, 2, 3)), *both(strides=(1, 1, 1), kv_strides=(1, 1, 1))),
    },
    step=Step(
        {"num_heads": 2, "in_features": 4, "kernel_size": (3, 3), "kv_strides": 2},
        (3, 4, 4),
        partial(cvt_attention, strides=(1, 1), kv_strides=(2, 2)),
    ),
    call={
        "params": PROJECTIONS | named(query_kernel=(3, 3, 8), key_kernel=(3, 3, 8), value_kernel=(3, 3, 8)),
        "strides": 1,
        "kv_strides": 2,
        "scale": 0.5,
    },
    arguments={"num_heads": 2, "in_features": 8, "kernel_size": (3, 3)},
    counts=[({"num_heads": 2, "in_features": 8, "kernel_size": (3, 3)}, 3 * 72 + 288)],
    split=[{"num_heads": 2, "in_features": 4, "kernel_size": (5, 3), "kv_strides": 2}],
    errors=[
        Refused(local((3, 3)), {"kv_strides": 0}, r"kv_strides \(=0\) must be an int >= 1, or one"),
        Refused(local((3, 3)) | {"value": (4, 3, 2)}, {}, r"params\['value'\] \(=\[4, 3, 2\]\) must be"),
    ],
    refused=[(partial(nn.CvTAttention, 3, 8, 3), r"CvTAttention: num_heads \(=3\) must divide qkv_features \(=8\)")],
)

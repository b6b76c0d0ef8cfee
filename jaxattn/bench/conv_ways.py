"""Convolution, the ways a user of JAX has. Each takes x [batch, *grid, features] and the kernel [*size, in, out]."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxattn.bench.cases import ConvCase
from jaxattn.bench.ways import Function, Way
from jaxattn.einsum import einsum
from jaxattn.zoo import conv


def ours(case: ConvCase) -> Function:
    """`einsum`, with the case's equation; axes of size one, which the equation leaves out, are taken off the kernel."""
    sizes: dict[str, Any] = {"g": case.groups} if "(g c)" in case.equation else {}
    padding = case.pads if "+" in case.equation else None

    def convolve(x, kernel):
        return einsum(case.equation, x, kernel.squeeze(), padding=padding, **sizes)

    return Function(convolve)


def zoo(case: ConvCase) -> Function:
    padding: Any = case.pads
    return Function(lambda x, kernel: conv(x, kernel, strides=case.stride, padding=padding, groups=case.groups))


def general(case: ConvCase) -> Function:
    letters = "xyz"[: case.rank]

    def convolve(x, kernel):
        return lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(case.stride,) * case.rank,
            padding=case.pads,
            dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
            feature_group_count=case.groups,
        )

    return Function(convolve)


def flax(case: ConvCase) -> Function:
    def layer() -> nnx.Conv:
        return nnx.Conv(
            case.shape[-1],
            case.kernel[-1],
            case.kernel[: case.rank],
            case.stride,
            padding=case.pads,
            feature_group_count=case.groups,
            use_bias=False,
            dtype=jnp.dtype(case.dtype),
            rngs=nnx.Rngs(0),
        )

    graph, state = nnx.split(nnx.eval_shape(layer), nnx.Param)

    def convolve(x, kernel):
        return nnx.merge(graph, jax.tree.map(lambda _: kernel, state))(x)  # the kernel is the only parameter

    return Function(convolve)


WAYS = [
    Way("jaxattn.einsum", "jax", ours, ours=True),
    Way("jaxattn.conv", "jax", zoo, ours=True),
    Way("lax", "jax", general),
    Way("nnx.Conv", "jax", flax),
]

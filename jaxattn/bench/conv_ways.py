"""Convolution, the ways a user of JAX has. Each takes x [batch, *grid, features] and the kernel [*size, in, out]."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxattn.bench.cases import ConvCase
from jaxattn.bench.ways import Function, Way, cannot_unless
from jaxattn.einsum import einsum
from jaxattn.zoo import conv, conv_transpose


def ours(case: ConvCase) -> Function:
    """`einsum`, with the case's equation; axes of size one, which the equation leaves out, are taken off the kernel."""
    sizes: dict[str, Any] = {"g": case.groups} if "(g c)" in case.equation else {}
    padding = case.pads if "+" in case.equation and not case.transposed else None

    def convolve(x, kernel):
        named = kernel if case.transposed else kernel.squeeze()
        return einsum(case.equation, x, named, padding=padding, **sizes)

    return Function(convolve)


def zoo(case: ConvCase) -> Function:
    padding: Any = case.pads
    if case.transposed:  # which, as lax and flax do, takes the kernel flipped
        flip = lambda kernel: jnp.flip(kernel, range(case.rank))
        return Function(lambda x, kernel: conv_transpose(x, flip(kernel), strides=case.stride, padding="VALID"))
    return Function(lambda x, kernel: conv(x, kernel, strides=case.stride, padding=padding, groups=case.groups))


def general(case: ConvCase) -> Function:
    letters = "xyz"[: case.rank]
    numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    if case.transposed:
        strides = (case.stride,) * case.rank
        flip = lambda kernel: jnp.flip(kernel, range(case.rank))
        return Function(lambda x, w: lax.conv_transpose(x, flip(w), strides, "VALID", dimension_numbers=numbers))

    def convolve(x, kernel):
        return lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(case.stride,) * case.rank,
            padding=case.pads,
            dimension_numbers=numbers,
            feature_group_count=case.groups,
        )

    return Function(convolve)


def flax(case: ConvCase) -> Function:
    cannot_unless(not case.transposed, "nnx.ConvTranspose is lax.conv_transpose, which is measured")

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

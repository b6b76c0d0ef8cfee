"""Depthwise convolution: learned weights by offset, each channel or head its own."""

from collections.abc import Sequence

import jax
from jax import lax
from jaxtyping import ArrayLike, Real

from jaxattn.checked import MeshAxis
from jaxattn.sizes import Size, per_axis
from jaxattn.zoo.equations import Padding, divided, read_padding, same, slid
from jaxattn.zoo.parameters import parameters
from jaxattn.zoo.registry import row
from jaxattn.zoo.softmax import softmax


@row(
    "depthwise convolution (ConvNeXt)", weights="w_{c,j-i}", source="learned", shared="no / yes", normalizer="none",
    paper="Chollet 2017 (1610.02357); Liu et al. 2022 (2201.03545)", shapes={"kernel": "*window features·m"},
)  # fmt: skip
def depthwise_conv(
    x: Real[ArrayLike, "*batch_and_grid features"],
    kernel: Real[ArrayLike, "*window out_features"],
    *,
    strides: Size = 1,
    padding: Padding = "SAME",
    dilation: Size = 1,
    boundary: str | Sequence[str] | None = None,
    precision: lax.PrecisionLike = None,
    axis_name: MeshAxis | None = None,
) -> jax.Array:
    """A convolution in which each channel sees itself alone,

        y[n, i, j, (c m)] = Σ_{r, s} x[n, i + r, j + s, c] · kernel[r, s, (c m)]

        einsum("... i0+r0 i1+r1 c, r0 r1 (c m) -> ... i0 i1 (c m)", x, kernel, c=features, padding=padding)

    (Chollet 2017, arXiv 1610.02357; with windows of 7 × 7 in ConvNeXt, Liu et al. 2022, arXiv 2201.03545.) A kernel of
    m times as many channels makes m outputs of each input. With strides s and dilation d, position i sees s·i + d·r.

    Args:
      x: `[*batch, *grid, features]`, with any number of batch axes.
      kernel: `[*window, features · m]`; its rank less one is the grid's.
      strides, dilation: ints, or one for each axis of the grid.
      padding: "SAME", "VALID", an int, or a sequence with an int or a pair `(low, high)` for each axis.
      boundary: what stands outside: "zero" (default), "edge", "reflect", "wrap"; one, or one for each axis.

    Returns:
      `[*batch, *positions, features · m]`, in the promoted dtype of x and kernel.

    Raises:
      ValueError: an argument has the wrong length or sign, or the shapes don't fit.

    >>> import jax.numpy as jnp
    >>> depthwise_conv(jnp.ones((2, 9, 9, 4)), jnp.ones((3, 3, 8)), strides=2).shape
    (2, 5, 5, 8)
    """
    p, x, grid = parameters("depthwise_conv", x, {"kernel": kernel})
    kernel, features, rank = p["kernel"], x.shape[-1], len(grid)
    if features == 0 or kernel.shape[-1] % features:
        raise ValueError(
            f"depthwise_conv: kernel (={list(kernel.shape)}) must be [*window, features · m] with x's features "
            f"(={features})"
        )
    strides = per_axis("depthwise_conv", "strides", strides, rank)
    dilation = per_axis("depthwise_conv", "dilation", dilation, rank)
    padding = read_padding("depthwise_conv", padding, rank)
    return slid(
        "... {sums} c, {r} (c m) -> ... {i} (c m)", x, kernel, kernel.shape[:-1], strides, dilation, c=features,
        padding=padding, boundary=boundary, axis_name=axis_name, precision=precision,
    )  # fmt: skip


@row(
    "LightConv", weights="w_{h,j-i}", source="learned", shared="head / yes", normalizer="softmax",
    paper="Wu et al. 2019 (1901.10430)", shapes={"kernel": "*window heads"},
)  # fmt: skip
def light_conv(
    x: Real[ArrayLike, "*batch_and_grid features"],
    kernel: Real[ArrayLike, "*window heads"],
    *,
    dilation: Size = 1,
    causal: bool = False,
    precision: lax.PrecisionLike = None,
    axis_name: MeshAxis | None = None,
) -> jax.Array:
    """A depthwise convolution whose weights a softmax makes sum to one, shared by the channels of a head,

        y[n, i, (h c)] = Σ_r softmax_r(kernel[r, h]) x[n, i + r, (h c)]

        einsum("... i0+r0 (h c), r0 h -> ... i0 (h c)", x, softmax(kernel))

    the "lightweight convolution" of Wu et al. 2019 (arXiv 1901.10430); the linear maps and the gate around it in their
    network are the caller's. Outside the grid stand zeros, which take their weight.

    Args:
      x: `[*batch, *grid, features]`, with any number of batch axes.
      kernel: `[*window, heads]`; its rank less one is the grid's. Heads divide features.
      dilation: an int, or one for each axis of the grid.
      causal: position i sees what comes before it, and itself last, along every axis; otherwise it is in the middle.

    Returns:
      `[*batch, *grid, features]`, in the promoted dtype of x and kernel. The softmax is in float32 at least.

    Raises:
      ValueError: an argument has the wrong length or sign, or the shapes don't fit.

    >>> import jax.numpy as jnp
    >>> light_conv(jnp.arange(6.0).reshape(6, 1), jnp.zeros((2, 1)), causal=True)[:, 0]  # a moving average
    Array([0. , 0.5, 1.5, 2.5, 3.5, 4.5], dtype=float32)
    """
    p, x, grid = parameters("light_conv", x, {"kernel": kernel})
    *size, heads = p["kernel"].shape
    divided("light_conv", "heads of kernel", heads, x.shape[-1])
    dilation = per_axis("light_conv", "dilation", dilation, len(grid))
    return slid(
        "... {sums} (h c), {r} h -> ... {i} (h c)", x, softmax(p["kernel"], tuple(range(len(grid)))), size,
        dilation=dilation, padding=same(size, dilation, causal), axis_name=axis_name, precision=precision,
    )  # fmt: skip

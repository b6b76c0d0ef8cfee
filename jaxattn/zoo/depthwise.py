"""Depthwise convolution: learned weights by offset, each channel or head its own."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn.einsum import einsum
from jaxattn.zoo.equations import Padding, divided, pads, per_axis, same, sliding
from jaxattn.zoo.registry import row
from jaxattn.zoo.softmax import softmax


@row(
    "depthwise convolution (ConvNeXt)",
    weights="w_{c,j-i}",
    source="learned",
    shared="no / yes",
    normalizer="none",
    paper="Chollet 2017 (1610.02357); Liu et al. 2022 (2201.03545)",
)
def depthwise_conv(
    x,
    kernel,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    boundary=None,
    precision: lax.PrecisionLike = None,
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
      precision: as in `jax.lax.dot_general`.

    Returns:
      `[*batch, *positions, features · m]`, in the promoted dtype of x and kernel.

    Raises:
      ValueError: an argument has the wrong length or sign, or the shapes don't fit.

    >>> import jax.numpy as jnp
    >>> depthwise_conv(jnp.ones((2, 9, 9, 4)), jnp.ones((3, 3, 8)), strides=2).shape
    (2, 5, 5, 8)
    """
    rank = _rank("depthwise_conv", x, kernel, "features·m")
    features = np.shape(x)[-1]
    if features == 0 or np.shape(kernel)[-1] % features:
        raise ValueError(
            f"depthwise_conv: kernel has shape {list(np.shape(kernel))}: its last axis must be a multiple of the "
            f"features of x (={features})"
        )
    strides = per_axis("depthwise_conv", "strides", strides, rank)
    sums, window, position = sliding(strides, per_axis("depthwise_conv", "dilation", dilation, rank))
    return einsum(
        f"... {sums} c, {window} (c m) -> ... {position} (c m)",
        x,
        kernel,
        c=features,
        padding=pads("depthwise_conv", padding, rank),
        boundary=boundary,
        precision=precision,
    )


@row(
    "LightConv",
    weights="w_{h,j-i}",
    source="learned",
    shared="head / yes",
    normalizer="softmax",
    paper="Wu et al. 2019 (1901.10430)",
)
def light_conv(
    x, kernel, *, dilation: int | Sequence[int] = 1, causal: bool = False, precision: lax.PrecisionLike = None
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
      precision: as in `jax.lax.dot_general`.

    Returns:
      `[*batch, *grid, features]`, in the promoted dtype of x and kernel. The softmax is in float32 at least.

    Raises:
      ValueError: an argument has the wrong length or sign, or the shapes don't fit.

    >>> import jax.numpy as jnp
    >>> light_conv(jnp.arange(6.0).reshape(6, 1), jnp.zeros((2, 1)), causal=True)[:, 0]  # a moving average
    Array([0. , 0.5, 1.5, 2.5, 3.5, 4.5], dtype=float32)
    """
    rank = _rank("light_conv", x, kernel, "heads")
    kernel = jnp.asarray(kernel)
    divided("light_conv", "heads of kernel", kernel.shape[-1], np.shape(x)[-1])
    dilation = per_axis("light_conv", "dilation", dilation, rank)
    sums, window, position = sliding((1,) * rank, dilation)
    return einsum(
        f"... {sums} (h c), {window} h -> ... {position} (h c)",
        x,
        softmax(kernel, tuple(range(rank))),
        padding=same(kernel.shape[:-1], dilation, causal),
        precision=precision,
    )


def _rank(layer: str, x, kernel, last: str) -> int:
    rank = np.ndim(kernel) - 1
    if rank < 1 or np.ndim(x) < rank + 1:
        raise ValueError(
            f"{layer}: kernel has shape {list(np.shape(kernel))} and x {list(np.shape(x))}: they must be "
            f"[*window, {last}] and [*batch, *grid, features], with a grid of the window's rank, at least 1"
        )
    return rank

"""Transposed convolution: an index that is written at a sum of axes."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import ArrayLike, Num

from jaxattn.einsum import einsum
from jaxattn.sizes import Size, per_axis
from jaxattn.zoo.equations import Padding, read_padding, sliding
from jaxattn.zoo.registry import row

PADDINGS = ("SAME", "VALID", "CIRCULAR")


@row(
    "transposed convolution", weights="1[i-s·j=Δ_h], V_h=W_Δ", source="fixed", shared="all / yes", normalizer="none",
    paper="Zeiler et al. 2010", shapes={"kernel": "*window features out_features"},
)  # fmt: skip
def conv_transpose(
    x: Num[ArrayLike, "*batch_and_grid features"],
    kernel: Num[ArrayLike, "*window channels_in channels_out"],
    *,
    strides: Size = 1,
    padding: Padding = "SAME",
    dilation: Size = 1,
    transpose_kernel: bool = False,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> jax.Array:
    """Transposed convolution in any rank: one call of `einsum`, with the sum of axes in its output.

        y[n, s·i + d·r, o] += x[n, i, c] · w[r, c, o]            for every i, r, c

        einsum("... i0 c, r0 c o -> ... s*i0+d*r0 o", x, w, padding=cropped)

    It is the adjoint of `conv`, whose equation has the same tokens (Zeiler et al. 2010, "Deconvolutional networks").
    Arguments and results are those of `jax.lax.conv_transpose`, which names the kernel in two ways:

    - `transpose_kernel=False`: `[*window, features, out_features]`, and w is the kernel flipped along its window: a
      correlation over an input with zeros between its entries, as in `flax.nnx.ConvTranspose`.
    - `transpose_kernel=True`: `[*window, out_features, features]`, and w is the kernel: what `conv` with this kernel
      does to its input, transposed; PyTorch's `ConvTranspose2d` but for the order of axes.

    Args:
      x: `[*batch, *grid, features]`, with any number of batch axes.
      kernel: as above; its rank less two is the grid's.
      strides: how far apart neighbours of the input are written, an int or one for each axis.
      padding: "SAME", an output of strides · n; "VALID", all that is written, at least strides · n; "CIRCULAR", an
        output of strides · n that is a torus, around which what is written outside goes, as in
        `flax.nnx.ConvTranspose`; or an int, or an int or a pair `(low, high)` for each axis: the pads of the
        correlation over the input with zeros between, under which dilation · (k - 1) on each side is all that is
        written, and less crops.
      dilation: the step between the taps, an int or one for each axis.
      transpose_kernel: which kernel is given.
      precision, preferred_element_type: as in `einsum`.

    Returns:
      `[*batch, *positions, out_features]`, in the promoted dtype of x and kernel.

    Raises:
      ValueError: an argument has the wrong length or sign, or the shapes don't fit.

    >>> import jax.numpy as jnp
    >>> conv_transpose(jnp.ones((2, 5, 5, 4)), jnp.ones((3, 3, 4, 8)), strides=2).shape
    (2, 10, 10, 8)
    """
    rank = np.ndim(kernel) - 2
    names = "out, features" if transpose_kernel else "features, out"
    channels = np.shape(kernel)[-1 if transpose_kernel else -2] if rank > 0 else None
    if rank < 1 or np.ndim(x) < rank + 1 or np.shape(x)[-1] != channels:
        raise ValueError(
            f"conv_transpose: kernel (={list(np.shape(kernel))}) and x (={list(np.shape(x))}) must be "
            f"[*window, {names}] and [*batch, *grid, features], with a grid of the window's rank, at least 1"
        )
    strides = per_axis("conv_transpose", "strides", strides, rank)
    dilation = per_axis("conv_transpose", "dilation", dilation, rank)
    if not transpose_kernel:
        kernel = jnp.flip(kernel, range(rank))
    sums, window, position = sliding(strides, dilation)
    taps = f"{window} o c" if transpose_kernel else f"{window} c o"
    spans = [d * (k - 1) for k, d in zip(np.shape(kernel)[:rank], dilation, strict=True)]
    padding = read_padding("conv_transpose", padding, rank, PADDINGS)
    return einsum(
        f"... {position} c, {taps} -> ... {sums} o",
        x,
        kernel,
        padding=_crop(padding, spans, strides, transpose_kernel),
        boundary="wrap" if padding == "CIRCULAR" else None,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )


def _crop(padding, spans: Sequence[int], strides: Sequence[int], transpose_kernel: bool) -> list[tuple[int, int]]:
    """What to crop of all that is written, (low, high) for each axis; negative appends zeros."""
    totals = [span + 1 - s for span, s in zip(spans, strides, strict=True)]  # leave strides · n
    if padding == "VALID":
        return [(0, min(0, total)) for total in totals]
    if padding in ("SAME", "CIRCULAR"):
        # of an odd number, flax's torus has the larger half before where the kernel is that of the adjoint
        lows = [(max(total, 0) + (transpose_kernel and padding == "CIRCULAR")) // 2 for total in totals]
        return [(low, total - low) for low, total in zip(lows, totals, strict=True)]
    return [(span - low, span - high) for span, (low, high) in zip(spans, padding, strict=True)]

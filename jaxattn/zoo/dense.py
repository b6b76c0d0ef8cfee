"""Dense convolution: weights that are fixed, one offset to a tap."""

from collections.abc import Sequence

import jax
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import ArrayLike, Num

from jaxattn.einsum import einsum
from jaxattn.sizes import Size, is_int, per_axis
from jaxattn.zoo.equations import Padding, read_padding, sliding
from jaxattn.zoo.registry import row


@row(
    "dense, strided, dilated, grouped convolution", weights="1[j-i=Δ_h], V_h=W_Δ", source="fixed", shared="all / yes",
    normalizer="none", paper="LeCun et al. 1989; Yu & Koltun 2016 (1511.07122)",
    shapes={"kernel": "*window features/groups out_features"},
)  # fmt: skip
def conv(
    x: Num[ArrayLike, "*batch_and_grid features"],
    kernel: Num[ArrayLike, "*window part out_features"],
    *,
    strides: Size = 1,
    padding: Padding = "SAME",
    dilation: Size = 1,
    groups: int = 1,
    boundary: str | Sequence[str] | None = None,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Convolution in any rank: one call of `einsum`.

        y[n, i, j, (g o)] = Σ_{r, s, c} x[n, 2·i + 3·r, 2·j + 3·s, (g c)] · kernel[r, s, c, (g o)]

        einsum("... 2*i0+3*r0 2*i1+3*r1 (g c), r0 r1 c (g o) -> ... i0 i1 (g o)", x, kernel, g=groups, padding=padding)

    with strides 2 and dilation 3: position i of the output sees `2·i + 3·r`. Correlation, as everywhere in deep
    learning (LeCun et al. 1989); dilated as in Yu & Koltun 2016 (arXiv 1511.07122), grouped as in AlexNet;
    `groups = features` is depthwise.

    Args:
      x: `[*batch, *spatial, features]`, with any number of batch axes.
      kernel: `[*window, features / groups, out_features]`; its rank less two is the number of spatial axes.
      strides, dilation: ints, or one for each spatial axis.
      padding: "SAME", "VALID", an int, or a sequence with an int or a pair `(low, high)` for each spatial axis.
      groups: how many groups features and out_features are split into.
      boundary: what stands outside: "zero" (default), "edge", "reflect", "wrap"; one, or one for each spatial axis.
      precision, preferred_element_type, implementation: as in `einsum`.

    Returns:
      `[*batch, *positions, out_features]`, in the promoted dtype of x and kernel.

    Raises:
      ValueError: an argument has the wrong length or sign, or the shapes don't fit.

    >>> import jax.numpy as jnp, jaxattn
    >>> jaxattn.conv(jnp.ones((2, 9, 9, 4)), jnp.ones((3, 3, 2, 8)), strides=2, groups=2).shape
    (2, 5, 5, 8)
    """
    rank = np.ndim(kernel) - 2
    if rank < 1:
        raise ValueError(f"conv: kernel (={list(np.shape(kernel))}) must be [*window, features / groups, out_features]")
    if np.ndim(x) < rank + 1:
        raise ValueError(
            f"conv: x (={list(np.shape(x))}) must be [*batch, *spatial, features] with the kernel's {rank} spatial axes"
        )
    for name, length in (("features of x", np.shape(x)[-1]), ("out_features of kernel", np.shape(kernel)[-1])):
        if not is_int(groups) or groups < 1 or length % groups:
            raise ValueError(f"conv: groups (={groups}) must be a positive int that divides the {name} (={length})")
    if np.shape(kernel)[-2] * groups != np.shape(x)[-1]:
        raise ValueError(
            f"conv: kernel (={list(np.shape(kernel))}) must be [*window, {np.shape(x)[-1] // groups}, out_features] "
            f"with x's features (={np.shape(x)[-1]}) and groups (={groups})"
        )
    strides, dilation = per_axis("conv", "strides", strides, rank), per_axis("conv", "dilation", dilation, rank)
    sums, window, position = sliding(strides, dilation)
    return einsum(
        f"... {sums} (g c), {window} c (g o) -> ... {position} (g o)",
        x,
        kernel,
        g=int(groups),
        padding=read_padding("conv", padding, rank),
        boundary=boundary,
        precision=precision,
        preferred_element_type=preferred_element_type,
        implementation=implementation,
    )

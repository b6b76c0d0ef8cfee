"""Convolution among patches: a convolution of pixels is one of patches of pixels too, and so is attention of them."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Num

from jaxattn.checked import checked
from jaxattn.einsum import einsum
from jaxattn.sizes import Size, per_axis
from jaxattn.zoo.equations import axes


@checked
def patch_kernel(
    kernel: Num[Array | np.ndarray, "*window features out_features"], patch: Size
) -> Num[Array, "*patches patch_features patch_out_features"]:
    """The kernel that convolves patches of side P as `kernel` convolves their pixels,

        M_Δ[(a, c), (b, o)] = W_{PΔ + a - b}[c, o]

    for pixel a of the patch that is seen, pixel b of the one that sees, at Δ patches from it, and W_δ zero outside of
    the kernel. A window of K pixels reaches 2·⌈⌊K/2⌋/P⌉ + 1 patches along an axis, so that with `conv_to_attention` as
    many heads (to the power of the axes: 9 in 2-D for K up to 2P + 1) are the convolution, in a vision transformer's
    layer, where head_dim is at least the rank of each M_Δ (Li et al. 2021, arXiv 2111.01353).

    It holds for strides of 1 and padding "SAME" on a grid that P divides, with zeros outside or with boundary "wrap"; a
    patch repeated at the border ("edge") is not its last pixel repeated.

    Args:
      kernel: `[*window, features, out_features]`; its rank less two is the number of grid axes.
      patch: P, an int or one for each axis.

    Returns:
      `[*window of patches, P^n · features, P^n · out_features]` in the kernel's dtype, where the features of a patch
      are its pixels' in order, `einsum("(i a) (j b) c -> i j (a b c)", x, a=P, b=P)`.

    Raises:
      ValueError: kernel has no window, or patch is not positive, by name.

    >>> import jax.numpy as jnp
    >>> from jaxattn import equivalence, zoo
    >>> x, kernel = jnp.sin(jnp.arange(12.0))[:, None], jnp.array([1.0, 2.0, 4.0])[:, None, None]
    >>> params, _ = equivalence.conv_to_attention(patch_kernel(kernel, 4))
    >>> y = zoo.quadratic_attention(einsum("(i a) c -> i (a c)", x, a=4), params)  # a token to a patch
    >>> len(params["centre"]), jnp.allclose(y.reshape(12, 1), zoo.conv(x, kernel), atol=1e-6).item()
    (3, True)
    """
    kernel = jnp.asarray(kernel)
    rank = kernel.ndim - 2
    if rank < 1 or 0 in kernel.shape:
        raise ValueError(f"patch_kernel: kernel (={list(kernel.shape)}) must be [*window, features, out_features]")
    patch = per_axis("patch_kernel", "patch", patch, rank)
    reach = [-(-(size // 2) // p) for size, p in zip(kernel.shape, patch, strict=False)]
    # The tap of PΔ + a - b is at PΔ + a - b + (K - 1) // 2, which an einsum reads as P·u + a + b' from the first that
    # any pair of pixels asks for, with u = Δ + reach and b' = P - 1 - b.
    lows = [p * (r + 1) - 1 - (size - 1) // 2 for size, p, r in zip(kernel.shape, patch, reach, strict=False)]
    spans = [2 * p * (r + 1) - 1 for p, r in zip(patch, reach, strict=True)]
    padding = [(low, span - low - size) for size, low, span in zip(kernel.shape, lows, spans, strict=False)]
    taps = " ".join(f"{p}*u{k}+a{k}+b{k}" for k, p in enumerate(patch))
    u, a, b = (axes(name, rank) for name in "uab")
    sizes: dict[str, Any] = {f"{name}{k}": p for k, p in enumerate(patch) for name in "ab"}
    matrices = einsum(f"{taps} c o -> {u} {a} c {b} o", kernel, padding=padding, **sizes)
    matrices = jnp.flip(matrices, range(2 * rank + 1, 3 * rank + 1))
    return einsum(f"{u} {a} c {b} o -> {u} ({a} c) ({b} o)", matrices)

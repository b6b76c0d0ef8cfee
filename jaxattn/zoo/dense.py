"""Dense convolution: weights that are fixed, one offset to a tap."""

import numbers
from collections.abc import Sequence

import jax
import numpy as np
from jax import lax

from jaxattn.einsum import einsum
from jaxattn.zoo.row import row


@row(
    "dense, strided, dilated, grouped convolution",
    weights="1[j-i=Δ_h], V_h=W_Δ",
    source="fixed",
    shared="all / yes",
    normalizer="none",
    paper="LeCun et al. 1989; Yu & Koltun 2016 (1511.07122)",
)
def conv(
    x,
    kernel,
    *,
    strides: int | Sequence[int] = 1,
    padding="SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    boundary=None,
    precision: lax.PrecisionLike = None,
    preferred_element_type=None,
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
        raise ValueError(f"conv: kernel has shape {list(np.shape(kernel))}: it must be [*window, features/groups, out]")
    if np.ndim(x) < rank + 1:
        raise ValueError(
            f"conv: x has shape {list(np.shape(x))}, but a kernel of {rank} spatial axes takes "
            f"[*batch, *spatial, features], at least {rank + 1} dimensions"
        )
    for name, length in (("features of x", np.shape(x)[-1]), ("out_features of kernel", np.shape(kernel)[-1])):
        if not _int(groups) or groups < 1 or length % groups:
            raise ValueError(f"conv: groups (={groups}) must be a positive int that divides the {name} (={length})")
    if np.shape(kernel)[-2] * groups != np.shape(x)[-1]:
        raise ValueError(
            f"conv: kernel has shape {list(np.shape(kernel))}, but with groups (={groups}) the {np.shape(x)[-1]} "
            f"features of x take [*window, {np.shape(x)[-1] // groups}, out_features]"
        )
    every = range(rank)
    sums = [
        f"{s}*i{k}+{d}*r{k}"
        for k, s, d in zip(every, _each(strides, rank, "strides"), _each(dilation, rank, "dilation"), strict=True)
    ]
    window, position = " ".join(f"r{k}" for k in every), " ".join(f"i{k}" for k in every)
    return einsum(
        f"... {' '.join(sums)} (g c), {window} c (g o) -> ... {position} (g o)",
        x,
        kernel,
        g=int(groups),
        padding=_pads(padding, rank),
        boundary=boundary,
        precision=precision,
        preferred_element_type=preferred_element_type,
        implementation=implementation,
    )


def _int(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _each(value, rank: int, name: str) -> tuple[int, ...]:
    """A positive int for each spatial axis."""
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,) * rank
    if len(values) != rank or not all(_int(v) and int(v) >= 1 for v in values):
        raise ValueError(f"conv: {name}={value!r} must be a positive int, or one for each of the {rank} spatial axes")
    return tuple(map(int, values))


def _pads(padding, rank: int):
    """`padding` with ints of a sequence spelled out as pairs, which `einsum` would read as one pair for all."""
    if padding is None or isinstance(padding, str) or _int(padding):
        return padding
    if isinstance(padding, Sequence) and len(padding) == rank:
        entries = [(p, p) if _int(p) else p for p in padding]
        if all(isinstance(p, Sequence) and len(p) == 2 and all(map(_int, p)) for p in entries):
            return entries
    raise ValueError(
        f"conv: padding={padding!r} must be 'SAME', 'VALID', an int, or an int or pair for each of the "
        f"{rank} spatial axes"
    )

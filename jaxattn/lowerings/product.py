"""A convolution of one tap as a matrix product over the channels, which on a CPU is faster where they are many."""

import functools

import jax
import numpy as np
from jax import lax

from jaxattn.extents import Resolved
from jaxattn.lowerings.convolution import Convolution, Sizes, convolve, described, match
from jaxattn.lowerings.lowering import Lowering, Problem

# Channels, in and out, from which it beats a convolution.
MANY = 16


def _match(problem: Problem) -> Convolution | None:
    """A convolution of one group, whose one tap stays inside and meets every token."""
    conv = match(problem.resolved)
    sizes = None if conv is None else Sizes.of(problem, conv)
    if conv is None or sizes is None or sizes.groups > 1 or sizes.taps > 1:
        return None
    same = all(s.index.coefficients[0] == 1 and s.index.indices().size == s.index.length for s in conv.spatial)
    inside = all(s.index.lowest == 0 and not s.scattered for s in conv.spatial)
    many = min(sizes.contracted, sizes.features) >= MANY and np.dtype("float16") not in problem.dtypes
    return conv if same and inside and many else None


def _product(conv: Convolution, resolved: Resolved, x, w, y_at: list[int], precision, accumulate) -> jax.Array:
    """What `by_lax` does with a kernel of one tap that stays inside: a matrix product over the channels."""
    (x, x_at), (w, w_at) = x, w
    w = w.transpose(w_at).reshape(w.shape[w_at[-2]], w.shape[w_at[-1]])
    contracted = (((x_at[-1],), (0,)), ((), ()))
    y = lax.dot_general(x, w, contracted, precision=precision, preferred_element_type=accumulate).astype(x.dtype)
    came = sorted(range(y.ndim - 1), key=lambda g: x_at[g])
    return y.transpose([[*came, y.ndim - 1].index(g) for g in sorted(range(y.ndim), key=lambda g: y_at[g])])


def product(resolved: Resolved, conv: Convolution, operands, precision, accumulate) -> jax.Array:
    """`convolve` by a matrix product."""
    run = functools.partial(_product, precision=precision, accumulate=accumulate)
    return convolve(resolved, conv, operands, precision, accumulate, run)


PRODUCT = Lowering(
    name="product",
    match=_match,
    describe=described("lax.dot_general over the channels"),
    temporaries=lambda resolved, conv, width: 0,
    run=product,
    widens=True,
)

"""A grouped convolution as a dense one for each group: on a CPU XLA's grouped one is poor, its gradients poorer."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from jaxattn.extents import Resolved
from jaxattn.lowerings.convolution import Convolution, Sizes, by_lax, convolve, described, match
from jaxattn.lowerings.lowering import Lowering, Problem
from jaxattn.lowerings.slices import grown

# Groups that the program may write out, and the products that each must have.
GROUPS, WORK = 64, 2**17


def _match(problem: Problem) -> Convolution | None:
    """A convolution of few large groups, where XLA's dense one is fast: up to two dimensions and 32 bits."""
    conv = match(problem.resolved)
    sizes = None if conv is None else Sizes.of(problem, conv)
    if conv is None or sizes is None or not 1 < sizes.groups <= GROUPS:
        return None
    fast = len(conv.spatial) <= 2 and all(dtype.itemsize <= 4 for dtype in problem.dtypes)
    return conv if fast and sizes.contracted > 2 and sizes.products >= sizes.groups * WORK else None


def _by_group(conv: Convolution, resolved: Resolved, x, w, y_at: list[int], precision) -> jax.Array:
    """What `by_lax` does, each group by itself."""
    (x, x_at), (w, w_at) = x, w
    groups = math.prod(resolved.sizes[a] for a in conv.group)
    one = dataclasses.replace(conv, group=())
    parts = zip(jnp.split(x, groups, x_at[-1]), jnp.split(w, groups, w_at[-1]), strict=True)
    ys = [by_lax(one, resolved, (x, x_at), (w, w_at), y_at, precision) for x, w in parts]
    return jnp.concatenate(ys, axis=y_at[-1])


def grouped(resolved: Resolved, conv: Convolution, operands, precision, accumulate) -> jax.Array:
    """`convolve` by a dense convolution for every group."""
    return convolve(resolved, conv, operands, precision, accumulate, functools.partial(_by_group, precision=precision))


def _temporaries(resolved: Resolved, conv: Convolution, width: int) -> int:
    """What `CONVOLUTION` holds, and the parts that are joined."""
    return (grown(resolved, everywhere=False) + math.prod(resolved.output_shape)) * width


GROUPED = Lowering(
    name="grouped",
    match=_match,
    describe=described("one lax.conv_general_dilated for each group"),
    temporaries=_temporaries,
    run=grouped,
    widens=True,
)

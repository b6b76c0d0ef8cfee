"""A transposed convolution on a CPU as a dense one that makes all phases of its strides (Shi et al. 2016, 1609.05158).

Position p of x and tap q meet the token `a·p + q - low`. With `q = a·j + f` that is `a·(p + j) + f - low`: tap j of
phase f, one of a, in a convolution whose stride is one. So the phases are features that it makes, and are put side by
side at the end. Where the stride does not divide the kernel, the last phases have fewer taps, and the phases are
computed apart if that is quicker. XLA:CPU is slow where there are zeros between inputs, in the kernel's gradient by
two orders of magnitude.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxattn.extents import Resolved
from jaxattn.lowerings.convolution import Convolution, Sizes, convolve, described, match, trimmed
from jaxattn.lowerings.lowering import Lowering, Problem
from jaxattn.lowerings.taps import TapAxis, trim
from jaxattn.sizes import planned

TAPS = 64  # products of taps that a program may write out
# Phases that lack taps are computed apart if there are at most so many of them, at least so many products, and at most
# so many results, since large pieces of memory take long to come; by a product a tap if at most so many numbers are
# copied for that. Measured on two cores, from [4,4,4,512] to [8,64,64,32].
PHASES_APART, WORK, APART, COPIED = 16, 2**22, 5 * 2**18, 2**22


def _match(problem: Problem) -> Convolution | None:
    """A transposed convolution of one group, with a stride, and without dilation where it has one."""
    conv = match(problem.resolved)
    sizes = None if conv is None else Sizes.of(problem, conv)
    if conv is None or sizes is None or sizes.groups > 1 or not all(s.scattered for s in conv.spatial):
        return None
    axes = [s.trim.axis for s in conv.spatial]
    dense = all(1 in (axis.stride, axis.dilation) for axis in axes)
    return conv if dense and any(axis.stride > 1 for axis in axes) else None


def _phase_axis(axis: TapAxis) -> TapAxis:
    """The axis of the phases: token t holds a·t to a·t + a-1, from the one that holds the first."""
    first = axis.low // axis.stride
    count = (axis.low + axis.length - 1) // axis.stride - first + 1
    return TapAxis(1, axis.dilation, first, count, axis.positions, -(-axis.taps // axis.stride))


def _by_phase(conv: Convolution, resolved: Resolved, x, w, y_at: list[int], precision) -> jax.Array:
    """What `by_lax` does, all phases at once."""
    (x, x_at), (w, w_at) = x, w
    x, w = x.transpose(x_at), w.transpose(w_at)  # [n, *positions, c], [*taps, c, o]
    axes = [s.trim.axis for s in conv.spatial]
    strides, rank = [axis.stride for axis in axes], len(axes)
    spatial = []
    for s, axis in zip(conv.spatial, map(_phase_axis, axes), strict=True):
        part = trim(axis)
        assert part is not None, "an axis that has been trimmed takes part in its phases"
        spatial.append(dataclasses.replace(s, axis=axis, trim=part))
    w = jnp.pad(w, [*((0, -axis.taps % axis.stride) for axis in axes), (0, 0), (0, 0)])
    w = w.reshape(*itertools.chain(*((s.axis.taps, a) for s, a in zip(spatial, strides, strict=True))), *w.shape[-2:])
    w = w.transpose(*range(0, 2 * rank, 2), 2 * rank, *range(1, 2 * rank, 2), 2 * rank + 1)
    features = w.shape[-1]
    w = w.reshape(*w.shape[: rank + 1], -1)  # [*taps, c, (*phases o)]
    one, straight = dataclasses.replace(conv, spatial=tuple(spatial)), list(range(rank + 2))
    run = functools.partial(_padded, phases=[_taps_of_phases(axis) for axis in axes], precision=precision)
    y = trimmed(run, one, resolved, (x, straight), (w, straight), straight)
    y = y.reshape(*y.shape[:-1], *strides, features)
    y = y.transpose(0, *itertools.chain(*((1 + a, 1 + rank + a) for a in range(rank))), 1 + 2 * rank)
    for dim in range(1, 1 + rank):
        y = lax.collapse(y, dim, dim + 2)
    starts = [axis.low % axis.stride for axis in axes]
    stops = [start + axis.length for start, axis in zip(starts, axes, strict=True)]
    for dim, (start, stop) in enumerate(zip(starts, stops, strict=True), 1):
        y = lax.slice_in_dim(y, start, stop, axis=dim)
    return y.transpose(sorted(range(y.ndim), key=lambda g: y_at[g]))


def _taps_of_phases(axis: TapAxis) -> list[int]:
    """Of each phase, its taps: fewer in the last ones, where the stride does not divide the kernel."""
    return [-((f - axis.taps) // axis.stride) for f in range(axis.stride)]


def _padded(conv: Convolution, resolved: Resolved, x, w, y_at: list[int], phases, precision) -> jax.Array:
    """All phases as features, [n, *tokens, (*phases o)]; `phases` are the taps that each has, along each axis."""
    (x, _), (w, _), pads = x, w, [(0, 0), *(s.padding for s in conv.spatial), (0, 0)]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(*pad, 0) for pad in pads])
    dilation, parts = tuple(s.trim.axis.dilation for s in conv.spatial), []
    phases = [
        [min(n, s.trim.taps[1]) - s.trim.taps[0] for n in each] for s, each in zip(conv.spatial, phases, strict=True)
    ]
    numbers = list(itertools.product(*phases))
    lacking = len(set(numbers)) > 1 and min(map(min, numbers)) > 0
    tokens = math.prod(map(planned, x.shape[:-1]))
    fits = tokens * w.size >= WORK and tokens * w.shape[-1] <= APART
    if not lacking or not fits or len(numbers) > PHASES_APART:
        return _convolved(x, w, dilation, precision)
    count = sum(map(math.prod, numbers))
    run = _by_tap if count <= TAPS and count * tokens * x.shape[-1] <= COPIED else _convolved
    for taps, kernel in zip(numbers, jnp.split(w, len(numbers), -1), strict=True):
        starts = [d * (k - n) for d, k, n in zip(dilation, w.shape, taps, strict=False)]
        seen = lax.slice(x, (0, *starts, 0), x.shape)
        parts.append(run(seen, kernel[tuple(slice(n) for n in taps)], dilation, precision))
    return jnp.concatenate(parts, -1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _convolved(x: jax.Array, w: jax.Array, dilation: tuple[int, ...], precision: Any) -> jax.Array:
    """y[t] = Σ_q x[t + d·(k-1-q)]·w[q], for x [n, *tokens, c] and w [*taps, c, o]."""
    rank = len(dilation)
    last, dims = rank + 1, tuple(range(1, rank + 1))
    layout = lax.ConvDimensionNumbers((0, last, *dims), (last, rank, *range(rank)), (0, last, *dims))
    w, ones = lax.rev(w, range(rank)), (1,) * rank
    return lax.conv_general_dilated(
        x, w, ones, "VALID", rhs_dilation=dilation, dimension_numbers=layout, precision=precision
    )


@functools.partial(_convolved.defjvp, symbolic_zeros=True)
def _tangent(dilation: tuple[int, ...], precision: Any, primals, tangents) -> tuple[jax.Array, Any]:
    """By the kernel a product for each tap. What JAX makes of it is a convolution with a kernel as large as the image,
    which XLA:CPU takes several times as long for."""
    (x, w), (of_x, of_w) = primals, tangents
    y, parts = _convolved(x, w, dilation, precision), []
    if type(of_x) is not SymbolicZero:
        parts.append(_convolved(of_x, w, dilation, precision))
    if type(of_w) is not SymbolicZero:
        few = math.prod(w.shape[:-2]) <= TAPS
        parts.append((_by_tap if few else _convolved)(x, of_w, dilation, precision))
    return y, functools.reduce(jnp.add, parts) if parts else jnp.zeros_like(y)


def _by_tap(x: jax.Array, w: jax.Array, dilation: tuple[int, ...], precision: Any) -> jax.Array:
    """The same, as a sum of products of matrices."""
    taps = w.shape[:-2]
    lengths = [n - d * (k - 1) for n, d, k in zip(x.shape[1:-1], dilation, taps, strict=True)]
    total = jnp.zeros((), x.dtype)
    for tap in itertools.product(*map(range, taps)):
        part = x
        for dim, (q, k, d, length) in enumerate(zip(tap, taps, dilation, lengths, strict=True), 1):
            start = d * (k - 1 - q)
            part = lax.slice_in_dim(part, start, start + length, axis=dim)
        total = total + jnp.matmul(part, w[tap], precision=precision)
    return total


def phases(resolved: Resolved, conv: Convolution, operands, precision, accumulate) -> jax.Array:
    """`convolve`, by its phases."""
    return convolve(resolved, conv, operands, precision, accumulate, functools.partial(_by_phase, precision=precision))


PHASES = Lowering(
    name="phases",
    match=_match,
    describe=described("the phases of the strides as features of one lax.conv_general_dilated, or apart"),
    temporaries=lambda resolved, conv, width: math.prod(resolved.output_shape) * width,
    run=phases,
    widens=True,
)

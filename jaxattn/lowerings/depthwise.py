"""Depthwise convolution as sums of shifted products, and its derivatives as more of the same.

All of it is in one trilinear form,

    T(x, w, y) = Σ_{n, p, q, c} x[n, stride·p + dilation·q - low, c] · w[q, c] · y[n, p, c]

with positions p and taps q in any number of dimensions, and zeros outside x. The convolution of x with w is ∂T/∂y, the
transposed convolution of y with w is ∂T/∂x, the gradient of a kernel is ∂T/∂w. Each is bilinear in the two arguments
that are left, and its transposes are the other two: one primitive, closed under derivatives of any order.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jaxtyping import Array

from jaxattn.extents import Resolved
from jaxattn.lowerings.convolution import Convolution, Sizes, convolve, described, match
from jaxattn.lowerings.lowering import Lowering, Problem
from jaxattn.lowerings.taps import TapAxis
from jaxattn.lowerings.trilinear import others, trilinear

# Channels of a group up to which they may be taken one by one, each in all the groups at once.
FEW = 4
# Taps up to which XLA:CPU makes one vectorised loop of the sum; beyond, an order of magnitude is lost.
TAPS = 128
# Positions that a step of the kernel's gradient adds up, and how many products it may write out. With few positions in
# it the slices of a step are read with their offsets computed for every element, which costs more than the sum itself.
BOX, WRITTEN = 56, 512


def _evaluate(first: Array, second: Array, *, wrt: str, axes: tuple[TapAxis, ...]) -> Array:
    dtype = first.dtype
    wide = jnp.float32 if dtype.itemsize < 4 else dtype
    return _DERIVATIVES[wrt](first.astype(wide), second.astype(wide), axes).astype(dtype)


def _by_output(x: Array, w: Array, axes: tuple[TapAxis, ...]) -> Array:
    """∂T/∂y, the convolution."""
    return _shifted(_pad(x, _around(axes)), w, axes)


def _by_input(w: Array, y: Array, axes: tuple[TapAxis, ...]) -> Array:
    """∂T/∂x: the strides put zeros between the elements of y, and the kernel is flipped."""
    spans = [a.dilation * (a.taps - 1) for a in axes]
    pads = [
        (span - a.low, a.length - 1 + a.low - a.stride * (a.positions - 1), a.stride - 1)
        for a, span in zip(axes, spans, strict=True)
    ]
    onto = tuple(a._replace(stride=1, positions=a.length) for a in axes)
    return _shifted(_pad(y, pads), lax.rev(w, range(len(axes))), onto)


def _by_kernel(x: Array, y: Array, axes: tuple[TapAxis, ...]) -> Array:
    """∂T/∂w: a loop over boxes of positions, each a strip of the last axis, and several rows where they are short."""
    x, last = _pad(x, _around(axes)), axes[-1]
    most = max(min(BOX, WRITTEN // last.taps), 1)
    strip = -(-last.positions // -(-last.positions // most))
    box = [1] * (len(axes) - 1) + [strip]
    if len(axes) > 1:
        count = axes[-2].positions
        box[-2] = max(rows for rows in range(1, count + 1) if count % rows == 0 and rows * strip <= max(most, strip))
    done = last.positions // strip * strip
    found = _boxes(x, y, axes, box, 0, done)
    return (
        found
        if done == last.positions
        else found + _boxes(x, y, axes, [*box[:-1], last.positions - done], done, last.positions)
    )


def _boxes(x: Array, y: Array, axes: tuple[TapAxis, ...], box: list[int], start: int, stop: int) -> Array:
    """∂T/∂w of the positions `start`..`stop` of the last axis, a whole number of boxes. There is an accumulator for
    every tap of the last axis, so that each product is one of whole slices."""
    n, c, last = x.shape[0], x.shape[-1], axes[-1]
    within = list(itertools.product(*map(range, box)))

    def step(sums: list[Array], at: list[Array]):
        starts = [a.stride * i for a, i in zip(axes, at, strict=True)]
        sizes = [a.stride * (size - 1) + a.dilation * (a.taps - 1) + 1 for a, size in zip(axes, box, strict=True)]
        xs = lax.dynamic_slice(x, [0, *starts, 0], [n, *sizes, c])
        ys = lax.dynamic_slice(y, [0, *at, 0], [n, *box, c])
        for i in within:
            rows = tuple(
                slice(a.stride * k, a.stride * k + a.dilation * (a.taps - 1) + 1, a.dilation)
                for a, k in zip(axes[:-1], i, strict=False)
            )
            at_taps = [last.stride * i[-1] + last.dilation * q for q in range(last.taps)]
            one = lax.expand_dims(ys[(slice(None), *i)], range(1, len(axes)))
            sums = [total + xs[(slice(None), *rows, k)] * one for total, k in zip(sums, at_taps, strict=True)]
        return sums, None

    counts = [*(a.positions for a in axes[:-1]), stop - start]
    corners = np.indices([count // size for count, size in zip(counts, box, strict=True)])
    places = [size * k.reshape(-1) for size, k in zip(box, corners, strict=True)]
    places[-1] += start
    zeros = jnp.zeros_like(x[(slice(None), *(slice(a.taps) for a in axes[:-1]), 0)])  # as x is sharded
    sums, _ = lax.scan(step, [zeros] * last.taps, list(map(jnp.asarray, places)))
    return jnp.stack(sums, axis=-2).sum(0)


def _shifted(x: Array, w: Array, axes: tuple[TapAxis, ...]) -> Array:
    """Σ_q x[n, stride·p + dilation·q, c] · w[q, c]: one slice for every tap, all of them read in one loop."""
    terms = []
    for taps in itertools.product(*(range(a.taps) for a in axes)):
        starts = [a.dilation * q for a, q in zip(axes, taps, strict=True)]
        stops = [start + a.stride * (a.positions - 1) + 1 for a, start in zip(axes, starts, strict=True)]
        part = lax.slice(x, [0, *starts, 0], [x.shape[0], *stops, x.shape[-1]], [1, *(a.stride for a in axes), 1])
        terms.append(part * w[taps])
    return functools.reduce(jnp.add, terms)


def _around(axes: tuple[TapAxis, ...]) -> list[tuple[int, int, int]]:
    """The zeros that x needs around it, or what of it nobody reads, as negative numbers."""
    return [(a.low, a.stride * (a.positions - 1) + a.dilation * (a.taps - 1) - a.low - a.length + 1, 0) for a in axes]


def _pad(x: Array, pads: Sequence[tuple[int, int, int]]) -> Array:
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])


_DERIVATIVES = {"x": _by_input, "w": _by_kernel, "y": _by_output}


def _alike(first: Array, second: Array, *, wrt: str, axes: tuple[TapAxis, ...]) -> Array:
    """Anything of the shape, the dtype, the sharding and the varying mesh axes of ∂T/∂`wrt`."""
    spatial = {"x": [a.length for a in axes], "w": [a.taps for a in axes], "y": [a.positions for a in axes]}[wrt]
    # over what is kept of the arguments: [n, c], or [c] of what has no n
    kept = {name: int(wrt != "w" and name != "w") for name in "xwy"}
    lanes = [z.sum(range(kept[name], z.ndim - 1)) for name, z in zip(others("xwy", wrt), (first, second), strict=True)]
    y = sum(lanes[1:], lanes[0])
    y = lax.expand_dims(y, range(y.ndim - 1, y.ndim - 1 + len(axes)))
    return jnp.broadcast_to(y, (*y.shape[: -1 - len(axes)], *spatial, y.shape[-1]))


def _batch(
    primitive: Primitive, arrays: Sequence[Array], dims: Sequence[int | None], *, wrt: str, axes: tuple[TapAxis, ...]
) -> tuple:
    """A `vmap` is more of n, where the kernel is not mapped, else more of c."""
    of = dict(zip(others("xwy", wrt), dims, strict=True))
    size = next(z.shape[dim] for z, dim in zip(arrays, dims, strict=True) if dim is not None)
    if of.get("w", 0) is None:
        merged = [z if d is None else jnp.moveaxis(z, d, 0) for z, d in zip(arrays, dims, strict=True)]
        merged = [z if d is None else z.reshape(-1, *z.shape[2:]) for z, d in zip(merged, dims, strict=True)]
        y = primitive.bind(*merged, wrt=wrt, axes=axes)
        return y.reshape(size, -1, *y.shape[1:]), 0
    merged = []
    for z, dim in zip(arrays, dims, strict=True):
        z = jnp.moveaxis(jnp.broadcast_to(z, (size, *z.shape)) if dim is None else z, dim or 0, -2)
        merged.append(z.reshape(*z.shape[:-2], -1))
    y = primitive.bind(*merged, wrt=wrt, axes=axes)
    return y.reshape(*y.shape[:-1], size, -1), y.ndim - 1


_partial = trilinear("depthwise_convolution", "xwy", _evaluate, _alike, _batch)


def partial(wrt: str, first: Array, second: Array, axes: Sequence[TapAxis]) -> Array:
    """∂T/∂`wrt`, given the other two of x `[n, *length, c]`, w `[*taps, c]`, y `[n, *positions, c]`, in this order."""
    return _partial(wrt, first, second, axes=tuple(axes))


# The equations that it computes


def _match(problem: Problem) -> Convolution | None:
    """A grouped convolution with few channels in a group and few taps, all of it scattered or none."""
    conv = match(problem.resolved)
    sizes = None if conv is None else Sizes.of(problem, conv)
    if conv is None or sizes is None or sizes.groups == 1:
        return None
    one_way = len({s.scattered for s in conv.spatial}) == 1
    return conv if sizes.contracted <= FEW and one_way and sizes.taps * sizes.contracted <= TAPS else None


def _depthwise(conv: Convolution, resolved: Resolved, x, w, y_at: list[int], accumulate) -> Array:
    """What `by_lax` does where the spatial dimensions are all scattered or none: the first channel of every group with
    all that is made of it, then the second."""
    (x, x_at), (w, w_at) = x, w
    groups, dtype = math.prod(resolved.sizes[a] for a in conv.group), x.dtype
    x, w = x.astype(accumulate).transpose(x_at), w.astype(accumulate).transpose(w_at)
    scattered, axes = conv.spatial[0].scattered, [s.trim.axis for s in conv.spatial]
    ys = []
    for c in range(w.shape[-2]):
        channel = x.reshape(*x.shape[:-1], groups, -1)[..., c]
        channel = jnp.repeat(channel, w.shape[-1] // groups, axis=-1)
        one = w[..., c, :]
        ys.append(partial("x", one, channel, axes) if scattered else partial("y", channel, one, axes))
    y = functools.reduce(jnp.add, ys).astype(dtype)
    return y.transpose(sorted(range(y.ndim), key=lambda g: y_at[g]))


def depthwise(resolved: Resolved, conv: Convolution, operands, precision, accumulate) -> Array:
    """`convolve` by sums of shifted products, which are exact to rounding whatever the precision."""
    run = functools.partial(_depthwise, accumulate=accumulate)
    return convolve(resolved, conv, operands, precision, accumulate, run)


def _temporaries(resolved: Resolved, conv: Convolution, width: int) -> int:
    """What is shifted, with zeros around it, for every product that it takes part in, in the dtype of the sums."""
    channels = [resolved.sizes[a] for a in (*conv.batch, *conv.group, *conv.contracted, *conv.features)]
    return math.prod([*channels, *(s.index.highest - s.index.lowest + 1 for s in conv.spatial)]) * max(width, 4)


DEPTHWISE = Lowering(
    name="depthwise",
    match=_match,
    describe=described("one sum of shifted products"),
    temporaries=_temporaries,
    run=depthwise,
    widens=True,
)

"""A static kernel: affine axes as one `lax.conv_general_dilated`.

An affine token over x, `a·p + b·q + c`, with q an axis of the kernel that is summed and p an axis of the output, is
one spatial dimension with stride a, dilation b and padding -c. On the right of the arrow, with p an axis of x, it is
the transposed convolution: x is dilated by a. Which of the two axes is written first does not matter, so the gradient
of a convolution with respect to its kernel, written as an equation, is a convolution as well.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn.extents import OUTPUT, Affine, Resolved
from jaxattn.lowerings.gather import axes_of, merge, split
from jaxattn.lowerings.lowering import Lowering, Problem
from jaxattn.lowerings.slices import extend, fold_back, grown
from jaxattn.lowerings.taps import TapAxis, Trim, trim


@dataclasses.dataclass(frozen=True)
class Spatial:
    """One spatial dimension: axis p of x or of the output, axis q of the kernel, and their numbers.

    The tokens are of x, the positions of the output; or, where it is `scattered`, the other way around. A negative
    coefficient is a positive one over the flipped axis: `flip_p`, `flip_q`. `trim` says what takes part.
    """

    p: str
    q: str
    index: Affine
    scattered: bool
    axis: TapAxis
    trim: Trim
    flip_p: bool
    flip_q: bool

    @property
    def padding(self) -> tuple[int, int]:
        """What lax pads by, once the axis is trimmed: never less than zero."""
        axis = self.trim.axis
        if self.scattered:
            reach = axis.dilation * (axis.taps - 1)
            return reach - axis.low, reach - axis.least_high
        # lax rounds the number of positions down: of the paddings that give it, take the one that was asked for
        asked = 0 if is_filled(self.index) else self.index.padding_high
        return axis.low, min(max(asked, axis.least_high, 0), axis.least_high + axis.stride - 1)


@dataclasses.dataclass(frozen=True)
class Convolution:
    """How the axes of an equation of two operands are shared out; `x` is the number of the operand with positions."""

    x: int
    spatial: tuple[Spatial, ...]
    batch: tuple[str, ...]
    group: tuple[str, ...]
    contracted: tuple[str, ...]
    features: tuple[str, ...]

    def describe(self, resolved: Resolved) -> str:
        """The call in words, for a reader of the plan."""
        both = [f"strides {tuple(s.trim.axis.stride for s in self.spatial if not s.scattered)}"]
        if any(s.scattered for s in self.spatial):
            both.append(f"lhs_dilation {tuple(s.trim.axis.stride for s in self.spatial if s.scattered)}")
        both += [
            f"padding {tuple(s.padding for s in self.spatial)}",
            f"dilation {tuple(s.trim.axis.dilation for s in self.spatial)}",
            f"groups {math.prod(resolved.sizes[a] for a in self.group)}",
        ]
        return ", ".join(part for part in both if not part.endswith("()"))


def match(resolved: Resolved) -> Convolution | None:
    """The convolution that an equation is, or None."""
    if len(resolved.operands) != 2 or any(len(index.axes) != 2 for index in resolved.affine):
        return None
    names = [axes_of(term) for term in resolved.operands]
    if any(len(set(axes)) < len(axes) for axes in names):
        return None
    inputs = [index for index in resolved.affine if index.term < 2]
    first = resolved.affine[0]
    x = first.term if inputs else int(first.axes[0] in names[1])
    if any(index.term != x for index in inputs):
        return None
    bare = [{a for token in term if not token.affine for a in token.axes} for term in resolved.terms]
    spatial = []
    for index in resolved.affine:
        for p, q in (index.axes, index.axes[::-1]):
            scattered = index.term == len(resolved.operands)
            p_stands = (p in bare[x]) if scattered else (p in bare[OUTPUT] and p not in bare[x])
            if p_stands and p not in bare[1 - x] and q in bare[1 - x] and q not in bare[x] | bare[OUTPUT]:
                spatial += filter(None, [_spatial(index, p, q, scattered)])
                break
    used = [axis for s in spatial for axis in (s.p, s.q)]
    if len(spatial) < len(resolved.affine) or len(set(used)) < len(used):
        return None
    mine, other = ([a for a in names[k] if a in bare[k] and a not in used] for k in (x, 1 - x))
    group = tuple(a for a in mine if a in bare[OUTPUT] and a in other)
    if any(resolved.sizes[a] == 0 for a in group):  # lax takes no convolution of no groups
        return None
    return Convolution(
        x,
        tuple(spatial),
        batch=tuple(a for a in mine if a in bare[OUTPUT] and a not in other),
        group=group,
        contracted=tuple(a for a in mine if a not in bare[OUTPUT] and a in other),
        features=tuple(a for a in other if a in bare[OUTPUT] and a not in mine),
    )


def _spatial(index: Affine, p: str, q: str, scattered: bool) -> Spatial | None:
    """One spatial dimension; None where nothing of it takes part. Outside stands zero, by now: see `extend`."""
    along = dict(zip(index.axes, zip(index.coefficients, index.extents, strict=True), strict=True))
    (a, count), (b, taps) = along[p], along[q]
    # what the flips of p and q leave: `lowest` is the token where |a|·p + |b|·q is zero
    lowest = 0 if is_filled(index) else index.lowest
    axis = TapAxis(abs(a), abs(b), -lowest, axis_length(index), count, taps)
    trimmed = trim(axis)
    return None if trimmed is None else Spatial(p, q, index, scattered, axis, trimmed, a < 0, b < 0)


def is_filled(index: Affine) -> bool:
    """Whether something other than zero stands outside."""
    return index.boundary not in (None, "zero")


def axis_length(index: Affine) -> int:
    """How long the axis is that is convolved: with what is filled in."""
    return index.highest - index.lowest + 1 if is_filled(index) else index.length


class Sizes(NamedTuple):
    """Of a convolution, what decides how a CPU makes it fastest."""

    groups: int
    contracted: int  # channels that a group sums over
    features: int  # and that it makes
    taps: int
    products: int

    @classmethod
    def of(cls, problem: Problem, conv: Convolution) -> "Sizes | None":
        """Its sizes; None on another machine, for numbers that are not floating, and where an axis is empty: there
        `lax` serves."""
        sizes = problem.resolved.sizes
        floating = all(jnp.issubdtype(dtype, jnp.floating) for dtype in problem.dtypes)
        if problem.backend != "cpu" or not floating or 0 in sizes.values():
            return None
        count = lambda axes: math.prod(sizes[a] for a in axes)
        return cls(
            groups=count(conv.group),
            contracted=count(conv.contracted),
            features=count(conv.features),
            taps=count(s.q for s in conv.spatial),
            products=count(sizes),
        )


def _arrange(names: list[str], groups: list[tuple[str, ...]]) -> list[int]:
    """The order of `groups` in which they are side by side in `names`, so that nothing moves; else their own order."""
    # a group of no axes becomes a dimension of 1: the batch (the first group) in front, others behind
    empty = lambda g: len(names) if g else 0
    order = sorted(range(len(groups)), key=lambda g: names.index(groups[g][0]) if groups[g] else empty(g))
    return order if [a for g in order for a in groups[g]] == names else list(range(len(groups)))


def _grouped(x: jax.Array, names: list[str], groups: list[tuple[str, ...]]) -> tuple[jax.Array, list[int]]:
    """x with each group of axes merged into one dimension, and where each group then stands."""
    order = _arrange(names, groups)
    flat = [a for g in order for a in groups[g]]
    size = dict(zip(names, x.shape, strict=True))
    x = x.transpose([names.index(a) for a in flat])
    return x.reshape([math.prod(size[a] for a in groups[g]) for g in order]), [
        order.index(g) for g in range(len(order))
    ]


def convolve(
    resolved: Resolved, conv: Convolution, operands, precision, accumulate, run: Callable | None = None
) -> jax.Array:
    """Evaluate an equation that is a convolution; `run` does the convolution itself, by default `lax`.

    It accumulates half precision in float32; the sums beside the convolution are made in `accumulate`.
    """
    x, w = operands[conv.x], operands[1 - conv.x]
    for s in conv.spatial:
        if not s.scattered and is_filled(s.index):
            x = extend(x.astype(accumulate), s.index.dim, s.index).astype(x.dtype)  # its transpose is a sum
    ps, qs = [s.p for s in conv.spatial], [s.q for s in conv.spatial]
    p_of = {s.index.dim: s.p for s in conv.spatial if not s.scattered}
    x_names = [a for d, token in enumerate(resolved.terms[conv.x]) for a in ([p_of[d]] if d in p_of else token.axes)]
    w_names = axes_of(resolved.terms[1 - conv.x])
    x = split(x, resolved.terms[conv.x], resolved.sizes)
    w = split(w, resolved.terms[1 - conv.x], resolved.sizes)

    if {*x_names, *w_names} > {*ps, *qs, *conv.batch, *conv.group, *conv.contracted, *conv.features}:
        x, w = x.astype(accumulate), w.astype(accumulate)
    x, x_names = _sum_out(x, x_names, {*ps, *conv.batch, *conv.group, *conv.contracted})
    w, w_names = _sum_out(w, w_names, {*qs, *conv.group, *conv.contracted, *conv.features})
    x = _flip(x, [x_names.index(s.p) for s in conv.spatial if s.scattered and s.flip_p])
    w = _flip(w, [w_names.index(s.q) for s in conv.spatial if s.flip_q])

    x, x_at = _grouped(x, x_names, [conv.batch, *((p,) for p in ps), conv.group + conv.contracted])
    w, w_at = _grouped(w, w_names, [*((q,) for q in qs), conv.contracted, conv.group + conv.features])
    p_out = {s.index.dim: s.p for s in conv.spatial if s.scattered}
    y_names = [a for d, token in enumerate(resolved.output) for a in ([p_out[d]] if d in p_out else token.axes)]
    y_groups = [conv.batch, *((p,) for p in ps), conv.group + conv.features]
    y_order = _arrange(y_names, y_groups)
    y_at = [y_order.index(g) for g in range(len(y_order))]

    y = trimmed(run or functools.partial(by_lax, precision=precision), conv, resolved, (x, x_at), (w, w_at), y_at)
    spread = {s.p: y.shape[at] for s, at in zip(conv.spatial, y_at[1:-1], strict=True)}
    flat = [a for g in y_order for a in y_groups[g]]
    y = y.reshape([spread.get(a, resolved.sizes[a]) for a in flat]).transpose([flat.index(a) for a in y_names])
    y = _flip(y, [y_names.index(s.p) for s in conv.spatial if not s.scattered and s.flip_p])
    for s in conv.spatial:
        if s.scattered and is_filled(s.index):
            y = fold_back(y.astype(accumulate), y_names.index(s.p), s.index)
    return merge(y, resolved)


def trimmed(run: Callable, conv: Convolution, resolved: Resolved, x, w, y_at: list[int]) -> jax.Array:
    """`run` on what takes part, with zeros around it."""
    (x, x_at), (w, w_at) = x, w
    for s, along, tap in zip(conv.spatial, x_at[1:-1], w_at[:-2], strict=True):
        x = _part(x, along, s.trim.positions if s.scattered else s.trim.tokens)
        w = _part(w, tap, s.trim.taps)
    y = run(conv, resolved, (x, x_at), (w, w_at), y_at)
    for s, along in zip(conv.spatial, y_at[1:-1], strict=True):
        part, length = (s.trim.tokens, s.axis.length) if s.scattered else (s.trim.positions, s.axis.positions)
        y = _within(y, along, part, length)
    return y


def by_lax(conv: Convolution, resolved: Resolved, x, w, y_at: list[int], precision) -> jax.Array:
    """`lax.conv_general_dilated` of (array, where its groups of axes stand) twice, into groups of axes at `y_at`."""
    (x, x_at), (w, w_at) = x, w
    return lax.conv_general_dilated(
        x,
        _flip(w, [tap for s, tap in zip(conv.spatial, w_at, strict=False) if s.scattered]),
        window_strides=[1 if s.scattered else s.trim.axis.stride for s in conv.spatial],
        padding=[s.padding for s in conv.spatial],
        lhs_dilation=[s.trim.axis.stride if s.scattered else 1 for s in conv.spatial],
        rhs_dilation=[s.trim.axis.dilation for s in conv.spatial],
        dimension_numbers=lax.ConvDimensionNumbers(
            (x_at[0], x_at[-1], *x_at[1:-1]), (w_at[-1], w_at[-2], *w_at[:-2]), (y_at[0], y_at[-1], *y_at[1:-1])
        ),
        feature_group_count=math.prod(resolved.sizes[a] for a in conv.group),
        precision=precision,
    )


def _part(x: jax.Array, dim: int, part: tuple[int, int]) -> jax.Array:
    return x if part == (0, x.shape[dim]) else lax.slice_in_dim(x, *part, axis=dim)


def _within(y: jax.Array, dim: int, part: tuple[int, int], length: int) -> jax.Array:
    """The transpose of `_part`: zeros around."""
    around = (part[0], length - part[1], 0)
    pads = [around if d == dim else (0, 0, 0) for d in range(y.ndim)]
    return y if part == (0, length) else lax.pad(y, jnp.zeros((), y.dtype), pads)


def _sum_out(x: jax.Array, names: list[str], kept: set[str]) -> tuple[jax.Array, list[str]]:
    """x summed over the axes that nothing else knows."""
    gone = [dim for dim, name in enumerate(names) if name not in kept]
    return (x.sum(gone, dtype=x.dtype) if gone else x), [name for name in names if name in kept]


def _flip(x: jax.Array, dims: list[int]) -> jax.Array:
    return lax.rev(x, dims) if dims else x


def described(how: str) -> Callable[[Resolved, Convolution], str]:
    """The description of a lowering that computes a convolution."""
    return lambda resolved, conv: f"{how}, {conv.describe(resolved)}"


CONVOLUTION = Lowering(
    name="convolution",
    match=lambda problem: match(problem.resolved),
    describe=described("lax.conv_general_dilated"),
    temporaries=lambda resolved, conv, width: grown(resolved, everywhere=False) * width,
    run=convolve,
    widens=True,  # a convolution of one dtype into another has no transpose in JAX; widening loses nothing
)

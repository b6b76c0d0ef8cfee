"""A static kernel: affine axes as one `lax.conv_general_dilated`.

An affine token over x, `a·p + b·q + c`, with q an axis of the kernel that is summed and p an axis of the output, is
one spatial dimension with stride a, dilation b and padding -c. On the right of the arrow, with p an axis of x, it is
the transposed convolution: x is dilated by a. Which of the two axes is written first does not matter, so the gradient
of a convolution with respect to its kernel, written as an equation, is a convolution as well.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn.extents import OUTPUT, Affine, Resolved
from jaxattn.kernels import shifts
from jaxattn.kernels.gather import axes_of, merge, split
from jaxattn.kernels.slices import extend, fold_back

# Channels of a group up to which they may be taken one by one, each in all the groups at once.
FEW = 4
# Groups that may be convolved one by one instead, which the program writes out, and the products that each must have.
GROUPS, WORK = 64, 2**17
# Channels, in and out, from which a matrix product beats a convolution of one tap.
MANY = 16


@dataclasses.dataclass(frozen=True)
class Spatial:
    """One spatial dimension: axis p of x or of the output, axis q of the kernel, and the numbers lax wants.

    A negative coefficient is a positive one over the flipped axis: `flip_p`, `flip_q`.
    """

    p: str
    q: str
    index: Affine
    scattered: bool
    stride: int
    dilation: int
    padding: tuple[int, int]
    flip_p: bool
    flip_q: bool


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
        both = [f"strides {tuple(s.stride for s in self.spatial if not s.scattered)}"]
        if any(s.scattered for s in self.spatial):
            both.append(f"lhs_dilation {tuple(s.stride for s in self.spatial if s.scattered)}")
        both += [
            f"padding {tuple(s.padding for s in self.spatial)}",
            f"dilation {tuple(s.dilation for s in self.spatial)}",
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
                spatial.append(_spatial(index, p, q, scattered))
                break
    used = [axis for s in spatial for axis in (s.p, s.q)]
    if len(spatial) < len(resolved.affine) or len(set(used)) < len(used):
        return None
    mine, other = ([a for a in names[k] if a in bare[k] and a not in used] for k in (x, 1 - x))
    return Convolution(
        x,
        tuple(spatial),
        batch=tuple(a for a in mine if a in bare[OUTPUT] and a not in other),
        group=tuple(a for a in mine if a in bare[OUTPUT] and a in other),
        contracted=tuple(a for a in mine if a not in bare[OUTPUT] and a in other),
        features=tuple(a for a in other if a in bare[OUTPUT] and a not in mine),
    )


def _spatial(index: Affine, p: str, q: str, scattered: bool) -> Spatial:
    """The numbers of one spatial dimension. Outside is zero by now, or has been filled: see `extend`."""
    along = dict(zip(index.axes, zip(index.coefficients, index.extents, strict=True), strict=True))
    (a, count), (b, taps) = along[p], along[q]
    filled = _filled(index)
    # what the flips of p and q leave: lowest is the index where |a|·p + |b|·q is zero
    lowest, length = 0 if filled else index.lowest, _length(index)
    reach = abs(b) * (taps - 1)
    if scattered:
        # out[m] = Σ x[p] w[q] where m = lowest + |a| p + |b| q: correlate the dilated x with the kernel flipped
        low = lowest + reach
        high = length - (abs(a) * (count - 1) + 1) - low + reach
        return Spatial(p, q, index, True, abs(a), abs(b), (low, high), a < 0, b > 0)
    # lax rounds the number of positions down: of the paddings that give `count`, take the one that was asked for
    least = lowest + abs(a) * (count - 1) + reach - (length - 1)
    high = min(max(0 if filled else index.padding_high, least), least + abs(a) - 1)
    return Spatial(p, q, index, False, abs(a), abs(b), (-lowest, high), a < 0, b < 0)


def _filled(index: Affine) -> bool:
    """Whether something other than zero stands outside."""
    return index.boundary not in (None, "zero")


def _length(index: Affine) -> int:
    """How long the axis is that is convolved: with what is filled in."""
    return index.highest - index.lowest + 1 if _filled(index) else index.length


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


def convolve(resolved: Resolved, operands, precision, accumulate, run: Callable | None = None) -> jax.Array:
    """Evaluate an equation for which `match` finds a convolution; `run` does the convolution itself, by default `lax`.

    It accumulates half precision in float32; the sums beside the convolution are made in `accumulate`.
    """
    conv = match(resolved)
    assert conv is not None
    x, w = operands[conv.x], operands[1 - conv.x]
    for s in conv.spatial:
        if not s.scattered and _filled(s.index):
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

    run = run or functools.partial(_lax, precision=precision)
    y = run(conv, resolved, (x, x_at), (w, w_at), y_at)
    spread = {s.p: y.shape[at] for s, at in zip(conv.spatial, y_at[1:-1], strict=True)}
    flat = [a for g in y_order for a in y_groups[g]]
    y = y.reshape([spread.get(a, resolved.sizes[a]) for a in flat]).transpose([flat.index(a) for a in y_names])
    y = _flip(y, [y_names.index(s.p) for s in conv.spatial if not s.scattered and s.flip_p])
    for s in conv.spatial:
        if s.scattered and _filled(s.index):
            y = fold_back(y.astype(accumulate), y_names.index(s.p), s.index)
    return merge(y, resolved)


def _lax(conv: Convolution, resolved: Resolved, x, w, y_at: list[int], precision) -> jax.Array:
    """`lax.conv_general_dilated` of (array, where its groups of axes stand) twice, into groups of axes at `y_at`."""
    (x, x_at), (w, w_at) = x, w
    return lax.conv_general_dilated(
        x,
        w,
        window_strides=[1 if s.scattered else s.stride for s in conv.spatial],
        padding=[s.padding for s in conv.spatial],
        lhs_dilation=[s.stride if s.scattered else 1 for s in conv.spatial],
        rhs_dilation=[s.dilation for s in conv.spatial],
        dimension_numbers=lax.ConvDimensionNumbers(
            (x_at[0], x_at[-1], *x_at[1:-1]), (w_at[-1], w_at[-2], *w_at[:-2]), (y_at[0], y_at[-1], *y_at[1:-1])
        ),
        feature_group_count=math.prod(resolved.sizes[a] for a in conv.group),
        precision=precision,
    )


def on_cpu(conv: Convolution, resolved: Resolved, dtypes: Iterable[np.dtype]) -> str:
    """The lowering that is fastest on a CPU, where XLA's grouped convolution is poor, and its gradients poorer."""
    groups, contracted, features = (
        math.prod(resolved.sizes[a] for a in axes) for axes in (conv.group, conv.contracted, conv.features)
    )
    taps = math.prod(resolved.sizes[s.q] for s in conv.spatial)
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes) or 0 in resolved.sizes.values():
        return "convolution"
    if groups == 1:
        same = all(s.index.coefficients[0] == 1 and s.index.indices().size == s.index.length for s in conv.spatial)
        inside = all(s.index.lowest == 0 and not s.scattered for s in conv.spatial)
        many = min(contracted, features) >= MANY and np.dtype("float16") not in dtypes
        return "product" if taps == 1 and same and inside and many else "convolution"
    one_way = len({s.scattered for s in conv.spatial}) == 1
    few = contracted <= FEW and one_way and taps * contracted <= shifts.TAPS
    # XLA's dense convolution is fast up to two dimensions and 32 bits
    fast = len(conv.spatial) <= 2 and groups <= GROUPS and all(dtype.itemsize <= 4 for dtype in dtypes)
    if fast and contracted > 2 and math.prod(resolved.sizes.values()) >= groups * WORK:
        return "grouped"
    return "depthwise" if few else "convolution"


def shifted_elements(resolved: Resolved) -> int:
    """What `depthwise` holds: what is shifted, with zeros around it, for every product that it takes part in."""
    conv = match(resolved)
    assert conv is not None
    channels = [resolved.sizes[a] for a in (*conv.batch, *conv.group, *conv.contracted, *conv.features)]
    return math.prod([*channels, *(s.index.highest - s.index.lowest + 1 for s in conv.spatial)])


def _product(conv: Convolution, resolved: Resolved, x, w, y_at: list[int], precision, accumulate) -> jax.Array:
    """What `_lax` does with a kernel of one tap that stays inside: a matrix product over the channels."""
    (x, x_at), (w, w_at) = x, w
    w = w.transpose(w_at).reshape(w.shape[w_at[-2]], w.shape[w_at[-1]])
    contracted = (((x_at[-1],), (0,)), ((), ()))
    y = lax.dot_general(x, w, contracted, precision=precision, preferred_element_type=accumulate).astype(x.dtype)
    came = sorted(range(y.ndim - 1), key=lambda g: x_at[g])
    return y.transpose([[*came, y.ndim - 1].index(g) for g in sorted(range(y.ndim), key=lambda g: y_at[g])])


def product(resolved: Resolved, operands, precision, accumulate) -> jax.Array:
    """`convolve` by a matrix product."""
    run = functools.partial(_product, precision=precision, accumulate=accumulate)
    return convolve(resolved, operands, precision, accumulate, run)


def _depthwise(conv: Convolution, resolved: Resolved, x, w, y_at: list[int], accumulate) -> jax.Array:
    """What `_lax` does where the spatial dimensions are all scattered or none: the first channel of every group with
    all that is made of it, then the second."""
    (x, x_at), (w, w_at) = x, w
    groups, dtype = math.prod(resolved.sizes[a] for a in conv.group), x.dtype
    x, w = x.astype(accumulate).transpose(x_at), w.astype(accumulate).transpose(w_at)
    scattered = conv.spatial[0].scattered
    axes = []
    for s, n in zip(conv.spatial, x.shape[1:-1], strict=True):
        taps = resolved.sizes[s.q]
        if scattered:  # x stands where the positions are, and the kernel has been flipped, for `lax`
            low, length, positions = s.dilation * (taps - 1) - s.padding[0], _length(s.index), n
        else:
            low, length, positions = s.padding[0], n, resolved.sizes[s.p]
        axes.append(shifts.Axis(s.stride, s.dilation, low, length, positions, taps))
    if scattered:
        w = lax.rev(w, range(len(axes)))
    ys = []
    for c in range(w.shape[-2]):
        channel = x.reshape(*x.shape[:-1], groups, -1)[..., c]
        channel = jnp.repeat(channel, w.shape[-1] // groups, axis=-1)
        one = w[..., c, :]
        ys.append(shifts.partial("x", one, channel, axes) if scattered else shifts.partial("y", channel, one, axes))
    y = functools.reduce(jnp.add, ys).astype(dtype)
    return y.transpose(sorted(range(y.ndim), key=lambda g: y_at[g]))


def depthwise(resolved: Resolved, operands, precision, accumulate) -> jax.Array:
    """`convolve` by sums of shifted products, which are exact to rounding whatever the precision."""
    run = functools.partial(_depthwise, accumulate=accumulate)
    return convolve(resolved, operands, precision, accumulate, run)


def _by_group(conv: Convolution, resolved: Resolved, x, w, y_at: list[int], precision) -> jax.Array:
    """What `_lax` does, each group by itself."""
    (x, x_at), (w, w_at) = x, w
    groups = math.prod(resolved.sizes[a] for a in conv.group)
    one = dataclasses.replace(conv, group=())
    parts = zip(jnp.split(x, groups, x_at[-1]), jnp.split(w, groups, w_at[-1]), strict=True)
    ys = [_lax(one, resolved, (x, x_at), (w, w_at), y_at, precision) for x, w in parts]
    return jnp.concatenate(ys, axis=y_at[-1])


def grouped(resolved: Resolved, operands, precision, accumulate) -> jax.Array:
    """`convolve` by a dense convolution for every group."""
    return convolve(resolved, operands, precision, accumulate, functools.partial(_by_group, precision=precision))


def _sum_out(x: jax.Array, names: list[str], kept: set[str]) -> tuple[jax.Array, list[str]]:
    """x summed over the axes that nothing else knows."""
    gone = [dim for dim, name in enumerate(names) if name not in kept]
    return (x.sum(gone, dtype=x.dtype) if gone else x), [name for name in names if name in kept]


def _flip(x: jax.Array, dims: list[int]) -> jax.Array:
    return lax.rev(x, dims) if dims else x

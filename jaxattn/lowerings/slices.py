"""Affine axes by slices: one strided slice per place in the window, summed or stacked; no unfold is ever built.

For windows on both sides of a product (local scores, local mix, involution), where a convolution does not apply.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn.boundary import fold
from jaxattn.extents import OUTPUT, Affine, Resolved
from jaxattn.lowerings.gather import axes_of, contract, merge, split, unfolded
from jaxattn.lowerings.lowering import Lowering, Problem

# Slices written out in the program; the windows beyond that are a loop, since the compiler may keep alive at once all
# that are written out, and takes its time over them.
UNROLL = 16


def _outside(index: Affine) -> tuple[np.ndarray, int, int]:
    """The tokens at lowest..highest of `index`, and the part of them that is the axis itself: the rest is outside."""
    tokens = fold(np.arange(index.lowest, index.highest + 1), index.length, index.boundary or "zero")
    start = min(max(-index.lowest, 0), len(tokens))
    return tokens, start, min(max(index.length - index.lowest, start), len(tokens))


def extend(x: jax.Array, dim: int, index: Affine) -> jax.Array:
    """Dimension `dim` of x over lowest..highest of `index`: cropped where that is inside, filled by the boundary."""
    if index.boundary in (None, "zero"):
        return _pad(x, dim, -index.lowest, index.highest - (index.length - 1))
    tokens, start, stop = _outside(index)
    parts = [
        jnp.take(x, tokens[:start], axis=dim, mode="clip"),
        lax.slice_in_dim(x, index.lowest + start, index.lowest + stop, axis=dim) if stop > start else None,
        jnp.take(x, tokens[stop:], axis=dim, mode="clip"),
    ]
    return jnp.concatenate([part for part in parts if part is not None and part.shape[dim]], axis=dim)


def fold_back(y: jax.Array, dim: int, index: Affine) -> jax.Array:
    """The adjoint of `extend`: what lies outside is dropped, or added to the token that the boundary puts there."""
    if index.boundary in (None, "zero"):
        return _pad(y, dim, index.lowest, index.length - 1 - index.highest)
    tokens, start, stop = _outside(index)
    low = min(max(index.lowest + start, 0), index.length)
    x = _pad(lax.slice_in_dim(y, start, stop, axis=dim), dim, low, index.length - low - (stop - start))
    for part in (slice(0, start), slice(stop, len(tokens))):
        where = (slice(None),) * dim
        x = x.at[(*where, tokens[part])].add(y[(*where, part)])
    return x


def _pad(x: jax.Array, dim: int, low: int, high: int, between: int = 0) -> jax.Array:
    """x with zeros below, above and between the elements of dimension `dim`; negative is cropped."""
    pads = [(0, 0, 0)] * x.ndim
    pads[dim] = (low, high, between)
    return lax.pad(x, jnp.zeros((), x.dtype), pads)


def at_place(x: jax.Array, dim: int, start, count: int, stride: int) -> jax.Array:
    """`count` elements of dimension `dim` from `start`, which may be traced, `stride` apart."""
    length = stride * (count - 1) + 1
    if isinstance(start, int):
        return lax.slice_in_dim(x, start, start + length, stride, axis=dim)
    return lax.slice_in_dim(lax.dynamic_slice_in_dim(x, start, length, axis=dim), 0, None, stride, axis=dim)


def loop_axes(resolved: Resolved) -> list[str]:
    """The axes that are walked one place at a time: the windows of every affine token."""
    return list(dict.fromkeys(axis for index in resolved.affine for axis in index.axes[1:]))


def can_slice(resolved: Resolved) -> bool:
    """Whether every place of the window is one slice of the output: no position of the output is walked itself."""
    walked = loop_axes(resolved)
    return all(index.axes[0] not in walked for index in resolved.of_term(OUTPUT).values())


def traced_loops(resolved: Resolved) -> list[str]:
    """The first of `loop_axes`, so many that what is left to write out is at most `UNROLL` slices."""
    loops = loop_axes(resolved)
    scattered = {axis for index in resolved.of_term(OUTPUT).values() for axis in index.axes}
    free = [axis for axis in loops if axis not in scattered]
    places = math.prod(resolved.sizes[axis] for axis in loops)
    traced = []
    while free and places > UNROLL:
        traced.append(free.pop(0))
        places //= resolved.sizes[traced[-1]]
    return traced


def multiply(arrays, names: list[list[str]], output: list[str], precision, accumulate) -> jax.Array:
    """One place of the window. Where no matrix product is in it, a product and a sum, which fuse."""
    matrix = len(arrays) == 2 and all(set(a) & set(output) - set(b) for a, b in (names, names[::-1]))
    if matrix or any(len(set(axes)) < len(axes) for axes in names):
        return contract(arrays, names, output, precision, accumulate)
    every = [*output, *dict.fromkeys(a for axes in names for a in axes if a not in output)]
    factors = []
    for x, axes in zip(arrays, names, strict=True):
        x = x.transpose([axes.index(a) for a in every if a in axes]).astype(accumulate)
        factors.append(lax.expand_dims(x, [k for k, a in enumerate(every) if a not in axes]))
    product = functools.reduce(jnp.multiply, factors)
    return product.sum(range(len(output), len(every)), dtype=accumulate)


class _Places:
    """The terms of the sum over a window: `term(at)` is the one where the loop axes have the values `at`."""

    def __init__(self, resolved: Resolved, precision, accumulate, dtype):
        self.resolved, self.precision, self.accumulate, self.dtype = resolved, precision, accumulate, dtype
        self.loops = loop_axes(resolved)

    def prepare(self, x: jax.Array, k: int) -> jax.Array:
        """Operand k with its affine axes extended and its composed axes split, in the dtype that sums are made in: the
        transpose of cutting slices is a sum."""
        x = x.astype(self.accumulate)
        for dim, index in self.resolved.of_term(k).items():
            x = extend(x, dim, index)
        return split(x, self.resolved.operands[k], self.resolved.sizes)

    def operand(self, x: jax.Array, k: int, at) -> tuple[jax.Array, list[str]]:
        """Operand k at one place, and the axes that it still has."""
        affine, names, dim = self.resolved.of_term(k), [], 0
        for token_dim, token in enumerate(self.resolved.operands[k]):
            index = affine.get(token_dim)
            for axis in [None] if index else token.axes:
                if index is not None:
                    lane = None if index.axes[0] in at else index.axes[0]
                    pairs = zip(index.axes, index.coefficients, strict=True)
                    start = index.offset - index.lowest + sum(c * at[a] for a, c in pairs if a in at)
                    x = at_place(x, dim, start, index.extents[0] if lane else 1, index.coefficients[0])
                else:
                    lane = None if axis in at else axis
                    x = x if lane else at_place(x, dim, at[axis], 1, 1)
                if lane is None:
                    x = lax.squeeze(x, [dim])
                else:
                    names, dim = [*names, lane], dim + 1
        return x, names

    def term(self, operands, at) -> jax.Array:
        """The product of the operands at one place, put where the output's affine tokens say."""
        output = [axis for axis in axes_of(self.resolved.output) if axis not in at]
        sliced = [self.operand(x, k, at) for k, x in enumerate(operands)]
        y = multiply(
            [x.astype(self.dtype) for x, _ in sliced], [n for _, n in sliced], output, self.precision, self.accumulate
        )
        for index in self.resolved.of_term(OUTPUT).values():
            pairs = zip(index.axes, index.coefficients, strict=True)
            start = index.offset - index.lowest + sum(c * at[a] for a, c in pairs if a in at)
            y = self._place(y, output, index, start)
        return y

    def _place(self, y: jax.Array, output: list[str], index: Affine, start: int) -> jax.Array:
        """Spread the position of an output token by its stride, beginning at `start` of lowest..highest."""
        stride, whole = index.coefficients[0], index.highest - index.lowest + 1
        length = stride * (index.extents[0] - 1) + 1
        return _pad(y, output.index(index.axes[0]), start, whole - start - length, stride - 1)

    def over(self, axes: list[str], operands, at) -> jax.Array:
        """Sum, or stack in front, the terms over the loop axes that are left."""
        if not axes:
            return self.term(operands, at)
        axis, rest = axes[0], axes[1:]
        stacked = any(axis in token.axes and not token.affine for token in self.resolved.output)
        extent = self.resolved.sizes[axis]

        def place(value):
            return self.over(rest, operands, at | {axis: value})

        if axis not in traced_loops(self.resolved):
            terms = [place(value) for value in range(extent)]
            return jnp.stack(terms) if stacked else functools.reduce(jnp.add, terms)
        body = jax.checkpoint(place)  # else reverse mode would keep every slice
        if stacked:
            return lax.map(body, jnp.arange(extent))
        return lax.scan(lambda y, value: (y + body(value), None), place(0), jnp.arange(1, extent))[0]


def slices(resolved: Resolved, match: bool, operands, precision, accumulate) -> jax.Array:
    """Evaluate a resolved equation; the result has the dtype `accumulate`."""
    places = _Places(resolved, precision, accumulate, operands[0].dtype)
    traced = traced_loops(resolved)
    loops = [*traced, *(axis for axis in places.loops if axis not in traced)]

    @jax.checkpoint  # the slices are cheaper to cut again than to keep
    def run(*operands):
        return places.over(loops, [places.prepare(x, k) for k, x in enumerate(operands)], {})

    y = run(*operands)
    scattered = resolved.of_term(OUTPUT)
    # what came out, and what the equation asks for: an affine token of the output is the one axis of its position
    kept = [axis for dim, token in enumerate(resolved.output) for axis in token.axes[: 1 if dim in scattered else None]]
    stacked = [axis for axis in loops if axis in kept]
    came = [*stacked, *(axis for axis in kept if axis not in stacked)]
    y = y.transpose([came.index(axis) for axis in kept])
    for index in scattered.values():
        y = fold_back(y, kept.index(index.axes[0]), index)
    return merge(y, resolved)


def match(problem: Problem) -> bool | None:
    """Whether it can, and an unfold is not free: one is built where the output asks for it or an operand holds it."""
    resolved = problem.resolved
    asked = math.prod(resolved.output_shape)
    held = max(map(math.prod, resolved.shapes))
    free = all(n <= (held if k == len(resolved.shapes) else asked) for k, n in unfolded(resolved).items())
    return True if not free and can_slice(resolved) else None


def grown(resolved: Resolved, everywhere: bool) -> int:
    """Elements of the operands that are cropped or extended: everywhere, or where a boundary fills in."""
    total = 0
    for k, shape in enumerate(resolved.shapes):
        lengths = list(shape)
        for dim, a in resolved.of_term(k).items():
            if everywhere or a.boundary not in (None, "zero"):
                lengths[dim] = a.highest - a.lowest + 1
        total += math.prod(lengths) if lengths != list(shape) else 0
    return total


def _describe(resolved: Resolved, match: bool) -> str:
    places = math.prod(resolved.sizes[axis] for axis in loop_axes(resolved))
    return f"one strided slice per place in the window, {places} of them"


SLICES = Lowering(
    name="slices",
    match=match,
    describe=_describe,
    temporaries=lambda resolved, match, width: grown(resolved, everywhere=True) * width,
    run=slices,
)

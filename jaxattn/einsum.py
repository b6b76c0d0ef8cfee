"""`jaxattn.einsum`: an einsum whose axes may be indexed by a sum, so that a window is part of the notation."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn.extents import OUTPUT, Resolved, check_options, resolve
from jaxattn.kernels import convolution, local, target
from jaxattn.kernels.gather import axes_of, contract, gather, merge, split, unfolded
from jaxattn.kernels.slices import can_slice, loop_axes, slices

IMPLEMENTATIONS = (None, "reference", "xla")


def plain(resolved: Resolved, operands, precision, accumulate) -> jax.Array:
    """No affine axis: reshape, `jnp.einsum`, reshape."""
    operands = [split(x, term, resolved.sizes) for x, term in zip(operands, resolved.operands, strict=True)]
    names = [axes_of(term) for term in resolved.operands]
    return merge(contract(operands, names, axes_of(resolved.output), precision, accumulate), resolved)


LOWERINGS: dict[str, tuple[Callable[..., jax.Array], str]] = {
    "plain": (plain, "reshapes and jnp.einsum"),
    "convolution": (convolution.convolve, "lax.conv_general_dilated"),
    "product": (convolution.product, "lax.dot_general over the channels"),
    "depthwise": (convolution.depthwise, "one sum of shifted products"),
    "grouped": (convolution.grouped, "one lax.conv_general_dilated for each group"),
    "bands": (local.local_product, "one dense product per tile of positions"),
    "slices": (slices, "one strided slice per place in the window"),
    "gather": (gather, "gather, jnp.einsum, scatter"),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `einsum` will do with an equation and shapes; print it.

    `flops` counts a multiplication and an addition for every product of the sum, `bytes` the operands and the result
    once each, `temporaries` an estimate of the bytes held besides them.
    """

    resolved: Resolved
    dtypes: tuple[np.dtype, ...]
    dtype: np.dtype
    lowering: str
    detail: str
    flops: int
    bytes: int
    temporaries: int

    @property
    def equation(self) -> str:
        return self.resolved.equation

    @property
    def shape(self) -> tuple[int, ...]:
        return self.resolved.output_shape

    def __str__(self) -> str:
        def described(dtype, shape):
            return f"{dtype}[{','.join(map(str, shape))}]"

        r = self.resolved
        rows = [
            ("operands", "; ".join(map(described, self.dtypes, r.shapes))),
            ("result", described(self.dtype, self.shape)),
            ("extents", " ".join(f"{axis}={size}" for axis, size in r.sizes.items())),
        ]
        for a in r.affine:
            whose = "output" if a.term == len(r.operands) else f"operand {a.term}"
            outside = f", outside: {a.boundary}" if a.boundary and (a.lowest < 0 or a.highest >= a.length) else ""
            rows.append((a.text, f"index {a.lowest}..{a.highest} of {a.length} in {whose}{outside}"))
        rows.append(("lowering", f"{self.lowering}: {self.detail}"))
        cost = f"{_si(self.flops)}FLOP, {_si(self.bytes)}B in and out, {_si(self.temporaries)}B temporaries"
        rows.append(("cost", cost))
        width = max(len(name) for name, _ in rows)
        return "\n".join([f"einsum  {self.equation}", *(f"  {name:<{width}}  {text}" for name, text in rows)])


def _si(number: float) -> str:
    power = min(int(math.log10(max(number, 1))) // 3, 4)
    return f"{number / 1000**power:.3g} {('', 'k', 'M', 'G', 'T')[power]}"


def _choose(resolved: Resolved, dtypes: tuple[np.dtype, ...], backend: str) -> tuple[str, str]:
    """The lowering of an equation and a word on it."""
    if not resolved.affine:
        return "plain", LOWERINGS["plain"][1]
    conv = convolution.match(resolved)
    if conv is not None:
        lowering = convolution.on_cpu(conv, resolved, dtypes) if backend == "cpu" else "convolution"
        return lowering, f"{LOWERINGS[lowering][1]}, {conv.describe(resolved)}"
    windowed = local.match(resolved) if backend == "cpu" else None
    if windowed is not None and local.pays(windowed, resolved, dtypes):
        return "bands", f"{LOWERINGS['bands'][1]}, {local.describe(windowed)}"
    # an unfold is built only where the output asks for one, and scattered only where an operand holds one
    asked = math.prod(resolved.output_shape)
    held = max(map(math.prod, resolved.shapes))
    free = all(n <= (held if k == len(resolved.shapes) else asked) for k, n in unfolded(resolved).items())
    if free or not can_slice(resolved):
        return "gather", LOWERINGS["gather"][1]
    places = math.prod(resolved.sizes[axis] for axis in loop_axes(resolved))
    return "slices", f"{LOWERINGS['slices'][1]}, {places} of them"


def _temporaries(resolved: Resolved, lowering: str, width: int) -> int:
    """Bytes that a lowering holds besides operands and result, as a rule of thumb."""
    if lowering == "gather":
        return sum(unfolded(resolved).values()) * width
    if lowering == "plain":
        return 0
    if lowering == "depthwise":
        return convolution.shifted_elements(resolved) * max(width, 4)  # in the dtype of the sums
    if lowering == "bands":
        windowed = local.match(resolved)
        assert windowed is not None
        return local.held(windowed, resolved, width)
    grown = math.prod(resolved.output_shape) if lowering == "grouped" else 0  # the parts that are joined
    for k, shape in enumerate(resolved.shapes):
        lengths = list(shape)
        for dim, a in resolved.of_term(k).items():
            if lowering == "slices" or a.boundary not in (None, "zero"):
                lengths[dim] = a.highest - a.lowest + 1
        grown += math.prod(lengths) if lengths != list(shape) else 0
    return grown * width


@functools.lru_cache(maxsize=4096)
def _plan(equation, shapes, dtypes, dtype, padding, boundary, sizes, implementation, backend) -> Plan:
    resolved = resolve(equation, shapes, tuple(map(str, dtypes)), padding, boundary, dict(sizes))
    if implementation == "reference":
        lowering, detail = "gather", LOWERINGS["gather"][1]
    else:
        lowering, detail = _choose(resolved, (*dtypes, dtype), backend)
    products = math.prod(resolved.sizes.values())
    summed = len(resolved.sizes) > len(axes_of(resolved.output)) or any(resolved.of_term(OUTPUT))
    flops = products * (max(len(shapes) - 1, 0) + int(summed))
    moved = sum(math.prod(s) * d.itemsize for s, d in zip(shapes, dtypes, strict=True))
    moved += math.prod(resolved.output_shape) * dtype.itemsize
    temporaries = _temporaries(resolved, lowering, max(d.itemsize for d in (dtype, *dtypes)))
    return Plan(resolved, dtypes, dtype, lowering, detail, flops, moved, temporaries)


def _make_plan(equation, operands, padding, boundary, preferred_element_type, implementation, sizes) -> Plan:
    """Check what the cache can't tell apart (1 == 1.0 == True) or can't hold (lists), then look the plan up."""
    if not isinstance(equation, str):
        raise ValueError(f"einsum: the equation must be a string, got {type(equation).__name__}")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"einsum: implementation={implementation!r} must be one of {IMPLEMENTATIONS}")
    shapes = tuple(tuple(x.shape) for x in operands)
    dtypes = tuple(np.dtype(x.dtype) for x in operands)
    pads, edges, extents = check_options(equation, shapes, tuple(map(str, dtypes)), padding, boundary, sizes)
    dtype = np.dtype(preferred_element_type or jnp.result_type(*operands))
    return _plan(equation, shapes, dtypes, dtype, pads, edges, extents, implementation, target.backend())


def plan(
    equation: str,
    /,
    *operands,
    padding=None,
    boundary=None,
    precision: lax.PrecisionLike = None,
    preferred_element_type=None,
    implementation: str | None = None,
    **sizes,
) -> Plan:
    """What `einsum` does with an equation: extents, lowering and cost, without computing anything.

    Args:
      equation: as for `einsum`.
      *operands: arrays, anything with a shape and a dtype, or shapes (tuples of ints, taken as float32).
      padding, boundary, precision, preferred_element_type, implementation, sizes: as for `einsum`.

    Raises:
      ValueError: as `einsum` does.

    >>> import jaxattn
    >>> print(jaxattn.plan("n i+r c, r c o -> n i o", (2, 10, 4), (3, 4, 8)))
    einsum  n i+r c, r c o -> n i o
      operands  float32[2,10,4]; float32[3,4,8]
      result    float32[2,8,8]
      extents   n=2 c=4 r=3 o=8 i=8
      i+r       index 0..9 of 10 in operand 0
      lowering  convolution: lax.conv_general_dilated, strides (1,), padding ((0, 0),), dilation (1,), groups 1
      cost      3.07 kFLOP, 1.22 kB in and out, 0 B temporaries
    """
    del precision  # it changes neither the lowering nor its cost
    described = [jax.ShapeDtypeStruct(x, jnp.float32) if isinstance(x, tuple | list) else x for x in operands]
    return _make_plan(equation, described, padding, boundary, preferred_element_type, implementation, sizes)


def einsum(
    equation: str,
    /,
    *operands,
    padding=None,
    boundary=None,
    precision: lax.PrecisionLike = None,
    preferred_element_type=None,
    implementation: str | None = None,
    **sizes,
) -> jax.Array:
    """An einsum whose axes may be indexed by a sum of axes.

        y[n, i, j, o] = Σ_{r, s, c} x[n, i + r, j + s, c] · w[r, s, c, o]        n i+r j+s c, r s c o -> n i j o

    Axes are names separated by spaces, operands are separated by commas. A token of an operand is

    - a name; a name twice in an operand is its diagonal, a name absent from the output is summed;
    - an affine sum with integer coefficients, `2*i+r-1`: the axis of the operand is read at that index. The first
      axis is the *position* (its coefficient, positive, is the stride), the others are *windows* (dilations).
      In the output it is written at that index: the exact adjoint of the same token on the left;
    - a composed axis `(g c)`, row-major;
    - or `...`, the same axes in every operand that writes it.

    Extents come from bare axes and keywords, a position's otherwise from `padding`.

    Args:
      equation: the text, such as `"n i+r j+s c, r s c o -> n i j o"`.
      *operands: arrays of any dtype, one for each term.
      padding: "VALID" (as None), "SAME", an int or a pair `(low, high)` for all affine tokens, or a sequence of these
        with one entry for each affine token as they are written. With padding, the lowest index of a token at
        position 0 is -low. In the output it crops instead.
      boundary: what stands outside: "zero" (the default once there is padding), "edge", "reflect" (the edge is not
        repeated) or "wrap"; one for all, or one for each affine token.
      precision, preferred_element_type: as in `jax.lax.dot_general`.
      implementation: None chooses; "reference" gathers every window and multiplies; "xla" is what None chooses from.
      **sizes: extents of axes that no operand gives, as in `g=4`.

    Returns:
      The result in the operands' promoted dtype, or in `preferred_element_type`. float16 and bfloat16 accumulate in
      float32. Where weights multiply the keys of a window, an infinity or NaN may also reach, as NaN, positions near
      it whose window does not hold it: on the CPU, windows are dense products with zeros beside them.

    Raises:
      ValueError: the equation is malformed or doesn't fit the operands; the message shows where.

    The notation extends that of Einstein (1916) and of einops (Rogozhnikov, ICLR 2022).

    >>> import jax.numpy as jnp, jaxattn
    >>> x, w = jnp.ones((2, 9, 10, 4)), jnp.ones((3, 3, 4, 8))
    >>> jaxattn.einsum("n i+r j+s c, r s c o -> n i j o", x, w, padding="SAME").shape
    (2, 9, 10, 8)
    """
    arrays = [jnp.asarray(x) for x in operands]
    chosen = _make_plan(equation, arrays, padding, boundary, preferred_element_type, implementation, sizes)
    small = jnp.issubdtype(chosen.dtype, jnp.floating) and chosen.dtype.itemsize < 4
    accumulate = np.dtype(jnp.float32) if small else chosen.dtype
    dtype = np.dtype(jnp.result_type(*arrays))
    if chosen.lowering in ("convolution", "product", "depthwise", "grouped") and dtype.itemsize < chosen.dtype.itemsize:
        dtype = chosen.dtype  # a convolution of one dtype into another has no transpose in JAX; widening loses nothing
    arrays = [x.astype(dtype) for x in arrays]
    run = LOWERINGS[chosen.lowering][0]
    return run(chosen.resolved, arrays, precision, accumulate).astype(chosen.dtype)

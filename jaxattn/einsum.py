"""`jaxattn.einsum`: an einsum whose axes may be indexed by a sum, so that a window is part of the notation."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn import explicit, machine, units
from jaxattn.checked import REFUSED, allowed_precision, shown
from jaxattn.extents import OUTPUT, Resolved, check_options, resolve
from jaxattn.lowerings.convolution import CONVOLUTION
from jaxattn.lowerings.depthwise import DEPTHWISE
from jaxattn.lowerings.gather import GATHER, axes_of
from jaxattn.lowerings.grouped import GROUPED
from jaxattn.lowerings.local import BANDS
from jaxattn.lowerings.lowering import Lowering, Problem, Solution, evaluate, first_match
from jaxattn.lowerings.pairs import by_pairs
from jaxattn.lowerings.phases import PHASES
from jaxattn.lowerings.plain import PLAIN
from jaxattn.lowerings.product import PRODUCT
from jaxattn.lowerings.slices import SLICES

# The first that matches is taken: what is special, and faster, stands before what is general.
ONE_STEP = (PLAIN, PRODUCT, GROUPED, DEPTHWISE, PHASES, CONVOLUTION, BANDS, SLICES, GATHER)
LOWERINGS = (PLAIN, by_pairs(ONE_STEP), *ONE_STEP[1:])
IMPLEMENTATIONS: dict[str | None, tuple[Lowering, ...]] = {None: LOWERINGS, "reference": (GATHER,), "xla": LOWERINGS}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `einsum` will do with an equation and shapes; print it.

    `flops` counts a multiplication and an addition for every product of the sum, `bytes` the operands and the result
    once each, `temporaries` an estimate of the bytes held besides them. `run` does it: `(operands, precision)` to the
    result; in a program for another platform, as is best there.
    """

    resolved: Resolved
    dtypes: tuple[np.dtype, ...]
    dtype: np.dtype
    lowering: str
    detail: str
    flops: int
    bytes: int
    temporaries: int
    run: Callable[[list[jax.Array], Any], jax.Array] = dataclasses.field(repr=False, compare=False)

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
        cost = (
            f"{units.si(self.flops)}FLOP, {units.si(self.bytes)}B in and out, {units.si(self.temporaries)}B temporaries"
        )
        rows.append(("cost", cost))
        return units.rows(f"einsum  {self.equation}", rows)


@functools.lru_cache(maxsize=4096)
def _plan(equation, shapes, dtypes, dtype, padding, boundary, sizes, implementation, backend) -> Plan:
    resolved = resolve(equation, shapes, tuple(map(str, dtypes)), padding, boundary, dict(sizes))
    known = resolved.planned()  # whose sizes can be compared
    problem = Problem(known, (*dtypes, dtype), backend)
    lowering, match = first_match(IMPLEMENTATIONS[implementation], problem)
    products = math.prod(known.sizes.values())
    summed = len(resolved.sizes) > len(axes_of(resolved.output)) or any(resolved.of_term(OUTPUT))
    flops = products * (max(len(shapes) - 1, 0) + int(summed))
    if lowering.flops is not None:
        flops = lowering.flops(known, match)
    moved = sum(math.prod(s) * d.itemsize for s, d in zip(known.shapes, dtypes, strict=True))
    moved += math.prod(known.output_shape) * dtype.itemsize
    temporaries = lowering.temporaries(known, match, max(d.itemsize for d in (dtype, *dtypes)))

    # an eager call dispatches one program; in a program that is traced it stands as if there were no jit
    @functools.partial(jax.jit, static_argnums=1, inline=True)
    def run(operands: list[jax.Array], precision: lax.PrecisionLike) -> jax.Array:
        solution = Solution(IMPLEMENTATIONS[implementation], problem, resolved, precision, dtype)
        return explicit.as_named(functools.partial(evaluate, solution), resolved, operands)

    detail = lowering.describe(known, match)
    return Plan(resolved, dtypes, dtype, lowering.name, detail, flops, moved, temporaries, run)


def _make_plan(equation, operands, padding, boundary, preferred_element_type, implementation, sizes) -> Plan:
    """Check what the cache can't tell apart (1 == 1.0 == True) or can't hold (lists), then look the plan up."""
    if not isinstance(equation, str):
        raise ValueError(f"einsum: the equation must be a string, got {type(equation).__name__}")
    if implementation not in tuple(IMPLEMENTATIONS):
        raise ValueError(f"einsum: implementation (={implementation!r}) must be one of {tuple(IMPLEMENTATIONS)}")
    shapes = tuple(tuple(x.shape) for x in operands)
    dtypes = tuple(np.dtype(x.dtype) for x in operands)
    pads, edges, extents = check_options(equation, shapes, tuple(map(str, dtypes)), padding, boundary, sizes)
    try:
        dtype = np.dtype(jnp.result_type(*operands) if preferred_element_type is None else preferred_element_type)
    except TypeError:
        if preferred_element_type is None:  # the operands', which strict promotion refuses
            raise
        raise ValueError(
            f"einsum: preferred_element_type (={preferred_element_type!r}) must be None or a dtype"
        ) from None
    return _plan(equation, shapes, dtypes, dtype, pads, edges, extents, implementation, machine.backend())


@functools.lru_cache(maxsize=4096)
def _known_plan(equation, operands, padding, boundary, preferred_element_type, implementation, sizes, backend) -> Plan:
    """`_make_plan` of what can be told apart, and so need not be checked again: words, dtypes and ints."""
    del backend  # the plan's, part of the key
    described = [jax.ShapeDtypeStruct(*x) for x in operands]
    return _make_plan(equation, described, padding, boundary, preferred_element_type, implementation, dict(sizes))


def _check_precision(precision: Any):
    if allowed_precision(precision) is REFUSED:
        raise ValueError(f"einsum: precision (={shown(precision)}) must be None, a jax.lax.Precision, or its name")


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
    if precision is not None:  # it changes neither the lowering nor its cost
        _check_precision(precision)
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

    Extents come from bare axes and keywords, a position's otherwise from `padding`. Three operands and more, with
    windows, are multiplied two at a time, in the order of the fewest products, which `plan` shows.

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
      float32. Where weights multiply the keys of a window, or a convolution is transposed, an infinity or NaN may also
      reach, as NaN, positions near it that it is not summed into: on the CPU, zeros are multiplied there.

    Raises:
      ValueError: the equation is malformed or doesn't fit the operands; the message shows where.

    The notation extends that of Einstein (1916) and of einops (Rogozhnikov, ICLR 2022).

    >>> import jax.numpy as jnp, jaxattn
    >>> x, w = jnp.ones((2, 9, 10, 4)), jnp.ones((3, 3, 4, 8))
    >>> jaxattn.einsum("n i+r j+s c, r s c o -> n i j o", x, w, padding="SAME").shape
    (2, 9, 10, 8)
    """
    arrays = [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in operands]
    options = (padding, boundary, preferred_element_type, implementation)
    simple = isinstance(equation, str) and all(x is None or isinstance(x, str | np.dtype | type) for x in options)
    simple = simple and not any(x.weak_type for x in arrays)  # whose dtype gives way
    if simple and all(type(size) is int for size in sizes.values()):
        described = tuple((x.shape, x.dtype) for x in arrays)
        chosen = _known_plan(equation, described, *options, tuple(sizes.items()), machine.backend())
    else:
        chosen = _make_plan(equation, arrays, *options, sizes)
    if precision is not None:
        _check_precision(precision)
    return chosen.run(arrays, tuple(precision) if isinstance(precision, list) else precision)

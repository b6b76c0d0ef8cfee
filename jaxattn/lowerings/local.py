"""A window on both sides of a product: local scores, local mix, and what the keys of either are due, by bands.

An equation is one of these where one of its three terms, the keys k, is read at `stride·p + dilation·u`, another, the
weights s, has both the positions p and the slots u, and the third, the queries q, has the positions only. What stands
on the right of the arrow says which of the derivatives of the trilinear form in `bands.py` it is.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn.extents import Affine, Resolved
from jaxattn.lowerings import bands
from jaxattn.lowerings.gather import axes_of, merge, split
from jaxattn.lowerings.lowering import Lowering, Problem
from jaxattn.lowerings.slices import extend, fold_back

# Slots and features from which a product with some waste beats a sum over slots: fewer slots `slices` writes out.
SLOTS, FEATURES = 17, 8
# How many times what is asked for a product may compute.
WASTE = 4


@dataclasses.dataclass(frozen=True)
class Local:
    """How the axes of an equation are shared out. `terms` has the number of the term that each of q, k, s is; `before`
    and `after` are the axes of all three, by where the keys have them: before the positions, or after."""

    terms: dict[str, int]
    indices: tuple[Affine, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    features: tuple[str, ...]

    @property
    def wrt(self) -> str:
        """Which of the three is asked for."""
        return next(name for name, term in self.terms.items() if term == 2)

    @property
    def axes(self) -> tuple[bands.BandAxis, ...]:
        return tuple(
            bands.BandAxis(a.coefficients[0], abs(a.coefficients[1]), a.extents[0], a.extents[1]) for a in self.indices
        )

    def order(self, name: str) -> list[list[str]]:
        """The axes that each dimension of q, k or s in `bands.py` is made of; a key's position is its place."""
        slots = [[a.axes[1]] for a in self.indices] if name == "s" else [list(self.features)]
        return [list(self.before), *([a.axes[0]] for a in self.indices), list(self.after), *slots]

    def flipped(self) -> list[int]:
        """The dimensions of s whose slots the keys count downwards."""
        return [2 + len(self.indices) + k for k, a in enumerate(self.indices) if a.coefficients[1] < 0]


def match(resolved: Resolved) -> Local | None:
    """The local product that an equation is, or None."""
    if len(resolved.operands) != 2 or len({a.term for a in resolved.affine}) != 1:
        return None
    names = [axes_of(term) for term in resolved.terms]
    if any(len(a.axes) != 2 for a in resolved.affine) or any(len(set(axes)) < len(axes) for axes in names):
        return None
    positions, slots = ([a.axes[k] for a in resolved.affine] for k in (0, 1))
    k = resolved.affine[0].term
    s = next((term for term in range(3) if term != k and {*positions, *slots} <= set(names[term])), None)
    if s is None:
        return None
    q = 3 - k - s
    shared = [a for a in names[k] if a in names[s] and a not in positions and a not in slots]
    features = [a for a in names[k] if a not in names[s]]
    if {*names[s]} != {*positions, *slots, *shared} or {*names[q]} != {*positions, *shared, *features}:
        return None
    first = min(names[k].index(a) for a in positions)
    before, after = (tuple(a for a in shared if (names[k].index(a) < first) == early) for early in (True, False))
    return Local({"q": q, "k": k, "s": s}, resolved.affine, before, after, tuple(features))


def pays(local: Local, resolved: Resolved, dtypes: tuple[np.dtype, ...]) -> bool:
    """Whether it beats slices on a CPU, where it was measured; `dtypes` of the operands and of the result."""
    floating = all(jnp.issubdtype(d, jnp.floating) and d.itemsize <= dtypes[-1].itemsize for d in dtypes)
    if not floating or 0 in resolved.sizes.values():
        return False
    features = math.prod(resolved.sizes[a] for a in local.features)
    slots = math.prod(a.slots for a in local.axes)
    asked = slots * math.prod(bands.tile_sizes(local.axes))
    return slots >= SLOTS and features >= FEATURES and bands.matrix_elements(local.axes) <= WASTE * asked


def describe(resolved: Resolved, local: Local) -> str:
    """The tiles in words, for a reader of the plan."""
    tiles = " × ".join(map(str, bands.tile_sizes(local.axes)))
    columns = math.prod(a.reach(t) for a, t in zip(local.axes, bands.tile_sizes(local.axes), strict=True))
    what = {"s": "scores", "q": "mix", "k": "what is due to the keys"}[local.wrt]
    return f"one dense product per tile of positions, {what}, tiles of {tiles} queries by {columns} keys"


def held(resolved: Resolved, local: Local, width: int) -> int:
    """Bytes that it holds besides operands and result of so many each: the keys as far as the positions reach, and
    all three in the dtype of the sums where that is wider."""
    shared = math.prod(resolved.sizes[a] for a in (*local.before, *local.after))
    features = math.prod(resolved.sizes[a] for a in local.features)
    positions = math.prod(a.positions for a in local.axes)
    elements = math.prod(a.reach(a.positions) for a in local.axes) * features
    if width < 4:
        elements += positions * (features + math.prod(a.slots for a in local.axes))
    return shared * elements * max(width, 4)


def local_product(resolved: Resolved, local: Local, operands, precision, accumulate) -> jax.Array:
    """Evaluate a resolved equation; the result has the dtype `accumulate`."""
    first, second = (
        _arranged(operands[local.terms[n]], n, local, resolved, accumulate) for n in "qks" if n != local.wrt
    )
    y = bands.partial(local.wrt, first, second, local.axes, precision)
    if local.wrt == "s":
        y = lax.rev(y, local.flipped())
    order = local.order(local.wrt)
    spread = [
        [n] if len(axes) == 1 else [resolved.sizes[a] for a in axes] for n, axes in zip(y.shape, order, strict=True)
    ]
    y = y.reshape([n for part in spread for n in part])
    names, kept = [a for axes in order for a in axes], _kept(resolved, local.terms[local.wrt])
    y = y.transpose([names.index(a) for a in kept])
    for index in resolved.of_term(2).values():
        y = fold_back(y, kept.index(index.axes[0]), index)
    return merge(y, resolved)


def _kept(resolved: Resolved, term: int) -> list[str]:
    """The axes of a term one by one, where an affine token is the one of its position."""
    return [a for token in resolved.terms[term] for a in token.axes[: 1 if token.affine else None]]


def _arranged(x: jax.Array, name: str, local: Local, resolved: Resolved, accumulate) -> jax.Array:
    """An operand with its dimensions in the order of `bands.py`, the keys as far as the positions reach."""
    term, x = local.terms[name], x.astype(accumulate)
    for dim, index in resolved.of_term(term).items():
        x = extend(x, dim, index)
    x, names, order = split(x, resolved.terms[term], resolved.sizes), _kept(resolved, term), local.order(name)
    x = x.transpose([names.index(a) for axes in order for a in axes])
    lengths = dict(zip((a for axes in order for a in axes), x.shape, strict=True))
    x = x.reshape([math.prod(lengths[a] for a in axes) for axes in order])
    return lax.rev(x, local.flipped()) if name == "s" else x


def _match(problem: Problem) -> Local | None:
    local = match(problem.resolved) if problem.backend == "cpu" else None
    return local if local is not None and pays(local, problem.resolved, problem.dtypes) else None


BANDS = Lowering("bands", match=_match, describe=describe, temporaries=held, run=local_product)

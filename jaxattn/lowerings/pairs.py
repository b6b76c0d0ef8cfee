"""Three operands and more, with windows: two at a time, in the order that takes the fewest products.

A pair is multiplied, and summed over the axes that nothing else names. A sum `i+r` whose axes nothing else of the pair
names is left whole: to the pair it is an axis like any other, and what the pair makes has it still.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxattn.extents import Affine, Resolved
from jaxattn.lowerings.lowering import Lowering, Problem, Solution, evaluate, first_match, statistics_dtype
from jaxattn.notation import ELLIPSIS, Token

EXHAUSTIVE = 5  # operands of which every order is tried; of more, the cheapest pair is taken each time


class Axis(NamedTuple):
    """One axis of an operand, and the index that it stands for where it is a sum."""

    token: Token
    affine: Affine | None

    @property
    def whole(self) -> "Axis":
        """A sum as an axis by itself, named by its text and its place in the equation."""
        name = f"{self.token.text}@{self.token.column}"
        return self if self.affine is None else Axis(Token(self.token.text, self.token.column, (name,)), None)


Term = tuple[Axis, ...]


class Pair(NamedTuple):
    """Two of the operands that are left, multiplied; the result takes its place behind the others."""

    places: tuple[int, int]
    resolved: Resolved
    made: Term
    output: Term  # of the whole equation, as it is from then on

    @property
    def products(self) -> int:
        return math.prod(self.resolved.sizes.values())


class Step(NamedTuple):
    """A pair, and what it can be computed by."""

    pair: Pair
    lowerings: tuple[Lowering, ...]
    problem: Problem

    @property
    def found(self) -> tuple[Lowering, Any]:
        return first_match(self.lowerings, self.problem)


def by_pairs(lowerings: tuple[Lowering, ...]) -> Lowering:
    """The lowering that computes each pair by the first of `lowerings` that can."""

    def match(problem: Problem) -> list[Step] | None:
        resolved = problem.resolved
        if len(resolved.operands) < 3 or not resolved.affine:
            return None
        indices = {(a.term, a.dim): a for a in resolved.affine}
        *operands, output = (
            tuple(Axis(token, indices.get((k, dim))) for dim, token in enumerate(term))
            for k, term in enumerate(resolved.terms)
        )
        sizes = dict(resolved.sizes)
        for axis in itertools.chain(*operands, output):
            if axis.affine is not None:
                sizes[axis.whole.token.axes[0]] = axis.affine.length
        dtypes, result, steps = list(problem.dtypes[:-1]), statistics_dtype(problem.dtypes[-1]), []
        for pair in _order(operands, output, sizes):
            mine = [dtypes[k] for k in pair.places]
            dtypes = [dtype for k, dtype in enumerate(dtypes) if k not in pair.places] + [result]
            steps.append(Step(pair, lowerings, Problem(pair.resolved, (*mine, result), problem.backend)))
        at_once = math.prod(resolved.sizes.values()) * (len(operands) - 1)
        return steps if sum(step.pair.products for step in steps) < at_once else None

    return Lowering("pairs", match, _describe, _temporaries, _run, flops=_flops, composed=True)


def _order(operands: list[Term], output: Term, sizes: Mapping[str, int]) -> list[Pair]:
    """The pairs that take the fewest products in all."""
    if len(operands) == 1:
        return []
    pairs = [_pair(k, m, operands, output, sizes) for k, m in itertools.combinations(range(len(operands)), 2)]
    if len(operands) > EXHAUSTIVE:
        pairs = [min(pairs, key=lambda pair: pair.products)]
    orders = []
    for pair in pairs:
        left = [term for k, term in enumerate(operands) if k not in pair.places]
        orders.append([pair, *_order([*left, pair.made], pair.output, sizes)])
    return min(orders, key=lambda order: sum(pair.products for pair in order))


def _pair(k: int, m: int, operands: list[Term], output: Term, sizes: Mapping[str, int]) -> Pair:
    mine = [*operands[k], *operands[m]]
    elsewhere = _names(axis for n, term in enumerate(operands) if n not in (k, m) for axis in term)
    untouched = [a for a in mine if a.affine and not set(a.token.axes) & _names(b for b in mine if b is not a)]
    given = [tuple(a.whole if a in untouched else a for a in operands[n]) for n in (k, m)]
    known = _names(itertools.chain(*given))
    if len(operands) == 2:
        made, seen, later = output, output, output
    else:
        # a sum of the output is written as soon as nothing else needs its axes
        others = lambda axis: elsewhere | _names(b for b in output if b is not axis)
        ready = [a for a in output if a.affine and set(a.token.axes) <= known - others(a)]
        later = tuple(a.whole if a in ready else a for a in output)
        wanted = known & (elsewhere | _names(later))
        whole = {a.whole.token.axes[0]: a for a in untouched}
        # in the order of the operand that has more axes, so that little is moved
        in_order = dict.fromkeys(n for term in sorted(given, key=len, reverse=True) for a in term for n in a.token.axes)
        rest = [n for n in in_order if n in wanted or n in whole]
        bare = [whole[n].whole if n in whole else Axis(Token(n, 0, (n,)), None) for n in rest]
        made = (*ready, *bare)
        seen = (*(a.whole for a in ready), *(whole.get(n, a) for n, a in zip(rest, bare, strict=True)))
    return Pair((k, m), _resolved([*given, made], sizes), seen, later)


def _names(axes: Iterable[Axis]) -> set[str]:
    return {name for axis in axes for name in axis.token.axes}


def _resolved(terms: list[Term], sizes: Mapping[str, int]) -> Resolved:
    """The equation of a pair."""
    places = [(k, dim, axis) for k, term in enumerate(terms) for dim, axis in enumerate(term)]
    named = lambda token: token.axes[0] if token.text == ELLIPSIS else token.text
    texts = [" ".join(named(axis.token) for axis in term) for term in terms]
    length = lambda a: a.affine.length if a.affine else math.prod(sizes[name] for name in a.token.axes)
    return Resolved(
        equation=f"{', '.join(texts[:-1])} -> {texts[-1]}",
        terms=tuple(tuple(axis.token for axis in term) for term in terms),
        shapes=tuple(tuple(map(length, term)) for term in terms[:-1]),
        sizes={name: sizes[name] for name in dict.fromkeys(n for _, _, axis in places for n in axis.token.axes)},
        affine=tuple(dataclasses.replace(a.affine, term=k, dim=dim) for k, dim, a in places if a.affine),
    )


def _run(resolved: Resolved, steps: list[Step], operands, precision, accumulate) -> Array:
    left = list(operands)
    for pair, lowerings, problem in steps:
        mine = [left[k] for k in pair.places]
        left = [x for k, x in enumerate(left) if k not in pair.places]
        with jax.numpy_dtype_promotion("standard"):  # what a pair makes is wider than the operands
            common = jnp.result_type(*mine)
        sizes = {name: resolved.sizes.get(name, n) for name, n in pair.resolved.sizes.items()}  # and what is left open
        mended = dataclasses.replace(pair.resolved, sizes=sizes, shapes=tuple(x.shape for x in mine))
        solution = Solution(lowerings, problem, mended, precision, accumulate)
        left.append(evaluate(solution, [x.astype(common) for x in mine]))
    return left[0]


def _describe(resolved: Resolved, steps: list[Step]) -> str:
    return "; then ".join(f"{step.pair.resolved.equation} ({step.found[0].name})" for step in steps)


def _flops(resolved: Resolved, steps: list[Step]) -> int:
    return sum(2 * step.pair.products for step in steps)


def _temporaries(resolved: Resolved, steps: list[Step], width: int) -> int:
    """What the pairs make before the last, and the most that one of them holds."""
    made = sum(math.prod(step.pair.resolved.output_shape) for step in steps[:-1]) * max(width, 4)
    held = [
        lowering.temporaries(step.pair.resolved, match, max(width, 4))
        for step in steps
        for lowering, match in [step.found]
    ]
    return made + max(held)

"""An equation and its operands' shapes: the extent of every axis, and the index that every affine token stands for."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np

from jaxattn.boundary import BOUNDARIES, fold
from jaxattn.notation import (
    ELLIPSIS,
    EquationError,
    ExtentError,
    IndexRangeError,
    NotationError,
    Parsed,
    Term,
    Token,
    parse,
)
from jaxattn.sizes import is_int, is_symbolic, planned

OUTPUT = -1  # the output among the terms: the last
Shapes = tuple[tuple[int, ...], ...]
Padding = Literal["VALID", "SAME"] | tuple[int, int]  # (low, high)


@dataclasses.dataclass(frozen=True)
class Affine:
    """index = offset + Σ coefficient · axis, on an axis of `length` tokens; the first axis is the position.

    `term` and `dim` say which token of the resolved equation it is, `padding_high` what the user asked for beyond
    the far end, and `boundary` (None: the index stays inside) what stands outside.
    """

    term: int
    dim: int
    text: str
    axes: tuple[str, ...]
    coefficients: tuple[int, ...]
    extents: tuple[int, ...]
    offset: int
    length: int
    padding_high: int
    boundary: str | None

    @property
    def lowest(self) -> int:
        return self.offset + sum(min(c, 0) * (n - 1) for c, n in zip(self.coefficients, self.extents, strict=True))

    @property
    def highest(self) -> int:
        return self.offset + sum(max(c, 0) * (n - 1) for c, n in zip(self.coefficients, self.extents, strict=True))

    def indices(self) -> np.ndarray:
        """The token of the axis at every value of `axes`, shape `extents`: int, -1 where nothing stands."""
        steps = [c * np.arange(n) for c, n in zip(self.coefficients, self.extents, strict=True)]
        index = self.offset + functools.reduce(np.add.outer, steps)
        return fold(index, self.length, self.boundary or "zero")


@dataclasses.dataclass(frozen=True)
class Resolved:
    """An equation with its shapes: every axis has an extent and every affine token an index.

    `terms` are the operands' tokens and the output's, with '...' spelled out as axes of its own.
    """

    equation: str
    terms: tuple[Term, ...]
    shapes: tuple[tuple[int, ...], ...]
    sizes: Mapping[str, int] = dataclasses.field(hash=False)
    affine: tuple[Affine, ...]

    @property
    def operands(self) -> tuple[Term, ...]:
        return self.terms[:OUTPUT]

    @property
    def output(self) -> Term:
        return self.terms[OUTPUT]

    @property
    def output_shape(self) -> tuple[int, ...]:
        scattered = {(a.term, a.dim): a.length for a in self.affine}
        return tuple(
            scattered.get((len(self.operands), dim), math.prod(self.sizes[axis] for axis in token.axes))
            for dim, token in enumerate(self.output)
        )

    def planned(self) -> "Resolved":
        """The same with a few entries for what `jax.export` leaves open: by it the way to compute is chosen."""
        shapes = tuple(tuple(map(planned, shape)) for shape in self.shapes)
        return dataclasses.replace(self, shapes=shapes, sizes={a: planned(n) for a, n in self.sizes.items()})

    def of_term(self, term: int) -> dict[int, Affine]:
        """The affine tokens of one term, by dimension; `OUTPUT` is the output's."""
        return {a.dim: a for a in self.affine if a.term == term % len(self.terms)}


def describe(shapes: Shapes, dtypes: tuple[str, ...]) -> str:
    """The operands for an error: `operand 0: float32[2,9]; operand 1: float32[3]`."""
    rows = zip(dtypes, shapes, strict=True)
    return "; ".join(f"operand {k}: {dtype}[{','.join(map(str, shape))}]" for k, (dtype, shape) in enumerate(rows))


class _Resolver:
    """The state of one `resolve`: the equation, its operands' shapes, and the extents known so far."""

    def __init__(self, parsed: Parsed, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[str, ...]):
        self.parsed = parsed
        self.shapes = shapes
        self.described = describe(shapes, dtypes)
        self.sizes: dict[str, int] = {}
        self.origin: dict[str, tuple[str, range]] = {}

    def fail(self, kind: type[EquationError], message: str, columns: Iterable[int] = ()) -> EquationError:
        return self.parsed.error(kind, message, columns, self.described)

    def learn(self, axis: str, size: int, source: str, columns: range) -> None:
        """Note that an axis has an extent; two that differ are an error that shows both places."""
        if axis not in self.sizes:
            self.sizes[axis], self.origin[axis] = size, (source, columns)
        elif self.sizes[axis] != size:
            before, place = self.origin[axis]
            message = f"axis '{axis}' has size {self.sizes[axis]} {before} but {size} {source}"
            raise self.fail(ExtentError, message, [*place, *columns])

    def spell_out_ellipsis(self) -> tuple[Term, ...]:
        """Every term with '...' replaced by axes named '...0', '...1', after checking the operands' ranks."""
        parsed, leading, first = self.parsed, None, -1
        for k, (term, shape) in enumerate(zip(parsed.operands, self.shapes, strict=True)):
            dots = [dim for dim, token in enumerate(term) if token.text == ELLIPSIS]
            named = len(term) - len(dots)
            if len(shape) < named or (len(shape) > named and not dots):
                least = "at least " if dots else ""
                message = f"operand {k} has {len(shape)} dimensions but its term names {least}{named}"
                raise self.fail(ExtentError, message, (c for token in term for c in token.columns()))
            if dots:
                mine = shape[dots[0] : len(shape) - (len(term) - 1 - dots[0])]
                if leading is not None and mine != leading:
                    message = f"'...' is {list(leading)} in operand {first} but {list(mine)} in operand {k}"
                    raise self.fail(ExtentError, message, term[dots[0]].columns())
                leading, first = mine, k
        names = [f"{ELLIPSIS}{k}" for k in range(len(leading or ()))]

        def spell(token: Token) -> Term:
            if token.text != ELLIPSIS:
                return (token,)
            return tuple(Token(ELLIPSIS, token.column, (name,)) for name in names)

        return tuple(tuple(itertools.chain.from_iterable(map(spell, term))) for term in parsed.terms)

    def check_sizes(self, given: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
        """Extents given by keyword, as ints."""
        named = {axis: token for term in self.parsed.terms for token in term for axis in token.axes}
        for axis, size in given.items():
            if axis not in named:
                message = f"keyword {axis}={size!r} names no axis of the equation (its axes: {', '.join(named)})"
                raise self.fail(NotationError, message)
            if not is_int(size) or size < 1:
                message = f"keyword {axis}={size!r} must be a positive int"
                raise self.fail(ExtentError, message, named[axis].columns(axis))
        return tuple(sorted((axis, int(size)) for axis, size in given.items()))

    def read_sizes(self, terms: tuple[Term, ...], given: Mapping[str, int]) -> None:
        """Extents from keywords and from bare axes."""
        named = {axis: token for term in self.parsed.terms for token in term for axis in token.axes}
        for axis, size in given.items():
            self.learn(axis, size, "by keyword", named[axis].columns(axis))
        for k, (term, shape) in enumerate(zip(terms, self.shapes, strict=False)):
            for token, length in zip(term, shape, strict=True):
                if not token.affine and len(token.axes) == 1:
                    self.learn(token.axes[0], length, f"in operand {k}", token.columns())

    def decompose(self, token: Token, length: int, term: int) -> bool:
        """Extents from a composed axis `(g c)`; False while two of them are unknown."""
        unknown = [axis for axis in token.axes if axis not in self.sizes]
        product = math.prod(self.sizes[axis] for axis in token.axes if axis in self.sizes)
        if len(unknown) > 1:
            return False
        if (unknown and (product == 0 or length % product)) or (not unknown and length != product):
            parts = " ".join(f"{axis}={self.sizes.get(axis, '?')}" for axis in token.axes)
            message = f"'{token.text}' has size {length} in operand {term}, which is not {parts}"
            raise self.fail(ExtentError, message, token.columns())
        for axis in unknown:
            self.learn(axis, length // product, f"in operand {term}", token.columns(axis))
        return True

    def ready(self, token: Token, scattered: bool) -> bool:
        """Whether the index of an affine token can be told: its windows are known, and on the right its position."""
        return all(axis in self.sizes for axis in token.axes[not scattered :])

    def refuse_symbolic(self, token: Token, length: int | None) -> None:
        """Of a sum every index is told before the program is made."""
        if any(map(is_symbolic, [*([] if length is None else [length]), *(self.sizes.get(a, 0) for a in token.axes)])):
            message = f"'{token.text}' must have sizes that are known: symbolic may be an axis that stands by itself"
            raise self.fail(ExtentError, message, token.columns())

    def infer(self, token: Token, length: int, pad: Padding) -> None:
        """The extent of an operand's affine position from its axis and padding, where nothing else gives it."""
        span, _ = self.span(token)
        if token.constant:
            message = f"the extent of '{token.axes[0]}' can't be read from '{token.text}', which has a constant"
            raise self.fail(ExtentError, f"{message}: give {token.axes[0]}=", token.columns())
        extent = self.pad(token, length, pad)[2]
        if extent < 1:
            message = f"the window of '{token.text}' reaches over {span + 1} tokens, its axis has {length}"
            padded = "" if pad == "VALID" else f" and padding {pad!r}"
            raise self.fail(ExtentError, message + padded, token.columns())
        self.learn(token.axes[0], extent, f"by '{token.text}'", token.columns(token.axes[0]))

    def span(self, token: Token) -> tuple[int, int]:
        """How far the windows of a token reach in all, and how much of that is below the position."""
        empty = [axis for axis in token.axes[1:] if self.sizes[axis] == 0]
        if empty:
            message = f"the window '{empty[0]}' of '{token.text}' has extent 0"
            raise self.fail(ExtentError, message, token.columns(empty[0]))
        pairs = zip(token.coefficients[1:], token.axes[1:], strict=True)
        reach = [d * (self.sizes[axis] - 1) for d, axis in pairs]
        return sum(map(abs, reach)), -sum(min(r, 0) for r in reach)

    def pad(self, token: Token, length: int | None, pad: Padding) -> tuple[int, int, int]:
        """What is padded below and above, and the extent of the position that follows. `length` is None for the
        output's tokens."""
        (span, below), stride = self.span(token), token.coefficients[0]
        if pad != "VALID" and token.constant:
            message = f"'{token.text}' has a constant, and padding={pad!r} shifts it as well: say it once"
            raise self.fail(NotationError, message, token.columns())
        if length is None:
            extent = self.sizes[token.axes[0]]
            length = stride * extent
        elif pad == "SAME":
            extent = -(-length // stride)
        elif pad == "VALID":
            # a window that only looks back reaches no further up than its position
            extent = (length - 1 - (span - below)) // stride + 1
        else:
            extent = (length + pad[0] + pad[1] - span - 1) // stride + 1
        if pad == "VALID":
            return below - token.constant, 0, extent
        if pad == "SAME":
            total = max((extent - 1) * stride + span + 1 - length, 0)
            return total // 2, total - total // 2, extent
        return pad[0], pad[1], extent

    def locate(self, token: Token, length: int | None, place: tuple[int, int], pad: Padding, boundary) -> Affine:
        """The index of an affine token whose axes are all known. `length` is None for the output's: there the token
        says how long its axis is."""
        (span, below), stride = self.span(token), token.coefficients[0]
        low, high, extent = self.pad(token, length, pad)
        extents = tuple(self.sizes[axis] for axis in token.axes)
        if pad == "SAME" and extents[0] != extent:
            source, columns = self.origin[token.axes[0]]
            message = (
                f"axis '{token.axes[0]}' has size {extents[0]} {source}, "
                f"but padding='SAME' over {length} tokens with stride {stride} gives {extent}"
            )
            raise self.fail(ExtentError, message, [*columns, *token.columns()])
        if length is None:
            length = stride * extent if pad == "SAME" else stride * (extent - 1) + span + 1 - low - high
        boundary = boundary or (None if pad == "VALID" else "zero")
        found = Affine(
            term=place[0],
            dim=place[1],
            text=token.text,
            axes=token.axes,
            coefficients=token.coefficients,
            extents=extents,
            offset=below - low,
            length=length,
            padding_high=high,
            boundary=boundary,
        )
        self._check_range(token, found)
        return found

    def _check_range(self, token: Token, found: Affine) -> None:
        if found.length < 1 and found.term == len(self.shapes):
            message = f"'{token.text}' gives the output an axis of {found.length} tokens: its padding crops everything"
            raise self.fail(IndexRangeError, message, token.columns())
        if found.boundary is None and (found.lowest < 0 or found.highest >= found.length):
            index = found.lowest if found.lowest < 0 else found.highest
            extents = ", ".join(f"'{a}' of extent {n}" for a, n in zip(found.axes, found.extents, strict=True))
            whose = "the output" if found.term == len(self.shapes) else f"operand {found.term}"
            message = (
                f"with axis {extents}, '{token.text}' reaches index {index}, outside 0..{found.length - 1} of {whose}:"
                " give a boundary or a padding"
            )
            raise self.fail(IndexRangeError, message, token.columns())

    def missing(self, tokens: Iterable[Token]) -> EquationError:
        """The error for axes whose extent nothing gives; a position follows once its windows are known."""
        needed = [(axis, token) for token in tokens for axis in token.axes[token.affine :]]
        unknown = {axis: token for axis, token in needed if axis not in self.sizes}
        columns = [column for axis, token in unknown.items() for column in token.columns(axis)]
        names = ", ".join(f"'{axis}'" for axis in unknown)
        wanted = ", ".join(f"{axis}=" for axis in unknown)
        return self.fail(ExtentError, f"nothing gives the extent of {names}: give {wanted}", columns)


def _state(equation: str, shapes: Shapes, dtypes: tuple[str, ...]) -> _Resolver:
    """The equation read and ready to be fitted; from here on an error shows the operands."""
    try:
        parsed = parse(equation)
    except NotationError as error:
        raise NotationError(f"{error}\n    {describe(shapes, dtypes)}") from None
    state = _Resolver(parsed, shapes, dtypes)
    if len(shapes) != len(parsed.operands):
        raise state.fail(ExtentError, f"the number of operands is {len(parsed.operands)}, {len(shapes)} were given")
    return state


def check_options(
    equation: str, shapes: Shapes, dtypes: tuple[str, ...], padding, boundary, sizes: Mapping[str, int]
) -> tuple[tuple[Padding, ...], tuple[str | None, ...], tuple[tuple[str, int], ...]]:
    """`padding` and `boundary` with an entry for each affine token, and the extents given by keyword; hashable."""
    state = _state(equation, shapes, dtypes)
    sums = [token for term in state.parsed.terms for token in term if token.affine]
    try:
        pads = tuple(normalize_padding(padding, [token.text for token in sums]))
        edges = tuple(normalize_boundary(boundary, [token.text for token in sums]))
    except ValueError as error:
        columns = [column for token in sums for column in token.columns()]
        raise state.fail(NotationError, str(error), columns) from None
    return pads, edges, state.check_sizes(sizes)


def resolve(
    equation: str,
    shapes: Shapes,
    dtypes: tuple[str, ...],
    padding: tuple[Padding, ...],
    boundary: tuple[str | None, ...],
    sizes: Mapping[str, int],
) -> Resolved:
    """Fit an equation to its operands' shapes: the extent of every axis and the index of every affine token.

    The options are those that `check_options` returns.
    """
    state = _state(equation, shapes, dtypes)
    terms = state.spell_out_ellipsis()
    state.read_sizes(terms, sizes)
    lengths = [*shapes, [None] * len(terms[OUTPUT])]
    places = [(k, dim, token) for k, term in enumerate(terms) for dim, token in enumerate(term)]
    sums = [(k, dim) for k, dim, token in places if token.affine]
    pads, edges = dict(zip(sums, padding, strict=True)), dict(zip(sums, boundary, strict=True))
    found: dict[tuple[int, int], Affine] = {}

    for k, dim, token in places:
        if token.affine:
            state.refuse_symbolic(token, lengths[k][dim])
    composed = [place for place in places if len(place[2].axes) > 1 and not place[2].affine and place[0] < len(shapes)]
    waiting = [place for place in places if place[2].affine]
    while composed or waiting:
        left = [(k, dim, token) for k, dim, token in composed if not state.decompose(token, shapes[k][dim], k)]
        ready = [place for place in waiting if state.ready(place[2], place[0] == len(shapes))]
        # what an operand says outright goes before what padding implies
        known = [place for place in ready if place[2].axes[0] in state.sizes]
        for k, dim, token in known:
            found[k, dim] = state.locate(token, lengths[k][dim], (k, dim), pads[k, dim], edges[k, dim])
        if len(left) == len(composed) and not known:
            unknown = {token.axes[0] for _, _, token in ready if not token.constant}
            for k, dim, token in ready:
                if not (token.constant and token.axes[0] in unknown):
                    state.infer(token, shapes[k][dim], pads[k, dim])
            if not ready:
                raise state.missing(token for _, _, token in (*left, *waiting))
        composed, waiting = left, [place for place in waiting if place not in known]
    return Resolved(equation, terms, shapes, state.sizes, tuple(found[place] for place in sums))


def normalize_padding(padding, sums: list[str]) -> list[Padding]:
    """`padding` as one "VALID", "SAME" or (low, high) for each affine token."""

    def one(value) -> Padding:
        if isinstance(value, str) and value.upper() in ("VALID", "SAME"):
            return "VALID" if value.upper() == "VALID" else "SAME"
        if is_int(value):
            return int(value), int(value)
        if not isinstance(value, str) and isinstance(value, Iterable):
            pair = tuple(value)
            if len(pair) == 2 and all(map(is_int, pair)):
                return int(pair[0]), int(pair[1])
        raise ValueError(
            f"padding={padding!r} must be 'VALID', 'SAME', an int, a pair (low, high), "
            f"or one of these for each affine token"
        )

    if padding is None:
        return ["VALID"] * len(sums)
    if isinstance(padding, str) or not isinstance(padding, Iterable):
        return [one(padding)] * len(sums)
    entries = list(padding)
    if len(entries) == 2 and all(map(is_int, entries)):
        return [one(entries)] * len(sums)
    if len(entries) != len(sums):
        raise _miscounted("padding", entries, sums)
    return [one(entry) for entry in entries]


def normalize_boundary(boundary, sums: list[str]) -> list[str | None]:
    """`boundary` as one name or None for each affine token."""
    one = isinstance(boundary, str) or not isinstance(boundary, Iterable)
    entries: list = [boundary] * len(sums) if one else list(boundary)
    for entry in [boundary] if one else entries:
        if entry is not None and (not isinstance(entry, str) or entry not in BOUNDARIES):
            raise ValueError(
                f"boundary={boundary!r} must be one of {', '.join(BOUNDARIES)}, or one for each affine token"
            )
    if len(entries) != len(sums):
        raise _miscounted("boundary", entries, sums)
    return entries


def _miscounted(name: str, entries: list, sums: list[str]) -> ValueError:
    tokens = ", ".join(sums) or "none"
    return ValueError(f"{name} has {len(entries)} entries, but the equation has {len(sums)} affine tokens ({tokens})")

"""The text of an equation, read into tokens; and the errors that show where it went wrong.

    n 2*i+r 2*j+s c, r s c o -> n i j o

A *token* is one axis of one operand: a name, a sum of axes (`2*i+r`), a product of axes (`(g c)`), or `...`.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable

NAME = r"[A-Za-z_][A-Za-z0-9_]*"
TERM = re.compile(rf"(?P<sign>[+-]?)(?:(?:(?P<coefficient>\d+)\*)?(?P<axis>{NAME})|(?P<constant>\d+))")
TOKEN = re.compile(r"\([^()]*\)|[^\s()]+|[()]")
ELLIPSIS = "..."


class EquationError(ValueError):
    """An equation that can't be read or doesn't fit its operands; the message shows where."""


class NotationError(EquationError):
    """The text of the equation is malformed."""


class ExtentError(EquationError):
    """An axis has two extents, or none, or operands of the wrong rank or number."""


class IndexRangeError(EquationError):
    """An affine index leaves its axis, and nothing says what stands outside."""


@dataclasses.dataclass(frozen=True)
class Token:
    """One axis of one operand, as written: its text, its column in the equation, and the axes it names.

    `coefficients`, one an axis, are those of a sum, and empty otherwise; a sum may also have a `constant`.
    """

    text: str
    column: int
    axes: tuple[str, ...]
    coefficients: tuple[int, ...] = ()
    constant: int = 0

    @property
    def affine(self) -> bool:
        """Whether the token is a sum."""
        return bool(self.coefficients)

    def columns(self, axis: str | None = None) -> range:
        """Where the token, or one axis in it, stands in the equation."""
        found = axis and re.search(rf"(?<![A-Za-z0-9_]){axis}(?![A-Za-z0-9_])", self.text)
        start, stop = found.span() if found else (0, len(self.text))
        return range(self.column + start, self.column + stop)


Term = tuple[Token, ...]


@dataclasses.dataclass(frozen=True)
class Parsed:
    """The text of an equation, read: the tokens of each operand and of the output."""

    equation: str
    operands: tuple[Term, ...]
    output: Term

    @property
    def terms(self) -> tuple[Term, ...]:
        """The operands, and the output last."""
        return (*self.operands, self.output)

    def error(
        self, kind: type[EquationError], message: str, columns: Iterable[int] = (), operands: str = ""
    ) -> EquationError:
        """An error that shows the equation with carets under `columns`, and the operands' shapes."""
        marked = set(columns)
        lines = [f"einsum: {message}", f"    {self.equation}"]
        if marked:
            lines.append("    " + "".join("^" if column in marked else " " for column in range(max(marked) + 1)))
        if operands:
            lines.append(f"    {operands}")
        return kind("\n".join(lines))


@functools.lru_cache(maxsize=4096)
def parse(equation: str) -> Parsed:
    """Read the text of an equation; the errors need no shapes."""
    bare = Parsed(equation, (), ())
    arrows = [match.start() for match in re.finditer("->", equation)]
    if len(arrows) != 1:
        columns = [column + k for column in arrows for k in (0, 1)]
        raise bare.error(NotationError, f"an equation has one '->', this one has {len(arrows)}", columns)
    left, right = equation[: arrows[0]], equation[arrows[0] + 2 :]
    if "," in right:
        raise bare.error(NotationError, "an equation has one output, but there is a ',' after '->'", _at(equation, ","))
    starts = [0, *(match.end() for match in re.finditer(",", left))]
    operands = tuple(_tokens(bare, text, start) for text, start in zip(left.split(","), starts, strict=True))
    parsed = Parsed(equation, operands, _tokens(bare, right, arrows[0] + 2))
    _check_output(parsed)
    return parsed


def _at(equation: str, text: str) -> range:
    start = equation.rindex(text)
    return range(start, start + len(text))


def _tokens(bare: Parsed, text: str, start: int) -> Term:
    """The tokens of one term."""
    tokens = tuple(_token(bare, match.group(), start + match.start()) for match in TOKEN.finditer(text))
    ellipses = [token for token in tokens if token.text == ELLIPSIS]
    if len(ellipses) > 1:
        raise bare.error(NotationError, "'...' stands at most once in a term", ellipses[1].columns())
    return tokens


def _token(bare: Parsed, text: str, column: int) -> Token:
    """One token: a name, a sum, a product or '...'."""
    if text == ELLIPSIS:
        return Token(text, column, ())
    where = range(column, column + len(text))
    if text in ("(", ")"):
        raise bare.error(NotationError, f"unbalanced '{text}': axes are composed as (g c), one level deep", where)
    if text.startswith("("):
        names = text[1:-1].split()
        for name in names:
            if not re.fullmatch(NAME, name):
                why = "a sum can't be composed" if re.search(r"[+\-*]", name) else "only names can be composed"
                raise bare.error(NotationError, f"'{name}' inside '{text}': {why}", where)
        if not names:
            raise bare.error(NotationError, "'()' composes no axes", where)
        return Token(text, column, tuple(names))
    if re.fullmatch(NAME, text):
        return Token(text, column, (text,))
    return _sum(bare, text, column)


def _sum(bare: Parsed, text: str, column: int) -> Token:
    """An affine sum of axes: the first axis is the position, the others are windows."""
    where = range(column, column + len(text))

    def fail(why: str) -> EquationError:
        return bare.error(NotationError, f"can't read '{text}': {why}", where)

    axes: list[str] = []
    coefficients: list[int] = []
    constant = at = 0
    while at < len(text):
        match = TERM.match(text, at)
        if match is None or (at > 0 and not match["sign"]):
            if re.search(r"\*\s*\d", text) or re.search(r"\d[A-Za-z_]", text):
                raise fail("a coefficient comes first, with a '*', as in 2*i")
            if text[0] in "+-" or text[-1] in "+-*":
                raise fail("a sum is written without spaces, as in 2*i+r-1")
            raise fail("a token is a name, a sum such as 2*i+r-1, a product such as (g c), or '...'")
        sign = -1 if match["sign"] == "-" else 1
        if match["axis"]:
            axes.append(match["axis"])
            coefficients.append(sign * int(match["coefficient"] or 1))
        else:
            constant += sign * int(match["constant"])
        at = match.end()
    if not axes:
        raise fail("a sum names at least one axis")
    if len(set(axes)) < len(axes):
        raise fail("an axis stands at most once in a sum; its coefficient says how often, as in 2*i")
    if 0 in coefficients:
        raise fail("a coefficient of 0 leaves the axis out")
    if coefficients[0] < 0:
        raise fail(f"the first axis is the position, and its coefficient must be positive, not {coefficients[0]}")
    return Token(text, column, tuple(axes), tuple(coefficients), constant)


def _check_output(parsed: Parsed) -> None:
    """Each axis of the output comes from an operand, and comes once; '...' is kept."""
    known = {axis for term in parsed.operands for token in term for axis in token.axes}
    seen: dict[str, Token] = {}
    for token in parsed.output:
        for axis in token.axes:
            if axis not in known:
                message = f"axis '{axis}' of the output appears in no operand"
                raise parsed.error(NotationError, message, token.columns(axis))
            if axis in seen:
                columns = [*seen[axis].columns(axis), *token.columns(axis)]
                raise parsed.error(NotationError, f"axis '{axis}' is repeated in the output", columns)
            seen[axis] = token
    dots = [token for term in parsed.operands for token in term if token.text == ELLIPSIS]
    kept = [token for token in parsed.output if token.text == ELLIPSIS]
    if dots and not kept:
        raise parsed.error(NotationError, "'...' must be kept in the output", dots[0].columns())
    if kept and not dots:
        raise parsed.error(NotationError, "'...' of the output appears in no operand", kept[0].columns())

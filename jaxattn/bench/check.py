"""`jaxattn check`: whether attention is right on this device, whichever way it is computed, and how fast it is.

Every way is held to "reference", which is a few lines of formula: values and every gradient, on small geometries.
"""

import functools
import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn import arguments
from jaxattn.arguments import Arrays
from jaxattn.attention import attention
from jaxattn.bench import machine
from jaxattn.bench.check_cases import CASES, INTERPRETED, TIMED, CheckCase
from jaxattn.bench.measure import one_line, sample
from jaxattn.errors import InputError
from jaxattn.kernels import backends, placed, sink
from jaxattn.kernels.backend import Backend
from jaxattn.kernels.reference import REFERENCE
from jaxattn.kernels.tpu import backend as tpu
from jaxattn.kernels.tpu import splash
from jaxattn.promotion import broadcasting

# Largest difference of an array's elements, over the largest element of the reference's.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
Function = Callable[[dict[str, Any]], dict[str, Any]]  # of what has a derivative, to values and gradients


class Outcome(NamedTuple):
    """What came of a way and a case: the largest difference, and of which array; or why there is none."""

    case: CheckCase
    way: str
    difference: float = math.nan
    of: str = ""
    reason: str = ""  # it does not support the case
    error: str = ""

    @property
    def wrong(self) -> bool:
        """A NaN is."""
        return bool(self.error) or not (self.reason or self.difference <= TOLERANCE[self.case.dtype])

    def __str__(self) -> str:
        if self.reason:
            return "-"
        return "FAILED" if self.error else f"{self.difference:.0e} {self.of}{' WRONG' * self.wrong}"


def run(interpret: bool):
    """Checks, times and prints. See `jaxattn check --help`."""
    begin = time.perf_counter()
    here = [x for x in backends.BACKENDS if x.platform in (None, jax.default_backend()) and x is not REFERENCE]
    outcomes = checked(CASES, here)
    if interpret:
        ways = [way._replace(name=f"{way.name}, interpreted") for way in (tpu.INTERPRETED, splash.INTERPRETED)]
        outcomes += checked(INTERPRETED, ways)
    print("difference from the reference: of which array (dx: the gradient by x); - where it can't\n")
    print(table(outcomes))
    print(f"\nmilliseconds, forward and with every gradient\n\n{speed(TIMED, [*here, REFERENCE])}\n")
    print(summary(outcomes, time.perf_counter() - begin))
    if any(outcome.wrong for outcome in outcomes):
        raise InputError("some results are wrong or missing: see the table, and report the line above")


def checked(cases: Sequence[CheckCase], ways: Sequence[Backend]) -> list[Outcome]:
    """Every way against the reference in every case. Compiling is what takes time, so a few are at it side by side."""
    with ThreadPoolExecutor(min(machine.threads(), 8)) as pool:
        return [
            outcome for outcomes in pool.map(lambda case: list(compared(case, ways)), cases) for outcome in outcomes
        ]


def compared(case: CheckCase, ways: Sequence[Backend]) -> Iterator[Outcome]:
    """What comes of each way."""
    expected: dict[str, np.ndarray] = {}
    for way in ways:
        if reason := refusal(way, case):
            yield Outcome(case, way.name, reason=reason)
            continue
        expected = expected or values(REFERENCE, case)
        try:
            found = values(way, case)
        except Exception as error:  # a way that fails is a line of the table
            yield Outcome(case, way.name, error=one_line(error))
            continue
        differences = {name: difference(found[name], x) for name, x in expected.items()}
        worst = max(differences, key=lambda name: (math.isnan(differences[name]), differences[name]))
        yield Outcome(case, way.name, differences[worst], worst)


def difference(x: np.ndarray, expected: np.ndarray) -> float:
    """The largest, over the largest number that is expected; -inf, an empty lse, has to be the same in both.

    >>> difference(np.array([1.0, 4.5, -np.inf]), np.array([1.0, 5.0, -np.inf]))
    0.1
    """
    x, expected = (np.asarray(y, np.float64) for y in (x, expected))
    empty = expected == -np.inf
    if (empty != (x == -np.inf)).any():
        return math.inf
    far = np.where(empty, 0, np.abs(np.where(empty, 0, x) - np.where(empty, 0, expected)))
    return float(far.max() / (np.abs(expected[~empty]).max(initial=0) or 1))


def values(way: Backend, case: CheckCase) -> dict[str, np.ndarray]:
    """What it returns, and the gradient of what has one. The reference computes in float32, whatever the case does."""
    function, real = as_function(way, case)
    fast = way is REFERENCE and jax.default_backend() == "cpu"  # to compile: it is run once
    if way is REFERENCE:
        real = {name: x.astype(np.float32) for name, x in real.items()}
    options = {"xla_backend_optimization_level": 0} if fast else None
    found = jax.jit(function, compiler_options=options)(real)
    return {name: np.asarray(x, np.float32) for name, x in found.items()}


def as_function(way: Backend, case: CheckCase, gradients: bool = True) -> tuple[Function, dict[str, Any]]:
    """A function of the arrays that have a gradient, and those. Products of float32 are exact, as on a CPU."""
    compute = functools.partial(computed, way, case.call())

    def function(real: dict[str, Any]) -> dict[str, Any]:
        if not gradients:
            return compute(real)
        found, pull = jax.vjp(compute, real)
        ramp = lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape).astype(x.dtype)
        # where nothing is seen lse is -inf, which has no derivative
        cotangents = {name: jnp.where(jnp.isinf(x), 0, ramp(x)) for name, x in found.items()}
        (pulled,) = pull(cotangents)
        return found | {f"d{name}": x for name, x in pulled.items()}

    return function, case.real()


@broadcasting
def computed(way: Backend, given: dict[str, Any], real: dict[str, Any]) -> dict[str, Any]:
    """`attention` by this way, which need not be one that it knows."""
    operands, options, offset = canonical(given | real)
    return dict(zip(("y", "lse"), sink.attend(*placed.whole(operands, options, offset), way), strict=False))


def canonical(given: dict[str, Any]) -> tuple[Any, Any, Any]:
    """What a kernel takes for the arguments of `attention`, with products of float32 as exact as on a CPU."""
    call = inspect.signature(attention).bind(precision="highest", **given)
    call.apply_defaults()
    traced = {name: call.arguments.pop(name) for name in Arrays._fields}
    arrays, settings = arguments.read(Arrays(**traced), **call.arguments)
    return *arguments.check(arrays, settings), arrays.query_offset


def refusal(way: Backend, case: CheckCase) -> str | None:
    """Why it can't, where it can't."""
    operands, options, offset = canonical(case.call() | case.real())
    return way.supports(*placed.whole(operands, options, offset))


def table(outcomes: Sequence[Outcome]) -> str:
    """A line a case, a column a way, and what went wrong in words."""
    by_case: dict[str, dict[str, Outcome]] = {}
    for outcome in outcomes:
        by_case.setdefault(outcome.case.name, {})[outcome.way] = outcome
    ways = list(dict.fromkeys(outcome.way for outcome in outcomes))
    rows = [["case", *ways]]
    rows += [[name, *(str(of.get(way, "")) for way in ways)] for name, of in by_case.items()]
    errors = [f"{x.way}, {x.case.name}: {x.error}" for x in outcomes if x.error]
    return "\n".join([aligned(rows), *errors])


def speed(cases: Sequence[CheckCase], ways: Sequence[Backend]) -> str:
    """A line a case, with the milliseconds of each way that can."""
    rows = [["case", *(way.name for way in ways)]]
    for case in cases:
        case = case if jax.default_backend() == "cpu" else case._replace(dtype="bfloat16")
        rows.append([case.name, *("-" if refusal(way, case) else timed(way, case) for way in ways)])
    return aligned(rows)


def timed(way: Backend, case: CheckCase) -> str:
    """Milliseconds forward and with gradients, or the error."""
    found = []
    try:
        for gradients in (False, True):
            function, real = as_function(way, case, gradients)
            real, function = jax.device_put(real), jax.jit(function)
            call = functools.partial(lambda f, x: jax.block_until_ready(f(x)), function, real)
            call()
            found.append(f"{1e3 * sample(call, 0.2):.3g}")
    except Exception as error:  # a way that fails is a word of the table
        return type(error).__name__
    return " / ".join(found)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{x:<{n}}" for x, n in zip(row, widths, strict=True)).rstrip() for row in rows)


def summary(outcomes: Sequence[Outcome], seconds: float) -> str:
    """One line for a report: the device, the versions, how many cases of each way were right, and which were not."""
    about, parts = machine.describe(), []
    for way in dict.fromkeys(outcome.way for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.way == way and not outcome.reason]
        wrong = [outcome.case.name for outcome in mine if outcome.wrong]
        parts.append(f"{way} {len(mine) - len(wrong)} of {len(mine)}{' but for ' * bool(wrong)}{' | '.join(wrong)}")
    names = ("jaxattn", "jax", "jaxlib", "libtpu")
    versions = [f"{name} {version}" for name in names if (version := machine.installed(name))]
    where = f"{jax.device_count()} × {about['device']}"
    return f"jaxattn check: {'; '.join([*parts, where, *versions, 'python ' + about['python'], f'{seconds:.0f} s'])}"

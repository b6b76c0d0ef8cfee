"""Ways compared: each is checked, and then all of them take turns, so that what disturbs one disturbs all."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxattn.bench.cases import Case
from jaxattn.bench.machine import forget_peak, peak_memory
from jaxattn.bench.programs import MODES, Program, make_program
from jaxattn.bench.ways import CannotError, Way

# Relative norm by which two results of a dtype may differ.
TOLERANCE = {"float32": 1e-4, "bfloat16": 4e-2, "float16": 1e-2}

# Bytes; what holds more is tried on a thin case first.
LARGE = 10**9


class Effort(NamedTuple):
    """How long is measured."""

    rounds: int  # turns that each program gets,
    seconds: float  # unless its runs would by then have taken as long as this, one a turn
    turn: float  # seconds that a turn lasts at least
    patience: float  # a program expected to take longer is not run
    memory: int  # bytes that a program may take


@dataclasses.dataclass
class Measurement:
    """One way in one mode. `status` is "ok", or why there is nothing to compare: "cannot", "skipped" for what would
    take too much time or memory, "differs" for a wrong result, "failed" for an exception."""

    way: str
    mode: str
    ours: bool = False
    status: str = "ok"
    note: str = ""
    samples: list[float] = dataclasses.field(default_factory=list)  # seconds
    compile_seconds: float | None = None
    temporaries: int | None = None
    difference: float | None = None  # of the result from the first way's, in relative norm

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Lower quartile, median, upper quartile of the samples.

        >>> Measurement("a", "forward", samples=[1.0, 2.0, 3.0, 4.0, 5.0]).quartiles
        (2.0, 3.0, 4.0)
        """
        low, middle, high = np.quantile(self.samples, (0.25, 0.5, 0.75))
        return float(low), float(middle), float(high)

    @property
    def median(self) -> float:
        return self.quartiles[1]

    def refuse(self, status: str, note: str):
        self.status, self.note = status, note


class SkippedError(Exception):
    """A program was not run; the message says what it would have taken."""


def compare(case: Case, ways: Sequence[Way], effort: Effort, say: Callable[[str], None]) -> list[Measurement]:
    """Measures every way in both modes. The first way that computes the case is what the others are checked against."""
    inputs, cotangent = jax.device_put(case.operands())  # once, for all
    found: list[Measurement] = []
    for mode in MODES:
        ready, truth = [], None
        for way in ways:
            say(f"{case.name}: {way.name}, {mode}")
            measured = Measurement(way.name, mode, way.ours)
            found.append(measured)
            try:
                refuse_if_hopeless(way, case, mode, effort, found)
                program = make_program(way, case, mode, inputs, cotangent)
                result = first_run(program, measured, effort)
                truth = truth or result
                check(measured, result, truth, case.dtype)
                ready.append((program, measured))
            except CannotError as error:
                measured.refuse("cannot", str(error))
            except SkippedError as error:
                measured.refuse("skipped", str(error))
            except Exception as error:  # a way that fails is a line of the table
                measured.refuse("failed", one_line(error))
        say(f"{case.name}: {len(ready)} ways take turns, {mode}")
        take_turns(ready, effort)
    return found


def refuse_if_hopeless(way: Way, case: Case, mode: str, effort: Effort, found: Sequence[Measurement]):
    """Skips what would take too long or too much memory, before anything is compiled at full size."""
    if way.needs(case) > effort.memory:
        raise SkippedError(f"would need {way.needs(case) / 1e9:.1f} GB, and {effort.memory / 1e9:.1f} GB may be used")
    forward = next((m for m in found if (m.way, m.mode, m.status) == (way.name, "forward", "ok")), None)
    if mode == "both" and forward is not None:
        if 3 * forward.median > effort.patience:
            raise SkippedError(f"would take more than {3 * forward.median:.0f} s")
        doubtful = 60 * forward.median > effort.patience  # backward passes 40 times slower than forward have been seen
    else:
        doubtful = way.needs(case) > LARGE
    if doubtful:
        small, times = case.thin()
        program = make_program(way, small, mode, *small.operands())
        forget_peak()
        before = peak_memory()
        expected, grown = times * sample(program.run, 0), times * (peak_memory() - before)
        if expected > effort.patience:
            raise SkippedError(f"would take about {expected:.0f} s, {times} times what a thin case takes")
        if grown > effort.memory:
            raise SkippedError(f"would need about {grown / 1e9:.1f} GB, {times} times what a thin case grows by")


def first_run(program: Program, measured: Measurement, effort: Effort) -> list[np.ndarray]:
    """Runs a program for its result; only where that has taken all patience does its time count."""
    measured.compile_seconds, measured.temporaries = program.compile_seconds, program.temporaries
    if program.temporaries is not None and program.temporaries > effort.memory:
        wanted, allowed = program.temporaries / 1e9, effort.memory / 1e9
        raise SkippedError(f"would need {wanted:.1f} GB of temporaries, and {allowed:.1f} GB may be used")
    start = time.perf_counter()
    outputs = program.run()
    seconds = time.perf_counter() - start
    if seconds > effort.patience:
        measured.samples.append(seconds)
    return program.numpy(outputs)


def check(measured: Measurement, result: Sequence[np.ndarray], truth: Sequence[np.ndarray], dtype: str):
    """Marks a result that is not the first way's."""
    measured.difference = max(difference(a, b) for a, b in zip(result, truth, strict=True))
    if not measured.difference <= TOLERANCE[dtype]:
        measured.refuse("differs", f"differs by {measured.difference:.1e} in norm; allowed: {TOLERANCE[dtype]:.0e}")


def difference(x: np.ndarray, truth: np.ndarray) -> float:
    """Relative norm of the difference; infinite where the shapes differ.

    >>> difference(np.array([3.0, 4.5]), np.array([3.0, 4.0]))
    0.1
    """
    if x.shape != truth.shape:
        return float("inf")
    x, truth = np.asarray(x, np.float64), np.asarray(truth, np.float64)
    return float(np.linalg.norm(x - truth) / (np.linalg.norm(truth) or 1.0))


def take_turns(programs: Sequence[tuple[Program, Measurement]], effort: Effort):
    """In every round each program runs once; one whose time is used up, or whose result is wrong, sits out."""
    for _ in range(effort.rounds):
        for program, measured in programs:
            if measured.status == "ok" and sum(measured.samples) < effort.seconds:
                try:
                    measured.samples.append(sample(program.run, effort.turn))
                except Exception as error:
                    measured.refuse("failed", one_line(error))


def one_line(error: Exception) -> str:
    """What an exception says, for a table."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def sample(run: Callable[[], object], turn: float) -> float:
    """Seconds of a run in a steady state: the median of a turn's runs, without the first where there are more.

    The first ones after a program that has given much memory back wait for the system to hand out pages.
    """
    times: list[float] = []
    while not times or sum(times) < turn:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:] or times))

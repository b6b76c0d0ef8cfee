"""What a TPU's compiler writes down of a program's Pallas kernels: their schedules, and the cycles that they come to.

A schedule is a list of bundles, the instructions of a cycle. Those inside a loop count as often as it runs: the loop
over a kernel's grid, and the loops of the kernel itself, whose lengths stand in the program that it was compiled from.
What hangs on a condition counts always; copies between HBM and VMEM go on beside it, and are not counted.
"""

import atexit
import functools
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

# Of all that the compiler can write: the schedules after registers are given out, and how each unit is used. The last
# schedule, "final_bundles", leaves out the bundles that wait.
PASSES = "packed-bundles-post-ra|pre-delay_hlo-static-per-bundle-utilization"
UNITS = ("MATMUL", "MATPUSH", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "FILL", "VSTORE", "SPILL", "SALU")
_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+([^{]*)\{\s*(\})?")
_LOOP = re.compile(r"^(\s*).*\bscf\.(?:for .* = (\S+) to (\S+) step (\S+)|while\b)")
_CONSTANT = re.compile(r"^\s*(%\S+) = arith\.constant (?:\{.*\} )?(-?\d+) : \w+$")
_CALL = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = [^\n]*custom_call_target="tpu_custom_call"[^\n]*$', re.MULTILINE)


class Kernel(NamedTuple):
    """One kernel of a program. `units` holds, for each unit, the cycles that it would need by itself for the text of
    the schedule, every loop once; FILL and SPILL are registers that are kept in VMEM for a while."""

    name: str
    cycles: int
    steps: int  # of its grid
    loops: tuple[int, ...]  # how often what is in each loop runs in a step
    known: bool  # whether all lengths are; what is in a loop of unknown length counts once
    bundles: int  # of the schedule's text
    vmem: int  # bytes
    units: dict[str, int]


@functools.cache
def ask() -> Path:
    """The folder of this process into which the compiler writes. It is told when it is loaded, at its first use."""
    folder = Path(tempfile.mkdtemp(prefix="jaxattn-schedules-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    told = {
        "xla_jf_dump_to": folder,
        "xla_jf_dump_llo_text": "true",
        "xla_jf_dump_llo_pass_label_regex": PASSES,
        "xla_mosaic_dump_to": folder,
    }
    flags = [os.environ.get("LIBTPU_INIT_ARGS", ""), *(f"--{name}={value}" for name, value in told.items())]
    os.environ["LIBTPU_INIT_ARGS"] = " ".join(filter(None, flags))
    return folder


def empty(folder: Path):
    """Removes what was written of another program."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def read_kernels(folder: Path, text: str) -> list[Kernel]:
    """The kernels of a compiled program's text, from what the compiler wrote of them into the folder.

    It compiles one of several that are the same, and writes of that one.
    """
    sources: dict[str, list[str]] = {}
    for path in _written(folder, "-mosaic-dump-*-post-late-loop-unroll.txt"):
        source = path.read_text()
        if name := re.search(r"func\.func @([\w.\-]+)\(", source):
            sources.setdefault(name[1], []).append(source)
    calls = [(call[1], call[0]) for call in _CALL.finditer(text)]
    read = {name: kernel for name, call in calls if (kernel := _read_kernel(folder, name, call, sources)) is not None}
    by_body = {_body(call): read[name] for name, call in calls if name in read}
    found = [(name, read.get(name) or by_body.get(_body(call) or "")) for name, call in calls]
    return [kernel._replace(name=name) for name, kernel in found if kernel is not None]


def _body(call: str) -> str | None:
    """The program of a kernel that is called."""
    body = re.search(r'"body":"([^"]+)"', call)
    return body[1] if body else None


def _read_kernel(folder: Path, name: str, call: str, sources: Mapping[str, list[str]]) -> Kernel | None:
    """One of which the compiler wrote; the first of the sources of its name is taken."""
    schedules = _written(folder, f"-{name}-*-packed-bundles-post-ra.txt")
    schedules = [path for path in schedules if "schedule-analysis" not in path.name]
    waiting = sources.get(re.sub(r"\.\d+$", "", name), [])
    if not schedules or not waiting:
        return None
    used = re.search(r'"used_scoped_memory_configs":\[\{[^}]*"size":"(\d+)"', call)
    steps, loops = read_loops(waiting.pop(0))
    runs = read_schedule(schedules[-1].read_text().splitlines())
    cycles, known = count(runs, steps, loops)
    units = _written(folder, f"-{name}-*-pre-delay_hlo-static-per-bundle-utilization.txt")
    return Kernel(
        name=name,
        cycles=cycles,
        steps=steps,
        loops=tuple(length or 1 for length in loops),
        known=known,
        bundles=sum(bundles for *_, bundles in runs),
        vmem=int(used[1]) if used else 0,
        units=read_units(units[-1].read_text().splitlines()) if units else {},
    )


def read_loops(source: str) -> tuple[int, list[int | None]]:
    """The steps of a kernel's grid, and how often each loop's contents run in a step, outer loops counted in; None
    where a length is none of the program's constants.

    >>> read_loops('''module {
    ...   func.func @kernel(%arg0: i32) attributes {iteration_bounds = array<i64: 4, 2>} {
    ...     scf.for %i = %c0_i32 to %c6_i32 step %c2_i32 : i32 {
    ...       scf.for %j = %c0 to %c5_7 step %c1 {
    ...       }
    ...     }
    ...     scf.if %first {
    ...       scf.for %i = %c0_i32 to %c4_i32 step %c1_i32 : i32 {
    ...       }
    ...     }
    ...     %end = arith.constant {in_layout = []} 8 : i32
    ...     scf.for %i = %c0_i32 to %end step %c4_i32 : i32 {
    ...     }
    ...     scf.for %i = %c0_i32 to %n step %c1_i32 : i32 {
    ... ''')
    (8, [3, 15, 4, 2, None])
    """
    bounds = re.search(r"iteration_bounds = array<i64: ([\d, ]+)>", source)
    steps = math.prod(map(int, bounds[1].split(","))) if bounds else 1
    loops: list[int | None] = []
    constants: dict[str, int] = {}
    around: list[tuple[int, int]] = []  # indentation and product of the loops that a line may stand in
    for line in source.splitlines():
        if constant := _CONSTANT.match(line):
            constants[constant[1]] = int(constant[2])
        indent = len(line) - len(line.lstrip())
        while around and indent <= around[-1][0]:  # one ends with a brace below its first letter
            around.pop()
        if "scf." not in line or not (loop := _LOOP.match(line)):
            continue
        ends = [_length(x, constants) for x in loop.groups()[1:]]
        outer = around[-1][1] if around else 1
        low, high, by = ends
        length = None if low is None or high is None or by is None else max(0, -(-(high - low) // by))
        loops.append(None if length is None else outer * length)
        around.append((indent, outer * (length or 1)))
    return steps, loops


def _length(name: str | None, constants: Mapping[str, int]) -> int | None:
    """A constant by its name, which mostly says it."""
    found = re.fullmatch(r"%c(-?\d+)(?:_\w+)?", name or "")
    return int(found[1]) if found else constants.get(name or "")


def read_schedule(lines: Iterable[str]) -> list[tuple[int, int, int]]:
    """Runs of bundles as (depth, loop, bundles), in the order of the text. Loops are numbered as they begin, the grid's
    first; outside of all of them it is -1.

    >>> read_schedule(["   0   :  { a }", " 0x1 LB: > { b }", " 0x2   : > {}", " 0x3 LB: >> { c }", " 0x4   : > { d }"])
    [(0, -1, 1), (1, 0, 2), (2, 1, 1), (1, 0, 1)]
    """
    runs: list[tuple[int, int, int]] = []
    depth, begun, stack = 0, 0, []
    for line in lines:
        if not (bundle := _BUNDLE.match(line)):
            continue
        if not bundle[2]:  # one that waits does not say how deep it is
            depth = bundle[1].count(">")
        if "LB" in bundle[1]:
            stack = [*stack[: depth - 1], begun]
            begun += 1
        loop = stack[depth - 1] if 0 < depth <= len(stack) else -1
        if runs and runs[-1][:2] == (depth, loop):
            runs[-1] = depth, loop, runs[-1][2] + 1
        else:
            runs.append((depth, loop, 1))
    return runs


def count(runs: Sequence[tuple[int, int, int]], steps: int, loops: Sequence[int | None]) -> tuple[int, bool]:
    """The cycles of a kernel in all its steps; and whether all loops were those that the program told of.

    >>> count([(0, -1, 10), (1, 0, 5), (2, 1, 7), (1, 0, 1)], 4, [3])
    (118, True)
    """
    grid = 1 if steps > 1 else 0  # the depth of the loop over it; of one step there is none
    inner = sorted({loop for depth, loop, _ in runs if depth > grid})
    known = len(inner) == len(loops) and None not in loops
    times = {loop: length or 1 for loop, length in zip(inner, loops, strict=True)} if len(inner) == len(loops) else {}
    total = 0
    for depth, loop, bundles in runs:
        total += bundles * (steps if depth >= grid else 1) * (times.get(loop, 1) if depth > grid else 1)
    return total, known


def read_units(lines: Iterable[str]) -> dict[str, int]:
    """For each unit the cycles that it would need by itself: the sum of what the bundles ask of it, over what it can do
    in one, which is the first line of numbers.

    >>> read_units(["4 4 3 4 2 1 3 3 1 1 2", "4 0 0 0 0 0 0 0 1 1 1", "4 0 0 1 0 0 0 0 0 1 0"])
    {'MATMUL': 2, 'VALU': 1, 'VSTORE': 1, 'SPILL': 2, 'SALU': 1}
    """
    rows = [list(map(int, parts)) for parts in map(str.split, lines) if _numbers(parts)]
    if not rows:
        return {}
    capacity, used = rows[0], [sum(column) for column in zip(*rows[1:], strict=True)]
    found = zip(UNITS, (-(-n // max(most, 1)) for n, most in zip(used, capacity, strict=False)), strict=False)
    return {unit: cycles for unit, cycles in found if cycles}


def _numbers(parts: Sequence[str]) -> bool:
    return len(parts) == len(UNITS) and all(part.isdigit() for part in parts)


def _written(folder: Path, ending: str) -> list[Path]:
    """Files named by the time at which they were written, the first first."""
    return sorted(folder.glob(f"[0-9]*{ending}"))

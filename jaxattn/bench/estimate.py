"""`jaxattn bench --topology`: what a chip's compiler expects of every way, on any machine. Nothing is run."""

import dataclasses
import fnmatch
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from jaxattn.bench import machine
from jaxattn.bench.cases import Case, select
from jaxattn.bench.chip_ways import WAYS
from jaxattn.bench.measure import one_line
from jaxattn.bench.report import aligned
from jaxattn.bench.run import check_writable, say, write_json, write_text
from jaxattn.bench.ways import CannotError, Way
from jaxattn.errors import InputError
from jaxattn.machine import traced_for
from jaxattn.train import hlo, schedule
from jaxattn.train.compile import CHIPS, Chip, find_devices
from jaxattn.train.schedule import Kernel

MODES = ("forward", "backward")
LEGEND = """\
ESTIMATES of the TPU's compiler, of one chip; nothing was run, and no figure here is a measured time.
us: the longer of its schedule and of what the program moves in HBM: arguments, results, and temporaries twice.
x: that, over the bound: every input read and every output written once, at the HBM's bandwidth.
backward: from q, k, v and do to dq, dk, dv; what a way needs of its forward pass is computed again in it.
MB: temporaries in HBM. VMEM: MB that the largest kernel holds. spill: the share of its instructions' cycles in which
a register is spilled. s: seconds that compiling took. ? marks loops whose length is not known, which count once."""
COLUMNS = ("us", "x", "MB", "VMEM", "spill", "s")


@dataclasses.dataclass
class Estimate:
    """One way in one mode. `status` is "ok", "cannot", "skipped" for what would not fit, or "failed"."""

    way: str
    mode: str
    ours: bool = False
    status: str = "ok"
    note: str = ""
    scheduled_seconds: float = 0.0  # kernels, and what XLA made around them
    moved_seconds: float = 0.0
    temporaries: int = 0
    compile_seconds: float = 0.0
    kernels: list[Kernel] = dataclasses.field(default_factory=list)
    known: bool = True  # whether the lengths of all loops are

    @property
    def seconds(self) -> float:
        """The longer of the two."""
        return max(self.scheduled_seconds, self.moved_seconds)

    @property
    def largest(self) -> Kernel | None:
        """The kernel that holds the most VMEM."""
        return max(self.kernels, key=lambda kernel: kernel.vmem, default=None)


def run(
    what: str,
    quick: bool,
    patterns: Sequence[str],
    topology: str,
    json_file: Path | None,
    markdown_file: Path | None = None,
    ways: Sequence[str] = (),
):
    """Compiles, and prints and writes what the compiler says. See `jaxattn bench --help`."""
    cases = select(what, quick, patterns, chip=True)
    kind = topology.partition(":")[0]
    if kind == "cpu":
        raise InputError(f"topology (={topology!r}) must be a TPU's, such as v5e:1x1: for a CPU nothing is estimated")
    check_writable(None, json_file)
    check_writable(None, markdown_file, "markdown")
    taken = {kind: named(WAYS[kind], ways) for kind in dict.fromkeys(case.kind for case in cases)}
    folder = schedule.ask()
    device, chip = find_devices(topology)[0], CHIPS[kind]
    names = ("jaxattn", "jax", "jaxlib", "libtpu")
    header = {"topology": topology, "versions": {name: machine.installed(name) for name in names}}
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    print(f"{topology}: {chip.clock} GHz, {chip.bandwidth} GB/s\nversions: {versions}\n{LEGEND}", flush=True)
    done: list[tuple[Case, dict[str, float], list[Estimate]]] = []
    for case in cases:
        bounds = {mode: case.bytes(mode) / chip.bandwidth / 1e9 for mode in MODES}
        found = [each for way in taken[case.kind] for each in estimates(way, case, device, chip, folder)]
        done.append((case, bounds, found))
        print(f"\n{table(case, bounds, found)}", flush=True)
        if json_file:
            write_json(json_file, as_json(header, chip, done))
        if markdown_file:
            write_text(markdown_file, markdown(f"{topology}; {versions}", done))
    if any(each.ours and each.status == "failed" for _, _, found in done for each in found):
        raise InputError("some results are missing: see the tables")


def named(ways: Sequence[Way], patterns: Sequence[str]) -> list[Way]:
    """Those whose name matches one of the patterns; without patterns, all of them."""
    found = [way for way in ways if not patterns or any(fnmatch.fnmatchcase(way.name, p) for p in patterns)]
    if not found:
        names = ", ".join(repr(way.name) for way in ways)
        raise InputError(f"ways (={', '.join(patterns)}) must name some of these, where * stands for anything: {names}")
    return found


def estimates(way: Way, case: Case, device: Any, chip: Chip, folder: Path) -> list[Estimate]:
    """What the compiler says of a way in each mode, or why it says nothing."""
    found = [Estimate(way.name, mode, way.ours) for mode in MODES]
    if (needed := way.needs(case)) > chip.memory * 2**30:
        return refused(found, "skipped", f"would need {needed / 1e9:.1f} GB, and the chip has {chip.memory} GiB")
    try:
        call = way.make(case).call
    except CannotError as error:
        return refused(found, "cannot", str(error))
    for each in found:
        say(f"{case.name}: {way.name}, {each.mode}")
        try:
            compile_into(each, call, case, device, chip, folder)
        except Exception as error:  # a way that fails is a line of the table; our own refusal says why
            reason = str(error).partition("can't, since ")[2].partition("; with None")[0]
            refused([each], *(("cannot", reason) if reason else ("failed", one_line(error))))
    return found


def refused(found: list[Estimate], status: str, note: str) -> list[Estimate]:
    for each in found:
        each.status, each.note = status, note
    return found


def compile_into(found: Estimate, call: Callable[..., Any], case: Case, device: Any, chip: Chip, folder: Path):
    """Compiles a function of a case's inputs, or its derivative alone."""
    *inputs, output = [jax.ShapeDtypeStruct(x, case.dtype, sharding=SingleDeviceSharding(device)) for x in flat(case)]
    function, arguments = call, inputs
    if found.mode == "backward":  # whose output is not asked for
        function, arguments = lambda *given: jax.vjp(call, *given[:-1])[1](given[-1]), [*inputs, output]
    jax.clear_caches()
    schedule.empty(folder)
    start = time.perf_counter()
    with traced_for("tpu", 1, chip.name):
        compiled = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
    found.compile_seconds = time.perf_counter() - start
    text, memory = compiled.as_text() or "", compiled.memory_analysis()
    around = hlo.read(text)
    found.kernels = schedule.read_kernels(folder, text)
    found.known = not around.unknown and all(kernel.known for kernel in found.kernels)
    if len(found.kernels) != text.count('custom_call_target="tpu_custom_call"'):
        found.known, found.note = False, "the schedule of a kernel was not found, and is not counted"
    cycles = around.cycles + sum(around.runs(kernel.name) * kernel.cycles for kernel in found.kernels)
    found.scheduled_seconds = cycles / chip.clock / 1e9
    found.temporaries = memory.temp_size_in_bytes if memory else 0
    moved = memory.argument_size_in_bytes + memory.output_size_in_bytes if memory else 0
    found.moved_seconds = (moved + 2 * found.temporaries) / chip.bandwidth / 1e9


def flat(case: Case) -> list[tuple[int, ...]]:
    """The shapes of inputs and output, with heads side by side where there are any."""
    shapes = case.shapes()
    if case.kind == "attention":
        tokens = (0, 1, 2, len(shapes) - 1)
        shapes = [(*x[:-2], x[-2] * x[-1]) if n in tokens else x for n, x in enumerate(shapes)]
    return shapes


def table(case: Case, bounds: dict[str, float], found: Sequence[Estimate]) -> str:
    """The table of one case. Ways of which there is nothing to say stand below, with the reason."""
    by = {(each.way, each.mode): each for each in found}
    rows = [("", *(cell for mode in MODES for cell in (mode, *[""] * (len(COLUMNS) - 1)))), ("", *COLUMNS * len(MODES))]
    notes = []
    for way in dict.fromkeys(each.way for each in found):
        mine = [by[way, mode] for mode in MODES]
        if any(each.status == "ok" for each in mine):
            rows.append((way, *(cell for each in mine for cell in cells(each, bounds[each.mode]))))
        said = mine[:1] if mine[0].note == mine[1].note else mine
        where = "" if len(said) == 1 else ", {}"
        notes += [f"  {way}{where.format(x.mode)}: {x.status}: {x.note}" for x in said if x.note]
    limits = ", ".join(f"{mode} {1e6 * bounds[mode]:.0f} us" for mode in MODES)
    return "\n".join([f"{case.name}: {case}; bound: {limits}", *aligned(rows), *notes])


def markdown(of: str, done: Sequence[tuple[Case, dict[str, float], list[Estimate]]]) -> str:
    """The table of all cases, for a page: microseconds, and in brackets that over the bound."""
    ways = list(dict.fromkeys(each.way for _, _, found in done for each in found if each.status == "ok"))
    heads = ["case", *(f"{mode}, {name}" for mode in MODES for name in ("bound", *ways))]
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for case, bounds, found in done:
        by = {(each.way, each.mode): each for each in found if each.status == "ok"}
        row = [f"`{case.name}`: {case}"]
        for mode in MODES:
            row.append(f"{1e6 * bounds[mode]:.0f}")
            mine = [by.get((way, mode)) for way in ways]
            row += ["" if x is None else f"{1e6 * x.seconds:.0f} ({x.seconds / bounds[mode]:.1f})" for x in mine]
        rows.append(row)
    said = f"Estimates of the TPU's compiler, in microseconds of one chip, which no chip has measured: {of}."
    return "\n".join([said, "", *(f"| {' | '.join(row)} |" for row in rows), ""])


def cells(each: Estimate, bound: float) -> tuple[str, ...]:
    """One way in one mode."""
    if each.status != "ok":
        return each.status, *[""] * (len(COLUMNS) - 1)
    vmem, spill = "-", "-"
    if largest := each.largest:
        vmem = f"{largest.vmem / 1e6:.0f}"
        spill = f"{largest.units.get('SPILL', 0) / largest.bundles:.0%}"
    shown = f"{1e6 * each.seconds:.4g}{'' if each.known else '?'}"
    return (
        shown,
        f"{each.seconds / bound:.2f}",
        f"{each.temporaries / 1e6:.1f}",
        vmem,
        spill,
        f"{each.compile_seconds:.0f}",
    )


def as_json(header: dict[str, Any], chip: Chip, done: Sequence[tuple[Case, dict[str, float], list[Estimate]]]) -> dict:
    """All of it, in seconds and bytes."""
    return {
        "header": header | {"estimates": True},
        "limits": {"bytes_per_second": chip.bandwidth * 1e9, "clock": chip.clock * 1e9},
        "cases": [
            {
                "name": case.name,
                "kind": case.kind,
                "case": str(case),
                "dtype": case.dtype,
                "bound_seconds": bounds,
                "estimates": [
                    dataclasses.asdict(each)
                    | {"seconds": each.seconds, "kernels": [kernel._asdict() for kernel in each.kernels]}
                    for each in found
                ],
            }
            for case, bounds, found in done
        ],
    }

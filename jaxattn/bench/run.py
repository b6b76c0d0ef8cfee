"""The benchmark from its arguments to the files that it leaves."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxattn.bench import attention_ways, conv_ways, figures, machine, report, torch_ways
from jaxattn.bench.cases import Case, select
from jaxattn.bench.measure import Effort, compare
from jaxattn.bench.ways import Way
from jaxattn.errors import InputError

WAYS = {
    "attention": [*attention_ways.WAYS, *torch_ways.ATTENTION],
    "conv": [*conv_ways.WAYS, *torch_ways.CONV],
}
SERIES = ("jaxattn", "shifted slices", "jax.nn")  # the ways that a scaling plot shows
PEERS = ("torch", "natten")


def run(what: str, quick: bool, patterns: Sequence[str], out: Path, json_file: Path | None):
    """Measures, prints and writes. See `jaxattn bench --help`."""
    cases = select(what, quick, patterns)
    check_writable(out, json_file)
    header = machine.describe() | {"missing": [name for name in PEERS if machine.installed(name) is None]}
    limits = machine.measure_limits(dict.fromkeys(case.dtype for case in cases))
    memory = int(0.6 * machine.free_memory())
    effort = Effort(3, 0.3, 0.01, 5, memory) if quick else Effort(7, 4, 0.5, 20, memory)
    print(report.header_text(header, limits), flush=True)
    results = []
    for case in cases:
        results.append(report.Result.of(case, compare(case, ways_of(case, header["missing"]), effort, say), limits))
        print(f"\n{report.table(results[-1])}", flush=True)
        if json_file:  # after every case, so that a run that is stopped leaves what it has measured
            write_json(json_file, report.as_json(header, limits, results))
    print(f"\n{report.summary(results)}")
    for path in draw(results, header, out):
        print(f"figure: {path}")
    if any(m.status == "differs" or (m.ours and m.status == "failed") for r in results for m in r.measurements):
        raise InputError("some results are wrong or missing: see the tables")


def say(what: str):
    """Progress, for someone who watches."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{what}", end="\r", file=sys.stderr, flush=True)


def ways_of(case: Case, missing: Sequence[str]) -> list[Way]:
    """The ways that are installed."""
    ways = WAYS[case.kind]
    ways = [way for way in ways if not case.series or way.name in SERIES]
    absent = {
        "torch": "torch" in missing,
        "NATTEN": "natten" in missing,
        "jax.nn, cuDNN": jax.default_backend() != "gpu",
    }
    return [way for way in ways if not any(gone and way.name.startswith(name) for name, gone in absent.items())]


def check_writable(out: Path | None, file: Path | None, name: str = "json"):
    """Before anything is measured: the folder, and the file of that argument, can be written."""
    if file is not None:
        if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
            raise InputError(f"{name} (={file}) must be in a folder that can be written to: {file.parent} is none")
        if file.is_dir():
            raise InputError(f"{name} (={file}) must be a file, not a folder")
    if out is None:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out (={out}) must be a folder that can be made: {error.strerror}") from error


def write_json(path: Path, values: dict):
    write_text(path, json.dumps(values, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str):
    """All of it or nothing."""
    whole = path.with_name(f"{path.name}.part")
    whole.write_text(text, encoding="utf-8")
    whole.replace(path)


def draw(results: Sequence[report.Result], header: dict, out: Path) -> list[Path]:
    """Writes the figures of what was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    caption = f"{header['device']}, {header['threads']} threads; {versions}"
    made = {}
    for kind in ("attention", "conv"):
        own = [r for r in results if r.case.kind == kind and not r.case.series]
        made |= {kind: figures.bars(own, caption)} if own else {}
    for series in ("tokens", "volume"):
        own = [r for r in results if r.case.series == series]
        made |= {f"scaling-{series}": figures.scaling(own, series)} if own else {}
    for name, figure in made.items():
        figure.savefig(out / f"{name}.png", dpi=160, facecolor="white")
    return [out / f"{name}.png" for name in made]

"""What is printed and written: a table for each case, a summary, and JSON."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jaxattn.bench.cases import Case
from jaxattn.bench.machine import Limits, load_warning
from jaxattn.bench.measure import Measurement
from jaxattn.bench.programs import MODES

LEGEND = """\
ms: median (lower quartile - upper quartile). fwd+bwd: the output, and the gradients by every input.
ratio: its time / jaxattn's; < marks a peer that is faster, ~ one that is faster by less than the spread (their
quartiles overlap). limit: what it would take at the rate of XLA's large matrix products, or of memory / its time.
MB: temporaries, as the compiler counts them. compile s: the seconds that it took over fwd+bwd."""


@dataclasses.dataclass
class Result:
    """A case and what was measured of it. The first way is ours."""

    case: Case
    measurements: list[Measurement]
    bounds: dict[str, float]  # seconds, by mode

    @classmethod
    def of(cls, case: Case, measurements: list[Measurement], limits: Limits) -> "Result":
        return cls(case, measurements, {mode: limits.seconds(case, mode) for mode in MODES})

    def ours(self, mode: str) -> Measurement | None:
        """Our measurement that the others are compared with."""
        ours = [m for m in self.measurements if m.mode == mode and m.ours]
        return ours[0] if ours and ours[0].status == "ok" else None

    def peers(self, mode: str) -> list[Measurement]:
        """Those that computed the case, the fastest first."""
        peers = [m for m in self.measurements if m.mode == mode and not m.ours and m.status == "ok"]
        return sorted(peers, key=lambda m: m.median)

    def ratio(self, m: Measurement) -> float | None:
        """Its time / ours."""
        ours = self.ours(m.mode)
        return m.median / ours.median if ours and m.status == "ok" else None

    def mark(self, m: Measurement) -> str:
        """ "<" for a peer that is faster than ours, "~" where the quartiles overlap."""
        ours = self.ours(m.mode)
        if ours is None or m.ours or m.status != "ok" or m.median >= ours.median:
            return ""
        return "<" if m.quartiles[2] < ours.quartiles[0] else "~"


def header_text(header: dict[str, Any], limits: Limits) -> str:
    """The machine, in a few lines."""
    rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s {dtype}" for dtype, rate in limits.flops.items())
    lines = [
        f"{header['device']}, {header['threads']} threads",
        f"limits: products {rates}; memory {limits.bandwidth / 1e9:.1f} GB/s",
        "versions: " + ", ".join(f"{name} {version}" for name, version in header["versions"].items()),
        "not installed, so not compared: " + (", ".join(header["missing"]) or "nothing"),
        load_warning(header["load"]) or f"load before the run: {header['load']}",
        LEGEND,
    ]
    return "\n".join(lines)


def table(result: Result) -> str:
    """The table of one case. Ways that cannot compute it stand below."""
    by = {(m.way, m.mode): m for m in result.measurements}
    rows = [("", "forward", "", "", "", "fwd+bwd", "", "", "", ""), COLUMNS]
    notes = []
    for way in sorted(dict.fromkeys(way for way, _ in by), key=lambda way: order(by[way, "forward"])):
        forward, both = by[way, "forward"], by[way, "both"]
        if {forward.status, both.status} != {"cannot"}:
            compiled = "-" if both.compile_seconds is None else f"{both.compile_seconds:.1f}"
            rows.append((way, *mode_cells(result, forward), *mode_cells(result, both), compiled))
        said = [forward] if forward.note == both.note else [forward, both]
        where = "" if len(said) == 1 else ", {}"
        notes += [f"  {way}{where.format(NAMES[m.mode])}: {m.status}: {m.note}" for m in said if m.note]
    return "\n".join([f"{result.case.name}: {result.case}", *aligned(rows), *notes])


COLUMNS = ("", "ms", "ratio", "limit", "MB", "ms", "ratio", "limit", "MB", "compile s")
NAMES = {"forward": "forward", "both": "fwd+bwd"}


def order(m: Measurement) -> tuple[bool, bool, float]:
    """Ours, then by time, then those that have none."""
    return not m.ours, m.status != "ok", m.median if m.status == "ok" else 0.0


def mode_cells(result: Result, m: Measurement) -> tuple[str, ...]:
    """One way in one mode."""
    memory = "-" if m.temporaries is None else f"{m.temporaries / 1e6:.1f}"
    if m.status != "ok":
        return m.status, "", "", memory
    low, middle, high = (f"{1e3 * x:.3g}" for x in m.quartiles)
    ratio = result.ratio(m)
    shown = "-" if ratio is None else f"{ratio:.2f}{result.mark(m) or ' '}"
    return f"{middle} ({low} - {high})", shown, f"{result.bounds[m.mode] / m.median:.1%}", memory


def aligned(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Columns as wide as they must be, to the right but for those in `left`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pad = lambda column, cell: cell.ljust(widths[column]) if column in left else cell.rjust(widths[column])
    return ["  " + "  ".join(pad(*cell) for cell in enumerate(row)).rstrip() for row in rows]


def summary(results: Sequence[Result]) -> str:
    """One line a case and mode: ours against the fastest peer."""
    rows = [("", "", "jaxattn ms", "best peer ms", "ratio", "", "the peer")]
    for result in results:
        for mode in MODES:
            ours, peers = result.ours(mode), result.peers(mode)
            if ours is None or not peers:
                continue
            best = peers[0]
            mine, its = (f"{1e3 * m.median:.3g}" for m in (ours, best))
            ratio = f"{result.ratio(best):.2f}"
            rows.append((result.case.name, NAMES[mode], mine, its, ratio, result.mark(best), best.way))
    faster = sorted({r.case.name for r in results for m in r.measurements if r.mark(m) == "<"})
    wrong = [f"{m.way} at {r.case.name}" for r in results for m in r.measurements if m.status == "differs"]
    lines = ["the fastest peer of each case", *aligned(rows, left=(0, 1, 5, 6))]
    lines.append("a peer is faster than jaxattn in: " + (", ".join(faster) or "no case"))
    return "\n".join(lines + ([f"wrong results: {', '.join(wrong)}"] if wrong else []))


def as_json(header: dict[str, Any], limits: Limits, results: Sequence[Result]) -> dict[str, Any]:
    """Everything that was measured, in seconds and bytes."""
    return {
        "header": header,
        "limits": {"flops_per_second": limits.flops, "bytes_per_second": limits.bandwidth},
        "cases": [
            {
                "name": r.case.name,
                "kind": r.case.kind,
                "case": str(r.case),
                "series": r.case.series,
                "place": r.case.place,
                "dtype": r.case.dtype,
                "bound_seconds": r.bounds,
                "measurements": [measurement_json(r, m) for m in r.measurements],
            }
            for r in results
        ],
    }


def measurement_json(result: Result, m: Measurement) -> dict[str, Any]:
    values = dataclasses.asdict(m) | {"ratio": result.ratio(m), "mark": result.mark(m)}
    if m.difference is not None and not math.isfinite(m.difference):
        values["difference"] = None  # JSON has no infinity
    if m.status == "ok":
        low, middle, high = m.quartiles
        values |= {"lower_quartile": low, "median": middle, "upper_quartile": high}
        values["share_of_limit"] = result.bounds[m.mode] / middle
    return values

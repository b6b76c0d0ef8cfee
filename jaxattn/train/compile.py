"""`jaxattn compile`: what a training step would need on a machine that is not there, from that machine's compiler."""

import contextlib
import importlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.errors import InputError, needs_extra
from jaxattn.machine import traced_for
from jaxattn.train import hlo, schedule
from jaxattn.train.config import Config
from jaxattn.train.data.dataset import Arrays, Dataset
from jaxattn.train.program import assemble
from jaxattn.train.sharding import batch_sharding, make_mesh

STEPS = 1000  # of a run; their number changes constants of the schedule, nothing else


class Chip(NamedTuple):
    """Public figures of a chip: its generation, clock in GHz, TFLOP/s in bfloat16, GB/s and GiB of its memory."""

    name: str
    clock: float
    tflops: float
    bandwidth: float
    memory: int


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 1.05, 275, 1228, 32),
        Chip("v5e", 1.5, 197, 819, 16),
        Chip("v5p", 1.75, 459, 2765, 95),
        Chip("v6e", 1.75, 918, 1640, 32),
    )
}


class Report(NamedTuple):
    """What the compiler says of one step on one device. Sizes are in bytes.

    `peak` is what must fit: arguments, outputs that do not take their place, temporaries and code. `limit` is the
    device's memory, None for a CPU. `flops` and `bytes` are XLA's count, which takes a loop's contents once, and what
    Pallas kernels say of themselves.
    """

    topology: str
    devices: int
    arguments: int
    outputs: int
    aliased: int  # of the outputs, what lies where arguments were
    temporaries: int
    code: int
    peak: int
    limit: int | None
    flops: float
    bytes: float  # read and written
    text: hlo.Text
    kernels: tuple[schedule.Kernel, ...]  # of Pallas, whose cycles are none of the text's
    seconds: float  # that tracing and compiling took

    @property
    def fits(self) -> bool:
        """Whether the step fits the device's memory, as far as that is known."""
        return self.limit is None or self.peak <= self.limit

    @property
    def of_kernels(self) -> int:
        """Cycles of a step in Pallas kernels, each as often as it runs."""
        return sum(self.text.runs(kernel.name) * kernel.cycles for kernel in self.kernels)

    @property
    def unread(self) -> int:
        """Kernels whose schedule was not found, or with a loop of unknown length, which counts once."""
        return len(self.text.kernels) - sum(kernel.known for kernel in self.kernels)


def find_devices(topology: str) -> list[Any]:
    """The devices of a machine that `topology` describes: "v5e:16x16" as TPUs are named, or "cpu:8" for virtual ones.

    Raises:
      ValueError: a kind or a shape that there is not.
      ImportError: the TPU's compiler is not installed.
    """
    kind, _, shape = topology.partition(":")
    if kind not in (*CHIPS, "cpu") or not re.fullmatch(r"\d+" if kind == "cpu" else r"\d+(x\d+){1,2}", shape):
        raise InputError(
            f"topology (={topology!r}) must be KIND:SHAPE, such as v5e:4x4, of {', '.join(CHIPS)}, or cpu:N"
        )
    if kind == "cpu":
        return _virtual(topology, int(shape))
    with needs_extra("tpu"):
        importlib.import_module("libtpu")
    # libtpu asks the cloud that it takes itself to be in, and locks the TPU, unless it is told otherwise
    told = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for name, value in told.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise InputError(f"topology (={topology!r}) must be one that the TPU's compiler knows: {error}") from error


def _virtual(topology: str, count: int) -> list[Any]:
    with contextlib.suppress(RuntimeError):  # JAX has its devices already
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if not 1 <= count <= len(devices):
        raise InputError(
            f"topology (={topology!r}) must be cpu:1 to cpu:{len(devices)}, as this process has {len(devices)} devices"
        )
    return devices[:count]


def compile_report(
    function: jax.stages.Wrapped, *arguments: Any, topology: str, devices: int, folder: Path | None = None
) -> Report:
    """Compiles a jitted function for a machine, and reports what its compiler says.

    Args:
      function: what `jax.jit` returns.
      arguments: `jax.ShapeDtypeStruct`s whose shardings are over devices of `find_devices`.
      topology: as in `find_devices`.
      devices: how many of them there are.
      folder: where the TPU's compiler was asked to write schedules, by `schedule.ask`.

    Raises:
      ValueError: the step does not fit, so there is no program; the compiler's own account is in the message.
    """
    kind = topology.partition(":")[0]
    platform = "cpu" if kind == "cpu" else "tpu"
    if folder:
        schedule.empty(folder)
    start = time.perf_counter()
    with traced_for(platform, devices, None if kind == "cpu" else kind):
        lowered = function.trace(*arguments).lower(lowering_platforms=(platform,))
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(f"the step does not fit {topology}; its compiler says: {_brief(str(error))}") from error
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
    names = {
        "arguments": "argument",
        "outputs": "output",
        "aliased": "alias",
        "temporaries": "temp",
        "code": "generated_code",
    }
    sizes = {ours: getattr(memory, f"{theirs}_size_in_bytes") for ours, theirs in names.items()}
    written = compiled.as_text() or ""
    return Report(
        topology=topology,
        devices=devices,
        **sizes,
        peak=sum(sizes.values()) - 2 * sizes["aliased"],
        limit=CHIPS[kind].memory * 2**30 if kind in CHIPS else None,
        flops=costs.get("flops", float("nan")),
        bytes=costs.get("bytes accessed", float("nan")),
        text=hlo.read(written),
        kernels=tuple(schedule.read_kernels(folder, written)) if folder else (),
        seconds=time.perf_counter() - start,
    )


def _brief(message: str) -> str:
    """The lines that say how much is wanted and of what, without the list of the largest arrays."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines[:6])


def plan_step(config: Config, topology: str, mesh: str, image_shape: tuple[int, ...], classes: int) -> Report:
    """The report of a configuration's training step, for images that need not be there either."""
    config.check()
    if config.mix == "both":
        raise InputError("mix (='both') must be one network: --mix conv or --mix attention")
    if min(image_shape) < 1 or classes < 1:
        raise InputError(f"image_shape (={image_shape}) and classes (={classes}) must be at least 1")
    folder = None if topology.startswith("cpu") else schedule.ask()
    devices = find_devices(topology)
    over = make_mesh(mesh, devices)
    program = assemble(config, _described(image_shape, classes), STEPS, over)
    lies, size = batch_sharding(over), config.batch_size
    batch = {
        "image": jax.ShapeDtypeStruct((size, *image_shape), jnp.uint8, sharding=lies["image"]),
        "label": jax.ShapeDtypeStruct((size,), jnp.int32, sharding=lies["label"]),
    }
    return compile_report(program.step, program.state, batch, topology=topology, devices=len(devices), folder=folder)


def _described(image_shape: tuple[int, ...], classes: int) -> Dataset:
    """A data set without images."""
    nothing = Arrays(np.zeros((0, *image_shape), np.uint8), np.zeros(0, np.int32))
    middle = np.full(image_shape[-1], 0.5, np.float32)
    names = tuple(map(str, range(classes)))
    return Dataset("described", names, image_shape, middle, middle, nothing, nothing, nothing)


def describe(report: Report) -> str:
    """A report as lines for people."""
    chip = CHIPS.get(report.topology.partition(":")[0])
    rows = [
        ("arguments", _size(report.arguments), "weights, moments, batch"),
        ("outputs", _size(report.outputs), f"{_size(report.aliased)} of them in the arguments' place"),
        ("temporaries", _size(report.temporaries), ""),
        ("code", _size(report.code), ""),
        ("memory per device", _size(report.peak), _verdict(report)),
        ("operations", f"{report.flops / 1e12:.3g} TFLOP", ""),
    ]
    if chip:
        rows[-1] = (*rows[-1][:2], f"{report.flops / chip.tflops / 1e9:.3g} ms at {chip.tflops} TFLOP/s")
        moving, at = report.bytes / chip.bandwidth / 1e6, lambda n: f"{n / chip.clock / 1e6:.3g} ms at {chip.clock} GHz"
        rows.append(("bytes moved", _size(report.bytes), f"{moving:.3g} ms at {chip.bandwidth} GB/s"))
        cycles = report.text.cycles + report.of_kernels
        rows.append(("cycles, estimated", f"{cycles:,}", at(cycles)))
        if kernels := report.text.kernels:
            note = f"{at(report.of_kernels)}, {sum(times for _, times in kernels)} runs of {len(kernels)} kernels"
            note += f", {report.unread} of which are not read, or not whole" if report.unread else ""
            rows.append(("of them in Pallas", f"{report.of_kernels:,}", note))
    lines = [f"{report.topology}: {report.devices} devices, compiled in {report.seconds:.0f} s"]
    lines += [f"  {name:<20}{value:>14}  {note}".rstrip() for name, value, note in rows]
    lines += [f"  collectives of a device and step{'' if report.text.collectives else ': none'}"]
    lines += [f"    {each.kind:<18}{each.number:>14,}  {_size(each.bytes)}" for each in report.text.collectives]
    if report.text.loops or report.text.unknown:
        lines.append(
            f"  {report.text.loops + report.text.unknown} loops: collectives and cycles count as often as they run "
            f"(once in {report.text.unknown} of unknown length), operations once"
        )
    return "\n".join(lines)


def _verdict(report: Report) -> str:
    if report.limit is None:
        return ""
    return f"{'fits' if report.fits else 'DOES NOT FIT'} {_size(report.limit)}"


def _size(count: int | float) -> str:
    """Bytes in the unit that suits.

    >>> _size(512), _size(3 * 2**20), _size(5 * 2**29)
    ('512 B', '3.00 MiB', '2.50 GiB')
    """
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 2**power:
            return f"{count / 2**power:.2f} {unit}"
    return f"{count} B"


def write_report(report: Report, path: Path):
    """The report as JSON, with the names that it has here."""
    values = report._asdict() | {"text": report.text._asdict(), "fits": report.fits}
    values["kernels"] = [kernel._asdict() for kernel in report.kernels]
    values["text"]["collectives"] = [each._asdict() for each in report.text.collectives]
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

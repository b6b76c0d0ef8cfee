"""The machine: what it is, and the two rates that XLA reaches on it, measured, as limits to compare with."""

import contextlib
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PACKAGES = ("jaxattn", "jax", "jaxlib", "flax", "numpy", "torch", "natten")


class Limits(NamedTuple):
    """What the machine reaches: FLOP/s of a matrix product by dtype, and bytes/s of memory, read and written."""

    flops: dict[str, float]
    bandwidth: float

    def seconds(self, case, mode: str) -> float:
        """The least time in which a case can be computed: its products at the rate of products, or its inputs and
        outputs moved once."""
        return max(case.flops(mode) / self.flops[case.dtype], case.bytes(mode) / self.bandwidth)


def measure_limits(dtypes: Iterable[str]) -> Limits:
    """Matrix products of 2048² (8192² on an accelerator), and one pass over an array that no cache holds.

    The pass writes where it has read: new memory would measure how fast the system hands out pages.
    """
    cpu = jax.default_backend() == "cpu"
    n, length = (2048, 2**26) if cpu else (8192, 2**28)
    square = jax.jit(lambda x: x @ x)  # of a matrix that is its own square
    flops = {dtype: 2 * n**3 / best_seconds(square, jnp.full((n, n), 1 / n, dtype)) for dtype in dtypes}
    array = jnp.ones(length, jnp.float32)
    moved = 2 * array.nbytes
    return Limits(flops, moved / best_seconds(jax.jit(lambda x: x + 1, donate_argnums=0), array))


def best_seconds(step: Callable[[jax.Array], jax.Array], x: jax.Array, times: int = 5) -> float:
    """The shortest of a few steps, each from what the last one returned: a limit is what is reached undisturbed."""
    x = jax.block_until_ready(step(x))
    samples = []
    for _ in range(times):
        start = time.perf_counter()
        x = jax.block_until_ready(step(x))
        samples.append(time.perf_counter() - start)
    return min(samples)


def describe() -> dict[str, Any]:
    """The device, its threads, its load before anything is measured, and the versions."""
    device = jax.devices()[0]
    return {
        "device": f"{device.platform}: {processor() if device.platform == 'cpu' else device.device_kind}",
        "threads": threads(),
        "load": None if sys.platform == "win32" else os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := installed(name))},
    }


def threads() -> int:
    """The processors that this process may use; `taskset` gives it fewer."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def processor() -> str:
    """The CPU's name where the system tells."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def free_memory() -> int:
    """Bytes that the device can still give."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except OSError:
        return 8 * 2**30  # no system that says: a guess that most can give


def peak_memory() -> int:
    """The most bytes that the process has had in memory since `forget_peak`; 0 where no system says."""
    try:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 0


def forget_peak():
    """Let `peak_memory` begin again, where the system can."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def load_warning(load: float | None) -> str | None:
    """What to print where others use the machine too."""
    if load is None or load < 0.3 * threads():
        return None
    return f"warning: the load was {load:.1f} before the run; what else runs here disturbs the times"

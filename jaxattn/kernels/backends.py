"""The ways to compute attention, and the choice among them."""

from jaxattn import machine
from jaxattn.kernels.backend import Backend
from jaxattn.kernels.operands import Operands, Options
from jaxattn.kernels.reference import REFERENCE
from jaxattn.kernels.tpu.backend import TPU
from jaxattn.kernels.xla import XLA

# Unless one is named, the first that supports the operands is taken.
BACKENDS: tuple[Backend, ...] = (TPU, XLA, REFERENCE)


def choose(implementation: str | None, operands: Operands, options: Options) -> tuple[Backend, dict[str, str]]:
    """The backend, and of each of this machine's that can't, why."""
    by_name = {backend.name: backend for backend in BACKENDS}
    if implementation is not None and implementation not in tuple(by_name):
        allowed = ", ".join(map(repr, by_name))
        raise ValueError(f"attention: implementation (={implementation!r}) must be None or one of {allowed}")
    here = machine.backend()
    found = {
        name: backend.supports(operands, options) if backend.platform in (None, here) else _elsewhere(backend, here)
        for name, backend in by_name.items()
        if backend.platform in (None, here) or name == implementation
    }
    refused = {name: reason for name, reason in found.items() if reason is not None}
    if implementation in refused:
        raise ValueError(
            f"attention: implementation (={implementation!r}) can't, since {refused[implementation]}; with None, the "
            f"first of those that can is taken: {', '.join(name for name in found if name not in refused)}"
        )
    wanted = [implementation] if implementation is not None else [name for name in found if name not in refused]
    if not wanted:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise ValueError(f"attention: no implementation can ({reasons})")
    return by_name[wanted[0]], refused


def _elsewhere(backend: Backend, here: str) -> str:
    return f"it runs on a {backend.platform} alone, and this is a {here}"

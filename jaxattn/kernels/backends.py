"""The ways to compute attention, and the choice among them."""

import os

from jaxattn import machine
from jaxattn.kernels import parted
from jaxattn.kernels.backend import Backend
from jaxattn.kernels.operands import Operands, Options
from jaxattn.kernels.reference import REFERENCE
from jaxattn.kernels.tpu.backend import TPU
from jaxattn.kernels.tpu.splash import SPLASH
from jaxattn.kernels.xla import XLA

# Unless one is named, the first that supports the operands is taken. The TPU's own kernels are to be named: they are
# right where they are interpreted, and the compiler says that they are fast, but no chip has run them yet.
BACKENDS: tuple[Backend, ...] = (SPLASH, XLA, TPU, REFERENCE)
VARIABLE = "JAXATTN_IMPLEMENTATION"  # of the environment: whoever runs a program can turn kernels on and off


def asked(implementation: str | None) -> tuple[str | None, ...]:
    """What is asked for: by the environment, which is a wish, and by the program, which is an order."""
    wish = os.environ.get(VARIABLE)
    if not wish:
        return (implementation,)
    if wish not in (names := [backend.name for backend in BACKENDS]):
        raise ValueError(f"attention: {VARIABLE} (={wish!r}) must be unset or one of {', '.join(map(repr, names))}")
    return wish, implementation


def choose(asked: tuple[str | None, ...], operands: Operands, options: Options) -> tuple[Backend, dict[str, str]]:
    """The backend, and of each of this machine's that can't, why."""
    wish, implementation = asked[0], asked[-1]
    by_name = {backend.name: backend for backend in BACKENDS}
    if implementation is not None and implementation not in tuple(by_name):
        allowed = ", ".join(map(repr, by_name))
        raise ValueError(f"attention: implementation (={implementation!r}) must be None or one of {allowed}")
    found = {
        name: _elsewhere(backend, asked, operands) or backend.supports(operands, options)
        for name, backend in by_name.items()
        if backend.platform in (None, machine.backend()) or name == implementation
    }
    if wish in found and found[wish] is None:
        implementation = wish
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


def _elsewhere(backend: Backend, asked: tuple[str | None, ...], operands: Operands) -> str | None:
    """Why it can't here, wherever the window is."""
    if backend.platform not in (None, machine.backend()):
        return f"it runs on a {backend.platform} alone, and this is a {machine.backend()}"
    named = backend.name == asked[-1] or (backend.name in asked and parted.known(operands))
    if backend.opaque and not machine.alone() and not named:
        return (
            f"the compiler can't split it over the {machine.device_count()} devices: call attention inside shard_map, "
            f"or with implementation={backend.name!r} on a mesh of Explicit axes, or where nothing is sharded"
        )
    return None

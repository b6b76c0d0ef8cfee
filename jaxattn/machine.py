"""The machine that a function is traced for: this one, unless it is compiled for another."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_elsewhere: contextvars.ContextVar[tuple[str, int] | None] = contextvars.ContextVar("elsewhere", default=None)


def backend() -> str:
    """ "cpu", "gpu" or "tpu"."""
    elsewhere = _elsewhere.get()
    return jax.default_backend() if elsewhere is None else elsewhere[0]


def device_count() -> int:
    """All its devices."""
    elsewhere = _elsewhere.get()
    return jax.device_count() if elsewhere is None else elsewhere[1]


@contextlib.contextmanager
def traced_for(backend: str, devices: int) -> Iterator[None]:
    """In the block, functions are traced as they would be on a machine with so many devices of that kind."""
    token = _elsewhere.set((backend, devices))
    try:
        yield
    finally:
        _elsewhere.reset(token)

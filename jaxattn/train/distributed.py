"""Several processes that train one network, joined by `jax.distributed`, none of which outlives another for long."""

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax

from jaxattn.errors import InputError
from jaxattn.train import peers

SILENCE = (
    25  # seconds without a heartbeat after which JAX gives a process up: one that hangs, which no connection shows
)
GRACE = 3  # seconds in which a failed collective is put down to the process that caused it
KEY = "jaxattn/peers"


class Group(NamedTuple):
    """What `jax.distributed.initialize` is given; None is left to it to find out."""

    coordinator: str | None
    processes: int | None
    process: int | None


def is_main() -> bool:
    """Whether this process prints and writes files: process 0, or the only one."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


@contextlib.contextmanager
def joined(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> Iterator[None]:
    """The block runs in one of several processes whose devices are one mesh; in a process alone, it simply runs.

    With none of the three arguments, the launcher decides: Cloud TPU pods, GKE, SLURM and Open MPI say how many
    processes they started. The block must hold all that the process does with JAX. Its end waits for all processes.
    If one process is killed, fails or is cut off, the others print which, and exit with status 1 within 30 s.

    Args:
      coordinator: HOST:PORT of process 0, at a free port.
      processes: how many there are.
      process: which this is, from 0.

    Raises:
      ValueError: some of the arguments without the others, or one out of its range, by name.

    >>> with joined():
    ...     is_main()
    True
    """
    group = find_group(coordinator, processes, process)
    if group is None:
        yield
        return
    # CPUs talk by Gloo, JAX's default
    jax.distributed.initialize(*group, heartbeat_timeout_seconds=SILENCE, shutdown_timeout_seconds=SILENCE)
    watch = _watch()
    try:
        yield
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:  # a process that was told to stop, as all of them are
            watch.finish()
            raise
        # A collective fails here because a process died there: then the watch says so, and ends this process.
        time.sleep(GRACE)
        watch.lost = lambda process, host: None
        atexit.register(peers.end)  # after the error is printed, and instead of JAX's wait for the others
        raise
    watch.finish()


def find_group(coordinator: str | None, processes: int | None, process: int | None) -> Group | None:
    """How this process joins others; None if it is alone."""
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3:
        return Group(None, None, None) if launched() > 1 else None
    if missing or coordinator is None or processes is None or process is None:
        raise InputError(
            f"{' and '.join(missing)} (=None) must be given too: coordinator, processes and process go together"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"coordinator (={coordinator!r}) must be HOST:PORT, where process 0 listens")
    if processes < 1:
        raise InputError(f"processes (={processes}) must be at least 1")
    if not 0 <= process < processes:
        raise InputError(f"process (={process}) must be at least 0 and less than processes (={processes})")
    return Group(coordinator, processes, process) if processes > 1 else None


def launched() -> int:
    """The number of processes that a launcher which JAX knows started; 1 without any."""
    # JAX tells what it detects to nobody, and its initialize fails where it detects nothing.
    from jax._src.clusters import ClusterEnv

    for launcher in ClusterEnv._cluster_types:
        # only the pods of an indexed job are processes of one run
        elsewhere = launcher.__name__ == "K8sCluster" and "JOB_COMPLETION_INDEX" not in os.environ
        if not launcher.opt_in_only_method and not elsewhere and launcher.is_env_present():
            return launcher.get_process_count()
    return 1


def _watch() -> peers.Peers:
    """Watches the other processes, whose addresses go through JAX's coordination service."""
    from jax._src.distributed import global_state as state  # no public name gives the service

    client, address = state.client, state.coordinator_address
    if client is None or address is None:
        raise RuntimeError("jax.distributed is not initialized")
    host = address.rpartition(":")[0].strip("[]")
    _outlast_aborts()
    return peers.Peers(
        state.process_id,
        state.num_processes,
        publish=lambda text: client.key_value_set(KEY, text),
        find=lambda: f"{host} {client.blocking_key_value_get(KEY, 60_000)}",
    )


def _outlast_aborts():
    """When process 0 dies, JAX's client aborts this one within milliseconds: that waits until the watch has spoken."""
    # Not signal.signal: Python would run the handler in the main thread, after the abort.
    ctypes.CDLL(None).signal(int(signal.SIGABRT), _aborted)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(number: int):
    time.sleep(1)  # the watch ends this process meanwhile, if it has lost one
    print("jaxattn: JAX ended this process for the error above; --resume goes on", file=sys.stderr)
    peers.end()

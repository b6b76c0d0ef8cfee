"""What the tests that start the real command in a process of its own share."""

import os
from pathlib import Path


def environment(cache: Path) -> dict[str, str]:
    """One device, and a user's compiler flags; what one process compiles, the next need not."""
    given = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return given | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

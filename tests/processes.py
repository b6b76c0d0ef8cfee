"""What the tests that start the real command in a process of its own share."""

import os
from pathlib import Path

import quick


def environment(cache: Path) -> dict[str, str]:
    """One device; what one process compiles, the next need not."""
    return os.environ | {
        "XLA_FLAGS": " ".join(quick.FLAGS),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

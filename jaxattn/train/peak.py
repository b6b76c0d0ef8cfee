"""What the device could do at most."""

import time

import jax
import jax.numpy as jnp


def peak_flops(dtype: str) -> float:
    """FLOP/s of a large matrix product on one device, the best of a few: what a step's own rate is compared with."""
    n = 1024 if jax.default_backend() == "cpu" else 8192
    x, square = jnp.full((n, n), 1 / n, dtype), jax.jit(lambda x: x @ x)  # of a matrix that is its own square
    x, samples = jax.block_until_ready(square(x)), []
    for _ in range(5):
        start = time.perf_counter()
        x = jax.block_until_ready(square(x))
        samples.append(time.perf_counter() - start)
    return 2 * n**3 / min(samples)

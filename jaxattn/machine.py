"""The machine that a function is traced for: this one, unless it is traced for another."""

from contextlib import AbstractContextManager

import jax

BACKENDS = ("cpu", "gpu", "tpu")
CHIPS = ("v4", "v5e", "v5p", "v6e")  # generations of TPUs
PLATFORMS = {"cpu": "cpu", "cuda": "gpu", "rocm": "gpu", "tpu": "tpu"}  # as JAX lowers for them
# JAX looks at it before it takes a program that it has traced already.
_elsewhere = jax.make_user_context(None)


def backend() -> str:
    """ "cpu", "gpu" or "tpu"."""
    return _elsewhere.value[0] if _elsewhere.value else jax.default_backend()


def device_count() -> int:
    """All its devices."""
    return _elsewhere.value[1] if _elsewhere.value else jax.device_count()


def alone() -> bool:
    """Whether a program is one device's own: there is no other, or it is inside a `shard_map` over all axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return device_count() == 1 or (not mesh.empty and mesh.are_all_axes_manual)


def chip() -> str | None:
    """The generation of the TPU that is traced for, as `traced_for` was told it."""
    return _elsewhere.value[2] if _elsewhere.value else None


def traced_for(backend: str, devices: int = 1, chip: str | None = None) -> AbstractContextManager[None]:
    """A context in which functions are traced as they would be on a machine with so many devices of a kind.

    What is exported from another machine has that machine's tiles, dtypes and ways to compute:

    >>> from jax import export
    >>> x = jax.ShapeDtypeStruct((1, 64, 2, 8), "float32")
    >>> with jaxattn.traced_for("tpu"):
    ...     exported = export.export(jax.jit(lambda x: jaxattn.attention(x, x, x)), platforms=["tpu"])(x)
    >>> exported.platforms
    ('tpu',)

    Outside of such a context a program for several platforms, or for another one, has each one's `attention`; and each
    one's `einsum` where it is traced on a CPU, whose own ways would not serve the others.

    Args:
        backend: "cpu", "gpu" or "tpu".
        devices: of all its processes.
        chip: a TPU's generation, "v4", "v5e", "v5p" or "v6e", whose tiles are taken; None: "v5e"'s.

    Raises:
        ValueError: one of them is none of these.
    """
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"traced_for: backend (={backend!r}) must be one of {', '.join(map(repr, BACKENDS))}")
    if not isinstance(devices, int) or isinstance(devices, bool) or devices < 1:
        raise ValueError(f"traced_for: devices (={devices!r}) must be an int >= 1")
    if chip is not None and (backend != "tpu" or not isinstance(chip, str) or chip not in CHIPS):
        raise ValueError(
            f"traced_for: chip (={chip!r}) must be None, or with 'tpu' one of {', '.join(map(repr, CHIPS))}"
        )
    return _elsewhere((backend, devices, chip))


def lowered_for(platform: str) -> AbstractContextManager[None]:
    """The context of a platform that JAX lowers for, unless it is told otherwise by `traced_for`."""
    return _elsewhere(_elsewhere.value or (PLATFORMS[platform], jax.device_count(), None))

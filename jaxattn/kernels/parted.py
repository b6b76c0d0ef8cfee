"""Attention on a mesh of Explicit axes by a backend that the compiler cannot split: by batch and heads, in a shard_map.

How the operands lie is known there while a program is traced, so each device computes its own part and nothing is
gathered. What lies along the grid is brought together first.
"""

import math
from collections.abc import Callable, Mapping

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxattn.kernels.operands import Operands, Options

Axes = tuple[str | None, ...]  # what goes together has one name; None is whole on every device
HEADS = "heads"  # of query and key: contiguous heads of the query share one of the key


def known(operands: Operands) -> bool:
    """Whether it is known how they lie: every axis of their mesh is Explicit."""
    if isinstance(operands.query, jax.ShapeDtypeStruct):
        return False
    mesh = jax.typeof(operands.query).sharding.mesh
    return not mesh.empty and len(mesh.explicit_axes) == len(mesh.axis_names)


def attend(compute: Callable[[Operands], tuple[Array, ...]], operands: Operands, options: Options) -> tuple[Array, ...]:
    """What `compute` gives, of each device's part, sharded as the query is. The gradient of what devices share is their
    sum."""
    given = {name: x for name, x in operands._asdict().items() if x is not None}
    axes = axes_of(given, options)
    over = mesh_axes(axes, given)
    specs = {name: PartitionSpec(*(over.get(axis) if axis else None for axis in axes[name])) for name in given}
    results = specs["query"], PartitionSpec(*specs["query"][:-1])
    mesh = jax.typeof(operands.query).sharding.mesh

    def run(*arrays: Array) -> tuple[Array, ...]:
        return compute(Operands(**dict(zip(given, arrays, strict=True))))

    parted = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=tuple(specs.values()),
        out_specs=results[: 1 + options.residuals],
        check_vma=False,  # an interpreted kernel has loops that do not know which of their arrays vary
    )
    lies = NamedSharding(mesh, PartitionSpec(*jax.typeof(operands.query).sharding.spec[:-1]))
    found = parted(*(jax.sharding.reshard(x, NamedSharding(mesh, specs[name])) for name, x in given.items()))
    return tuple(jax.sharding.reshard(x, lies) for x in found)


def axes_of(given: Mapping[str, Array], options: Options) -> dict[str, Axes]:
    """The names of the axes of each operand that a kernel may take; others, and what is broadcast, are whole."""
    rank = len(options.axes)
    batch = tuple(f"batch{n}" for n in range(given["query"].ndim - rank - 2))
    grid = (None,) * rank
    of: dict[str, Axes] = dict.fromkeys(("query", "key", "value"), (*batch, *grid, HEADS, None))
    of |= dict.fromkeys(("extra_key", "extra_value"), (*batch, None, HEADS, None))
    of |= dict.fromkeys(("key_mask", "query_segments", "key_segments"), (*batch, *grid))
    of["relative_bias"] = (HEADS, *grid)
    if "slot_mask" in given:
        slots = given["slot_mask"].ndim - len(batch) - rank - 1
        of["slot_mask"] = (*batch, *grid, HEADS, *[None] * slots)
    if "sink" in given:
        of["sink"] = (HEADS,) if given["sink"].ndim == 1 else (*batch, *grid, HEADS)
    axes = {name: of.get(name, (None,) * x.ndim) for name, x in given.items()}
    split = {
        name: [None if n == 1 else axis for n, axis in zip(x.shape, axes[name], strict=True)]
        for name, x in given.items()
    }
    return {name: tuple(found) for name, found in split.items()}


def mesh_axes(axes: Mapping[str, Axes], given: Mapping[str, Array]) -> dict[str, tuple[str, ...]]:
    """By which axes of the mesh each named axis is split: as the first operand has it that has it split, where it
    divides all of them and no other takes those axes."""
    over: dict[str, tuple[str, ...]] = {}
    taken: set[str] = set()
    for name, x in given.items():
        sharding = jax.typeof(x).sharding
        for axis, part in zip(axes[name], sharding.spec, strict=True):
            names = () if part is None else (part,) if isinstance(part, str) else tuple(part)
            if axis is None or axis in over or not names or taken & set(names):
                continue
            parts = math.prod(sharding.mesh.shape[each] for each in names)
            sizes = [y.shape[axes[other].index(axis)] for other, y in given.items() if axis in axes[other]]
            if all(size % parts == 0 for size in sizes):
                over[axis] = names
                taken |= set(names)
    return over

"""The Explicit axes of a mesh, where a program says how its arrays lie: inside, the compiler decides, as on Auto axes.

Arrays bring their mesh along: it need not be set.
"""

import math
from collections.abc import Callable, Sequence

import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxattn.extents import OUTPUT, Resolved
from jaxattn.sizes import planned


def propagated(function: Callable, mesh: AbstractMesh, specs: Sequence[PartitionSpec]) -> Callable:
    """The function, each of whose results lies as its spec says."""
    lies = tuple(NamedSharding(mesh, spec) for spec in specs)
    return jax.sharding.auto_axes(function, axes=mesh.explicit_axes, out_sharding=lies)


def as_query(attend: Callable, query: Array, outputs: int = 1) -> Callable:
    """Attention, whose outputs lie as the query does."""
    sharding = jax.typeof(query).sharding
    if not sharding.mesh.explicit_axes:
        return attend
    return propagated(attend, sharding.mesh, (PartitionSpec(*sharding.spec[:-1]),) * outputs)


def as_named(solve: Callable[..., Array], resolved: Resolved, operands: Sequence[Array]) -> Array:
    """An equation's result: its axes lie as those of their names do in the operands, the first that is split.

    Axes that are indexed by a sum are brought together: where XLA splits a convolution along its grid, and some devices
    hold the same part, the kernel's gradient is as many times too large (jax 0.10 and 0.12, on the CPU).
    """
    shardings = [jax.typeof(x).sharding for x in operands]
    mesh = next((sharding.mesh for sharding in shardings if sharding.mesh.explicit_axes), None)
    if mesh is None:
        return solve(operands)
    over: dict[str, tuple[str, ...]] = {}
    whole = []
    for n, (term, x, sharding) in enumerate(zip(resolved.operands, operands, shardings, strict=True)):
        parts = [None if dim in resolved.of_term(n) else part for dim, part in enumerate(sharding.spec)]
        whole.append(jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*parts))))
        for token, part in zip(term, parts, strict=True):
            names = () if part is None else (part,) if isinstance(part, str) else tuple(part)
            if names and token.axes and not set(names) & set(sum(over.values(), ())):
                over.setdefault(token.axes[0], names)
    spec = []
    for dim, (token, size) in enumerate(zip(resolved.output, resolved.output_shape, strict=True)):
        names = over.pop(token.axes[0], ()) if token.axes and dim not in resolved.of_term(OUTPUT) else ()
        spec.append(names if names and planned(size) % math.prod(mesh.shape[name] for name in names) == 0 else None)
    return propagated(lambda operands: (solve(operands),), mesh, (PartitionSpec(*spec),))(whole)[0]

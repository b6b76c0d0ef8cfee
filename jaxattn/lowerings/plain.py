"""No affine axis: reshape, `jnp.einsum`, reshape."""

from jaxtyping import Array

from jaxattn.extents import Resolved
from jaxattn.lowerings.gather import axes_of, contract, merge, split
from jaxattn.lowerings.lowering import Lowering


def plain(resolved: Resolved, match: bool, operands, precision, accumulate) -> Array:
    """Evaluate a resolved equation; the result has the dtype `accumulate`."""
    operands = [split(x, term, resolved.sizes) for x, term in zip(operands, resolved.operands, strict=True)]
    names = [axes_of(term) for term in resolved.operands]
    return merge(contract(operands, names, axes_of(resolved.output), precision, accumulate), resolved)


PLAIN = Lowering(
    name="plain",
    match=lambda problem: None if problem.resolved.affine else True,
    describe=lambda resolved, match: "reshapes and jnp.einsum",
    temporaries=lambda resolved, match, width: 0,
    run=plain,
)

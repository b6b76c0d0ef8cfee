"""Affine axes by gathering: every token becomes the axes it names, then a plain einsum, then a scatter.

The readable implementation of `jaxattn.einsum`, and the one that runs every equation. It materialises the windows.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.extents import OUTPUT, Affine, Resolved
from jaxattn.lowerings.lowering import Lowering
from jaxattn.notation import Term


def axes_of(term: Term) -> list[str]:
    """The axes of a term, one by one: `i+r (g c)` is i, r, g, c."""
    return [axis for token in term for axis in token.axes]


def contract(arrays, names: list[list[str]], output: list[str], precision, accumulate) -> jax.Array:
    """A plain einsum over named axes, accumulated in the dtype `accumulate`."""
    if len(arrays) != 2:  # jnp.einsum sums and chains in the operands' dtype
        arrays = [x.astype(accumulate) for x in arrays]
    label = {name: k for k, name in enumerate(dict.fromkeys(name for axes in names for name in axes))}
    interleaved = [part for x, axes in zip(arrays, names, strict=True) for part in (x, [label[a] for a in axes])]
    return jnp.einsum(
        *interleaved, [label[name] for name in output], precision=precision, preferred_element_type=accumulate
    )


def split(x: jax.Array, term: Term, sizes) -> jax.Array:
    """Composed axes `(g c)` as axes of their own; affine tokens stay one axis each."""
    lengths = zip(term, x.shape, strict=True)
    shape = [[n] if token.affine else [sizes[axis] for axis in token.axes] for token, n in lengths]
    return x.reshape([n for part in shape for n in part])


def merge(y: jax.Array, resolved: Resolved) -> jax.Array:
    """The output's axes, composed as the equation writes them."""
    return y.reshape(resolved.output_shape)


def unfold(x: jax.Array, dim: int, index: Affine) -> jax.Array:
    """Dimension `dim` of x as one dimension per axis of `index`: x[..., index(i, r, ...), ...], zero outside."""
    tokens = index.indices()
    y = jnp.take(x, np.maximum(tokens, 0), axis=dim, mode="clip")
    if (tokens >= 0).all():
        return y
    inside = (tokens >= 0).reshape(tokens.shape + (1,) * (x.ndim - dim - 1))
    return jnp.where(inside, y, jnp.zeros((), y.dtype))


def scatter(y: jax.Array, dim: int, index: Affine) -> jax.Array:
    """The adjoint of `unfold`: add every element of y to the token that it came from; what falls outside is dropped."""
    tokens = index.indices()
    shape = (*y.shape[:dim], index.length, *y.shape[dim + tokens.ndim :])
    where = (slice(None),) * dim + (np.where(tokens < 0, index.length, tokens),)
    return jnp.zeros(shape, y.dtype).at[where].add(y, mode="drop")


def gather(resolved: Resolved, match: bool, operands, precision, accumulate) -> jax.Array:
    """Evaluate a resolved equation; the result has the dtype `accumulate`."""
    expanded = []
    for k, (x, term) in enumerate(zip(operands, resolved.operands, strict=True)):
        dtype, x = x.dtype, x.astype(accumulate)  # the transpose of a gather is a sum
        for dim, index in sorted(resolved.of_term(k).items(), reverse=True):
            x = unfold(x, dim, index)
        x = x.astype(dtype)
        expanded.append(x.reshape([resolved.sizes[axis] for axis in axes_of(term)]))
    y = contract(
        expanded, [axes_of(term) for term in resolved.operands], axes_of(resolved.output), precision, accumulate
    )
    dims = np.cumsum([0, *(len(token.axes) for token in resolved.output)])
    for dim, index in sorted(resolved.of_term(OUTPUT).items(), reverse=True):
        y = scatter(y, int(dims[dim]), index)
    return merge(y, resolved)


def unfolded(resolved: Resolved) -> dict[int, int]:
    """Elements of each term with affine tokens, written out over all its axes: what `gather` materialises."""
    return {a.term: math.prod(resolved.sizes[x] for x in axes_of(resolved.terms[a.term])) for a in resolved.affine}


GATHER = Lowering(
    name="gather",
    match=lambda problem: True,
    describe=lambda resolved, match: "gather, jnp.einsum, scatter",
    temporaries=lambda resolved, match, width: sum(unfolded(resolved).values()) * width,
    run=gather,
)

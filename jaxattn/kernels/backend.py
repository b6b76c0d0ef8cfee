"""What `attention` has to know of a way to compute it."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array

from jaxattn.kernels.operands import Operands, Options


class Cost(NamedTuple):
    """What a call takes, from shapes alone."""

    tile: tuple[int, ...]  # queries along each axis that are computed together
    columns: int  # keys that such a tile meets
    steps: int  # of the loop, one after the other
    held: int  # bytes of a step: its scores, keys, values and queries
    flops: int  # of both products, with what is computed and then hidden
    strips: int = 1  # that the grid is cut into, along its first axis, for a step to hold one


class Backend(NamedTuple):
    """One way to compute attention, as pure functions of operands and options.

    supports: None where it can compute them, else the reason why not, which ends the sentence "it can't, since ...".
        The operands may be `jax.ShapeDtypeStruct`s.
    forward: the output [*batch, *queries, heads, value_dim]; with `options.residuals` also lse [*batch, *queries,
        heads], -inf where a query sees nothing. What a query with nothing to attend to gets is zeros.
    backward: `(operands, cotangents, options, wanted)` to the cotangents of the operands that `wanted` names, from
        those of what `forward` returns. None: JAX differentiates `forward`.
    cost: an estimate.
    platform: the one kind of machine that it runs on, "tpu" or "gpu"; None: any.
    opaque: whether the compiler cannot split its calls over devices. Unless it is named, such a backend is taken where
        there is one device, or inside a `shard_map` over all axes of its mesh: else what is sharded would be gathered.
        Named, on a mesh of Explicit axes, it is put into such a `shard_map` (`parted.py`).

    With `backward`, a backend is wrapped in the primitives of `primitive.py`, and so has every derivative, `vmap` and
    `shard_map`. It is given no function of the caller's and no empty array: those go to `differentiable.py`.
    """

    name: str
    supports: Callable[[Operands, Options], str | None]
    forward: Callable[[Operands, Options], tuple[Array, ...]]
    backward: Callable[[Operands, tuple[Array, ...], Options, tuple[str, ...]], dict[str, Array]] | None
    cost: Callable[[Operands, Options], Cost]
    platform: str | None = None
    opaque: bool = False

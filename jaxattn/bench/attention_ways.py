"""Attention, the ways a user of JAX has. Each takes query, key and value [batch, *grid, heads, head_dim]."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn.attention import attention
from jaxattn.bench.cases import AttentionCase
from jaxattn.bench.ways import CannotError, Function, Way, cannot_unless
from jaxattn.window import Window

# A program with more slices than this takes minutes to compile.
SLICES = 400


def windowed(case: AttentionCase) -> Window:
    if case.window is None:
        raise CannotError("there is no window")
    return case.window


def numbers(case: AttentionCase) -> tuple[np.ndarray, np.ndarray]:
    """The number of the key in each slot, [tokens, slots], where there is none 0; and whether it is seen."""
    window = windowed(case)
    indices = window.indices(case.grid)
    mask = window.mask(case.grid) & (indices >= 0).all(-1)
    flat = np.ravel_multi_index(tuple(np.moveaxis(np.maximum(indices, 0), -1, 0)), case.grid)
    return flat.reshape(case.tokens, -1), mask.reshape(case.tokens, -1)


def dense_mask(case: AttentionCase) -> np.ndarray:
    """Whether each query sees each key, bool [tokens, tokens]."""
    keys, seen = numbers(case)
    mask = np.zeros((case.tokens, case.tokens), bool)
    np.logical_or.at(mask, (np.arange(case.tokens)[:, None], keys), seen)
    return mask


def dense_offsets(case: AttentionCase) -> tuple[np.ndarray, ...]:
    """The entry in the table of relative biases for each query and key, an array [tokens, tokens] for each axis.

    Keys beyond the window get an entry too; the mask hides them.
    """
    places = np.indices(case.grid).reshape(len(case.grid), -1)
    return tuple(
        np.clip(axis.size - 1 + (x[None, :] - x[:, None]) // axis.dilation, 0, 2 * axis.size - 2)
        for x, axis in zip(places, windowed(case).axes(case.grid), strict=True)
    )


def flat(x):
    """[batch, *grid, heads, head_dim] as [batch, tokens, heads, head_dim]."""
    return x.reshape(x.shape[0], -1, *x.shape[-2:])


def ours(case: AttentionCase) -> Function:
    def attend(q, k, v, *bias):
        return attention(q, k, v, window=case.window, relative_bias=bias[0] if bias else None)

    return Function(attend)


def dense(case: AttentionCase) -> Function:
    """`jax.nn.dot_product_attention` of every query with every key, under the window's mask where there is one."""
    if case.window is None:
        return Function(functools.partial(jax.nn.dot_product_attention, implementation="xla"))
    mask = dense_mask(case)
    entries = dense_offsets(case) if case.bias else ()

    def attend(q, k, v, *bias):
        table = bias[0][(slice(None), *entries)][None] if bias else None
        return jax.nn.dot_product_attention(flat(q), flat(k), flat(v), table, mask[None, None]).reshape(q.shape)

    return Function(attend)


def cudnn(case: AttentionCase) -> Function:
    """`jax.nn`'s fused kernel on a GPU, over all keys."""
    cannot_unless(case.dtype in ("bfloat16", "float16"), "it takes half precision")
    cannot_unless(case.window is None, "its windows are one-dimensional")
    return Function(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"))


def by_hand(case: AttentionCase) -> Function:
    """Swin's partition: the blocks become batch entries, and each attends to itself."""
    window, rank = windowed(case), len(case.grid)
    apart = [z.block == z.size and z.dilation == 1 and z.length % z.size == 0 for z in window.axes(case.grid)]
    cannot_unless(all(apart), "the windows overlap")
    split = [length for n, k in zip(case.grid, window.sizes, strict=True) for length in (n // k, k)]
    blocks = [0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1, 2 * rank + 2]

    def enter(x):
        x = x.reshape(x.shape[0], *split, *x.shape[-2:]).transpose(blocks)
        return x.reshape(-1, case.slots, *x.shape[-2:])

    def attend(q, k, v):
        y = jax.nn.dot_product_attention(enter(q), enter(k), enter(v))
        y = y.reshape(q.shape[0], *split[::2], *split[1::2], *q.shape[-2:])
        return y.transpose(np.argsort(blocks)).reshape(q.shape)

    return Function(attend)


def fixed_offsets(case: AttentionCase) -> list[np.ndarray]:
    """For each axis the offset from the query of each slot, where it is the same for every query."""
    axes = windowed(case).axes(case.grid)
    fixed = all(axis.boundary == "mask" and axis.block == 1 for axis in axes)
    cannot_unless(fixed, "a slot of windows that move inward, or of blocks, has no one offset")
    return [axis.positions()[0] - axis.query[0] for axis in axes]


def padding(offsets: list[np.ndarray]) -> list[tuple[int, int]]:
    return [(max(-int(o.min()), 0), max(int(o.max()), 0)) for o in offsets]


def slot_bias(bias, offsets: list[np.ndarray], case: AttentionCase):
    """[heads, slots] of a table over offsets."""
    if not bias:
        return 0
    axes = windowed(case).axes(case.grid)
    entries = np.ix_(*(axis.size - 1 + o // axis.dilation for o, axis in zip(offsets, axes, strict=True)))
    return bias[0][(slice(None), *entries)].reshape(case.shape[-2], -1)


def softmax(scores, seen, dtype):
    """Over the last axis, in float32."""
    return jax.nn.softmax(jnp.where(seen, scores.astype(jnp.float32), -jnp.inf), axis=-1).astype(dtype)


def slices(case: AttentionCase) -> Function:
    """One slice of the padded keys and values for each slot: the scores stacked, the products summed."""
    offsets = fixed_offsets(case)
    cannot_unless(case.slots <= SLICES, f"{case.slots} slices would take minutes to compile")
    pads = padding(offsets)
    seen = windowed(case).mask(case.grid).reshape(*case.grid, 1, -1)

    def attend(q, k, v, *bias):
        def places(x):
            x = jnp.pad(x, [(0, 0), *pads, (0, 0), (0, 0)])
            for place in itertools.product(*offsets):
                begin = [low + int(o) for o, (low, _) in zip(place, pads, strict=True)]
                inside = [slice(b, b + n) for b, n in zip(begin, case.grid, strict=True)]
                yield x[(slice(None), *inside)]

        scores = jnp.stack([jnp.einsum("...d,...d->...", q, key) for key in places(k)], axis=-1) * q.shape[-1] ** -0.5
        weights = softmax(scores + slot_bias(bias, offsets, case), seen, q.dtype)
        return sum(weights[..., u : u + 1] * value for u, value in enumerate(places(v)))

    return Function(attend)


def patches(case: AttentionCase) -> Function:
    """The keys and values of every window by `lax.conv_general_dilated_patches`, then two einsums."""
    window, offsets = windowed(case), fixed_offsets(case)
    dilation = [axis.dilation for axis in window.axes(case.grid)]
    seen = window.mask(case.grid).reshape(*case.grid, 1, -1)
    letters = "xyz"[: len(case.grid)]
    layout = (f"N{letters}C", f"{letters}IO", f"N{letters}C")

    def attend(q, k, v, *bias):
        def unfold(x):  # the patches' channels are [features, *window]
            x = x.reshape(*x.shape[:-2], -1)
            x = lax.conv_general_dilated_patches(
                x,
                window.sizes,
                (1,) * len(case.grid),
                padding(offsets),
                rhs_dilation=dilation,
                dimension_numbers=layout,
            )
            return x.reshape(*q.shape, -1)

        scores = jnp.einsum("...d,...du->...u", q, unfold(k)) * q.shape[-1] ** -0.5
        weights = softmax(scores + slot_bias(bias, offsets, case), seen, q.dtype)
        return jnp.einsum("...u,...du->...d", weights, unfold(v))

    return Function(attend)


def gather(case: AttentionCase) -> Function:
    """The keys and values of every window by `jnp.take`, then two einsums."""
    keys, seen = numbers(case)
    relative = [axis.relative() for axis in windowed(case).axes(case.grid)] if case.bias else []

    def attend(q, k, v, *bias):
        scores = jnp.einsum("bthd,btuhd->bthu", flat(q), jnp.take(flat(k), keys, axis=1)) * q.shape[-1] ** -0.5
        if bias:
            scores = scores + relative_bias(bias[0], relative, case)
        weights = softmax(scores, seen[:, None], q.dtype)
        return jnp.einsum("bthu,btuhd->bthd", weights, jnp.take(flat(v), keys, axis=1)).reshape(q.shape)

    return Function(attend)


def relative_bias(table, first: list[np.ndarray], case: AttentionCase):
    """[tokens, heads, slots] of a table over offsets, where slot u of a query has the entry `first` + u."""
    rank, index = len(case.grid), []
    for axis, (start, k) in enumerate(zip(first, windowed(case).sizes, strict=True)):
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = len(start), k
        index.append((start[:, None] + np.arange(k)).reshape(shape))
    full = np.broadcast_arrays(*index)  # each [*grid, *size]
    return table[(slice(None), *full)].reshape(len(table), case.tokens, -1).swapaxes(0, 1)


def dense_bytes(case: AttentionCase) -> int:
    """The scores of every query and key, in float32."""
    return 4 * case.shape[0] * case.shape[-2] * case.tokens * (case.queries or case.tokens)


def window_bytes(case: AttentionCase) -> int:
    """The keys and the values of every window."""
    if case.window is None:
        return 0
    return 2 * math.prod(case.shape) * case.slots * jnp.dtype(case.dtype).itemsize


WAYS = [
    Way("jaxattn", "jax", ours, ours=True),
    Way("shifted slices", "jax", slices),
    Way("gather + einsum", "jax", gather, window_bytes),
    Way("patches + einsum", "jax", patches, window_bytes),
    Way("jax.nn", "jax", dense, dense_bytes),
    Way("jax.nn, cuDNN", "jax", cudnn),
    Way("reshape + jax.nn", "jax", by_hand),
]

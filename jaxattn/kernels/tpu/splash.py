"""JAX's splash attention, a Pallas kernel for a TPU, as a backend: all keys, or a long window of one axis.

The kernel takes heads before tokens, lengths that its blocks divide, and queries that the scale is in already; what is
hidden from a query is of another segment. A query that sees nothing gets the mean of the values there, zeros here.
"""

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxattn.kernels import xla
from jaxattn.kernels.backend import Backend, Cost
from jaxattn.kernels.operands import Operands, Options
from jaxattn.kernels.tpu.backend import precision_of, refused
from jaxattn.sizes import planned

TAKEN = ("query", "key", "value", "scale", "key_mask", "query_segments", "key_segments", "soft_cap")
TAKEN += ("sink",)  # which is no kernel's
LANES = 128
BLOCK = 1024  # queries, and keys, at most
TOGETHER = 2**20  # bytes of the keys of a head, of several blocks, that the kernel may hold
LEAST = 256  # queries, and slots, from which on it is faster than XLA's tiles
MOST = 2**16  # tokens whose blocks are looked through while a program is traced: all keys, which takes seconds
MOST_OF_WINDOW = 2**14  # and under a window


class Blocks(NamedTuple):
    """How tokens are cut: `number` blocks of `size`, a multiple of 128."""

    size: int
    number: int

    @classmethod
    def of(cls, tokens: int) -> "Blocks":
        """As few as there can be, and as small as these can be."""
        number = -(-tokens // BLOCK)
        return cls(-(-tokens // number // LANES) * LANES, number)

    @property
    def tokens(self) -> int:
        """With what fills up the last."""
        return self.size * self.number

    def part(self, most: int) -> int:
        """The largest part of a block that is no more, and a multiple of 128 as well."""
        return max(n for n in range(LANES, min(most, self.size) + 1, LANES) if self.size % n == 0)

    def together(self, tokens: int) -> int:
        """The most blocks that are so many tokens, and of which all can be made."""
        return max(n for n in range(1, self.number + 1) if self.number % n == 0 and (n == 1 or n * self.size <= tokens))


def supports(operands: Operands, options: Options, *, least: int = LEAST) -> str | None:
    """Why it can't, or should not; None where it can."""
    operands = with_key_mask(operands, options)
    if (reason := refused(operands, options, TAKEN)) is not None:
        return reason
    if operands.soft_cap is not None and options.soft_cap is None:
        return "its soft cap is a number that the program is traced with, and this one is an array"
    axis, *more_axes = options.axes
    if more_axes or reach_of(options) is None:
        return "it takes all keys, or a window of one axis that slides key by key and is cut at the border"
    if min(options.queries) < least or axis.size < least - 1:  # a window of 255 has as many on either side
        return f"it is for {least} queries and slots and more: of fewer, XLA's tiles are as fast"
    most = MOST if options.window is None else MOST_OF_WINDOW
    if max(*options.queries, *options.keys) > most:
        return f"its blocks are looked through while a program is traced, so there may be {most} tokens at most"
    if what_varies_is_checked():
        return "its results do not say over which axes they vary: shard_map must have check_vma=False"
    return None


def what_varies_is_checked() -> bool:
    """Whether this is inside a `shard_map` that checks what varies over its axes: there the index along one does."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = () if mesh.empty else mesh.manual_axes
    return any(jax.typeof(jax.lax.axis_index(axis)).manual_axis_type.varying for axis in axes[:1])


def with_key_mask(operands: Operands, options: Options) -> Operands:
    """Without a window, a mask that is the same for all queries and heads is one of keys."""
    mask = operands.slot_mask
    if options.window is not None or mask is None or mask.shape[-3:-1] != (1, 1):
        return operands
    if isinstance(mask, jax.ShapeDtypeStruct):
        of_keys = jax.ShapeDtypeStruct((*mask.shape[:-3], mask.shape[-1]), mask.dtype)
    else:
        of_keys = mask[..., 0, 0, :]
    return operands._replace(slot_mask=None, key_mask=of_keys)


def reach_of(options: Options) -> tuple[int, int] | tuple[()] | None:
    """How many keys behind itself and ahead a query sees, as far as there are so many; (): all; None: it can't be."""
    if options.window is None:
        return ()
    axis, n = options.axes[0], options.keys[0]
    query, low, high = np.arange(len(axis.start)), axis.start + axis.low, axis.start + axis.high
    behind, ahead = int((query - low).max(initial=0)), int((high - 1 - query).max(initial=0))
    slides = axis.dilation == 1 and len(query) == n and np.array_equal(axis.query, query)
    cut = np.array_equal(low, np.maximum(query - behind, 0)) and np.array_equal(high, np.minimum(query + ahead + 1, n))
    return (behind, ahead) if slides and cut else None


def forward(operands: Operands, options: Options, *, interpret: bool = False) -> tuple[Array, ...]:
    """The output [*batch, queries, heads, value_dim]; with `options.residuals` also lse [*batch, queries, heads]."""
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    operands = with_key_mask(operands, options)
    (queries,), (keys,) = options.queries, options.keys
    of_queries, of_keys = Blocks.of(queries), Blocks.of(keys)
    query = (operands.query.astype(operands.scale.dtype) * operands.scale).astype(operands.query.dtype)
    arrays = heads_first(query, of_queries), *(heads_first(x, of_keys) for x in (operands.key, operands.value))
    with computing(operands, options):
        attend = kernel_of(operands, options, of_queries, of_keys, interpret)
        if (ids := segments(operands, of_queries, of_keys)) is None:
            found = jax.vmap(attend)(*arrays)
        else:
            found = jax.vmap(lambda *given: attend(*given[:3], SegmentIds(*given[3:])))(*arrays, *ids)
    output, lse = (found[0], found[1][0]) if options.residuals else (found, None)
    shape = operands.query.shape[:-1]
    output = jnp.swapaxes(output[:, :, :queries], 1, 2).reshape(*shape, output.shape[-1])
    if lse is not None:
        lse = jnp.swapaxes(lse[:, :, :queries], 1, 2).reshape(shape)
    if ids is not None and (operands.key_mask is not None or operands.query_segments is not None):
        sees = see_something(*ids, reach_of(options))[:, :queries].reshape(*shape[:-1], 1)
        output = jnp.where(sees[..., None], output, jnp.zeros((), output.dtype))
        lse = None if lse is None else jnp.where(sees, lse, -jnp.inf)
    return (output,) if lse is None else (output, lse)


def backward(
    operands: Operands,
    cotangents: tuple[Array, ...],
    options: Options,
    wanted: tuple[str, ...],
    *,
    interpret: bool = False,
) -> dict[str, Array]:
    """The cotangents of the operands in `wanted`, from those of what `forward` returns. The kernel has none of lse."""
    if options.residuals:
        return xla.backward(operands, cotangents, options, wanted)

    def attend(mine: dict[str, Array]) -> tuple[Array, ...]:
        return forward(operands._replace(**mine), options, interpret=interpret)

    with computing(operands, options):
        return jax.vjp(attend, {name: getattr(operands, name) for name in wanted})[1](cotangents)[0]


@contextlib.contextmanager
def computing(operands: Operands, options: Options) -> Iterator[None]:
    """What the kernel takes from where it is traced: numbers of 32 bits, and the precision of its products, of which
    bfloat16 has one."""
    precision = "default" if operands.query.dtype == jnp.bfloat16 else precision_of(options)
    name = precision.name.lower() if isinstance(precision, jax.lax.Precision) else precision
    as_asked = contextlib.nullcontext() if name is None else jax.default_matmul_precision(name)
    with jax.enable_x64(False), as_asked:
        yield


def kernel_of(operands: Operands, options: Options, of_queries: Blocks, of_keys: Blocks, interpret: bool) -> Any:
    """JAX's function of query, key and value [heads, tokens, dim] and segments."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape, reach = (of_queries.tokens, of_keys.tokens), reach_of(options)
    mask = splash.LocalMask(shape, reach, 0) if reach else splash.FullMask(shape)
    of_query, of_key = step_of(operands, options, of_queries, of_keys)
    # one kernel has all derivatives, where VMEM holds all keys and values of a head, and their sums
    whole = not reach and of_key == of_keys.tokens <= TOGETHER // 2 // row_of(operands)
    wide = row_of(operands) > 2 * LANES  # more than bfloat16 of 128 numbers
    backward_query = of_queries.part(512 if reach or whole or wide else BLOCK)
    backward_key = of_keys.part(512) if wide and not whole else of_key if reach or whole else of_keys.size
    sizes = splash.BlockSizes(
        block_q=of_query,
        block_kv=of_key,
        block_kv_compute=of_keys.part(512),
        block_q_dkv=backward_query,
        block_kv_dkv=backward_key,
        block_kv_dkv_compute=of_keys.part(512),
        block_q_dq=None if whole else backward_query,
        block_kv_dq=None if whole else backward_key,
        use_fused_bwd_kernel=whole,
    )
    return splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * operands.query.shape[-2]),
        block_sizes=sizes,
        save_residuals=options.residuals,
        attn_logits_soft_cap=options.soft_cap,
        interpret=interpret,
    )


def step_of(operands: Operands, options: Options, of_queries: Blocks, of_keys: Blocks) -> tuple[int, int]:
    """The queries and keys of a step forward, by the compiler's estimates of 4096 tokens: as many keys as fit, or under
    a window so few that some blocks are left out."""
    if reach := reach_of(options):
        return of_queries.part(512), of_keys.size if sum(reach) >= of_keys.size else of_keys.part(512)
    return of_queries.part(256), of_keys.size * of_keys.together(TOGETHER // row_of(operands))


def row_of(operands: Operands) -> int:
    """Bytes of a key, or of a value, of a head in VMEM."""
    return max(operands.query.shape[-1], operands.value.shape[-1], LANES) * operands.query.dtype.itemsize


def heads_first(x: Float[Array, "*batch tokens heads dim"], blocks: Blocks) -> Float[Array, "entries heads places dim"]:
    """With zeros behind the tokens."""
    x = jnp.swapaxes(x.reshape(-1, *x.shape[-3:]), 1, 2)
    return jnp.pad(x, [(0, 0), (0, 0), (0, blocks.tokens - x.shape[2]), (0, 0)])


def segments(
    operands: Operands, of_queries: Blocks, of_keys: Blocks
) -> tuple[Int[Array, "entries queries"], Int[Array, "entries keys"]] | None:
    """The segment of each query and of each key, which is no query's where it is hidden from all; None where all see
    all."""
    query, key, mask = operands.query_segments, operands.key_segments, operands.key_mask
    queries, keys = operands.query.shape[-3], operands.key.shape[-3]
    if query is None and mask is None and keys == of_keys.tokens:
        return None
    entries = math.prod(operands.query.shape[:-3])
    flat = lambda x, n: jnp.broadcast_to(x, (*operands.query.shape[:-3], n)).reshape(entries, n)
    if query is None or key is None:
        of_query, of_key, hidden = (jnp.zeros((entries, n), jnp.int32) for n in (queries, keys, 1))
        hidden = hidden + 1
    else:
        of_query, of_key = (flat(x, n).astype(jnp.int32) for x, n in ((query, queries), (key, keys)))
        used = (of_query[:, :, None] == jnp.arange(queries + 1, dtype=jnp.int32)).any(1)
        hidden = jnp.argmin(used, -1, keepdims=True).astype(jnp.int32)  # the first number that is none of them
    if mask is not None:
        of_key = jnp.where(flat(mask, keys), of_key, hidden)
    of_query = jnp.pad(of_query, [(0, 0), (0, of_queries.tokens - queries)])
    padding = jnp.broadcast_to(hidden, (entries, of_keys.tokens - keys))
    return of_query, jnp.concatenate([of_key, padding], 1)


def see_something(
    query: Int[Array, "entries queries"], key: Int[Array, "entries keys"], reach: tuple[int, ...] | None
) -> Bool[Array, "entries queries"]:
    """Whether a query sees a key."""
    same = query[:, :, None] == key[:, None, :]
    if reach:
        ahead = np.arange(key.shape[1]) - np.arange(query.shape[1])[:, None]
        same = same & (-reach[0] <= ahead) & (ahead <= reach[1])
    return same.any(-1)


def cost(operands: Operands, options: Options) -> Cost:
    """A step is a block of queries of a head with a block of keys; blocks in which nothing is seen are left out."""
    of_queries, of_keys = Blocks.of(options.queries[0]), Blocks.of(options.keys[0])
    of_query, of_key = step_of(operands, options, of_queries, of_keys)
    first = np.arange(0, of_queries.tokens, of_query)
    behind, ahead = reach_of(options) or (of_queries.tokens, of_keys.tokens)
    low = np.maximum(first - behind, 0) // of_key
    met = np.minimum((first + of_query - 1 + ahead) // of_key, of_keys.tokens // of_key - 1) - low + 1
    steps = planned(math.prod(operands.query.shape[:-3])) * operands.query.shape[-2] * int(met.sum())
    dims, itemsize = operands.query.shape[-1] + operands.value.shape[-1], operands.query.dtype.itemsize
    held = itemsize * (of_query + of_key) * dims + 4 * of_query * of_keys.part(512)
    return Cost((of_query,), int(met.max()) * of_key, steps, held, 2 * steps * of_query * of_key * dims)


SPLASH = Backend("splash", supports, forward, backward, cost, platform="tpu", opaque=True)
INTERPRETED = SPLASH._replace(  # the same on any machine, slowly, of any length: for tests
    supports=functools.partial(supports, least=1),
    forward=functools.partial(forward, interpret=True),
    backward=functools.partial(backward, interpret=True),
    platform=None,
)

"""Attention as it can be computed on a TPU: this library's ways, and those of others.

Tokens come as a layer has them, [batch, *grid, heads·head_dim]: with heads of 64 in an axis of their own, an array at
the border of a program would take twice its bytes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxattn.attention import attention
from jaxattn.bench import attention_ways, conv_ways
from jaxattn.bench.cases import AttentionCase
from jaxattn.bench.ways import Function, Way, cannot_unless, optional

BLOCK, COMPUTED = 1024, 512  # of splash attention, by its estimates over 4096 tokens: queries and keys, keys at once


def named(implementation: str, case: AttentionCase) -> Function:
    def attend(q, k, v, *bias):
        relative = bias[0] if bias else None
        return attention(q, k, v, window=case.window, relative_bias=relative, implementation=implementation)

    return Function(attend)


def splash(case: AttentionCase) -> Function:
    """JAX's Pallas kernel for sparse masks, over the tokens in a row. It leaves out blocks in which nothing is seen."""
    cannot_unless(not case.bias, "it takes no bias")
    cannot_unless(case.queries is None, "its queries are blocks")
    cannot_unless(case.tokens <= 2**14, f"its mask of {case.tokens}² would take minutes to read")
    kernels = optional("jax.experimental.pallas.ops.tpu.splash_attention")
    tokens, heads, window = case.tokens, case.shape[-2], case.window
    if window is None:
        mask = kernels.FullMask((tokens, tokens))
    elif len(case.grid) == 1 and (along := window.along[0]).boundary == "mask" and along.dilation == along.block == 1:
        behind = along.size - 1 if along.causal else along.size // 2
        mask = kernels.LocalMask((tokens, tokens), (behind, along.size - 1 - behind), 0)
    else:
        mask = kernels.NumpyMask(attention_ways.dense_mask(case))
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    sizes = dict.fromkeys(names, min(BLOCK, tokens))
    sizes |= dict.fromkeys(("block_kv_compute", "block_kv_dkv_compute"), min(COMPUTED, tokens))
    attend = kernels.make_splash_mha_single_device(
        kernels.MultiHeadMask([mask] * heads), block_sizes=kernels.BlockSizes(**sizes)
    )

    def function(q, k, v):
        first = lambda x: attention_ways.flat(x).swapaxes(1, 2)  # heads before tokens
        y = jax.vmap(attend)(first(q) * q.shape[-1] ** -0.5, first(k), first(v))
        return y.swapaxes(1, 2).reshape(q.shape)

    return Function(function)


def in_lanes(make: Callable[[AttentionCase], Function], case: AttentionCase) -> Function:
    """The same of tokens whose heads stand side by side."""
    inner = make(case).call

    def function(q: Any, k: Any, v: Any, *bias: Any) -> Any:
        apart = [x.reshape(*x.shape[:-1], *case.shape[-2:]) for x in (q, k, v)]
        return inner(*apart, *bias).reshape(q.shape)

    return Function(function)


def _way(name: str, make: Callable[[AttentionCase], Function], *needs: Any, ours: bool = False) -> Way:
    return Way(name, "jax", functools.partial(in_lanes, make), *needs, ours=ours)


WAYS = {
    "attention": [
        _way("jaxattn, tpu", functools.partial(named, "tpu"), ours=True),
        _way("jaxattn, splash", functools.partial(named, "splash"), ours=True),
        _way("jaxattn, xla", functools.partial(named, "xla"), ours=True),
        _way("splash", splash),
        _way("jax.nn", attention_ways.dense, attention_ways.dense_bytes),
        _way("shifted slices", attention_ways.slices),
        _way("reshape + jax.nn", attention_ways.by_hand),
    ],
    "conv": conv_ways.WAYS,
}

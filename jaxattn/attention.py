"""Attention over windows of any rank: check, choose a backend, call."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxattn import arguments, explicit, head_groups, machine
from jaxattn.arguments import Arrays, Operand, Settings
from jaxattn.checked import shown
from jaxattn.kernels import backends, parted, placed, sink
from jaxattn.kernels.operands import Operands, ScoreMod
from jaxattn.normalize import NORMALIZERS, Normalizer, logsumexp
from jaxattn.promotion import broadcasting
from jaxattn.window import Window


def attention(
    query: Operand,
    key: Operand,
    value: Operand,
    bias: Operand | None = None,
    mask: Operand | tuple[Operand | None, Operand | None] | None = None,
    *,
    window: Window | Sequence[Window] | None = None,
    scale: float | Operand | None = None,
    relative_bias: Operand | None = None,
    key_embedding: Operand | Sequence[Operand] | None = None,
    score_mod: ScoreMod | None = None,
    logits_soft_cap: float | Operand | None = None,
    normalize: str | Normalizer = "softmax",
    segment_ids: Operand | Sequence[Operand] | None = None,
    grid_sizes: Operand | None = None,
    extra_key: Operand | None = None,
    extra_value: Operand | None = None,
    extra_positions: Operand | None = None,
    sink_logits: Operand | None = None,
    query_offset: int | Sequence[int] | str | Operand | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Operand | None = None,
    broadcast_dropout: bool = False,
    precision: jax.lax.PrecisionLike = None,
    implementation: str | None = None,
    tile: int | Sequence[int] | None = None,
    return_residuals: bool = False,
) -> Any:
    """Multi-head attention, each query over its own window of keys.

    For query i, with j over the slots of its window and then the extra tokens:

        s_ij = scale·(q_i · k_j) + q_i · r[j-i] + relative_bias[j-i] + bias_ij     then soft cap, score_mod, mask
        y_i  = sum_j A_ij v_j,   A_i = normalize(s_i)

    Shapes: `batch` is any number of axes, `grid` the axes of the window (one, without a window), and k `window.size`.
    Query head h uses key head h // (heads / key_heads). Batch axes match exactly; only bias and mask broadcast.

    Args:
        query: [*batch, *query_grid, heads, head_dim], floating point. `query_grid` is ``window.query_grid(grid)``.
        key: [*batch, *grid, key_heads, head_dim].
        value: [*batch, *grid, key_heads, value_dim].
        bias: added to the score; broadcasts against [*batch, *query_grid, heads, *k], or without a window against
            [*batch, heads, T, S]. A bias of -inf masks, and so does the least finite number of its dtype.
        mask: bool, True attends; broadcasts like `bias`. With a window also a mask of keys, [*batch or 1, *grid] or
            [*grid]; or a pair of both, ``(of_keys, by_slot)``, of which one may be None. A mask that could be read in
            both ways, as where a window is as large as the grid, is refused unless it is said which it is.
        window: which keys a query sees; None: all of them, of one axis of tokens: a grid of two axes is then a batch of
            rows, and all of it sees itself reshaped, or in ``Window(grid)``. A slot outside the grid under boundary
            "zero" is a zero key and a zero value: its score is its bias terms, and neither a mask of keys nor segments
            apply to it. A list of windows, of one query grid, is one for each of as many equal groups of heads, and
            each costs what it costs alone: `relative_bias` and `key_embedding` are then lists as well, of the groups'
            heads, and so may be `bias` and `mask`; what is no list serves every group.
        scale: None is head_dim ** -0.5.
        relative_bias: [heads, *(2k-1)], indexed by k - 1 + (key - stride·query) / dilation per axis, where `key` is the
            position of the slot before any folding at the boundary.
        key_embedding: r, [heads or 1, *(2k-1), head_dim], indexed like `relative_bias`; or a tuple of one table for
            each axis of the window, [heads or 1, 2k-1, dim], which costs less: where dim is head_dim, r is their sum
            (BoTNet, MViTv2); where the dims make up head_dim, they stand one after the other (SASA).
        score_mod: ``score_mod(score, head, query_index, key_index) -> score``, elementwise, on tiles of scores against
            which the integer arrays broadcast: the query head, the query's index in the query grid and the key's in the
            key grid (tuples, one array per axis; a slot outside the grid gives its position there). Not applied to
            extra tokens. A score of -inf masks; a function that returns bools is a mask, and is refused.
        logits_soft_cap: cap·tanh(s / cap), extra tokens included.
        normalize: "softmax"; "relu", max(s, 0) / count; "sigmoid", sigma(s - log count), where count is the number of
            visible slots and extra tokens; "sparsemax"; "none", the scores themselves; or a function `(scores, mask) ->
            weights` over the last axis, which holds the whole window in order. What is masked is zeroed afterwards.
        segment_ids: integers [*batch, *grid], or a pair for query [*batch, *query_grid] and key, or without the batch,
            the same for every entry; a query attends to keys of its own segment. From one array, a strided query takes
            the id of the key it stands on.
        grid_sizes: integers [*batch, rank], perhaps traced: how much of the grid of the keys each entry of the batch
            takes up, from its start on; the rest is padding (NaViT). Each is attended as if it were alone, its windows
            shifted at its own border; one smaller than a window under "shift" as by the largest window that fits. A
            query in the padding gives zeros, its lse is -inf, and what the padding holds reaches nothing. What is given
            by slot is so by the entry's own slots. Boundaries "shift", "mask", "zero" and "valid". It costs 8·rank
            bytes a query; and under "shift", unless causal, products as of a window of 2k-1 slots.
        extra_key, extra_value: [*batch, n, key_heads, head_dim] and [..., value_dim]: tokens that every query sees,
            after its slots. They take no bias.
        extra_positions: integers [n, rank] or [*batch, n, rank], where the extra tokens stand on the grid of the keys:
            along the axes on which the window is causal, a query does not see those that are ahead of it. None: every
            query sees them all. A token that is in the grid as well is seen twice, unless a mask of keys hides it.
        sink_logits: [heads], a logit that takes its share of the weights and has no value (gpt-oss): A_ij = exp(s_ij) /
            (exp(sink) + sum_j exp(s_ij)). Neither scale nor soft cap nor score_mod applies to it; -inf is none. softmax
            only. A query with nothing else to attend to gives zeros, and its lse is the sink's logit.
        query_offset: the queries are those of index offset, offset + 1, ... of the window's query grid, on which there
            may be fewer of them than the keys make: an int for each axis (one, of one axis), or "end", the last ones.
            What is given for queries (bias, mask, segments) is given for these, and `score_mod` is told their index on
            the whole query grid. It may be traced, `jax.Array` integers, also in a tuple: one program for all places,
            which computes a dense product with the keys around the queries, for few queries (a token of a decoder);
            it is then moved so that all queries stand on the grid, and `normalize` is no function. Not without a
            window, of which it says where it stands: causal attention over n keys is ``Window(n, causal=True)``.
        dropout_rate: in [0, 1), of the normalised weights. The same `dropout_key` drops the same weights, in every
            implementation, forward and backward.
        dropout_key: a `jax.random.key`, needed where `dropout_rate` > 0.
        broadcast_dropout: drop the same in every entry of the batch and every head.
        precision: as in `jax.lax.dot_general`.
        implementation: None chooses; "reference" is the readable one, which gathers `N × window` keys; "xla" tiles, and
            is slower with a function of yours (`score_mod`, `normalize`), which may close over what is differentiated;
            "splash" is JAX's splash attention, which None chooses on one TPU, or inside `shard_map(check_vma=False)`:
            softmax of 256 queries or more over all keys, or over windows of one axis that are causal or of boundary
            "mask", without bias, with a soft cap that is a Python number, its query rounded once more where the scale
            is no power of two;
            "tpu" is kernels for a TPU, for softmax over windows with no other term than relative_bias, on one device,
            inside `shard_map`, or on a mesh of Explicit axes, over which it splits batch and heads as they lie (Auto
            axes tell it nothing, and the compiler gathers what is sharded). No chip has run them yet, so they are not
            chosen by None. The environment's JAXATTN_IMPLEMENTATION goes before it, wherever what it names can: "tpu"
            turns the kernels on in a job, and "xla" turns them off where the code names them (what is compiled already,
            as a whole training step, stays as it is).
        tile: queries per tile along each axis of the grid, multiples of the window's block, for "xla" (and "tpu", which
            rounds them up to whole registers); an int serves all axes. None chooses by a model of the cost, from shapes
            and backend. It changes speed and memory only.
        return_residuals: also return lse, the log of the sum of exponentials of the final scores, and of the sink's
            logit; softmax only.

    Returns:
        [*batch, *query_grid, heads, value_dim] in the promoted dtype of query, key and value (statistics in float32, or
        float64 for float64). A query with nothing to attend to gives zeros, and zero gradients. With
        `return_residuals`, a pair with lse [*batch, *query_grid, heads], -inf where there is nothing to attend to; see
        `merge_attentions`. A NaN gives NaN to the queries that see it, whatever the normaliser. It may also reach
        queries nearby that do not, as in dense attention under a mask (0 · NaN); "reference" keeps it to those that do.

    Raises:
        ValueError: before anything is compiled, naming the argument, what came and what is allowed.

    Under `jit`, `vmap`, `grad`, `jvp`, `linear_transpose` in the values, `checkpoint` and `shard_map` it is what the
    formula is. `jax.experimental.jet` has no rule for "xla": nest `jvp`, or take "reference".

    References:
        Vaswani et al. 2017 (arXiv 1706.03762); Ramachandran et al. 2019 (1906.05909); Hassani et al. 2023 (2204.07143);
        sinks: Xiao et al. 2023 (2309.17453), OpenAI 2025 (2508.10925).

    Example:
        >>> x = jnp.ones((1, 8, 8, 2, 16))  # batch 1, grid 8 × 8, 2 heads of 16
        >>> attention(x, x, x, window=Window((3, 3))).shape
        (1, 8, 8, 2, 16)
        >>> sizes = jnp.array([[5, 6]])  # an image of 5 × 6; what is outside is padding
        >>> attention(x, x, x, window=Window((3, 3)), grid_sizes=sizes)[0, :, :, 0, 0].sum().item()
        30.0

        Queries coarser than the keys are a stride. Queries finer than the keys are heads: those that stand on one key
        are folded into a group, which shares that key's window (and has a relative_bias for each of its members).

        >>> fine, keys = jnp.ones((8, 2, 16)), jnp.ones((4, 2, 16))  # two queries on each key
        >>> folded = fine.reshape(4, 2, 2, 16).swapaxes(1, 2).reshape(4, 4, 16)  # [keys, heads · 2, head_dim]
        >>> output = attention(folded, keys, keys, window=Window(3))
        >>> output.reshape(4, 2, 2, 16).swapaxes(1, 2).reshape(8, 2, 16).shape
        (8, 2, 16)

        Tokens that are added to 8 that are there see those, and each other:

        >>> new, all_keys = jnp.ones((2, 2, 16)), jnp.ones((10, 2, 16))
        >>> attention(new, all_keys, all_keys, window=Window(4, causal=True), query_offset="end").shape
        (2, 2, 16)
    """
    if isinstance(window, list | tuple):
        return head_groups.attend(attention, window, locals())  # the arguments, for nothing else is here yet
    arrays = Arrays(
        query=query,
        key=key,
        value=value,
        bias=bias,
        mask=mask,
        scale=scale,
        relative_bias=relative_bias,
        key_embedding=key_embedding,
        logits_soft_cap=logits_soft_cap,
        segment_ids=segment_ids,
        grid_sizes=grid_sizes,
        extra_key=extra_key,
        extra_value=extra_value,
        extra_positions=extra_positions,
        sink_logits=sink_logits,
        dropout_key=dropout_key,
        query_offset=query_offset,
    )
    arrays, settings = arguments.read(
        arrays,
        window=window,
        score_mod=score_mod,
        normalize=normalize,
        dropout_rate=dropout_rate,
        precision=precision,
        tile=tile,
        implementation=implementation,
        return_residuals=return_residuals,
        broadcast_dropout=broadcast_dropout,
    )
    # a function of the caller's may hold what changes, which a cache would freeze
    attend = _attend if settings.has_functions else _attend_compiled
    found = attend(arrays, settings, machine.backend())
    return found if return_residuals else found[0]


@broadcasting
def merge_attentions(outputs: Sequence[Operand], lses: Sequence[Operand], *, return_residuals: bool = False) -> Any:
    """Join softmax attentions of the same queries over disjoint sets of keys, exactly.

    ``y = sum_n exp(lse_n - lse) y_n`` with ``lse = log sum_n exp(lse_n)``: what one attention over all the keys gives,
    for outputs [*batch, *grid, heads, value_dim] and lses [*batch, *grid, heads] as `attention(...,
    return_residuals=True)` returns them. A sink is one more key, whose value is zero: give `sink_logits` to one part
    alone, whichever it is. Where every part is empty (its lse is -inf) the result is zeros, with zero
    gradients. `return_residuals` also returns lse.

    >>> q, k, v = (jnp.full((4, 1, 2), 0.1 * n) for n in range(3))
    >>> half = [attention(q, k[s], v[s], return_residuals=True) for s in (slice(0, 1), slice(1, 4))]
    >>> jnp.allclose(merge_attentions(*zip(*half)), attention(q, k, v)).item()
    True
    """
    outputs, lses = _parts("outputs", outputs), _parts("lses", lses)
    if len(outputs) != len(lses):
        raise ValueError(f"merge_attentions: outputs (={len(outputs)} arrays) must be as many as lses (={len(lses)})")
    for name, parts, shape in (("outputs", outputs, outputs[0].shape), ("lses", lses, outputs[0].shape[:-1])):
        for n, part in enumerate(parts):
            if part.shape != shape or part.ndim == 0:
                raise ValueError(
                    f"merge_attentions: {name}[{n}] (={list(part.shape)}) must be {list(shape)}, as outputs[0] is"
                )
    if not isinstance(return_residuals, bool | np.bool_):
        raise ValueError(f"merge_attentions: return_residuals (={shown(return_residuals)}) must be True or False")
    scores = jnp.stack(lses, axis=-1)
    present = scores != -jnp.inf
    scores = jnp.where(present, scores, 0)
    weights = NORMALIZERS["softmax"](scores, present)
    stacked = jnp.where(present[..., None, :], jnp.stack(outputs, axis=-1), 0)
    merged = (stacked.astype(weights.dtype) * weights[..., None, :]).sum(-1).astype(stacked.dtype)
    return (merged, logsumexp(scores, present)) if return_residuals else merged


def _parts(name: str, parts: Any) -> list[Array]:
    """One array for each part, at least one."""
    try:
        arrays = [jnp.asarray(part) for part in parts]
    except (TypeError, ValueError):  # no sequence, or none of numbers
        arrays = []
    if not arrays or not all(jnp.issubdtype(x.dtype, jnp.floating) for x in arrays):
        raise ValueError(f"merge_attentions: {name} (={shown(parts)}) must be a sequence of floating-point arrays")
    return arrays


@broadcasting
def _attend(arrays: Arrays, settings: Settings, platform: str) -> tuple[Array, ...]:
    """Check, choose, call. A compiled call is found by its platform too, for a backend may support one alone."""
    del platform
    operands, options = arguments.check(arrays, settings)

    def attend(operands: Operands, offset: Any) -> tuple[Array, ...]:
        whole = placed.whole(operands, options, offset)
        backend, _ = backends.choose(settings.asked, *whole)
        output, *lse = sink.attend(*whole, backend)
        grid = operands.query.shape[:-1]
        return output.reshape(*grid, output.shape[-1]), *(x.reshape(grid) for x in lse)

    if settings.asked != (None,) and parted.known(operands) and arrays.query_offset is None:
        backend, _ = backends.choose(settings.asked, operands, options)
        if backend.opaque:
            return parted.attend(functools.partial(attend, offset=None), operands, options)
    return explicit.as_query(attend, operands.query, 1 + options.residuals)(operands, arrays.query_offset)


_attend_compiled = jax.jit(_attend, static_argnums=(1, 2))

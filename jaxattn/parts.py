"""The parts of `attention`, one by one: scores, weights, and the mix of values by weights."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from jaxattn import arguments, explicit, machine
from jaxattn.arguments import Arrays, Operand, Settings
from jaxattn.checked import checked, shown
from jaxattn.kernels import parts
from jaxattn.kernels.operands import Operands, Options, ScoreMod
from jaxattn.normalize import Normalizer
from jaxattn.promotion import broadcasting
from jaxattn.window import Window


def attention_scores(
    query: Operand,
    key: Operand,
    bias: Operand | None = None,
    mask: Operand | tuple[Operand | None, Operand | None] | None = None,
    *,
    window: Window | None = None,
    scale: float | Operand | None = None,
    relative_bias: Operand | None = None,
    key_embedding: Operand | Sequence[Operand] | None = None,
    score_mod: ScoreMod | None = None,
    logits_soft_cap: float | Operand | None = None,
    segment_ids: Operand | Sequence[Operand] | None = None,
    extra_key: Operand | None = None,
    extra_positions: Operand | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*batch_and_query_grid heads slots"]:
    """The scores of `attention`, of each query and each slot of its window, which it normalises:

        s_ij = scale·(q_i · k_j) + q_i · r[j-i] + relative_bias[j-i] + bias_ij     then soft cap, score_mod, mask

    All arguments are `attention`'s, which has more. It holds what it returns and a few tiles, forward and backward: for
    a window of w slots, N × w numbers.

    Returns:
        [*batch, *query_grid, heads, slots + extra tokens] in float32, or in float64 for float64; -inf where a slot
        takes no part, with zero gradients. Slots are the window's, row-major (`Window.indices` says which key each
        holds); without a window they are the keys.

    Raises:
        ValueError: as `attention` does.

    >>> x = jnp.ones((1, 8, 8, 2, 16))  # batch 1, grid 8 × 8, 2 heads of 16
    >>> attention_scores(x, x, window=Window((3, 3))).shape
    (1, 8, 8, 2, 9)
    """
    arrays = Arrays(
        query=query,
        key=key,
        value=key,
        bias=bias,
        mask=mask,
        scale=scale,
        relative_bias=relative_bias,
        key_embedding=key_embedding,
        logits_soft_cap=logits_soft_cap,
        segment_ids=segment_ids,
        extra_key=extra_key,
        extra_value=extra_key,
        extra_positions=extra_positions,
    )
    options = {"score_mod": score_mod, "normalize": "none", "dropout_rate": 0.0, "precision": precision}
    return _call("attention_scores", parts.scores, arrays, window, options)


def attention_weights(
    query: Operand,
    key: Operand,
    bias: Operand | None = None,
    mask: Operand | tuple[Operand | None, Operand | None] | None = None,
    *,
    window: Window | None = None,
    scale: float | Operand | None = None,
    relative_bias: Operand | None = None,
    key_embedding: Operand | Sequence[Operand] | None = None,
    score_mod: ScoreMod | None = None,
    logits_soft_cap: float | Operand | None = None,
    normalize: str | Normalizer = "softmax",
    segment_ids: Operand | Sequence[Operand] | None = None,
    extra_key: Operand | None = None,
    extra_positions: Operand | None = None,
    sink_logits: Operand | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Operand | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*batch_and_query_grid heads slots"]:
    """The weights of `attention`, A_i = normalize(s_i), by which `mix` adds up the values.

    All arguments are `attention`'s, which has more. What it holds, and the layout and dtype of what it returns, are
    those of `attention_scores`; what takes no part has the weight 0. A sink takes its share and is not shown.

    Raises:
        ValueError: as `attention` does.

    >>> x = jnp.linspace(0, 1, 2 * 8 * 16).reshape(8, 2, 16)
    >>> weights = attention_weights(x, x, window=Window(3))
    >>> jnp.allclose(weights.sum(-1), 1).item()
    True
    """
    arrays = Arrays(
        query=query,
        key=key,
        value=key,
        bias=bias,
        mask=mask,
        scale=scale,
        relative_bias=relative_bias,
        key_embedding=key_embedding,
        logits_soft_cap=logits_soft_cap,
        segment_ids=segment_ids,
        extra_key=extra_key,
        extra_value=extra_key,
        extra_positions=extra_positions,
        sink_logits=sink_logits,
        dropout_key=dropout_key,
    )
    options = {"score_mod": score_mod, "normalize": normalize, "dropout_rate": dropout_rate, "precision": precision}
    return _call("attention_weights", parts.weights, arrays, window, options)


@checked
def mix(
    weights: Float[ArrayLike, "*batch_and_query_grid heads slots"],
    value: Float[ArrayLike, "*batch_and_grid value_heads value_dim"],
    *,
    window: Window | None = None,
    extra_value: Float[ArrayLike, "*batch n value_heads value_dim"] | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*batch_and_query_grid heads value_dim"]:
    """The values that each query's window holds, added up by weights: ``y_i = sum_j A_ij v_j``.

    ``mix(attention_weights(query, key, ...), value)`` is ``attention(query, key, value, ...)``; the weights may as well
    come from elsewhere. It is linear in both, and holds what it is given and a few tiles.

    Args:
        weights: [*batch, *query_grid, heads, slots + extra tokens], floating point, as `attention_weights` returns
            them. One of a slot that takes no part in the window (`Window.mask`) counts for nothing.
        value: [*batch, *grid, value_heads, value_dim]; their heads divide those of the weights.
        window: as in `attention`.
        extra_value: [*batch, n, value_heads, value_dim], of the last n weights.
        precision: as in `jax.lax.dot_general`.

    Returns:
        [*batch, *query_grid, heads, value_dim], in value's dtype.

    Raises:
        ValueError: naming the argument, what came and what is allowed.

    >>> x = jnp.ones((8, 2, 16))
    >>> mean = jnp.full((8, 2, 3), 1 / 3)
    >>> mix(mean, x, window=Window(3)).shape
    (8, 2, 16)
    """
    weights, value = jnp.asarray(weights), jnp.asarray(value)
    extra = None if extra_value is None else jnp.asarray(extra_value).astype(value.dtype)
    _check_mix(weights, value, extra, window)
    hashable: Any = tuple(precision) if isinstance(precision, list) else precision
    return _mix(weights, value, extra, window, hashable, machine.backend())


def _call(name: str, part: Callable, arrays: Arrays, window: Any, options: dict[str, Any]) -> Array:
    """A part of attention, of arguments that `attention` checks."""
    try:
        rest = {"tile": None, "implementation": None, "return_residuals": False, "broadcast_dropout": False}
        arrays, settings = arguments.read(arrays, window=window, **options, **rest)
        # a function of the caller's may hold what changes, which a cache would freeze
        evaluate = _evaluate if settings.has_functions else _evaluate_compiled
        return evaluate(part, arrays, settings, machine.backend())
    except ValueError as error:
        raise ValueError(str(error).replace("attention: ", f"{name}: ", 1)) from None


@broadcasting
def _evaluate(part: Callable, arrays: Arrays, settings: Settings, platform: str) -> Array:
    del platform  # by which a compiled call is found, for its tiles are that machine's
    operands, options = arguments.check(arrays, settings)
    return explicit.as_query(lambda operands: (part(operands, options),), operands.query)(operands)[0]


_evaluate_compiled = jax.jit(_evaluate, static_argnums=(0, 2, 3))


def _check_mix(weights: Array, value: Array, extra: Array | None, window: Window | None) -> None:
    rank = 1 if window is None else window.rank
    for name, x in (("weights", weights), ("value", value)):
        if x.ndim < rank + 2:
            raise ValueError(f"mix: {name} (={shown(x)}) must have at least {rank + 2} axes, for a grid of rank {rank}")
    heads, batch, keys = value.shape[-2], value.shape[: -rank - 2], value.shape[-rank - 2 : -2]
    if extra is not None and extra.shape != (*batch, extra.shape[-3], *value.shape[-2:]):
        raise ValueError(f"mix: extra_value (={shown(extra)}) must be {[*batch, 'n', *value.shape[-2:]]}, as value is")
    queries = weights.shape[-3:-2] if window is None else window.query_grid(keys)
    slots = math.prod(keys if window is None else window.sizes) + (0 if extra is None else extra.shape[-3])
    if heads == 0 or weights.shape[-2] % heads or weights.shape != (*batch, *queries, weights.shape[-2], slots):
        wanted = ", ".join(map(str, (*batch, *queries, f"a multiple of {heads}", slots)))
        raise ValueError(
            f"mix: weights (={shown(weights)}) must be [*batch, *query_grid, heads, slots + extra tokens] = "
            f"[{wanted}], for value (={shown(value)}) and window (={window})"
        )


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
@broadcasting
def _mix(weights: Array, value: Array, extra: Array | None, window: Window | None, precision: Any, platform: str):
    del platform
    rank = 1 if window is None else window.rank
    operands = Operands(weights, value, value, jnp.ones(()), extra_key=extra, extra_value=extra)
    options = Options(window, weights.shape[-2 - rank : -2], value.shape[-2 - rank : -2], precision=precision)
    return explicit.as_query(lambda operands: (parts.mix(operands, options),), weights)(operands)[0]

"""Attention that starts as a convolution, or with a convolution's habits, and is free to leave them."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Real

from jaxattn.checked import checked
from jaxattn.zoo.quadratic import quadratic_scores


@checked
def init_as_cnn(
    attention: nnx.Module,
    how: Literal["gpsa", "impulse", "mimetic"],
    *,
    alpha: float | None = None,
    gate: float = 1.0,
    size: int = 3,
    positions: Real[Array | np.ndarray, "*grid in_features"] | None = None,
    rngs: nnx.Rngs | None = None,
) -> None:
    """Set an attention layer's parameters, in place, so that it starts as a CNN does. Three ways:

    "gpsa" (d'Ascoli et al. 2021, ConViT, arXiv 2103.10697): the positional part of head h looks at tap h of a √H × √H
    kernel, v_h = -α (1, -2Δ_h), so that v·r_δ = -α(‖δ - Δ_h‖² - ‖Δ_h‖²) for r_δ = (‖δ‖², δ); the gate is λ, and W_V the
    identity. With the gate closed (σ(λ) → 1) and α large, the layer is the convolution by W[Δ_h] = W_V,h W_O,h with
    edge padding, within 2 · error_bound(α, rank) of its norm. At the paper's α = 1, λ = 1, it is a soft start.

    "impulse" (after Zheng et al. 2024, arXiv 2401.12511): head h attends to one offset of a `size` × `size` grid, the
    offsets in turn, by weights softmax_δ(-α ‖δ - Δ_h‖²). In a layer with a `relative_bias`, that is the table, and the
    queries start from zero. In one without, `positions` say what is added to the tokens, and W_Q and W_K are the
    least-squares solution (here by formula, where the paper optimises them) of

        scale · (p_i W_Q) · (p_j W_K) = α (2 (i + Δ_h) · j - ‖j‖²)

    which has rank `rank` + 1, and the same softmax over j. It is exact where the positions are linearly independent.

    "mimetic" (Trockman & Kolter 2023, arXiv 2305.09828): W_Q W_Kᵀ ≈ 0.7 Z + 0.7 I in each head and
    W_V W_O ≈ 0.4 Z - 0.4 I, with Z of N(0, 1 / features), by singular values: what trained vision transformers show.

    Args:
      attention: a module with query, key, value and out (`nn.Attention`, `nnx.MultiHeadAttention`, or parameters of
        these names); for "gpsa", with value, position `[heads, rank + 1]` and gate `[heads]`.
      how: "gpsa", "impulse" or "mimetic".
      alpha: sharpness; None is 1 for "gpsa" and 8 for "impulse". "mimetic" has none.
      gate: λ of "gpsa".
      size: side of the grid of offsets of "impulse".
      positions: for "impulse", `[*grid, in_features]`.
      rngs: `nnx.Rngs`, for "mimetic"; `params` is used.

    Raises:
      ValueError: an argument is none of these, or the layer lacks what the way needs, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> from jaxattn import nn
    >>> layer = nn.Attention(9, 18, window=(3, 3), relative_bias=True, rngs=nnx.Rngs(0))
    >>> init_as_cnn(layer, "impulse")
    >>> layer.weights(jnp.ones((5, 5, 18)))[2, 2].argmax(-1)  # of the token in the middle: a slot to a head
    Array([0, 1, 2, 3, 4, 5, 6, 7, 8], dtype=int32)
    """
    if alpha is not None and alpha <= 0:
        raise ValueError(f"init_as_cnn: alpha (={alpha}) must be None or a finite number > 0")
    match how:
        case "gpsa":
            _gpsa(attention, 1.0 if alpha is None else alpha, gate)
        case "impulse":
            _impulse(attention, 8.0 if alpha is None else alpha, size, positions)
        case _:
            if rngs is None or alpha is not None:
                raise ValueError(
                    f"init_as_cnn: rngs (={rngs}) must be given and alpha (={alpha}) must be None with how='mimetic'"
                )
            _mimetic(attention, rngs)


def _gpsa(attention: Any, alpha: float, gate: float) -> None:
    position, gates, value = (_parameter(attention, name) for name in ("position", "gate", "value"))
    heads, rank = position.shape[0], position.shape[1] - 1
    side = round(heads ** (1 / rank))
    if side**rank != heads:
        raise ValueError(
            f"init_as_cnn: num_heads (={heads}) must be a whole number to the power of {rank} with how='gpsa', which "
            f"makes the heads a kernel of {rank} axes with equal sides: {side**rank} or {(side + 1) ** rank}"
        )
    features = value.shape[0]
    if value.shape[1] * value.shape[2] != features:
        raise ValueError(
            f"init_as_cnn: heads (={value.shape[1]}) · head_dim (={value.shape[2]}) must be {features}, the features, "
            "with how='gpsa', which makes value the identity"
        )
    centre = _offsets(side, rank)
    _set(position, -alpha * np.concatenate([np.ones((heads, 1)), -2 * centre], axis=1))
    _set(gates, np.full(gates.shape, gate))
    _set(value, np.eye(features).reshape(value.shape))


def _impulse(attention: Any, alpha: float, size: int, positions: Any) -> None:
    query, key = _heads(attention, "impulse")
    table: Any = getattr(attention, "relative_bias", None)
    if positions is None and table is None:
        raise ValueError(
            "init_as_cnn: positions (=None) must be given with how='impulse' where the layer has no relative_bias"
        )
    rank = (table.ndim if positions is None else np.ndim(positions)) - 1
    offsets = _offsets(size, rank)
    centre = offsets[np.arange(query.shape[1]) % len(offsets)]
    if positions is not None:
        return _by_positions(attention, query, key, centre, alpha, np.asarray(positions, np.float64))
    slots = [(n + 1) // 2 for n in table.shape[1:]]
    if min(slots) < size:
        raise ValueError(f"init_as_cnn: size (={size}) must fit in the layer's window, {slots}")
    params = {"centre": jnp.asarray(centre), "alpha": jnp.full(len(centre), alpha)}
    _set(table, quadratic_scores(params, [np.arange(1 - k, k) for k in slots]))
    _set(query, np.zeros(query.shape))  # keys stay, so that the queries have gradients
    _no_bias(attention, "query")


def _by_positions(attention: Any, query, key, centre: np.ndarray, alpha: float, positions: np.ndarray) -> None:
    """Queries (i + Δ, 1) and keys (2j, -‖j‖²), the grid's middle the origin, from the positions by least squares."""
    *grid, features = positions.shape
    if not grid:
        raise ValueError(f"init_as_cnn: positions (={list(positions.shape)}) must be [*grid, in_features]")
    rank, head_dim = len(grid), query.shape[2]
    if features != query.shape[0] or features != key.shape[0]:
        raise ValueError(
            f"init_as_cnn: positions (={list(positions.shape)}) must have as many features as query "
            f"(={query.shape[0]}) and key (={key.shape[0]}) take"
        )
    if head_dim < rank + 1:
        raise ValueError(
            f"init_as_cnn: head_dim (={head_dim}) must be at least {rank + 1} for positions on a grid of {rank} axes"
        )
    axes = [np.arange(n) - (n - 1) / 2 for n in grid]
    token = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, rank)
    one = np.ones((len(token), 1))
    scale = getattr(attention, "scale", None)
    root = np.sqrt(alpha / (head_dim**-0.5 if scale is None else scale))
    solve = np.linalg.pinv(positions.reshape(-1, features))
    queries, keys = np.zeros(query.shape), np.array(key[...], np.float64)
    for h, delta in enumerate(centre):
        queries[:, h, : rank + 1] = solve @ (root * np.concatenate([token + delta, one], axis=1))
        keys[:, h, : rank + 1] = solve @ (root * np.concatenate([2 * token, -(token**2).sum(1)[:, None]], axis=1))
    _set(query, queries)
    _set(key, keys)
    for name in ("query", "key"):
        _no_bias(attention, name)


def _mimetic(attention: Any, rngs: nnx.Rngs) -> None:
    query, key = _heads(attention, "mimetic")
    value, out = _parameter(attention, "value"), _parameter(attention, "out")
    features, heads, head_dim = query.shape
    if key.shape[0] != features or value.shape != query.shape or out.shape != (heads, head_dim, features):
        raise ValueError(
            f"init_as_cnn: query (={list(query.shape)}), key (={list(key.shape)}), value (={list(value.shape)}) and "
            f"out (={list(out.shape)}) must have as many features in as out, and as many heads, with how='mimetic'"
        )
    if head_dim > features:
        raise ValueError(
            f"init_as_cnn: head_dim (={head_dim}) must be at most in_features (={features}) with how='mimetic'"
        )

    def noise():
        return np.asarray(jax.random.normal(rngs.params(), (features, features)), np.float64) / np.sqrt(features)

    pairs = [_split(0.7 * noise() + 0.7 * np.eye(features), head_dim) for _ in range(heads)]
    _set(query, np.stack([left for left, _ in pairs], axis=1))
    _set(key, np.stack([right for _, right in pairs], axis=1))
    left, right = _split(0.4 * noise() - 0.4 * np.eye(features), heads * head_dim)
    _set(value, left.reshape(value.shape))
    _set(out, right.T.reshape(out.shape))
    for name in ("query", "key", "value", "out"):
        _no_bias(attention, name)


def _split(matrix: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """The two factors, with so many columns, whose product L Rᵀ is nearest to the matrix; spare columns are zero."""
    left, scale, right = np.linalg.svd(matrix)
    kept = min(columns, len(scale))
    root = np.sqrt(scale[:kept])
    spare = [(0, 0), (0, columns - kept)]
    return np.pad(left[:, :kept] * root, spare), np.pad(right[:kept].T * root, spare)


def _offsets(side: int, rank: int) -> np.ndarray:
    """The offsets of a kernel's taps, `[side**rank, rank]`."""
    axes = [np.arange(side) - (side - 1) // 2] * rank
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, rank)


def _heads(attention: Any, how: str) -> tuple[Any, Any]:
    """The query and key kernels, one key head to a query head, with nothing between them and the scores."""
    query, key = _parameter(attention, "query"), _parameter(attention, "key")
    if query.shape[1:] != key.shape[1:]:
        raise ValueError(
            f"init_as_cnn: key (={list(key.shape)}) must have as many heads as query (={list(query.shape)}) with "
            f"how={how!r}"
        )
    if getattr(attention, "query_ln", None) is not None:
        raise ValueError(
            f"init_as_cnn: normalize_qk (=True) must be False with how={how!r}: it would undo the products"
        )
    for name in ("rotary", "transform_qk"):
        if getattr(attention, name, None) is not None:
            raise ValueError(f"init_as_cnn: {name} must be left out with how={how!r}: it would undo the products")
    return query, key


def _parameter(attention: Any, name: str) -> Any:
    """The parameter of that name, or the kernel of the layer of that name."""
    found = getattr(attention, name, None)
    found = getattr(found, "kernel", found)
    if not isinstance(found, nnx.Variable):
        raise ValueError(
            f"init_as_cnn: attention (={type(attention).__name__}) must have the parameter {name!r}, which is to be set"
        )
    return found


def _set(parameter: Any, array: Any) -> None:
    parameter[...] = jnp.asarray(array, parameter.dtype)


def _no_bias(attention: Any, name: str) -> None:
    bias = getattr(getattr(attention, name), "bias", None)
    bias = getattr(attention, f"{name}_bias", None) if bias is None else bias
    if bias is not None:
        _set(bias, np.zeros(bias.shape))

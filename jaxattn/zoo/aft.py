"""The attention-free transformer: weights from the key and the offset, channel by channel, gated by the query."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn.einsum import einsum
from jaxattn.kernels.problem import statistics_dtype
from jaxattn.zoo.equations import axes, divided, same, sliding
from jaxattn.zoo.parameters import affine, features, named
from jaxattn.zoo.registry import row

LINEAR = dict.fromkeys(("query", "key", "value"), "features hidden")
BIASES = dict.fromkeys(("query_bias", "key_bias", "value_bias"), "?hidden")


@row(
    "AFT",
    weights="exp(k_j + w_ij), gated by σ(q_i)",
    source="key + learned",
    shared="no / no",
    normalizer="sum",
    paper="Zhai et al. 2021 (2105.14103)",
)
def aft(x, params: Mapping[str, Any], *, precision: lax.PrecisionLike = None) -> jax.Array:
    """Each channel a head of its own, whose weights come from key and position,

        y_i = W_O (σ(q_i) ⊙ Σ_j exp(k_j + w_ij) ⊙ v_j / Σ_j exp(k_j + w_ij)),    q = W_Q x, k = W_K x, v = W_V x

    the AFT-full of Zhai et al. 2021 (arXiv 2105.14103), in two sums of products, since exp(k_j + w_ij) is exp(w_ij) ·
    exp(k_j): nothing of tokens² · channels is made. w = 0 is AFT-simple; a w of -inf masks, but not all of a query's
    keys. The largest key of each channel and the largest w of each query are subtracted first, so no exponential
    overflows; a query for which every exp(k_j + w_ij) is e^-80 of what these two would make together (in float32) is
    beyond this product form.

    Args:
      x: `[*batch, *grid, features]`, with any number of batch axes.
      params: "query", "key", "value" `[features, hidden]`, "position" w `[*grid, *grid]` (query's place first), "out"
        `[hidden, out_features]`, and optionally "query_bias", "key_bias", "value_bias" `[hidden]` and "out_bias"
        `[out_features]`.
      precision: as in `jax.lax.dot_general`.

    Returns:
      `[*batch, *grid, out_features]`, in the dtype of x and params. The sums are in float32 at least.

    Raises:
      ValueError: a parameter is missing or unknown, or a shape doesn't fit, by name.

    >>> import jax.numpy as jnp
    >>> params = {name: jnp.ones((8, 6)) for name in ("query", "key", "value")} | {"out": jnp.ones((6, 8))}
    >>> aft(jnp.ones((2, 5, 7, 8)), params | {"position": jnp.ones((5, 7, 5, 7))}).shape
    (2, 5, 7, 8)
    """
    rank = max(np.ndim(params.get("position", ())) // 2, 1)
    sizes = features("aft", x, rank)
    params = named(
        "aft", params, sizes, **LINEAR, **BIASES, position="*grid *grid", out="hidden out_features",
        out_bias="?out_features",
    )  # fmt: skip
    if params["position"].shape[:rank] != np.shape(x)[-1 - rank : -1]:
        raise ValueError(
            f"aft: params['position'] has shape {list(params['position'].shape)} and x {list(np.shape(x))}: "
            "they must be [*grid, *grid] and [*batch, *grid, features]"
        )
    gate, e, ev = _exponentials(jnp.asarray(x), params, rank, precision)
    position = params["position"].astype(e.dtype)
    largest = jnp.max(position, axis=tuple(range(rank, 2 * rank)), keepdims=True)
    weights = jnp.exp(position - lax.stop_gradient(largest))
    i, j = axes("i", rank), axes("j", rank)
    above, below = (einsum(f"{i} {j}, ... {j} c -> ... {i} c", weights, z, precision=precision) for z in (ev, e))
    return affine("... c, c o -> ... o", gate * (above / below).astype(gate.dtype), params, "out", precision)


@row(
    "AFT-conv",
    weights="exp(k_j + w_{h,j-i}), w = 0 outside the window, gated by σ(q_i)",
    source="key + learned",
    shared="no / no",
    normalizer="sum",
    paper="Zhai et al. 2021 (2105.14103)",
)
def aft_conv(x, params: Mapping[str, Any], *, precision: lax.PrecisionLike = None) -> jax.Array:
    """`aft` whose w is the same wherever one stands, and zero outside a window: all tokens are seen, those near by
    differently,

        y_i = W_O (σ(q_i) ⊙ Σ_j exp(k_j + w_{j-i}) ⊙ v_j / Σ_j exp(k_j + w_{j-i}))

        Σ_j exp(k_j + w_{j-i}) ⊙ v_j = Σ_j exp(k_j) ⊙ v_j + einsum("... i0+r0 (h c), r0 h -> ... i0 (h c)",
                                                                   exp(k) ⊙ v, exp(w) - 1)

    the AFT-conv of Zhai et al. 2021 (arXiv 2105.14103): a sum over all and a depthwise convolution, whose weights the
    channels of a head share. The largest key of each channel is subtracted first, so no exponential overflows. A token
    that holds nearly all the sum and has a w far below zero is a difference of near equals: its relative rounding
    error is e^-w that of the dtype.

    Args:
      x: `[*batch, *grid, features]`, with any number of batch axes.
      params: "query", "key", "value" `[features, hidden]`, "position" w `[*window, heads]`, whose rank less one is the
        grid's, "out" `[hidden, out_features]`, and optionally "query_bias", "key_bias", "value_bias" `[hidden]` and
        "out_bias" `[out_features]`. Heads divide hidden.
      precision: as in `jax.lax.dot_general`.

    Returns:
      `[*batch, *grid, out_features]`, in the dtype of x and params. The sums are in float32 at least.

    Raises:
      ValueError: a parameter is missing or unknown, or a shape doesn't fit, by name.

    >>> import jax.numpy as jnp
    >>> params = {name: jnp.ones((8, 6)) for name in ("query", "key", "value")} | {"out": jnp.ones((6, 8))}
    >>> aft_conv(jnp.ones((2, 14, 14, 8)), params | {"position": jnp.ones((7, 7, 3))}).shape
    (2, 14, 14, 8)
    """
    rank = max(np.ndim(params.get("position", ())) - 1, 1)
    sizes = features("aft_conv", x, rank)
    params = named(
        "aft_conv", params, sizes, **LINEAR, **BIASES, position="*window heads", out="hidden out_features",
        out_bias="?out_features",
    )  # fmt: skip
    size, heads = params["position"].shape[:-1], params["position"].shape[-1]
    divided("aft_conv", "heads of params['position']", heads, params["value"].shape[-1], "hidden features")
    gate, e, ev = _exponentials(jnp.asarray(x), params, rank, precision)
    more = jnp.expm1(params["position"].astype(e.dtype))
    sums, window, i = sliding((1,) * rank, (1,) * rank)
    pads = same(size, (1,) * rank)
    grid = tuple(range(-1 - rank, -1))

    def total(z):
        near = einsum(f"... {sums} (h c), {window} h -> ... {i} (h c)", z, more, padding=pads, precision=precision)
        return z.sum(grid, keepdims=True) + near

    return affine("... c, c o -> ... o", gate * (total(ev) / total(e)).astype(gate.dtype), params, "out", precision)


def _exponentials(x: jax.Array, params: Mapping[str, jax.Array], rank: int, precision) -> list[jax.Array]:
    """σ(q), exp(k - max k) and its product with v, the latter two in float32 at least."""
    query, key, value = (
        affine("... c, c m -> ... m", x, params, name, precision) for name in ("query", "key", "value")
    )
    wide = statistics_dtype(key.dtype)
    key = key.astype(wide)
    largest = jnp.max(key, axis=tuple(range(-1 - rank, -1)), keepdims=True)
    e = jnp.exp(key - lax.stop_gradient(largest))
    return [jax.nn.sigmoid(query), e, e * value.astype(wide)]

"""The attention-free transformer: weights from the key and the offset, channel by channel, gated by the query."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import ArrayLike, Real

from jaxattn.checked import MeshAxis
from jaxattn.einsum import einsum
from jaxattn.kernels.operands import statistics_dtype
from jaxattn.zoo.equations import axes, divided, slid
from jaxattn.zoo.parameters import affine, parameters
from jaxattn.zoo.registry import row
from jaxattn.zoo.softmax import below_largest, everywhere

LINEAR = dict.fromkeys(("query", "key", "value"), "features -> hidden") | {"out": "hidden -> out_features"}


@row(
    "AFT", weights="exp(k_j + w_ij), gated by σ(q_i)", source="key + learned", shared="no / no", normalizer="sum",
    paper="Zhai et al. 2021 (2105.14103)", shapes=LINEAR | {"position": "*grid *grid"},
)  # fmt: skip
def aft(
    x: Real[ArrayLike, "*batch_and_grid features"], params: Mapping[str, Any], *, precision: lax.PrecisionLike = None
) -> jax.Array:
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

    Returns:
      `[*batch, *grid, out_features]`, in the dtype of x and params. The sums are in float32 at least.

    Raises:
      ValueError: a parameter is missing or unknown, or a shape doesn't fit, by name.

    >>> import jax.numpy as jnp
    >>> params = {name: jnp.ones((8, 6)) for name in ("query", "key", "value")} | {"out": jnp.ones((6, 8))}
    >>> aft(jnp.ones((2, 5, 7, 8)), params | {"position": jnp.ones((5, 7, 5, 7))}).shape
    (2, 5, 7, 8)
    """
    p, x, grid = parameters("aft", x, params)
    rank = len(grid)
    gate, e, ev = _exponentials(x, p, rank, precision)
    weights = jnp.exp(below_largest(p["position"].astype(e.dtype), tuple(range(rank, 2 * rank))))
    i, j = axes("i", rank), axes("j", rank)
    above, below = (einsum(f"{i} {j}, ... {j} c -> ... {i} c", weights, z, precision=precision) for z in (ev, e))
    return affine("... c, c o -> ... o", gate * (above / below).astype(gate.dtype), p, "out", precision)


@row(
    "AFT-conv", weights="exp(k_j + w_{h,j-i}), w = 0 outside the window, gated by σ(q_i)", source="key + learned",
    shared="no / no", normalizer="sum", paper="Zhai et al. 2021 (2105.14103)",
    shapes=LINEAR | {"position": "*window heads"},
)  # fmt: skip
def aft_conv(
    x: Real[ArrayLike, "*batch_and_grid features"],
    params: Mapping[str, Any],
    *,
    precision: lax.PrecisionLike = None,
    axis_name: MeshAxis | None = None,
) -> jax.Array:
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

    Returns:
      `[*batch, *grid, out_features]`, in the dtype of x and params. The sums are in float32 at least.

    Raises:
      ValueError: a parameter is missing or unknown, or a shape doesn't fit, by name.

    >>> import jax.numpy as jnp
    >>> params = {name: jnp.ones((8, 6)) for name in ("query", "key", "value")} | {"out": jnp.ones((6, 8))}
    >>> aft_conv(jnp.ones((2, 14, 14, 8)), params | {"position": jnp.ones((7, 7, 3))}).shape
    (2, 14, 14, 8)
    """
    p, x, grid = parameters("aft_conv", x, params)
    rank, *size, heads = len(grid), *p["position"].shape
    divided("aft_conv", "heads of params['position']", heads, p["value"].shape[-1], "the hidden features")
    gate, e, ev = _exponentials(x, p, rank, precision, axis_name)
    more = jnp.expm1(p["position"].astype(e.dtype))

    def total(z):
        equation = "... {sums} (h c), {r} h -> ... {i} (h c)"
        near = slid(equation, z, more, size, axis_name=axis_name, precision=precision)
        return everywhere(z.sum(tuple(range(-1 - rank, -1)), keepdims=True), axis_name) + near

    return affine("... c, c o -> ... o", gate * (total(ev) / total(e)).astype(gate.dtype), p, "out", precision)


def _exponentials(x: jax.Array, params: Mapping[str, jax.Array], rank: int, precision, axis_name=None):
    """σ(q), exp(k - max k) and its product with v, the latter two in float32 at least."""
    query, key, value = (
        affine("... c, c m -> ... m", x, params, name, precision) for name in ("query", "key", "value")
    )
    wide = statistics_dtype(key.dtype)
    e = jnp.exp(below_largest(key.astype(wide), tuple(range(-1 - rank, -1)), axis_name))
    return jax.nn.sigmoid(query), e, e * value.astype(wide)

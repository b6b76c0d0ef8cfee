"""Axial attention: along one axis at a time, with a relative position in query, key and value."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import ArrayLike, Real

from jaxattn.checked import AnyInt
from jaxattn.einsum import einsum
from jaxattn.kernels.operands import statistics_dtype
from jaxattn.normalize import softmax
from jaxattn.zoo.heads import PROJECTIONS, join, project
from jaxattn.zoo.parameters import parameters
from jaxattn.zoo.registry import row


@row(
    "axial attention", weights="q·k + q·r^q + k·r^k, V = v_j + r^v, one axis at a time", source="pair",
    shared="head / no", normalizer="softmax", paper="Wang et al. 2020 (2003.07853)",
    shapes=PROJECTIONS | {"query_embedding": "heads|1 offsets head_dim", "key_embedding": "heads|1 offsets head_dim",
    "value_embedding": "heads|1 offsets value_dim"},
)  # fmt: skip
def axial_attention(
    x: Real[ArrayLike, "*batch_and_grid features"],
    params: Mapping[str, Any],
    *,
    axis: AnyInt = -2,
    window: int | None = None,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """Position-sensitive attention along one axis; two of them, one after the other, see a whole image,

        s_ij = q_i·k_j + q_i·r^q[j-i] + k_j·r^k[j-i],
        y_i = Σ_h W_O,h Σ_{j in N(i)} softmax_j(s_ij) (v_j + r^v[j-i]).

    (Wang et al. 2020, Axial-DeepLab, arXiv 2003.07853, equation 4: no scale, and the heads one after the other: no
    "out".) The scores of an axis of n tokens are held in memory, n² for each line and head.

    Args:
      x: `[*batch, *grid, features]`, with any number of axes: all but `axis` and the features are a batch.
      params: "query_embedding", "key_embedding" `[heads or 1, 2m-1, head_dim]` and "value_embedding" `[heads or 1,
        2m-1, value_dim]`, indexed by m - 1 + j - i, where m is the window, or without one the axis's n tokens.
        "query", "key" `[features, heads, head_dim]`, "value" `[features, heads, value_dim]`, and optionally
        "query_bias", "key_bias", "value_bias" (without features), "out" `[heads, value_dim, out_features]` and
        "out_bias" `[out_features]`. Without "out" the heads' outputs stand one after the other.
      axis: which axis of x; -2 is the grid's last.
      window: m: token i attends to i - m // 2, ..., i - m // 2 + m - 1, as far as they are in the grid (the paper's
        span); None means all tokens of the axis.

    Returns:
      x's shape with out_features in place of features, in the dtype of x and params.

    Raises:
      ValueError: a parameter is missing or unknown, or a shape doesn't fit, by name.

    >>> import jax.numpy as jnp
    >>> params = {name: jnp.ones((8, 2, 4)) for name in ("query", "key", "value")}
    >>> rows, columns = ({f"{name}_embedding": jnp.ones((2, 2 * n - 1, 4)) for name in params} for n in (5, 6))
    >>> y = axial_attention(jnp.ones((3, 5, 6, 8)), params | rows, axis=-3)
    >>> axial_attention(y, params | columns, axis=-2).shape
    (3, 5, 6, 8)
    """
    if window is not None and window < 1:
        raise ValueError(f"axial_attention: window (={window}) must be None or an int >= 1")
    x, axis = jnp.asarray(x), _axis(axis, np.ndim(x))
    n = x.shape[axis]
    m = n if window is None else window
    p, x, _ = parameters("axial_attention", jnp.moveaxis(x, axis, -2), params, 1, offsets=2 * m - 1)
    q, k, v = project(x, p, precision)
    tables = (p[f"{name}_embedding"] for name in ("query", "key", "value"))
    rq, rk, rv = (jnp.broadcast_to(table, (q.shape[-2], *table.shape[1:])) for table in tables)
    kwargs: dict[str, Any] = {"precision": precision, "boundary": "zero", "i": n, "j": n}
    scores = {"preferred_element_type": statistics_dtype(q.dtype), **kwargs}
    s = einsum("... i h d, ... j h d -> ... h i j", q, k, **scores)
    s += einsum(f"... i h d, h j-i+{m - 1} d -> ... h i j", q, rq, **scores)
    s += einsum(f"... j h d, h j-i+{m - 1} d -> ... h i j", k, rk, **scores)
    offset = np.arange(n) - np.arange(n)[:, None]
    seen = (-(m // 2) <= offset) & (offset < m - m // 2) if window is not None else np.ones((n, n), bool)
    a = softmax(s, jnp.asarray(seen)).astype(v.dtype)
    y = einsum("... h i j, ... j h d -> ... i h d", a, v, **kwargs)
    y += einsum(f"... h i j, h j-i+{m - 1} d -> ... i h d", a, rv, **kwargs)
    return jnp.moveaxis(join(y, p, precision), -2, axis)


def _axis(axis: int, ndim: int) -> int:
    """Which axis of x, from the front."""
    if not -ndim <= axis < ndim or axis % ndim == ndim - 1:
        raise ValueError(
            f"axial_attention: axis (={axis}) must be an axis of x, which has {ndim}, and not the last, its features"
        )
    return axis % ndim

"""The lambda layer: what a query sees is a linear map, made of its surroundings before it is asked."""

from collections.abc import Mapping
from typing import Any

import jax
from jax import lax
from jaxtyping import ArrayLike, Real

from jaxattn.checked import MeshAxis
from jaxattn.einsum import einsum
from jaxattn.zoo.equations import axes, slid
from jaxattn.zoo.parameters import affine, parameters
from jaxattn.zoo.registry import row
from jaxattn.zoo.softmax import everywhere, softmax


@row(
    "lambda layer", weights="q_i·(Σ_j k̄_j v_j + Σ_j E_{j-i} v_j)", source="key + learned", shared="head / no",
    normalizer="softmax over keys only", paper="Bello 2021 (2102.08602)",
    shapes={"query": "features -> heads key_dim", "key": "features -> key_dim depth",
    "value": "features -> value_dim depth", "position": "*window key_dim depth"},
)  # fmt: skip
def lambda_layer(
    x: Real[ArrayLike, "*batch_and_grid features"],
    params: Mapping[str, Any],
    *,
    precision: lax.PrecisionLike = None,
    axis_name: MeshAxis | None = None,
) -> jax.Array:
    """A linear map from queries to values, λ_i, of what all tokens hold and of where those in the window are,

        y_i[h, v] = Σ_k q_i[h, k] · (λ^c + λ^p_i)[k, v],
        λ^c[k, v] = Σ_{j, u} softmax_j(k_j[k, u]) · v_j[v, u],    λ^p_i[k, v] = Σ_{r, u} E[r, k, u] · v_{i+r}[v, u]

        λ^p = einsum("... i0+r0 v u, r0 k u -> ... i0 k v", value, E)

    (Bello 2021, arXiv 2102.08602). There is no softmax over pairs, and no weight for one in memory. Outside the grid
    stand zeros; a window of 2n - 1 over n tokens is the global layer. u is the paper's intra-depth. Its batch
    normalisation of queries and values is, once trained, a scale and a shift, which their projections can hold.

    Args:
      x: `[*batch, *grid, features]`, with any number of batch axes.
      params: "query" `[features, heads, key_dim]`, "key" `[features, key_dim, depth]`, "value" `[features, value_dim,
        depth]`, "position" E `[*window, key_dim, depth]`, whose rank less two is the grid's; and optionally
        "query_bias", "key_bias", "value_bias", of those shapes without features.

    Returns:
      `[*batch, *grid, heads · value_dim]`, in the dtype of x and params. The softmax is in float32 at least.

    Raises:
      ValueError: a parameter is missing or unknown, or a shape doesn't fit, by name.

    >>> import jax.numpy as jnp
    >>> params = {"query": jnp.ones((8, 4, 3)), "key": jnp.ones((8, 3, 1)), "value": jnp.ones((8, 2, 1))}
    >>> lambda_layer(jnp.ones((2, 7, 7, 8)), params | {"position": jnp.ones((5, 5, 3, 1))}).shape
    (2, 7, 7, 8)
    """
    p, x, grid = parameters("lambda_layer", x, params)
    query, key, value = (affine("... c, c m n -> ... m n", x, p, name, precision) for name in ("query", "key", "value"))
    i, position = axes("i", len(grid)), p["position"]
    key = softmax(key, tuple(range(-2 - len(grid), -2)), axis_name)
    content = everywhere(einsum(f"... {i} k u, ... {i} v u -> ... k v", key, value, precision=precision), axis_name)
    equation, flat = "... {sums} (v u), {r} k u -> ... {i} k v", einsum("... v u -> ... (v u)", value)
    local = slid(equation, flat, position, position.shape[:-2], axis_name=axis_name, precision=precision)
    y = einsum(f"... {i} h k, ... k v -> ... {i} (h v)", query, content, precision=precision)
    return y + einsum("... h k, ... k v -> ... (h v)", query, local, precision=precision)

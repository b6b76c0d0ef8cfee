"""GPSA: a gate between attention by content and attention by position."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import ArrayLike, Real

from jaxattn.checked import MeshAxis
from jaxattn.einsum import einsum
from jaxattn.halo import split_attention
from jaxattn.kernels.operands import statistics_dtype
from jaxattn.window import Window
from jaxattn.zoo.heads import PROJECTIONS, join, project
from jaxattn.zoo.parameters import parameters
from jaxattn.zoo.registry import row
from jaxattn.zoo.whole_grid import whole_grid


@row(
    "GPSA (ConViT)", weights="(1-σ(λ)) softmax(q·k) + σ(λ) softmax(v·r)", source="pair + learned", shared="head / no",
    normalizer="softmax", paper="d'Ascoli et al. 2021 (2103.10697)",
    shapes=PROJECTIONS | {"position": "heads coordinates", "gate": "heads"},
)  # fmt: skip
def gpsa(
    x: Real[ArrayLike, "*batch_and_grid features"],
    params: Mapping[str, Any],
    *,
    scale: float | None = None,
    precision: lax.PrecisionLike = None,
    implementation: str | None = None,
    axis_name: MeshAxis | None = None,
) -> jax.Array:
    """Gated positional self-attention over a grid: each head mixes what it sees by content and by position,

        A_h(i, j) = (1 - σ(λ_h)) softmax_j(scale · q_i·k_j) + σ(λ_h) softmax_j(u_h·r[j-i]),
        y_i = b_O + Σ_h W_O,h Σ_j A_h(i, j) v_j,    r[δ] = (‖δ‖², δ1, δ2).

    With u = -α (1, -2Δ1, -2Δ2) a head attends around the offset Δ, the more sharply the larger α. (d'Ascoli et al.
    2021, ConViT, arXiv 2103.10697; u is its v_pos.)

    Args:
      x: `[*batch, *grid, features]`, with any number of batch axes.
      params: "position" u, `[heads, rank + 1]`, whose second size says how many axes the grid has; "gate" λ,
        `[heads]`. "query", "key" `[features, heads, head_dim]`, "value" `[features, heads, value_dim]`, and optionally
        "query_bias", "key_bias", "value_bias" (without features), "out" `[heads, value_dim, out_features]` and
        "out_bias" `[out_features]`. Without "out" the heads' outputs stand one after the other.
      scale: of the content; None means head_dim ** -0.5.

    Returns:
      `[*batch, *grid, out_features]`, in the dtype of x and params.

    Raises:
      ValueError: a parameter is missing or unknown, or a shape doesn't fit, by name.

    >>> import jax.numpy as jnp
    >>> params = {name: jnp.ones((8, 2, 4)) for name in ("query", "key", "value")}
    >>> gpsa(jnp.ones((3, 4, 5, 8)), params | {"position": jnp.ones((2, 3)), "gate": jnp.ones(2)}).shape
    (3, 4, 5, 8)
    """
    rank = max(1, (np.shape(params.get("position", ())) or (0,))[-1] - 1)
    window = Window(whole_grid("gpsa", x, rank, axis_name))
    p, x, _ = parameters("gpsa", x, params, rank, coordinates=rank + 1)
    query, key, value = project(x, p, precision)
    exact = statistics_dtype(query.dtype)  # ‖δ‖² needs more than bfloat16's eight bits, also inside a product
    bias = einsum("h c, c ... -> h ...", p["position"].astype(exact), _r(window.sizes, exact), precision="highest")
    gate = jax.nn.sigmoid(p["gate"]).reshape((1,) * (query.ndim - 2) + (-1, 1))
    kwargs: dict[str, Any] = {
        "window": window, "precision": precision, "implementation": implementation, "axis_name": axis_name,
    }  # fmt: skip
    content = split_attention(query, key, value, scale=scale, **kwargs)
    positional = split_attention(query, key, value, scale=0.0, relative_bias=bias, **kwargs)
    return join((1 - gate) * content + gate * positional, p, precision)


def _r(grid: tuple[int, ...], dtype: Any) -> jax.Array:
    """r[δ] = (‖δ‖², δ1, δ2, ...) for every offset of two tokens of a grid: `[rank + 1, *(2n-1)]`.

    >>> _r((2,), "int32")
    Array([[ 1,  0,  1],
           [-1,  0,  1]], dtype=int32)
    """
    offset = np.stack(np.meshgrid(*(np.arange(1 - n, n) for n in grid), indexing="ij"))
    return jnp.asarray(np.concatenate([np.square(offset).sum(0, keepdims=True), offset]), dtype)

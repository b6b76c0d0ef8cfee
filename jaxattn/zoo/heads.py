"""What the attention layers share: queries, keys and values by heads, the way back, and the positions of these."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxattn.einsum import einsum
from jaxattn.zoo.parameters import affine

PROJECTIONS = {
    "query": "features -> heads head_dim",
    "key": "features -> heads head_dim",
    "value": "features -> heads value_dim",
    "out": "?heads value_dim -> out_features",
}
EMBEDDINGS = {"embedding_{axis}": "heads|1 offsets_{axis} width"}


def offsets(size: tuple[int, ...]) -> tuple[int, ...]:
    """How many offsets there are between two tokens of a window, along each axis."""
    return tuple(2 * k - 1 for k in size)


def project(x: jax.Array, params: Mapping[str, jax.Array], precision) -> list[jax.Array]:
    """The query, key and value of every token of x `[*batch, *grid, features]`: `[*batch, *grid, heads, head_dim]`.

    Where there is no key among the parameters, the keys are zeros.
    """
    names = [name for name in ("query", "key", "value") if name in params]
    found = {name: affine("... c, c h d -> ... h d", x, params, name, precision) for name in names}
    return [found["query"], found.get("key", jnp.zeros_like(found["query"])), found["value"]]


def embedding(layer: str, params: Mapping[str, jax.Array], rank: int) -> tuple[jax.Array, ...] | None:
    """r as `attention` takes it, a table for each axis: all of head_dim wide, which are added, or head_dim / rank,
    which stand one after the other. None where there is none."""
    if "embedding_0" not in params:
        return None
    head_dim, width = params["query"].shape[-1], params["embedding_0"].shape[-1]
    if width != head_dim and width * rank != head_dim:
        raise ValueError(
            f"{layer}: params['embedding_0'] (of width {width}) must be of width head_dim (={head_dim}), or head_dim / "
            f"{rank}, where the axes' embeddings stand one after the other"
        )
    return tuple(params[f"embedding_{axis}"] for axis in range(rank))


def join(y: jax.Array, params: Mapping[str, jax.Array], precision) -> jax.Array:
    """`[*batch, *grid, out_features]` of `[*batch, *grid, heads, value_dim]`.

    Without an output projection, the heads stand one after the other.
    """
    if "out" not in params:
        return einsum("... h d -> ... (h d)", y)
    return affine("... h d, h d o -> ... o", y, params, "out", precision)

"""What stands in some bottlenecks for the 3 × 3 convolution: BoTNet's and HaloNet's attention, and lambda layers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxattn.attention import attention
from jaxattn.halo import shard_count, split_attention
from jaxattn.models.pooling import average_pool
from jaxattn.models.resize import resize_offsets
from jaxattn.models.resnet_blocks import batch_norm
from jaxattn.models.translation import Rule, Table
from jaxattn.nn.attention import Attention
from jaxattn.nn.conv import Conv
from jaxattn.nn.grid import Splittable
from jaxattn.parts import attention_weights
from jaxattn.window import Window

ALONE = {"kernel": "i head dim -> (head dim) i 1 1"}
BOTNET: Table = {
    "layer.query|key|value": Rule("qkv", {"kernel": "i head dim -> +(head dim) i 1 1"}),
    "rows": Rule("pos_embed.height_rel", resize=resize_offsets),
    "columns": Rule("pos_embed.width_rel", resize=resize_offsets),
}  # fmt: skip
# the key and value of a head stand together
HALO: Table = {
    "layer.query": Rule("q", ALONE), "layer.key|value": Rule("kv", {"kernel": "i head dim -> (head +dim) i 1 1"}),
    "rows": "pos_embed.height_rel", "columns": "pos_embed.width_rel",
}  # fmt: skip
LAMBDA: Table = {
    "query|key|value": Rule("qkv", {"kernel": "i o -> +o i 1 1"}), "query_norm": "norm_q", "value_norm": "norm_v",
    "position": Rule("conv_lambda", {"kernel": "h w i o -> o i h w 1"}),
}  # fmt: skip


class PositionAttention(Splittable):
    """Attention with an embedding of rows and one of columns, which the heads share,

        y_i = Σ_{j in N(i)} softmax_j(q_i·k_j / √d + q_i·(u[row_j - row_i] + v[column_j - column_i])) v_j

    over the whole grid (BoTNet, Srinivas et al. 2021, arXiv 2101.11605), then pooled where there is a stride; or over a
    block and its halo (HaloNet, Vaswani et al. 2021, arXiv 2103.12731), where a stride leaves every other query, and
    timm's position is then no function of the offset: it counts the queries that are left, and the keys as they were.

    Args:
      width, num_heads, stride: of the layer; features stay.
      window: the grid, or the side of a block.
      halo: tokens around it; None: BoTNet's.
    """

    def __init__(
        self, width: int, num_heads: int, stride: int, window: tuple[int, int], halo: int | None, **kwargs: Any
    ):
        size: Any = window if halo is None else tuple(n + 2 * halo for n in window)
        self.window = Window(size) if halo is None else Window(size, block=window, boundary="zero")
        self.block, self.halo, self.stride = window, halo, stride
        self.layer = Attention(
            num_heads, width, window=self.window, use_bias=False, out_projection=False, keep_rngs=False, **kwargs
        )
        draw, dim = nnx.initializers.normal((width // num_heads) ** -0.5), width // num_heads
        self.rows, self.columns = (
            nnx.Param(draw(kwargs["rngs"].params(), (2 * n - 1, dim), kwargs["param_dtype"])) for n in size
        )

    def __call__(self, x: Float[Array, "*batch height width features"], *, sow_weights: bool = False):
        grid = (x.shape[-3] * shard_count(self.axis_name), x.shape[-2])
        fits = (
            grid == self.block if self.halo is None else not any(n % k for n, k in zip(grid, self.block, strict=True))
        )
        if not fits:
            kind = "be" if self.halo is None else "divide"
            raise ValueError(f"BoTNet: window (={self.block}) must {kind} the grid of its stage, which is {grid}")
        layer: Any = self.layer
        query, key, value = layer.query(x), layer.key(x), layer.value(x)
        rows, columns = (table[...].astype(query.dtype) for table in (self.rows, self.columns))
        if self.halo is not None and self.stride == 2:
            y = self._strided(query[..., ::2, ::2, :, :], key, value, rows, columns)
            return y.reshape(*y.shape[:-2], -1)
        # timm counts a halo's keys from its own first one, the window's from the block's
        tables = tuple(jnp.roll(table, -(self.halo or 0), 0)[None] for table in (rows, columns))
        terms: dict[str, Any] = {"window": self.window, "key_embedding": tables}
        if sow_weights:
            self.sow(nnx.Intermediate, "attention_weights", attention_weights(query, key, **terms))
        y = split_attention(query, key, value, axis_name=self.axis_name, **terms)
        y = y.reshape(*x.shape[:-1], -1)
        return average_pool(y, self.axis_name) if self.stride == 2 else y

    def _strided(self, query: Array, key: Array, value: Array, rows: Array, columns: Array) -> Array:
        """Of each block, its queries and all keys that they see, as a batch."""
        if self.axis_name is not None:
            raise ValueError(
                f"BoTNet: axis_name (={self.axis_name!r}) must be None for a halo with a stride, "
                "which sees all of its grid"
            )
        *batch, height, width, heads, dim = query.shape
        halo = self.halo or 0
        (p, q), (k, m) = (n // 2 for n in self.block), (n + 2 * halo for n in self.block)
        blocks = (height // p, width // q)
        query = query.reshape(*batch, blocks[0], p, blocks[1], q, heads, dim)

        def around(x):
            x = jnp.pad(x, [(0, 0)] * len(batch) + [(halo, halo)] * 2 + [(0, 0)] * 2)
            for axis, size, count, step in ((-4, k, blocks[0], 2 * p), (-3, m, blocks[1], 2 * q)):
                x = jnp.take(x, step * np.arange(count)[:, None] + np.arange(size), axis=x.ndim + axis)
            return jnp.moveaxis(x, -4, -5).reshape(*batch, *blocks, k * m, heads, dim)

        # of query a and key s of an axis: the table's row s - a, counted from its middle
        u = rows[np.arange(k) - np.arange(p)[:, None] + k - 1]
        v = columns[np.arange(m) - np.arange(q)[:, None] + m - 1]
        position = jnp.einsum("...xaybhd,asd->...xyhabs", query, u)[..., None]
        position = position + jnp.einsum("...xaybhd,btd->...xyhabt", query, v)[..., None, :]
        bias = position.reshape(*batch, *blocks, heads, p * q, k * m)
        query = jnp.moveaxis(query, -4, -5).reshape(*batch, *blocks, p * q, heads, dim)
        y = attention(query, around(key), around(value), bias).reshape(*batch, *blocks, p, q, heads, dim)
        return jnp.moveaxis(y, -4, -5).reshape(*batch, height, width, heads, dim)


class LambdaMixer(Splittable):
    """A linear map for each token, of the whole grid's keys and values and of where values stand around it,

        y_i = q_i Λ_i,   Λ_i = Σ_j softmax_j(k_j) v_jᵀ + Σ_δ E[δ] v_{i+δ}ᵀ + b

    with BatchNorms of q and v (Bello 2021, arXiv 2102.08602), then pooled where there is a stride.

    Args:
      width, num_heads, stride: of the layer; features stay.
      window: the side of E.
      key_dim: numbers of a query and of a key.
    """

    def __init__(self, width: int, num_heads: int, stride: int, window: int, key_dim: int = 16, **kwargs: Any):
        sizes = {"query": num_heads * key_dim, "key": key_dim, "value": width // num_heads}
        self.query, self.key, self.value = (
            nnx.Linear(width, size, use_bias=False, **kwargs) for size in sizes.values()
        )
        self.query_norm, self.value_norm = (batch_norm(sizes[name], **kwargs) for name in ("query", "value"))
        self.position = Conv(1, key_dim, (window, window), padding=window // 2, **kwargs)
        self.num_heads, self.stride = num_heads, stride

    def __call__(self, x: Float[Array, "*batch height width features"], *, sow_weights: bool = False):
        if self.axis_name is not None:
            raise ValueError(
                f"BoTNet: axis_name (={self.axis_name!r}) must be None for a lambda layer, which sees all of the grid"
            )
        query, value = self.query_norm(self.query(x)), self.value_norm(self.value(x))
        key = self.key(x)
        key = jax.nn.softmax(key, axis=(-3, -2))
        query = query.reshape(*x.shape[:-1], self.num_heads, -1)
        content = jnp.einsum("...ijk,...ijv->...kv", key, value)
        around = self.position(jnp.moveaxis(value, -1, -3)[..., None])  # [*batch, v, height, width, k]
        y = jnp.einsum("...ijhk,...kv->...ijhv", query, content)
        y = y + jnp.einsum("...ijhk,...vijk->...ijhv", query, around)
        y = y.reshape(*x.shape[:-1], -1)
        return average_pool(y) if self.stride == 2 else y

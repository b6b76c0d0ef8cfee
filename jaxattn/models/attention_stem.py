"""The first layer of a network of attention alone."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jaxtyping import Array, Float, Num

from jaxattn.attention import merge_attentions
from jaxattn.halo import split_attention
from jaxattn.nn.grid import Splittable
from jaxattn.window import Window


class AttentionStem(Splittable):
    """SASA's stem: attention in 4 × 4 windows, whose values know where in the window they stand,

        y_i = Σ_{j in N(i)} softmax_j(q_i · k_j) Σ_m p_m[j-i] W_V,m x_j,   p_m[δ] = softmax_m((row[δ₁] + col[δ₂]) · ν_m)

    (Ramachandran et al. 2019, section 3.2). Since the p_m sum to one over m, the sum over m joins M attentions with the
    relative biases log p_m as `merge_attentions` joins partial ones, exactly.

    `[*batch, height, width, in_features]` to `[*batch, height, width, features]`.
    """

    size = (4, 4)

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        num_heads: int,
        mixtures: int = 4,
        dtype=None,
        param_dtype,
        rngs: nnx.Rngs,
    ):
        if features % num_heads:
            raise ValueError(f"AttentionStem: num_heads (={num_heads}) must divide features (={features})")
        head_dim = features // num_heads

        def linear(*out_features):
            return nnx.LinearGeneral(
                in_features, out_features, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

        def table(rows):
            return nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (rows, head_dim), param_dtype))

        self.query, self.key = linear(num_heads, head_dim), linear(num_heads, head_dim)
        self.value = linear(mixtures, num_heads, head_dim)
        # the logits of p are sums of head_dim products of which ν brings the 1/√head_dim: of order one at first
        self.row, self.column, self.mixture = table(self.size[0]), table(self.size[1]), table(mixtures)
        self.window = Window(self.size, boundary="mask")
        self.dtype = dtype

    def log_mixture(self) -> Float[Array, "mixtures height width"]:
        """log p_m[δ]: how a token's value is mixed at each slot of the window."""
        position = self.row[...][:, None] + self.column[...]
        nu = self.mixture[...] * self.mixture.shape[-1] ** -0.5
        return jax.nn.log_softmax(jnp.einsum("ijd,md->mij", position, nu), axis=0)

    def __call__(self, x: Num[Array, "*batch height width channels"]) -> Float[Array, "*batch height width features"]:
        query, key, values = dtypes.promote_dtype((self.query(x), self.key(x), self.value(x)), dtype=self.dtype)
        heads = query.shape[-2]
        # slot u of an even window is the offset u - k // 2, which the relative table keeps at k - 1 + u - k // 2
        pads = [(k - 1 - k // 2, k // 2) for k in self.size]
        tables = jnp.pad(self.log_mixture(), [(0, 0), *pads]).astype(query.dtype)
        parts = [
            split_attention(
                query,
                key,
                values[..., m, :, :],
                axis_name=self.axis_name,
                window=self.window,
                relative_bias=jnp.broadcast_to(table, (heads, *table.shape)),
                return_residuals=True,
            )
            for m, table in enumerate(tables)
        ]
        y = merge_attentions([out for out, _ in parts], [lse for _, lse in parts])
        return y.reshape(*x.shape[:-1], -1)

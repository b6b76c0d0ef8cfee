"""GPSA's module, and where its heads begin."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from jaxattn import zoo
from jaxattn.checked import checked
from jaxattn.nn.layer import Init, Layer, head_sizes, small_init


class GPSA(Layer):
    """Gated positional self-attention, which begins as a convolution: `jaxattn.zoo.gpsa` with its parameters.

    Head h begins at the offset Δ_h, one of a grid of K^rank = num_heads offsets around the token, with
    position u = -α (1, -2Δ_h), and the identity for its value. (d'Ascoli et al. 2021, ConViT, arXiv 2103.10697.)

    Args:
      num_heads, in_features, qkv_features, out_features: as in `Attention`.
      rank: the number of grid axes; num_heads must be a power K^rank.
      locality_strength: α. At 1 a head leaves two thirds of its weight off the token at its offset, in 2-D.
      gate: where λ begins; at 1, 73 % of the weight is positional.
      identity_value: whether the value's kernel begins as the identity; then `qkv_features` must be `in_features`.
      use_bias: whether query, key and value have biases; the output projection has one.
      kernel_init: initialiser of the projections.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> layer = GPSA(9, 36, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 7, 7, 36))).shape
    (2, 7, 7, 36)
    >>> layer.position[...][0]  # -(1, -2Δ) for Δ = (-1, -1)
    Array([-1., -2., -2.], dtype=float32)
    """

    function = staticmethod(zoo.gpsa)

    @checked
    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        rank: int = 2,
        locality_strength: float = 1.0,
        gate: float = 1.0,
        identity_value: bool = True,
        use_bias: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Init = small_init,
        rngs: nnx.Rngs,
    ):
        given = locals()  # the arguments, by name
        if identity_value and qkv_features not in (None, in_features):
            raise ValueError(
                f"GPSA: with identity_value, qkv_features (={qkv_features}) must be in_features (={in_features})"
            )
        self.rank = rank
        position = -locality_strength * np.insert(-2 * head_centres(num_heads, rank), 0, 1, axis=1)
        self.draw(
            given, head_sizes(self, given) | {"coordinates": rank + 1}, biased=("out",),
            position=lambda key, shape, dtype: jnp.asarray(position, dtype), gate=nnx.initializers.constant(gate),
        )  # fmt: skip
        if identity_value:
            identity = jnp.eye(in_features, dtype=param_dtype)
            self.value = nnx.Param(identity.reshape(in_features, num_heads, -1))


def head_centres(num_heads: int, rank: int) -> np.ndarray:
    """The offset at which each head begins, `[num_heads, rank]`: a grid around zero, row-major.

    >>> head_centres(4, 2)
    array([[-0.5, -0.5],
           [-0.5,  0.5],
           [ 0.5, -0.5],
           [ 0.5,  0.5]])
    """
    side = round(num_heads ** (1 / rank))
    if side**rank != num_heads:
        raise ValueError(f"GPSA: num_heads (={num_heads}) must be K^{rank} for a grid of {rank} axes (rank={rank})")
    return np.indices((side,) * rank).reshape(rank, -1).T - (side - 1) / 2

"""A block of a vision transformer, whose mixing layer is a setting."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from jaxattn.models.backbone import scale, scaled
from jaxattn.models.gelu import gelu
from jaxattn.models.residual import drop_path
from jaxattn.nn.attention import Attention
from jaxattn.nn.gated import GPSA
from jaxattn.nn.grid import Splittable
from jaxattn.nn.quadratic import QuadraticAttention
from jaxattn.nn.rows import RowLinear

MIXES = ("global", "local", "quadratic", "gpsa")
Mix = str | Callable[..., nnx.Module]
small_init = nnx.initializers.normal(0.02)
xavier_init = nnx.initializers.xavier_uniform()
torch_init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # what PyTorch's linear maps start from


class TokenMixer(Splittable):
    """A block's mixing of tokens, `[*batch, *tokens, width]` to the same; "global" takes a grid or a sequence of them.

    "global": `nn.Attention` of all tokens. "local": the same in a window, with a relative bias (NAT, Hassani et al.
    2022, arXiv 2204.07143). "gpsa": `nn.GPSA`. "quadratic": `nn.QuadraticAttention`, each head with a whole value
    matrix, and a linear map after it (Cordonnier, Loukas & Jaggi 2020, arXiv 1911.03584, as in their code). A function
    makes its own: `mix(width, dtype=..., param_dtype=..., rngs=...)` gives a module that keeps a grid's shape.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mix: Mix,
        *,
        window: tuple[int, ...],
        qkv_bias: bool,
        kernel_init: Callable[..., Any],
        **kwargs: Any,
    ):
        self.out = nnx.data(None)
        if not isinstance(mix, str):
            self.layer = mix(width, **kwargs)
        elif mix == "quadratic":
            self.layer = QuadraticAttention(num_heads, width, kernel_init=kernel_init, **kwargs)
            self.out = nnx.Linear(width, width, kernel_init=kernel_init, **kwargs)
        elif mix == "gpsa":
            self.layer = GPSA(num_heads, width, use_bias=qkv_bias, kernel_init=kernel_init, **kwargs)
        else:
            place: dict[str, Any] = {"window": window, "relative_bias": True} if mix == "local" else {"rank": 1}
            self.layer = Attention(
                num_heads, width, use_bias=qkv_bias, kernel_init=kernel_init, keep_rngs=False, **place, **kwargs
            )
            if not qkv_bias:  # which leaves the projection out its bias
                heads = (num_heads, width // num_heads)
                linear = RowLinear if mix == "local" else nnx.LinearGeneral
                self.layer.out = linear(heads, width, axis=(-2, -1), kernel_init=kernel_init, **kwargs)
        self.flat = mix == "global"

    def __call__(self, x: Float[Array, "*batch width"], *, axes: int, sow_weights: bool = False):
        """`axes`: how many axes of tokens x has."""
        tokens = x.reshape(*x.shape[: -1 - axes], -1, x.shape[-1]) if self.flat else x
        # the others have no weights to show
        shown = partial(self.layer, sow_weights=sow_weights) if isinstance(self.layer, Attention) else self.layer
        y = shown(tokens).reshape(x.shape)
        return y if self.out is None else self.out(y)


class MLP(Splittable):
    """W₂ φ(W₁ x + b₁) + b₂, with φ the gelu by erf unless given, and dropout after each linear map."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        dropout: float,
        activation: Callable[[Array], Array] = gelu,
        **kwargs: Any,
    ):
        self.activation = activation
        self.first, self.second = nnx.Linear(width, hidden, **kwargs), nnx.Linear(hidden, width, **kwargs)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x: Float[Array, "*batch width"], *, rngs: nnx.Rngs | None = None):
        hidden = self.dropout(self.activation(self.first(x)), rngs=rngs)
        return self.dropout(self.second(hidden), rngs=rngs)


class Block(Splittable):
    """A transformer's block: x + mix(norm(x)), and then x + MLP(norm(x)); or with the norm after the sum, "post". With
    `layer_scale`, a factor for each feature of each branch, which begins there.

    `axes` of tokens come in: 3 for a volume, 2 for a grid, 1 for a sequence.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_dim: int,
        mix: Mix,
        *,
        axes: int,
        norm: str,
        window: tuple[int, ...],
        qkv_bias: bool,
        drop_path_rate: float,
        dropout: float,
        kernel_init: Callable[..., Any],
        layer_scale: float | None = None,
        activation: Callable[[Array], Array] = gelu,
        epsilon: float = 1e-6,
        **kwargs: Any,
    ):
        self.axes, self.post = axes, norm == "post"
        self.mix = TokenMixer(
            width, num_heads, mix, window=window, qkv_bias=qkv_bias, kernel_init=kernel_init, **kwargs
        )
        self.mlp = MLP(width, mlp_dim, dropout=dropout, activation=activation, kernel_init=kernel_init, **kwargs)
        self.mix_norm, self.mlp_norm = (layer_norm(width, epsilon, **kwargs) for _ in range(2))
        self.gamma1, self.gamma2 = (scale(width, layer_scale, kwargs["param_dtype"]) for _ in range(2))
        self.dropout, self.drop_path = nnx.Dropout(dropout), drop_path(drop_path_rate, axes + 1)

    def __call__(self, x: Float[Array, "*batch width"], *, sow_weights: bool = False, rngs: nnx.Rngs | None = None):
        def mix(x):
            return self.dropout(self.mix(x, axes=self.axes, sow_weights=sow_weights), rngs=rngs)

        mlp = partial(self.mlp, rngs=rngs)
        for branch, norm, gamma in ((mix, self.mix_norm, self.gamma1), (mlp, self.mlp_norm, self.gamma2)):
            y = branch(x) if self.post else branch(norm(x))
            x = x + self.drop_path(scaled(y, gamma), rngs=rngs)
            x = norm(x) if self.post else x
        return x


def layer_norm(width: int, epsilon: float = 1e-6, **kwargs: Any) -> nnx.LayerNorm:
    """With ViT's epsilon; its statistics are in float32, or in float64."""
    return nnx.LayerNorm(width, epsilon=epsilon, **kwargs)


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x σ(1.702 x), with which OpenAI's CLIP was trained.

    >>> [round(y, 4) for y in quick_gelu(jnp.array([-1.0, 0.0, 1.0])).tolist()]
    [-0.1542, 0.0, 0.8458]
    """
    return x * jax.nn.sigmoid(1.702 * x)

"""Pooling by attention: one learned query looks at all tokens."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxattn.models.backbone import layer_norm
from jaxattn.models.translation import BY_HEAD, FUSED, OUT, Rule, Table
from jaxattn.nn.attention import Attention
from jaxattn.nn.grid import Splittable

LATENT = "c -> 1 1 c"
TIMM: Table = {
    "latent": Rule("latent", LATENT),
    "attention.query": Rule("q", BY_HEAD),
    "attention.key|value": Rule("kv", FUSED), "attention.out": Rule("proj", OUT),
    "norm": "norm", "first": "mlp.fc1", "second": "mlp.fc2",
}  # fmt: skip
HUGGING_FACE: Table = {
    "latent": Rule("probe", LATENT), "attention.query|key|value": Rule("attention.in_proj_", FUSED),
    "attention.out": Rule("attention.out_proj", OUT),
    "norm": "layernorm", "first": "mlp.fc1", "second": "mlp.fc2",
}  # fmt: skip


class LatentPool(Splittable):
    """p = attention(q, x, x), with a learned query q, and then p + W₂ φ(W₁ norm(p)) (Zhai et al. 2022, arXiv
    2106.04560, section 2.1): `[*batch, tokens, width]` to `[*batch, width]`."""

    def __init__(
        self, width: int, num_heads: int, hidden: int, *, activation: Callable[[Array], Array], epsilon: float,
        kernel_init: Callable[..., Any], **kwargs: Any,
    ):  # fmt: skip
        draw = nnx.initializers.truncated_normal(width**-0.5)
        self.latent = nnx.Param(draw(kwargs["rngs"].params(), (width,), kwargs["param_dtype"]))
        self.attention = Attention(num_heads, width, kernel_init=kernel_init, keep_rngs=False, rank=1, **kwargs)
        self.norm, self.activation = layer_norm(width, epsilon, **kwargs), activation
        self.first = nnx.Linear(width, hidden, kernel_init=kernel_init, **kwargs)
        self.second = nnx.Linear(hidden, width, kernel_init=kernel_init, **kwargs)

    def __call__(self, x: Float[Array, "*batch tokens width"], *, sow_weights: bool = False):
        latent = jnp.broadcast_to(self.latent[...].astype(x.dtype), (*x.shape[:-2], 1, x.shape[-1]))
        y = self.attention(latent, x, sow_weights=sow_weights)[..., 0, :]
        return y + self.second(self.activation(self.first(self.norm(y))))

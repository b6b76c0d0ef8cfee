"""Convolution, attention, and everything between, as one einsum in JAX:

    y_i  =  Σ_h  Σ_{j in N(i)}  A_h(i, j) · V_h x_j

Every layer of this library is that line. They differ only in where the weights `A` come from: fixed at an offset
(convolution), learned at an offset (depthwise convolution), made from the centre (involution), made from the pair
(local self-attention). So there are two primitives, both pure functions, both differentiable to any order:

- `jaxattn.einsum`: an einsum whose axes may be indexed by a sum, so that a window is part of the notation;
- `jaxattn.attention`: two such einsums around a normaliser, in tiles, so that the weights never reach memory.

>>> import jax.numpy as jnp
>>> import jaxattn
>>> x, kernel = jnp.ones((2, 9, 9, 4)), jnp.ones((3, 3, 4, 8))
>>> jaxattn.einsum("n i+r j+s c, r s c o -> n i j o", x, kernel).shape  # a convolution
(2, 7, 7, 8)
>>> q = k = v = jnp.ones((1, 32, 32, 4, 16))  # batch, *grid, heads, head_dim
>>> jaxattn.attention(q, k, v, window=jaxattn.Window((7, 7))).shape  # each query over the 7 × 7 keys around it
(1, 32, 32, 4, 16)

`Window`, `plan` and `Plan`, `merge_attentions` and `conv` are here too. `jaxattn.zoo` has the layers as functions,
`jaxattn.nn` as Flax modules, `jaxattn.models` networks made of them, and `jaxattn.train` trains those.
"""

from typing import TYPE_CHECKING

from .at import attention_at as attention_at
from .attention import attention as attention
from .attention import merge_attentions as merge_attentions
from .attention_plan import AttentionPlan as AttentionPlan
from .attention_plan import attention_plan as attention_plan
from .einsum import Plan as Plan
from .einsum import einsum as einsum
from .einsum import plan as plan
from .machine import traced_for as traced_for
from .parts import attention_scores as attention_scores
from .parts import attention_weights as attention_weights
from .parts import mix as mix
from .window import Window as Window
from .zoo import conv as conv

if TYPE_CHECKING:  # else a checker takes it for the module of that name
    from .models.remix import remix as remix
    from .models.remix import remix_report as remix_report

__version__ = "0.1.0"


def __getattr__(name: str):
    """`jaxattn.nn`, `models`, `equivalence`, `measure`, `plots`, `remix` and its report, imported when asked for."""
    import importlib

    if name in ("remix", "remix_report"):
        return getattr(importlib.import_module("jaxattn.models.remix"), name)
    if name in ("nn", "models", "equivalence", "measure", "plots"):
        return importlib.import_module(f"jaxattn.{name}")
    raise AttributeError(f"module 'jaxattn' has no attribute {name!r}")

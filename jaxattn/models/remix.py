"""A network whose tokens mix in another way, from the same weights."""

from collections.abc import Sequence
from typing import Any

from flax import nnx

from jaxattn.models.backbone import Backbone
from jaxattn.models.nat import Neighborhood
from jaxattn.models.swin_attention import WindowAttention

TARGETS = ("neighborhood",)


def remix(model: Any, to: str, *, stages: Sequence[int] | None = None) -> Any:
    """A copy of a network, in which each token attends to its nearest and not to its window's, with every weight kept.

    Swin's windows part the grid, and NAT's move with the query; queries, keys, values, the output, and the bias of each
    offset mean the same in both. So a Swin becomes a network with NAT's mixing (Hassani et al. 2023, arXiv 2204.07143)
    and its own weights, from which training can go on. Where the window is the whole grid, the two are the same.

    Args:
      model: a `jaxattn.models.Swin` of version 1.
      to: "neighborhood".
      stages: which stages change, counted from 0; None: all.

    Raises:
      ValueError: no such target, a network that has no windows, one whose scores are cosines, or no such stage.

    >>> import jaxattn
    >>> from flax import nnx
    >>> swin = jaxattn.models.Swin((2,), 8, (2,), window=4, image_size=32, rngs=nnx.Rngs(0))
    >>> model = jaxattn.remix(swin, "neighborhood")
    >>> type(model.stages[0].blocks[1].mix).__name__, model(jnp.ones((1, 32, 32, 3))).shape
    ('Neighborhood', (1, 1000))
    """
    if to not in TARGETS:
        raise ValueError(f"remix: to (={to!r}) must be {' or '.join(map(repr, TARGETS))}")
    blocks = [block for stage in model.stages for block in stage.blocks] if isinstance(model, Backbone) else []
    windows = [block.mix for block in blocks if isinstance(getattr(block, "mix", None), WindowAttention)]
    if not windows or any(mix.attention.relative_bias is None for mix in windows):
        raise ValueError(
            f"remix: model (={type(model).__name__}) must have windows with a bias for each offset: a Swin of version 1"
        )
    count = len(model.stages)
    chosen = range(count) if stages is None else stages
    if not all(0 <= n < count for n in chosen):
        raise ValueError(f"remix: stages (={stages}) must be from 0 to {count - 1}")
    made = nnx.clone(model)
    for n in chosen:
        for block in made.stages[n].blocks:
            block.mix = _neighborhood(block.mix)
    return made


def _neighborhood(mix: WindowAttention) -> Neighborhood:
    old: Any = mix.attention
    settings = {"dtype": old.dtype, "param_dtype": old.relative_bias.dtype, "use_bias": old.query.bias is not None}
    shape = (old.num_heads, old.in_features, mix.window, 1)
    new: Any = nnx.eval_shape(lambda: Neighborhood(*shape, **settings, rngs=nnx.Rngs(0)))
    for name in ("query", "key", "value", "out", "relative_bias"):
        setattr(new.attention, name, getattr(old, name))
    return new

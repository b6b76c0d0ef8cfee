"""A network whose tokens mix in another way, from the same weights."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from flax import nnx

from jaxattn.checked import AnyInt, Extended, checked
from jaxattn.equivalence.convert import convert
from jaxattn.models.backbone import Backbone
from jaxattn.models.efficientnet import EfficientNet
from jaxattn.models.nat import Neighborhood
from jaxattn.models.nat_windows import ShiftedWindows
from jaxattn.models.resnet import ResNet
from jaxattn.models.swin_attention import WindowAttention
from jaxattn.nn.conv import Conv

Target = Literal["neighborhood", "window", "attention"]
ARRAYS = (nnx.Param, nnx.BatchStat)


class Remixed(NamedTuple):
    """A network that `remix` made, and what became of each array of the one before, by names such as
    "stages.0.blocks.1.mix.attention.query.kernel"; printed, it says so.

    Attributes:
      model: the network.
      kept: arrays that are where they were, bit by bit.
      moved: from the name before to the name now: a kernel `[*taps, in / groups, out]` that became an attention's
        value `[in / groups, taps, out]`, bit by bit.
      new: arrays that nothing in the network before was.
    """

    model: Any
    kept: tuple[str, ...]
    moved: dict[str, str]
    new: tuple[str, ...]

    def __str__(self) -> str:
        moved = tuple(f"{before} → {after}" for before, after in self.moved.items())
        parts = (("kept", self.kept), ("moved", moved), ("new", self.new))
        lines = [f"{len(names)} {part}:" + "".join(f"\n  {name}" for name in names) for part, names in parts if names]
        return "\n".join(lines)


@checked
def remix(
    model: nnx.Module, to: Target, *, stages: Sequence[AnyInt] | None = None, alpha: Extended | None = None
) -> Any:
    """A copy of a network whose tokens mix in another way, with every weight kept, from which training can go on.

    "neighborhood": a Swin's windows become NAT's neighbourhoods (Hassani et al. 2023, arXiv 2204.07143). Swin's windows
    part the grid, and NAT's move with the query; queries, keys, values, the output, and the bias b[j-i] of each of the
    (2k-1)² offsets mean the same in both.

    "window": NAT's neighbourhoods become Swin's windows (Liu et al. 2021, arXiv 2103.14030) of the same side k, whose
    table has the same (2k-1)² offsets. Every other block's are shifted by half of it, where the grid is larger. Dilated
    neighbourhoods (DiNAT's) become windows on each of the grids of every dilation-th token, with the offsets that they
    had.

    Where one window is the whole grid, both are the same function as before. Elsewhere they are another, to train on.

    "attention": each convolution of more than one tap in the blocks (ConvNeXt's 7 × 7, ResNet's 3 × 3) becomes local
    attention with one head to a tap, `nn.QuadraticAttention`, by `equivalence.convert`: the same function. The stem and
    what is between stages stay convolutions; `convert` alone makes all of them attention, and brings them back.

    Args:
      model: a `jaxattn.models` network: `Swin` (of version 1), `NAT`, or one of stages with convolutions, such as
        `ConvNeXt` and `ResNet`.
      to: "neighborhood", "window" or "attention".
      stages: which stages change, counted from 0; None: all.
      alpha: of "attention" alone, how sharply a head looks at its tap, as in `convert`. None is the hard limit, in
        which the outputs differ by rounding, and no gradient reaches where the heads look. With a finite one these
        learn, from a function within the bound of `equivalence.conv_to_attention`.

    Raises:
      ValueError: no such target or stage, or stages that hold nothing that becomes it.

    >>> import jax.numpy as jnp
    >>> import jaxattn
    >>> from flax import nnx
    >>> swin = jaxattn.models.Swin((2,), 8, (2,), window=4, image_size=32, rngs=nnx.Rngs(0))
    >>> model = jaxattn.remix(swin, "neighborhood")
    >>> type(model.stages[0].blocks[1].mix).__name__, model(jnp.ones((1, 32, 32, 3))).shape
    ('Neighborhood', (1, 1000))
    """
    return _remixed(model, to, stages, alpha).model


@checked
def remix_report(
    model: nnx.Module, to: Target, *, stages: Sequence[AnyInt] | None = None, alpha: Extended | None = None
) -> Remixed:
    """What `remix` makes, and a list of what was kept: a `Remixed`, to print.

    Args:
      model, to, stages, alpha: as in `remix`.

    Raises:
      ValueError: as `remix`.

    >>> import jaxattn
    >>> from flax import nnx
    >>> model = jaxattn.models.ConvNeXt((1,), (8,), rngs=nnx.Rngs(0))
    >>> report = jaxattn.remix_report(model, "attention")
    >>> len(report.kept), report.moved
    (16, {'stages.0.blocks.0.depthwise.kernel': 'stages.0.blocks.0.depthwise.value'})
    >>> report.new
    ('stages.0.blocks.0.depthwise.alpha', 'stages.0.blocks.0.depthwise.centre')
    """
    return _remixed(model, to, stages, alpha)


def _remixed(model: Any, to: Target, stages: Sequence[int] | None, alpha: float | None) -> Remixed:
    if alpha is not None and to != "attention":
        raise ValueError(f"remix: alpha (={alpha}) must be None with to={to!r}, whose scores are the network's own")
    blocks, change = _blocks(model), CHANGES[to]
    chosen = range(len(blocks)) if stages is None else stages
    if blocks and not all(0 <= n < len(blocks) for n in chosen):
        raise ValueError(f"remix: stages (={list(chosen)}) must be from 0 to {len(blocks) - 1}")
    places = {path: place for n in chosen for place, path in enumerate(blocks[n])} if blocks else {}
    changed: list[str] = []

    def replace(path: tuple[Any, ...], layer: Any) -> Any:
        place = next((places[path[:n]] for n in range(len(path) + 1) if path[:n] in places), None)
        if place is None or not change.suits(layer):
            return layer
        changed.append(_name(path))
        return change.make(layer, place, alpha)

    made = nnx.recursive_map(replace, nnx.clone(model))  # the copy comes first: the map would share the variables
    if not changed:
        where = type(model).__name__ + ("" if stages is None else f", stages {list(chosen)}")
        raise ValueError(f"remix: model (={where}) must have {change.needs}")
    before, after = (tuple(_name(path) for path, _ in nnx.to_flat_state(nnx.state(m, ARRAYS))) for m in (model, made))
    moved = {f"{name}.kernel": f"{name}.value" for name in changed} if to == "attention" else {}
    kept = tuple(name for name in after if name in set(before))
    return Remixed(made, kept, moved, tuple(name for name in after if name not in {*kept, *moved.values()}))


def _blocks(model: Any) -> list[list[tuple[Any, ...]]]:
    """The paths of each stage's blocks; none for a network without stages."""
    if isinstance(model, Backbone):
        return [[("stages", n, "blocks", m) for m in range(len(s.blocks))] for n, s in enumerate(model.stages)]
    if not isinstance(model, ResNet | EfficientNet):
        return []
    ends = model.ends if isinstance(model, ResNet) else [end + 1 for end in model.ends]
    return [[("blocks", n) for n in range(start, end)] for start, end in zip((0, *ends[:-1]), ends, strict=True)]


def _name(path: Sequence[Any]) -> str:
    return ".".join(map(str, path))


def _neighborhood(mix: Any, place: int, alpha: None) -> Neighborhood:
    window = mix.attention.window.sizes
    dilation = mix.dilation if isinstance(mix, ShiftedWindows) else 1
    return _with_weights(mix, lambda heads, width, **kwargs: Neighborhood(heads, width, window, dilation, **kwargs))


def _windows(mix: Any, place: int, alpha: None) -> ShiftedWindows:
    window, shifted = mix.attention.window, place % 2 == 1
    dilation = window.along[0].dilation
    return _with_weights(
        mix,
        lambda heads, width, **kwargs: ShiftedWindows(heads, width, window.sizes, dilation, shifted=shifted, **kwargs),
    )


def _with_weights(mix: Any, make: Callable[..., Any]) -> Any:
    """The mixer that `make` makes, of the same settings, with the projections and the table of `mix`."""
    old: Any = mix.attention
    settings = {"dtype": old.dtype, "param_dtype": old.relative_bias.dtype, "use_bias": old.query.bias is not None}
    new: Any = nnx.eval_shape(lambda: make(old.num_heads, old.in_features, **settings, rngs=nnx.Rngs(0)))
    for name in ("query", "key", "value", "out", "relative_bias"):
        setattr(new.attention, name, getattr(old, name))
    new.axis_name, new.attention.axis_name = mix.axis_name, old.axis_name
    return new


def _has_windows(layer: Any) -> bool:
    swin = isinstance(layer, WindowAttention) and getattr(layer.attention, "relative_bias", None) is not None
    return swin or isinstance(layer, ShiftedWindows)


class Change(NamedTuple):
    """How a target is reached.

    Attributes:
      needs: what a network must have, in words.
      suits: whether a layer is what changes.
      make: what it becomes, from the layer, its block's place in the stage, and alpha.
    """

    needs: str
    suits: Callable[[Any], bool]
    make: Callable[[Any, int, Any], Any]


CHANGES = {
    "neighborhood": Change("windows with a bias for each offset: a Swin of version 1", _has_windows, _neighborhood),
    "window": Change("neighbourhoods: a NAT or a DiNAT", lambda layer: isinstance(layer, Neighborhood), _windows),
    "attention": Change(
        "convolutions of more than one tap in its blocks: a ConvNeXt, or a ResNet that convolves",
        lambda layer: isinstance(layer, Conv) and math.prod(layer.kernel_size) > 1,
        lambda layer, place, alpha: convert(layer, alpha=alpha),
    ),
}

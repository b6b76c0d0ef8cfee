"""A network's weights under the names and in the layouts of PyTorch: one table, read both ways."""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from jaxattn.models.layout import Entry, Resize, Shape, layout
from jaxattn.nn.depthwise import DepthwiseConv, LightConv
from jaxattn.nn.transposed import ConvTranspose

# how PyTorch calls what a layer of Flax has
LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}
COUNTER = "num_batches_tracked"  # of BatchNorm, which with a fixed momentum does not use it
KERNELS = ("", "", "i o -> o i", "w i o -> o i w", "h w i o -> o i h w", "d h w i o -> o i d h w")  # by rank


class Rule(NamedTuple):
    """Where some parameters of ours are among theirs, and how they lie there."""

    name: str  # theirs, with a * for each * of ours; after a _ at its end, the leaf follows without a dot
    layout: str | Mapping[str, str] | Sequence[str] = ""  # an equation (see `layout`); one a leaf, or one a part
    resize: Resize | None = None  # makes their array of another size what an entry takes


Table = Mapping[str, str | Rule]


# `nn.Attention`'s projections as linear layers: query, key and value one after the other, or each alone
FUSED = {"kernel": "i head dim -> +(head dim) i", "bias": "head dim -> +(head dim)"}
BY_HEAD = {"kernel": "i head dim -> (head dim) i", "bias": "head dim -> (head dim)"}
OUT = {"kernel": "head dim o -> o (head dim)", "bias": "o -> o"}


def under(ours: str, theirs: str, table: Table) -> dict[str, str | Rule]:
    """The table of a part of a network, which stands at `ours` there, and at `theirs` in PyTorch's.

    >>> under("blocks.*", "layers.*", {"norm": "norm1"})
    {'blocks.*.norm': 'layers.*.norm1'}
    """
    found: dict[str, str | Rule] = {}
    for name, rule in table.items():
        moved = rule._replace(name=f"{theirs}.{rule.name}") if isinstance(rule, Rule) else f"{theirs}.{rule}"
        found[f"{ours}.{name}"] = moved
    return found


def below(theirs: str, table: Table) -> dict[str, str | Rule]:
    """The same table, where PyTorch has all of it in one module.

    >>> below("model", {"norm": "norm1"})
    {'norm': 'model.norm1'}
    """
    found = under("", theirs, table)
    return {name.removeprefix("."): rule for name, rule in found.items()}


@dataclasses.dataclass(frozen=True)
class Translation:
    """A network's names and layouts in PyTorch, as one publisher has them.

    Attributes:
      publisher: whose names they are.
      table: our module or parameter to theirs: a name, or a `Rule`. A * is a number, *-1 the one before it, and
        "query|key|value" are several parameters that are one of theirs. Below a module, a kernel is a weight
        `[out, in, *window]`, and the other leaves are as PyTorch calls them. What the table does not name is called as
        here.
      head: our module that makes the logits; it alone may differ in a file.
      derived: endings of names whose arrays are computed from sizes.
      constants: what their network has beyond ours, as it changes nothing: passed over, and written as it is here.
      beside: beginnings of names of other networks in the same file, which are passed over.

    >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    >>> {name: entry.shape for name, entry in Translation("timm", {"kernel": "fc.weight"}).entries(model).items()}
    {'bias': (2,), 'fc.weight': (2, 3)}
    """

    publisher: str
    table: Table
    head: str = "head"
    derived: Sequence[str] = ()
    constants: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    beside: tuple[str, ...] = ()

    def entries(self, model: nnx.Module) -> dict[str, Entry]:
        """Their name to what it holds, for every parameter and statistic of the model."""
        parts: dict[str, list[tuple[int, str, Shape, str, Resize | None]]] = {}
        layers = {".".join(map(str, path)): layer for path, layer in nnx.iter_modules(model)}
        for path, shape in shapes_of(model).items():
            usual = _usual(layers.get(path.rpartition(".")[0]), path.rpartition(".")[2], len(shape))
            name, part, equation, resize = self._place(path, usual)
            parts.setdefault(name, []).append((part, path, shape, equation, resize))
        found = {}
        for name, holds in parts.items():
            numbers, ours, shapes, equations, resizes = zip(*sorted(holds, key=lambda held: held[:2]), strict=True)
            if len(set(numbers)) < len(numbers):
                raise ValueError(
                    f"Translation: table must give each of {', '.join(ours)} a name of its own, and gives {name!r}"
                )
            found[name] = Entry(list(ours), list(shapes), [layout(equation) for equation in equations], resizes[0])
        return found

    def _place(self, path: str, usual: str) -> tuple[str, int, str, Resize | None]:
        """The name of theirs that holds a parameter, as which part of it, and in which layout, if not the usual one."""
        for pattern, parts, rule in self._patterns:
            if (match := pattern.fullmatch(path)) is None:
                continue
            leaf, part = match["leaf"], match["part"]
            name = rule.name
            for number in filter(str.isdecimal, filter(None, match.groups())):
                name = name.replace("*-1", str(int(number) - 1), 1) if "*-1" in name else name.replace("*", number, 1)
            if leaf:
                name += ("" if name.endswith("_") else ".") + LEAVES.get(leaf, leaf)
            number = parts.index(part) if part in parts else 0
            given = _equation(rule.layout, leaf or path.rpartition(".")[2], number)
            return name, number, given or usual, rule.resize
        before, dot, leaf = path.rpartition(".")
        return before + dot + LEAVES.get(leaf, leaf), 0, usual, None

    @functools.cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], list[str], Rule]]:
        """For each line of the table: what finds our parameters, the parts in their order, and the rule."""
        found = []
        for ours, rule in self.table.items():
            *before, last = (r"\d+" if step == "*" else step for step in ours.split("."))
            before = "".join(f"({step})\\." if step == r"\d+" else f"{re.escape(step)}\\." for step in before)
            pattern = re.compile(rf"{before}(?P<part>{last})(?:\.(?P<leaf>\w+))?")
            found.append((pattern, last.split("|"), rule if isinstance(rule, Rule) else Rule(rule)))
        return found


def _equation(given: str | Mapping[str, str] | Sequence[str], leaf: str, part: int) -> str:
    """The layout of a leaf by the rule; empty where it says nothing."""
    if isinstance(given, Mapping):
        given = given.get(leaf, "")
    return given if isinstance(given, str) else given[part]


def _usual(layer: Any, leaf: str, rank: int) -> str:
    """The layout of a layer's parameter as PyTorch has it."""
    if leaf != "kernel":
        axes = " ".join("abcdef"[:rank])
        return f"{axes} -> {axes}"
    if isinstance(layer, DepthwiseConv | LightConv):
        taps = " ".join("dhw"[4 - rank :])
        return f"{taps} c -> c 1 {taps}"
    if isinstance(layer, nnx.ConvTranspose | ConvTranspose):
        taps = "dhw"[5 - rank :]
        if layer.transpose_kernel:
            return f"{' '.join(taps)} o i -> i o {' '.join(taps)}"
        return f"{' '.join(f'-{tap}' for tap in taps)} i o -> i o {' '.join(taps)}"
    return KERNELS[rank]


def shapes_of(model: nnx.Module) -> dict[str, Shape]:
    """The shape of every parameter and statistic, by its path."""
    state = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    return {".".join(map(str, path)): tuple(variable.shape) for path, variable in state}

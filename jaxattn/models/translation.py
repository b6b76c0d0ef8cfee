"""A network's weights under the names and in the layouts of PyTorch: one table, read both ways."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from jaxattn.nn.depthwise import DepthwiseConv, LightConv
from jaxattn.nn.transposed import ConvTranspose

Shape = tuple[int, ...]
Resize = Callable[[np.ndarray, "Entry"], np.ndarray]

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
    layout: str | Mapping[str, str] | Sequence[str] = ""  # an equation (see `Layout`); one a leaf, or one a part
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


class Layout(NamedTuple):
    """One of our arrays as (a part of) one of theirs; `layout` makes it of an equation."""

    names: list[str]  # our axes
    flips: tuple[int, ...]  # those that are reversed
    units: list[list[str]]  # which of ours each of theirs is made of, row-major; none: an axis of one
    joint: int  # the unit along which parts stand one after the other
    merged: list[int]  # how many units each axis of theirs has: more than one where parts join within it

    def sizes(self, shape: Shape) -> list[int]:
        """Of the units."""
        by_name = dict(zip(self.names, shape, strict=True))
        return [math.prod(by_name[name] for name in unit) for unit in self.units]

    def order(self) -> list[int]:
        """Our axes as theirs come."""
        return [self.names.index(name) for unit in self.units for name in unit]


@functools.cache
def layout(equation: str) -> Layout:
    """A rearrangement of our array into theirs, as an equation: `"i head dim -> (head dim) i"`.

    Ours is on the left, an axis a name. On the right, parentheses make one axis of several, and 1 adds one. A minus
    before a name on the left reverses its axis. A plus on the right says along which axis the parts stand one after the
    other, where several parameters of ours are one of theirs: `+(head dim)`, or within an axis, `(head +dim)`. Without
    one, they do along the first.

    >>> layout("row -column -> 1 (row column)").units
    [[], ['row', 'column']]
    """
    left, _, right = equation.partition("->")
    units, merged, joint = [], [], 0
    for plus, group in re.findall(r"(\+?)(\([^)]*\)|\w+)", right):
        tokens = group.strip("()").split()
        # an axis within which parts join stays apart until they have
        apart = any(token.startswith("+") for token in tokens)
        found = [[token.lstrip("+")] for token in tokens] if apart else [[token for token in tokens if token != "1"]]
        if plus or apart:
            joint = len(units) + next((n for n, token in enumerate(tokens) if token.startswith("+")), 0)
        units += found
        merged.append(len(found))
    names = left.split()
    flips = tuple(axis for axis, name in enumerate(names) if name.startswith("-"))
    return Layout([name.lstrip("-") for name in names], flips, units, joint, merged)


class Entry(NamedTuple):
    """One array of theirs: our parameters in it, in their order, and how it is made of these.

    >>> entry = Entry(["q", "k"], [(2, 1), (2, 1)], [layout("-i o -> +o i")] * 2)
    >>> entry.write([np.array([[1], [2]]), np.array([[3], [4]])])
    array([[2, 1],
           [4, 3]])
    >>> entry.read(np.array([[2, 1], [4, 3]]))[1]
    array([[3],
           [4]])
    """

    ours: list[str]
    shapes: list[Shape]
    layouts: list[Layout]
    resize: Resize | None = None

    @property
    def _units(self) -> list[int]:
        """The sizes of the units of their array."""
        parts = [part.sizes(shape) for part, shape in zip(self.layouts, self.shapes, strict=True)]
        whole = list(parts[0])
        whole[self.layouts[0].joint] = sum(part[self.layouts[0].joint] for part in parts)
        return whole

    @property
    def shape(self) -> Shape:
        """Of their array."""
        sizes = iter(self._units)
        return tuple(math.prod(next(sizes) for _ in range(count)) for count in self.layouts[0].merged)

    def write(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Their array, of our parts."""
        moved = [
            np.flip(part, how.flips).transpose(how.order()).reshape(how.sizes(part.shape))
            for part, how in zip(parts, self.layouts, strict=True)
        ]
        return np.concatenate(moved, self.layouts[0].joint).reshape(self.shape)

    def read(self, array: np.ndarray) -> list[np.ndarray]:
        """Our parts, of their array."""
        joint = self.layouts[0].joint
        counts = [how.sizes(shape)[joint] for how, shape in zip(self.layouts, self.shapes, strict=True)]
        parts = np.split(array.reshape(self._units), np.cumsum(counts)[:-1], joint)
        found = []
        for part, how, shape in zip(parts, self.layouts, self.shapes, strict=True):
            order = how.order()
            moved = part.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))
            found.append(np.flip(moved, how.flips))
        return found


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

"""What is measured: the cases of attention and of convolution, each with a small one of its kind for `--quick`."""

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxattn.errors import InputError
from jaxattn.window import Window


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """One attention: query, key and value [batch, *grid, heads, head_dim] and, with `bias`, a relative bias. With
    `queries`, so many queries of all keys, as decoding has them."""

    name: str
    shape: tuple[int, ...]
    window: Window | None
    dtype: str = "float32"
    bias: bool = False
    series: str = ""  # the axis of a scaling plot that it is a point of
    queries: int | None = None

    kind = "attention"

    @property
    def grid(self) -> tuple[int, ...]:
        return self.shape[1:-2]

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def slots(self) -> int:
        return self.tokens if self.window is None else math.prod(self.window.sizes)

    @property
    def place(self) -> int:
        """Where it stands in its series."""
        return {"": 0, "tokens": self.tokens, "volume": self.slots}[self.series]

    @property
    def visible(self) -> int:
        """The pairs of a query and a key that it sees, of one batch entry and head."""
        if self.window is None:
            return self.tokens * (self.queries or self.tokens)
        return math.prod(int(axis.visible().sum()) for axis in self.window.axes(self.grid))

    @property
    def query_shape(self) -> tuple[int, ...]:
        return self.shape if self.queries is None else (self.shape[0], self.queries, *self.shape[-2:])

    def shapes(self) -> list[tuple[int, ...]]:
        """Of the inputs, and of the output."""
        shapes = [self.query_shape, self.shape, self.shape]
        if self.bias and self.window is not None:
            shapes.append((self.shape[-2], *(2 * k - 1 for k in self.window.sizes)))
        return [*shapes, self.query_shape]

    def operands(self) -> tuple[list[np.ndarray], np.ndarray]:
        """The inputs and the cotangent of the output."""
        *inputs, cotangent = normal(self.shapes(), self.dtype)
        return inputs, cotangent

    def flops(self, mode: str) -> int:
        """Scores and mix forward; backward the two derivatives of each. What is computed again does not count."""
        products = {"forward": 2, "both": 6}[mode]
        return products * 2 * self.shape[0] * self.shape[-2] * self.shape[-1] * self.visible

    def bytes(self, mode: str) -> int:
        """Every input read and every output written, once: q, k, v, o, and for both also do, dq, dk, dv. Backward alone
        does without o."""
        queries, keys = {"forward": (2, 2), "both": (4, 4), "backward": (3, 4)}[mode]
        moved = queries * math.prod(self.query_shape) + keys * math.prod(self.shape)
        return moved * jnp.dtype(self.dtype).itemsize

    def thin(self) -> tuple["AttentionCase", int]:
        """One head of one batch entry, and how many of them the case is."""
        batch, *_, heads, head_dim = self.shape
        return dataclasses.replace(self, shape=(1, *self.grid, 1, head_dim)), batch * heads

    def __str__(self) -> str:
        text = f"{self.dtype}[{','.join(map(str, self.shape))}]"
        if self.window is None:
            return f"{text}, every key" if self.queries is None else f"{text}, {self.queries} query of every key"
        default, options = Window(self.window.sizes), []
        for name in ("stride", "dilation", "block", "causal", "boundary", "offset"):
            value = getattr(self.window, name)
            if name == "boundary" or value != getattr(default, name):
                options.append(f"{name} {value[0] if len(set(value)) == 1 else value}")
        size = "×".join(map(str, self.window.sizes))
        return ", ".join([text, f"window {size}", *options, *(["relative bias"] if self.bias else [])])


@dataclasses.dataclass(frozen=True)
class ConvCase:
    """One convolution, in `einsum`'s notation and as `lax` describes it: x [batch, *grid, features], kernel
    [*size, features / groups, out]. One that is `transposed` writes tap q of position p to stride·p + q."""

    name: str
    equation: str
    shape: tuple[int, ...]
    kernel: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    stride: int = 1
    groups: int = 1
    dtype: str = "float32"
    transposed: bool = False

    kind, series, place = "conv", "", 0

    @property
    def rank(self) -> int:
        return len(self.shape) - 2

    @property
    def output(self) -> tuple[int, ...]:
        if self.transposed:
            lengths = [(n - 1) * self.stride + k for n, k in zip(self.shape[1:-1], self.kernel, strict=False)]
            return (self.shape[0], *lengths, self.kernel[-1])
        lengths = [
            (n + low + high - k) // self.stride + 1
            for n, k, (low, high) in zip(self.shape[1:-1], self.kernel, self.pads, strict=False)
        ]
        return (self.shape[0], *lengths, self.kernel[-1])

    def shapes(self) -> list[tuple[int, ...]]:
        """Of the inputs, and of the output."""
        return [self.shape, self.kernel, self.output]

    def operands(self) -> tuple[list[np.ndarray], np.ndarray]:
        """The inputs and the cotangent of the output."""
        x, kernel, cotangent = normal(self.shapes(), self.dtype)
        return [x, kernel], cotangent

    def flops(self, mode: str) -> int:
        """A product for every tap of every output; backward one for each of the two derivatives."""
        products = {"forward": 1, "both": 3}[mode]
        positions = self.shape[:-1] if self.transposed else self.output[:-1]
        return products * 2 * math.prod(positions) * math.prod(self.kernel)

    def bytes(self, mode: str) -> int:
        """Every input read and every output written, once; backward alone does without the output itself."""
        inputs, outputs = {"forward": (1, 1), "both": (2, 2), "backward": (2, 1)}[mode]
        moved = inputs * (math.prod(self.shape) + math.prod(self.kernel)) + outputs * math.prod(self.output)
        return moved * jnp.dtype(self.dtype).itemsize

    def thin(self) -> tuple["ConvCase", int]:
        """One batch entry, and how many of them the case is."""
        return dataclasses.replace(self, shape=(1, *self.shape[1:])), self.shape[0]

    def __str__(self) -> str:
        shapes = ", ".join(f"[{','.join(map(str, shape))}]" for shape in (self.shape, self.kernel))
        return f"{self.dtype}{shapes}, {self.equation}"


Case = AttentionCase | ConvCase


def normal(shapes: Sequence[tuple[int, ...]], dtype: str) -> list[np.ndarray]:
    """The same numbers every time."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, np.float32).astype(jnp.dtype(dtype)) for shape in shapes]


def both_boundaries(name: str, shape: tuple[int, ...], size: Any, **options) -> list[AttentionCase]:
    """A case whose windows are cut at the border, and one where they move inward."""
    return [
        AttentionCase(f"{name}-{boundary}", shape, Window(size, boundary=boundary), **options)
        for boundary in ("mask", "shift")
    ]


def depthwise(name: str, shape: tuple[int, ...], k: int) -> ConvCase:
    pads = ((k // 2, k // 2),) * 2
    return ConvCase(name, "n i+r j+s c, r s c -> n i j c", shape, (k, k, 1, shape[-1]), pads, groups=shape[-1])


def attention_cases(quick: bool) -> list[AttentionCase]:
    """The list; with `quick`, some of it in small."""
    if quick:
        grid, three = (1, 14, 14, 2, 8), Window((3, 3), boundary="mask")
        return [
            *both_boundaries("2d", grid, (3, 3)),
            AttentionCase("2d-bf16-mask", grid, three, dtype="bfloat16"),
            AttentionCase("2d-bias", grid, three, bias=True),
            AttentionCase("3d-mask", (1, 4, 6, 6, 2, 8), Window((1, 3, 3), boundary="mask")),
            AttentionCase("1d-causal", (1, 128, 2, 8), Window(15, causal=True, boundary="mask")),
            AttentionCase("1d-causal-whole", (1, 64, 2, 8), Window(64, causal=True)),
            AttentionCase("swin", (1, 16, 16, 2, 8), Window((8, 8), block=8)),
            AttentionCase("global", (1, 128, 2, 8), None),
            AttentionCase("decode", (1, 128, 2, 8), None, queries=1),
        ]
    grid, seven = (4, 56, 56, 4, 32), Window((7, 7), boundary="mask")
    return [
        *both_boundaries("2d", grid, (7, 7)),
        *both_boundaries("2d-bf16", grid, (7, 7), dtype="bfloat16"),
        *both_boundaries("2d-large", (1, 64, 64, 8, 64), (13, 13)),
        *both_boundaries("3d", (1, 16, 28, 28, 4, 32), (3, 7, 7)),
        *both_boundaries("1d", (1, 4096, 8, 64), 255),
        AttentionCase("1d-causal", (1, 4096, 8, 64), Window(255, causal=True, boundary="mask")),
        AttentionCase("1d-causal-whole", (1, 4096, 4, 64), Window(4096, causal=True)),
        AttentionCase("2d-head128", (2, 32, 32, 4, 128), seven),
        AttentionCase("2d-dilated", grid, dataclasses.replace(seven, dilation=2)),
        AttentionCase("2d-bias", grid, seven, bias=True),
        AttentionCase("swin", (4, 64, 64, 4, 32), Window((8, 8), block=8)),
        AttentionCase("global", (1, 4096, 4, 64), None),
        AttentionCase("decode", (1, 4096, 8, 64), None, queries=1),
        AttentionCase("decode-batch", (8, 1024, 8, 64), None, queries=1),
    ]


def chip_cases(quick: bool) -> list[AttentionCase]:
    """What is compiled for a chip, in its own precision; with `quick`, some of it in small."""
    of = functools.partial(both_boundaries, dtype="bfloat16")
    if quick:
        return [
            *of("2d", (1, 16, 16, 2, 64), (3, 3)),
            AttentionCase("global", (1, 512, 2, 64), None, dtype="bfloat16"),
        ]
    grid, nat, line = (8, 64, 64, 8, 64), (8, 56, 56, 16, 32), (8, 4096, 8, 64)
    alone = functools.partial(AttentionCase, dtype="bfloat16")
    return [
        *of("2d", grid, (7, 7)),
        *of("2d-large", grid, (13, 13)),
        *of("nat", nat, (7, 7), bias=True),
        *of("2d-head128", (8, 64, 64, 4, 128), (7, 7)),
        alone("swin", nat, Window((7, 7), block=7), bias=True),
        *of("3d", (1, 16, 64, 64, 8, 64), (3, 7, 7)),
        alone("2d-dilated", grid, Window((7, 7), dilation=2)),
        alone("2d-wrap", grid, Window((7, 7), boundary="wrap")),
        *of("1d", line, 255),
        alone("1d-causal", line, Window(255, causal=True, boundary="mask")),
        alone("global", line, None),
        alone("decode", line, None, queries=1),
    ]


def series_cases(quick: bool) -> list[AttentionCase]:
    """How time and temporaries grow: in the tokens at 7×7, and in the volume of the window at 64×64."""
    sides, at, sizes, grid = (
        ((8, 16), 3, (3, 5), 16) if quick else ((56, 112, 224, 448), 7, (3, 5, 7, 9, 13, 19, 31), 64)
    )

    def point(series: str, length: int, n: int, k: int) -> AttentionCase:
        return AttentionCase(f"{series}-{length}", (1, n, n, 4, 32), Window((k, k), boundary="mask"), series=series)

    return [*(point("tokens", n, n, at) for n in sides), *(point("volume", k, grid, k) for k in sizes)]


def transposed(name: str, shape: tuple[int, ...], k: int, features: int, stride: int) -> ConvCase:
    rank = len(shape) - 2
    grid, taps = "ijk"[:rank], "rst"[:rank]
    written = " ".join(f"{stride}*{i}+{r}" for i, r in zip(grid, taps, strict=True))
    equation = f"n {' '.join(grid)} c, {' '.join(taps)} c o -> n {written} o"
    kernel = (*(k,) * rank, shape[-1], features)
    return ConvCase(name, equation, shape, kernel, ((0, 0),) * rank, stride=stride, transposed=True)


def conv_cases(quick: bool) -> list[ConvCase]:
    """The list; with `quick`, the same kinds in small."""
    pick: Callable[[Any, Any], Any] = lambda full, small: small if quick else full
    grid = pick((8, 56, 56, 64), (1, 12, 12, 16))
    c = grid[-1]
    dense, one, three = "n i+r j+s c, r s c o -> n i j o", ((1, 1),) * 2, ((3, 3),) * 2
    line = pick((8, 2048, 256), (1, 64, 16))
    return [
        ConvCase("dense-3x3", dense, grid, (3, 3, c, c), one),
        ConvCase("dense-7x7", dense, grid, (7, 7, c, c), three),
        ConvCase("dense-3x3-stride2", "n 2*i+r 2*j+s c, r s c o -> n i j o", grid, (3, 3, c, 2 * c), one, stride=2),
        ConvCase("dense-1x1", "n i j c, c o -> n i j o", grid, (1, 1, c, 4 * c), ((0, 0),) * 2),
        ConvCase("grouped-3x3", "n i+r j+s (g c), r s c (g o) -> n i j (g o)", grid, (3, 3, c // 8, c), one, groups=8),
        depthwise("depthwise-7x7", pick((8, 56, 56, 96), (1, 12, 12, 16)), 7),
        depthwise("depthwise-3x3", pick((8, 112, 112, 32), (1, 12, 12, 16)), 3),
        ConvCase("depthwise-1d-causal", "n i+r c, r c -> n i c", line, (4, 1, line[-1]), ((3, 0),), groups=line[-1]),
        transposed("transposed-4x4-stride2", pick((4, 32, 32, 64), (1, 6, 6, 8)), 4, pick(64, 8), 2),
        transposed("transposed-3x3-stride2", pick((4, 16, 16, 128), (1, 6, 6, 8)), 3, pick(128, 8), 2),
        transposed("transposed-3d-stride2", pick((1, 16, 16, 16, 32), (1, 3, 4, 3, 4)), 2, 1, 2),
    ]


def select(what: str, quick: bool, patterns: Sequence[str], chip: bool = False) -> list[Case]:
    """The cases of "attention", "conv" or "all" whose name matches one of `patterns`; without patterns, all of them.
    With `chip` those that are compiled for one, in bfloat16.

    >>> [case.name for case in select("all", True, ["*bf16*", "global"])]
    ['2d-bf16-mask', 'global']
    """
    cases: list[Case] = []
    if what in ("attention", "all"):
        cases += chip_cases(quick) if chip else [*attention_cases(quick), *series_cases(quick)]
    if what in ("conv", "all"):
        cases += [dataclasses.replace(x, dtype="bfloat16") if chip else x for x in conv_cases(quick)]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(case.name, pattern) for case in cases):
            names = ", ".join(case.name for case in cases)
            raise InputError(
                f"cases (={pattern}) must name some of `bench {what}`, where * and ? stand for anything: {names}"
            )
    return [case for case in cases if not patterns or any(fnmatch.fnmatchcase(case.name, p) for p in patterns)]

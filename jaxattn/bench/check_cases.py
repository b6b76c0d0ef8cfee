"""What `jaxattn check` computes: small geometries, each with some of the arguments of `attention`, so that all meet."""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxattn.window import Window

BATCH, HEADS, KEY_HEADS, DIM = 2, 4, 2, 16


class CheckCase(NamedTuple):
    """A grid, the settings of a `Window` (None: there is none), and names in `ARGUMENTS`."""

    grid: tuple[int, ...]
    window: Mapping[str, Any] | None
    arguments: tuple[str, ...] = ()
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """As in a table: `20×20 7×7, dilation 2; relative_bias`."""
        given = dict(self.window or {})
        times = lambda sizes: "×".join(map(str, sizes if isinstance(sizes, tuple) else (sizes,)))
        size = times(given.pop("size")) if given else "all keys"
        settings = [f"{name} {times(x)}" for name, x in given.items() if name != "causal"]
        words = ", ".join([f"{times(self.grid)} {size}", *settings, *["causal"] * ("causal" in given)])
        return "; ".join([words, *self.arguments, *[self.dtype] * (self.dtype != "float32")])

    def call(self) -> dict[str, Any]:
        """The arguments of `attention` in float32, but for implementation and precision."""
        window = None if self.window is None else Window(**self.window)
        queries = self.grid if window is None else window.query_grid(self.grid)
        slots = self.grid if window is None else window.sizes
        shapes = Shapes(np.random.default_rng(0), self.grid, queries, slots, window is None)
        given: dict[str, Any] = {"window": window}
        for name, tokens, heads in (("query", queries, HEADS), ("key", self.grid, KEY_HEADS)):
            given[name] = shapes.normal(BATCH, *tokens, heads, DIM)
        given["value"] = shapes.normal(*given["key"].shape)
        for name in self.arguments:
            given |= ARGUMENTS[name](shapes)
        return given

    def real(self) -> dict[str, Any]:
        """Those of them that have a derivative, in the case's dtype."""
        arrays = {name: x for name, x in self.call().items() if isinstance(x, np.ndarray) and x.dtype == np.float32}
        return {name: x.astype(self.dtype) for name, x in arrays.items()}


class Shapes(NamedTuple):
    """The sizes of a case, and where its numbers come from."""

    rng: np.random.Generator
    grid: tuple[int, ...]
    queries: tuple[int, ...]
    slots: tuple[int, ...]
    all_keys: bool  # there is no window

    def normal(self, *shape: int) -> np.ndarray:
        return self.rng.normal(size=shape).astype(np.float32)

    def chance(self, *shape: int) -> np.ndarray:
        """True in two of three places."""
        return self.rng.random(shape) < 2 / 3

    @property
    def offsets(self) -> list[int]:
        return [2 * n - 1 for n in self.slots]


def _bias(s: Shapes) -> dict[str, Any]:
    return {"bias": s.normal(HEADS, *s.queries, *s.slots) if s.all_keys else s.normal(*s.queries, HEADS, *s.slots)}


def _mask_of_keys(s: Shapes) -> dict[str, Any]:
    mask = s.chance(BATCH, *s.grid)
    return {"mask": mask[:, None, None] if s.all_keys else mask}


def _extra(s: Shapes) -> dict[str, Any]:
    return {f"extra_{name}": s.normal(BATCH, 3, KEY_HEADS, DIM) for name in ("key", "value")}


ARGUMENTS = {
    "relative_bias": lambda s: {"relative_bias": s.normal(HEADS, *s.offsets)},
    "bias": _bias,
    "key_embedding": lambda s: {"key_embedding": s.normal(HEADS, *s.offsets, DIM)},
    "mask of keys": _mask_of_keys,
    "mask by slot": lambda s: {"mask": (None, s.chance(*s.queries, 1, *s.slots))},
    "segments": lambda s: {"segment_ids": s.rng.integers(0, 2, (BATCH, *s.grid))},
    "grid_sizes": lambda s: {"grid_sizes": np.array([s.grid, [-(-n // 2) for n in s.grid]])},
    "extra tokens": _extra,
    "sinks": lambda s: {"sink_logits": s.normal(HEADS)},
    "soft cap": lambda s: {"logits_soft_cap": 1.5},
    "scale": lambda s: {"scale": 0.7},
    "scores of 300": lambda s: {"scale": 300 / math.sqrt(DIM)},
    "lse": lambda s: {"return_residuals": True},
    "dropout": lambda s: {"dropout_rate": 0.3, "dropout_key": jax.random.key(0)},
    "relu": lambda s: {"normalize": "relu"},
    "sigmoid": lambda s: {"normalize": "sigmoid"},
    "sparsemax": lambda s: {"normalize": "sparsemax"},
    "score_mod": lambda s: {"score_mod": _nearer},
}


def _nearer(score: Any, head: Any, query: tuple[Any, ...], key: tuple[Any, ...]) -> Any:
    """ALiBi, as a function of the caller's."""
    return score - 0.1 * abs(query[-1] - key[-1]) * (1 + head)


_of = functools.partial(dict, boundary="mask")
CASES = (
    # one axis
    CheckCase((61,), dict(size=7), ("lse",)),
    CheckCase((64,), _of(size=8), ("relative_bias", "lse")),
    CheckCase((48,), dict(size=5, boundary="zero"), ("bias",)),
    CheckCase((37,), dict(size=5, boundary="edge")),
    CheckCase((37,), dict(size=6, boundary="reflect"), ("scale",)),
    CheckCase((40,), dict(size=6, boundary="valid"), ("sinks", "lse")),
    CheckCase((64,), _of(size=9, causal=True), ("extra tokens",)),
    CheckCase((64,), _of(size=9, causal=True), ("mask of keys", "lse")),
    CheckCase((45,), dict(size=4, causal=True, dilation=2), ("soft cap",)),
    CheckCase((41,), dict(size=5, stride=2), ("relative_bias",)),
    CheckCase((35,), dict(size=5, block=5), ("segments",)),
    CheckCase((300,), _of(size=129)),
    CheckCase((7,), _of(size=17)),
    CheckCase((1,), dict(size=1)),
    CheckCase((64,), dict(size=9), ("scores of 300", "lse")),
    CheckCase((64,), dict(size=9), ("relu",)),
    CheckCase((64,), dict(size=9), ("sparsemax",)),
    # two
    CheckCase((16, 16), dict(size=(7, 7)), ("lse",)),
    CheckCase((16, 16), _of(size=(7, 7)), ("relative_bias",)),
    CheckCase((13, 11), dict(size=(3, 5)), ("scale",)),
    CheckCase((12, 13), dict(size=(3, 3), boundary="wrap"), ("relative_bias",)),
    CheckCase((12, 12), dict(size=(3, 3), boundary="zero"), ("key_embedding",)),
    CheckCase((14, 14), dict(size=(7, 7), block=7), ("relative_bias",)),
    CheckCase((16, 16), _of(size=(8, 8), block=4), ("lse",)),
    CheckCase((14, 15), dict(size=(3, 3), dilation=2), ("lse",)),
    CheckCase((15, 14), dict(size=(4, 3), stride=(2, 3)), ("bias",)),
    CheckCase((12, 12), _of(size=(3, 5)), ("mask of keys", "segments", "lse")),
    CheckCase((12, 12), dict(size=(3, 3)), ("mask by slot",)),
    CheckCase((12, 12), dict(size=(5, 3)), ("extra tokens", "soft cap", "lse")),
    CheckCase((12, 12), dict(size=(3, 3)), ("grid_sizes",)),
    CheckCase((12, 12), dict(size=(3, 3)), ("dropout",)),
    CheckCase((12, 12), dict(size=(3, 3)), ("sigmoid", "extra tokens")),
    CheckCase((12, 12), _of(size=(3, 3)), ("score_mod",)),
    CheckCase((16, 16), dict(size=(7, 7)), ("lse",), "bfloat16"),
    CheckCase((14, 14), dict(size=(7, 7), block=7), ("relative_bias",), "bfloat16"),
    # three
    CheckCase((4, 8, 8), dict(size=(3, 3, 3)), ("lse",)),
    CheckCase((4, 6, 7), dict(size=(3, 3, 1), boundary=("zero", "edge", "wrap")), ("relative_bias",)),
    # all keys
    CheckCase((64,), None, ("lse",)),
    CheckCase((64,), None, ("mask of keys", "soft cap")),
    CheckCase((64,), None, ("bias",), "bfloat16"),
    CheckCase((300,), None, ("mask of keys", "segments", "scale")),
    CheckCase((520,), _of(size=400, causal=True), ("soft cap",)),
    CheckCase((300,), None, (), "bfloat16"),
)
# each property of the kernels once: an interpreted kernel is slow
INTERPRETED = (
    CheckCase((24,), _of(size=5, causal=True), ("mask of keys", "segments", "extra tokens", "soft cap", "lse")),
    CheckCase((8, 8), dict(size=(3, 3)), ("relative_bias",)),
    CheckCase((8, 32), dict(size=(3, 3), dilation=2, boundary="wrap"), (), "bfloat16"),
    CheckCase((4, 3, 8), _of(size=(3, 3, 3)), ("lse",)),
    CheckCase((40,), None, ("mask of keys", "segments", "scale")),
)
TIMED = (
    CheckCase((1024,), dict(size=63)),
    CheckCase((28, 28), dict(size=(7, 7)), ("relative_bias",)),
    CheckCase((28, 28), dict(size=(7, 7), block=7)),
    CheckCase((1024,), None),
)

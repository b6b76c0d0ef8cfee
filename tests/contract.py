"""What every implementation of `attention` is held to: named geometries and named arguments, made into problems.

A problem knows what `attention` takes, and what it should give: values, and the gradient of every floating-point
argument, from `oracle_gradients`. To hold one more implementation to the contract, add its name to IMPLEMENTATIONS.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import oracle_gradients

from jaxattn.attention import attention
from jaxattn.kernels import differentiable, loop, tiles
from jaxattn.kernels.operands import Options
from jaxattn.window import Axis, Window

SMALL = "xla in small tiles"
IMPLEMENTATIONS = [SMALL, "xla", "reference"]  # the core takes the first of them


def known(options):
    """The options that this version's compiler has."""

    def has(name, value):
        try:
            jax.jit(lambda x: x, compiler_options={name: value}).lower(0.0).compile()
        except jax.errors.JaxRuntimeError:
            return False
        return True

    return {name: value for name, value in options.items() if has(name, value)}


# Compilation is most of what these tests take, and float64 results do not depend on how hard LLVM tries.
quick = {"xla_backend_optimization_level": 0}
quicker = known(quick | {"xla_cpu_use_fusion_emitters": False})


def small_tile(axes):
    """About three queries along each axis."""
    return tuple(math.ceil(3 / axis.block) * axis.block for axis in axes)


def in_little_room(function):
    """The same, with a step of one entry's tile, or of a few, where the tile is given: so that little problems are
    loops. Patched for good, since what a primitive does is traced when whatever called it has returned."""

    @functools.wraps(function)
    def wrapped(*arguments):
        options = next(x for x in arguments if isinstance(x, Options))
        if options.tile is None:
            return function(*arguments)
        few = 1 if sum(options.keys) % 2 else 6
        rows, columns = math.prod(options.tile), math.prod(map(tiles.reach, options.axes, options.tile))
        room = few * 4 * tiles.tile_numbers(rows, columns, (3, 2))
        with mock.patch.object(tiles, "step_budget", return_value=room):
            return function(*arguments)

    return wrapped


loop._plan, differentiable.attend = in_little_room(loop._plan), in_little_room(differentiable.attend)


GEOMETRIES = {
    # one axis: each boundary, also with windows longer than the grid
    "shift": ((61,), dict(size=7)),
    "mask": ((37,), dict(size=6, boundary="mask")),
    "zero": ((37,), dict(size=5, boundary="zero")),
    "edge": ((23,), dict(size=5, boundary="edge")),
    "reflect": ((23,), dict(size=6, boundary="reflect")),
    "wrap": ((23,), dict(size=5, boundary="wrap")),
    "valid": ((40,), dict(size=6, boundary="valid")),
    "longer than the grid, mask": ((7,), dict(size=17, boundary="mask")),
    "longer than the grid, edge": ((4,), dict(size=11, boundary="edge")),
    "longer than the grid, reflect": ((4,), dict(size=11, boundary="reflect")),
    "longer than the grid, wrap": ((4,), dict(size=11, boundary="wrap")),
    # strides, dilation, blocks, causality, offsets, and lengths that are a multiple of none of them
    "dilation 2": ((33,), dict(size=5, dilation=2)),
    "dilation 3, mask": ((32,), dict(size=5, dilation=3, boundary="mask")),
    "dilation 3, wrap": ((23,), dict(size=4, dilation=3, boundary="wrap")),
    "stride 2": ((41,), dict(size=5, stride=2)),
    "stride beyond the size": ((40,), dict(size=2, stride=3, boundary="mask")),
    "stride 2, dilation 3": ((41,), dict(size=4, stride=2, dilation=3, boundary="zero")),
    "stride 3, valid, dilation 2": ((40,), dict(size=5, stride=3, dilation=2, boundary="valid")),
    "block 2": ((35,), dict(size=5, block=2)),
    "block 3, dilation 2": ((35,), dict(size=4, block=3, dilation=2, boundary="mask")),
    "block is the size": ((35,), dict(size=5, block=5)),
    "block is the size, ragged": ((38,), dict(size=4, block=4, boundary="mask")),
    "causal": ((45,), dict(size=6, causal=True)),
    "causal, mask, stride 2": ((45,), dict(size=6, causal=True, boundary="mask", stride=2)),
    "causal, zero, dilation 2": ((45,), dict(size=4, causal=True, boundary="zero", dilation=2)),
    "causal, block 3": ((44,), dict(size=5, causal=True, block=3)),
    "causal, valid": ((20,), dict(size=4, causal=True, boundary="valid")),
    "offset ahead": ((31,), dict(size=4, boundary="mask", offset=2)),
    "offset behind, wrap": ((19,), dict(size=4, boundary="wrap", offset=-23)),
    "offset beyond the grid": ((9,), dict(size=3, boundary="mask", offset=9)),
    # sizes of one and of the whole grid, and windows that are streamed
    "size 1": ((13,), dict(size=1)),
    "one token": ((1,), dict(size=1)),
    "one token, wrap": ((1,), dict(size=5, boundary="wrap")),
    "as long as the grid": ((24,), dict(size=24)),
    "as long as the grid, causal": ((24,), dict(size=24, causal=True)),
    "129 of 300": ((300,), dict(size=129)),
    "129 of 300, causal, mask": ((300,), dict(size=129, causal=True, boundary="mask")),
    # two axes
    "5 x 3": ((23, 19), dict(size=(5, 3))),
    "5 x 5, mask": ((13, 12), dict(size=(5, 5), boundary="mask")),
    "21 x 21 of 24 x 24": ((24, 24), dict(size=(21, 21))),
    "as large as the grid": ((6, 5), dict(size=(6, 5))),
    "every offset of the grid": ((5, 4), dict(size=(9, 7), boundary="mask")),
    "Swin": ((16, 15), dict(size=(4, 5), block=(4, 5))),
    "Swin, ragged": ((13, 14), dict(size=(4, 4), block=(4, 4), boundary="mask")),
    "halo": ((13, 12), dict(size=(6, 5), block=(3, 2), boundary="mask")),
    "dilated": ((15, 14), dict(size=(3, 3), dilation=(2, 3), boundary=("shift", "mask"))),
    "strided": ((14, 13), dict(size=(3, 2), stride=(2, 3), boundary="mask")),
    "wrap and mask": ((12, 9), dict(size=(3, 5), boundary=("wrap", "mask"), dilation=(1, 2))),
    "edge and reflect": ((9, 11), dict(size=(4, 3), boundary=("edge", "reflect"))),
    "zero and valid": ((9, 11), dict(size=(3, 3), boundary=("zero", "valid"), stride=(1, 2))),
    "causal and not": ((11, 10), dict(size=(3, 4), causal=(True, False), boundary=("mask", "shift"))),
    "causal twice": ((9, 8), dict(size=(3, 3), causal=True)),
    "all at once": (
        (13, 17),
        dict(
            size=(4, 3), block=(2, 1), stride=(1, 2), dilation=(2, 1), boundary=("mask", "wrap"), causal=(True, False)
        ),
    ),
    "a row": ((1, 23), dict(size=(1, 5))),
    "a column": ((23, 1), dict(size=(3, 1), boundary="mask")),
    "1 x 3": ((9, 8), dict(size=(1, 3))),
    # three and four
    "3 x 3 x 3": ((9, 7, 6), dict(size=(3, 3, 3))),
    "3-D, all at once": (
        (5, 6, 4),
        dict(size=(2, 3, 2), dilation=(1, 1, 2), boundary=("zero", "shift", "wrap"), causal=(True, False, False)),
    ),
    "3-D, flat": ((5, 1, 6), dict(size=(3, 1, 3), boundary="mask", block=(1, 1, 3))),
    "4-D": ((3, 4, 3, 4), dict(size=(2, 3, 1, 2), boundary=("mask", "shift", "shift", "mask"))),
    # no window: queries, keys
    "global": ((40, 40), None),
    "global, more keys": ((13, 29), None),
    "global, one query": ((1, 30), None),
    "global, one key": ((30, 1), None),
    "global, 700": ((700, 700), None),
}


def parts(implementation, geometry, arguments):
    """What the core shows of all cases: each argument in tiles, and with others in the reference; and every two
    properties of a window that meet, since most faults need no more than two things (Kuhn, Wallace & Gallo 2004, IEEE
    TSE 30(6))."""
    grid, given = GEOMETRIES[geometry]
    backend = "xla" if implementation == SMALL else implementation
    if "part of the queries" in arguments:
        return (arguments,) if given is not None else ()
    argument = [f"{backend}, {arguments}"] if backend != "reference" or "everything" in arguments else []
    if given is None:
        return (*argument, f"{implementation}, no window")
    spread = lambda name, default: np.broadcast_to(given.get(name, default), len(np.atleast_1d(given["size"])))
    properties = {"rank": len(grid), "boundary": sorted(set(spread("boundary", "shift").tolist()))}
    properties |= {name: bool((spread(name, 1) > 1).any()) for name in ("stride", "dilation", "block")}
    properties |= {"causal": bool(spread("causal", False).any()), "offset": "offset" in given}
    properties |= {"all of the grid": bool((spread("size", 1) >= grid).any())}
    return (*argument, *itertools.combinations(properties.items(), 2))


@dataclasses.dataclass
class Problem:
    """A geometry with arguments: as `attention` takes them, and as the oracle does."""

    grid: tuple[int, ...]
    window: Window | None
    queries: tuple[int, ...]
    batch: tuple[int, ...]
    heads: int
    rng: np.random.Generator
    operands: dict[str, Any]  # of attention, to be differentiated
    options: dict[str, Any]  # of attention, not to be
    told: dict[str, Any]  # the oracle's own form of the options; it has one batch axis
    part: tuple[slice, ...] | None = None  # those of all queries, with batch axes, that `attention` is given

    def call(self, implementation, operands):
        """`attention`, of operands that a transformation may have in hand, and which may stand for options as well."""
        given = self.options | operands | dict(window=self.window, implementation=implementation)
        given |= self.of_part(given)
        tables = [given.pop(name) for name in by_axis(operands)]
        given |= {"key_embedding": tuple(tables)} if tables else {}
        if implementation == SMALL:
            axes = (Axis.everything(*self.queries, *self.grid),) if self.window is None else self.window.axes(self.grid)
            given |= dict(implementation="xla", tile=small_tile(axes))
        return attention(**given)

    def of_part(self, given):
        """What is given for queries, cut to the part that there is."""
        if self.part is None:
            return {}
        cut = {"query": given["query"][self.part]}
        cut |= {name: given[name][self.part] for name in ("bias", "mask") if np.shape(given.get(name)) == self.full}
        if isinstance(given.get("segment_ids"), tuple):
            cut["segment_ids"] = (given["segment_ids"][0][self.part], given["segment_ids"][1])
        return cut

    def cast(self, dtype):
        """The same in another dtype, rounded here, before the oracle sees it."""
        return self.at({name: np.asarray(x).astype(dtype) for name, x in self.operands.items()})

    def at(self, operands):
        """The same for other operands."""
        return dataclasses.replace(self, operands=operands)

    def cotangents(self, dtype=np.float64):
        """Some for the output and, where it is asked for, lse; also for an lse of -inf, which sends nothing."""
        rng, shape = np.random.default_rng(7), self.operands["query"].shape[:-1]
        output = rng.normal(size=(*shape, self.operands["value"].shape[-1])).astype(dtype)
        lse = rng.normal(size=shape) if self.options.get("return_residuals") else np.zeros(shape)
        return (output, lse) if self.part is None else (output[self.part], lse[self.part])

    def expected(self, cotangents):
        """((output, lse), gradients), in float64; those of a part are those of all queries, of which the rest is seeded
        with zeros, cut."""
        if self.part is not None:
            seeds = [np.zeros_like(x, np.float64) for x in dataclasses.replace(self, part=None).cotangents()]
            for seed, x in zip(seeds, cotangents, strict=True):
                seed[self.part] = x
            result, gradients = dataclasses.replace(self, part=None).expected(seeds)
            return tuple(x[self.part] for x in result), gradients
        cotangents = tuple(self.flat(np.asarray(x, np.float64)) for x in cotangents)
        result, gradients = oracle_gradients.attention(**self.given(self.operands), cotangents=cotangents)
        if "bias" in gradients:
            gradients["bias"] = self.from_slots(gradients["bias"], self.operands["bias"].shape)
        gradients |= self.of_axes(gradients.get("key_embedding"))
        result = tuple(x.reshape(*self.batch, *x.shape[1:]) for x in result)
        return result, {name: np.reshape(gradients[name], x.shape) for name, x in self.operands.items()}

    def given(self, operands):
        """What the oracle takes."""
        operands = {name: np.asarray(x, np.float64) for name, x in operands.items()}
        tables = [operands.pop(name) for name in by_axis(operands)]
        operands |= {"key_embedding": over_all_axes(tables, operands["query"].shape[-1])} if tables else {}
        operands |= {name: self.flat(operands[name]) for name in PER_TOKEN if name in operands}
        if "bias" in operands:
            operands["bias"] = self.by_slot(operands["bias"])
        return operands | self.told | self.geometry()

    def of_axes(self, gradient):
        """The gradients of tables by axis, from that of the table over all axes."""
        found, before = {}, 0
        for a, name in enumerate(by_axis(self.operands)):
            shape = self.operands[name].shape
            first = before if shape[-1] < gradient.shape[-1] else 0
            mine = gradient[..., first : first + shape[-1]].sum(tuple(b + 1 for b in range(len(self.slots)) if b != a))
            found[name] = mine if shape[0] > 1 else mine.sum(0, keepdims=True)
            before += shape[-1]
        return found

    def geometry(self):
        """The window as the oracle takes it."""
        if self.window is None:
            return dict(size=None, geometry=None)
        given = {field.name: getattr(self.window, field.name) for field in dataclasses.fields(self.window)}
        return dict(size=given.pop("size"), geometry=given)

    @functools.cached_property
    def seen(self):
        """The oracle's slots."""
        if self.window is None:
            return oracle_gradients.everything(*self.queries, *self.grid)
        given = self.geometry()
        return oracle_gradients.slots(self.grid, given["size"], **given["geometry"])

    @property
    def slots(self):
        """The slots of a query, along each axis."""
        return self.grid if self.window is None else self.window.size

    @property
    def full(self):
        """The shape against which a bias and a mask by slot broadcast."""
        of_a_head = (self.heads, *self.queries) if self.window is None else (*self.queries, self.heads)
        return (*self.batch, *of_a_head, *self.slots)

    def flat(self, x):
        """The batch as one axis."""
        return np.reshape(x, (math.prod(self.batch), *np.shape(x)[len(self.batch) :]))

    def by_slot(self, x):
        """What broadcasts against `full`, as the oracle takes it: [batch, *queries, heads, *slots]."""
        x = np.broadcast_to(x, self.full)
        return self.flat(np.swapaxes(x, -2, -3) if self.window is None else x)

    def from_slots(self, gradient, shape):
        """The transpose of `by_slot`."""
        gradient = gradient.reshape(*self.batch, *gradient.shape[1:])
        gradient = np.swapaxes(gradient, -2, -3) if self.window is None else gradient
        present = (1,) * (gradient.ndim - len(shape)) + tuple(shape)
        broadcast = tuple(axis for axis, n in enumerate(present) if n < gradient.shape[axis])
        return gradient.sum(broadcast, keepdims=True).reshape(shape)


# The norm of the error, relative to what it should be.
TOLERANCE = {jnp.float64: 1e-10, jnp.float32: 1e-5, jnp.float16: 3e-3, jnp.bfloat16: 2e-2}


def check(made, implementation, dtype=jnp.float64):
    """Output, lse, and the gradient of each operand."""
    made = made.cast(dtype)
    cotangents = made.cotangents(dtype)
    residuals = "return_residuals" in made.options

    @functools.partial(jax.jit, compiler_options=quicker)
    def values_and_gradients(operands):
        result, pullback = jax.vjp(functools.partial(made.call, implementation), operands)
        given = (cotangents[0], jnp.asarray(cotangents[1], result[1].dtype)) if residuals else cotangents[0]
        return result, pullback(given)[0]

    with jax.numpy_dtype_promotion("strict"):
        result, gradients = values_and_gradients(made.operands)
    (output, lse), expected = made.expected(cotangents)
    output_is, lse_is = result if residuals else (result, lse)
    assert output_is.dtype == dtype
    assert {name: x.dtype for name, x in gradients.items()} == dict.fromkeys(made.operands, jnp.dtype(dtype))
    close(output_is, output, dtype, "output")
    np.testing.assert_array_equal(np.isfinite(lse_is), np.isfinite(lse))
    close(np.where(np.isfinite(lse), lse_is, 0), np.where(np.isfinite(lse), lse, 0), dtype, "lse")
    for name in made.operands:
        close(gradients[name], expected[name], dtype, f"gradient of {name}")


def close(ours, theirs, dtype, name):
    assert ours.shape == theirs.shape, name
    error, size = np.linalg.norm(np.asarray(ours, np.float64) - theirs), np.linalg.norm(theirs)
    # What cancels to nothing has no relative error: it is held to what a thousandth in every entry would be.
    least = 1e-3 * max(theirs.size, 1) ** 0.5
    assert error <= TOLERANCE[dtype] * max(size, least), f"{name}: off by {error / max(size, least):.1e} of its norm"


def agree(ours, theirs, what):
    """Two trees of float64."""
    ours, theirs = ({jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(t)} for t in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for path in ours:
        close(ours[path], np.asarray(theirs[path]), jnp.float64, f"{what} {path}")


def scalar(made, implementation):
    """A function of the operands: the output and lse, weighted and summed."""
    cotangents = made.cotangents()

    def loss(operands):
        result = made.call(implementation, operands)
        output, lse = result if isinstance(result, tuple) else (result, jnp.zeros(result.shape[:-1]))
        return (output * cotangents[0]).sum() + (jnp.where(jnp.isfinite(lse), lse, 0) * cotangents[1]).sum()

    return loss


PER_TOKEN = ("query", "key", "value", "extra_key", "extra_value")


def problem(geometry, arguments="plain", *, batch=None, heads=4, key_heads=2, head_dim=3, value_dim=2, seed=0):
    """The problem of a geometry and arguments, named or given: a batch of three, or of one with many scores."""
    grid, given = GEOMETRIES[geometry] if isinstance(geometry, str) else geometry
    window = None if given is None else Window(**given)
    queries, grid = (grid[:1], grid[1:]) if window is None else (window.query_grid(grid), grid)
    slots = grid if window is None else window.sizes
    batch = (3 if math.prod(queries + slots) < 1e5 else 1,) if batch is None else batch
    rng = np.random.default_rng(seed)
    operands = dict(
        query=rng.normal(size=(*batch, *queries, heads, head_dim)),
        key=rng.normal(size=(*batch, *grid, key_heads, head_dim)),
        value=rng.normal(size=(*batch, *grid, key_heads, value_dim)),
    )
    made = Problem(grid, window, queries, batch, heads, rng, operands, {}, {})
    for add in ARGUMENTS[arguments] if isinstance(arguments, str) else arguments:
        add(made)
    return made


def residuals(p):
    p.options["return_residuals"] = True


def bias(p, shape=None):
    p.operands["bias"] = p.rng.normal(size=p.full if shape is None else shape)


def minus_infinity(p):
    """In the bias, here and there, in half of the slots of the first head, and in every slot of the first query."""
    values = p.operands["bias"]
    values[p.rng.random(values.shape) < 0.3] = -math.inf
    heads = values.ndim - len(p.slots) - (1 if p.window else 1 + len(p.queries))
    np.moveaxis(values, heads, 0)[0, ..., p.slots[-1] // 2 :] = -math.inf
    values[(slice(None),) * len(p.batch) + (0,) * (1 + len(p.queries))] = -math.inf


def relative_bias(p):
    if p.seen.entry is not None:
        p.operands["relative_bias"] = p.rng.normal(size=(p.heads, *(2 * k - 1 for k in p.slots)))


def key_embedding(p, heads=None):
    if p.seen.entry is not None:
        shape = (heads or p.heads, *(2 * k - 1 for k in p.slots), p.operands["query"].shape[-1])
        p.operands["key_embedding"] = p.rng.normal(size=shape)


def by_axis(operands):
    """The names of what stands for a `key_embedding` by axis, in order."""
    return sorted(name for name in operands if name.startswith("key_embedding_"))


def embedding_by_axis(p, heads=(None,), dims=None):
    """Tables of head_dim, to be added; or of `dims`, to stand one after the other, where there are as many axes. Of
    `heads`, which are taken in turns, None is all of them."""
    if p.seen.entry is None:
        return
    head_dim, rank = p.operands["query"].shape[-1], len(p.slots)
    dims = dims if dims is not None and len(dims) == rank else (head_dim,) * rank
    for a, (size, dim) in enumerate(zip(p.slots, dims, strict=True)):
        of_heads = heads[a % len(heads)] or p.heads
        p.operands[f"key_embedding_{a}"] = p.rng.normal(size=(of_heads, 2 * size - 1, dim))


def over_all_axes(tables, head_dim):
    """The table of every offset, [heads, *(2k-1), head_dim], entry by entry."""
    heads, added = max(len(table) for table in tables), tables[0].shape[-1] == head_dim
    full = np.zeros((heads, *(table.shape[1] for table in tables), head_dim))
    for place in np.ndindex(full.shape[:-1]):
        parts = [table[place[0] % len(table), entry] for table, entry in zip(tables, place[1:], strict=True)]
        full[place] = sum(parts) if added else np.concatenate(parts)
    return full


def extra_tokens(p, n=2):
    for name in ("key", "value"):
        p.operands[f"extra_{name}"] = p.rng.normal(size=(*p.batch, n, *p.operands[name].shape[-2:]))


def part_of_the_queries(p, traced=False):
    """Up to seven of them along each axis, from somewhere on; without a window there is no such place."""
    if p.window is not None:
        count = [int(p.rng.integers(1, min(n, 7) + 1)) for n in p.queries]
        first = [int(p.rng.integers(0, n - m + 1)) for n, m in zip(p.queries, count, strict=True)]
        p.options["query_offset"] = jnp.asarray(first) if traced else tuple(first)
        p.part = (slice(None),) * len(p.batch) + tuple(slice(f, f + m) for f, m in zip(first, count, strict=True))


def positions_of_extra_tokens(p):
    """Of those there are, where the window is causal: before the grid, in it and behind it."""
    if p.window is not None and any(p.window.causal):
        tokens = p.operands["extra_key"].shape[-3]
        least, most = -1, np.array(p.grid) + 1
        p.options["extra_positions"] = p.rng.integers(least, most, (*p.batch, tokens, len(p.grid)))
        p.told["extra_positions"] = p.flat(p.options["extra_positions"])


def sinks(p):
    p.operands["sink_logits"] = p.rng.normal(size=p.heads)


def scale(p):
    p.operands["scale"] = np.float64(0.7)


def soft_cap(p):
    p.operands["logits_soft_cap"] = np.float64(1.5)


def large_scores(p):
    """Of some 1e4, either sign."""
    p.operands["query"] = 1e4 * p.operands["query"]


def mask_by_slot(p, shape=None):
    mask = p.rng.random(p.full if shape is None else shape) < 0.6
    p.options["mask"], p.told["slot_mask"] = mask, p.by_slot(mask)


def mask_of_keys(p, batch=None):
    """Without a window, that is a mask by slot which is the same for every query."""
    mask = p.rng.random((*(p.batch if batch is None else batch), *p.grid)) < 0.6
    p.options["mask"] = mask[..., None, None, :] if p.window is None else mask
    p.told["key_mask"] = p.flat(np.broadcast_to(mask, (*p.batch, *p.grid)))


def first_keys(p):
    """Only the keys at the start of the last axis are visible: to most queries nothing is, to many a part."""
    mask = np.broadcast_to(np.arange(p.grid[-1]) < p.grid[-1] // 3 + 1, p.grid)
    p.options["mask"] = mask[..., None, None, :] if p.window is None else np.broadcast_to(mask, (*p.batch, *p.grid))
    p.told["key_mask"] = p.flat(np.broadcast_to(mask, (*p.batch, *p.grid)))


def nothing_visible(p):
    mask = np.zeros(p.full, bool)
    p.options["mask"], p.told["slot_mask"] = mask, p.by_slot(mask)


def segments(p, batches=(None, None)):
    """Of queries and of keys, each with a batch of its own if need be."""
    batches = [p.batch if batch is None else batch for batch in batches]
    ids = tuple(p.rng.integers(0, 2, (*b, *grid)) for b, grid in zip(batches, (p.queries, p.grid), strict=True))
    whole = [np.broadcast_to(x, (*p.batch, *grid)) for x, grid in zip(ids, (p.queries, p.grid), strict=True)]
    p.options["segment_ids"], p.told["segment_ids"] = ids, tuple(map(p.flat, whole))


def one_array_of_segments(p, batch=None):
    """Runs of tokens; a query is of the segment of the key that it stands on, if it stands on any."""
    batch = p.batch if batch is None else batch
    if p.window is None and p.queries != p.grid:
        return segments(p, (batch, batch))
    ids = np.cumsum(p.rng.random((*batch, *p.grid)) < 0.1, axis=-1)
    stride = (1,) if p.window is None else p.window.stride
    stands_on = (..., *(slice(0, n * s, s) for n, s in zip(p.queries, stride, strict=True)))
    whole = np.broadcast_to(ids, (*p.batch, *p.grid))
    p.options["segment_ids"], p.told["segment_ids"] = ids, (p.flat(whole[stands_on]), p.flat(whole))


def score_mod(p):
    """Arithmetic, that complex numbers pass through."""

    def modify(score, head, query, key):
        far = sum(abs(i - j) for i, j in zip(query, key, strict=True)) * (1 + query[0] - key[-1])
        far, head = (x.astype(score.dtype) for x in (far, head))
        return score * (1 + 0.1 * head) + 0.05 * score**2 - 0.02 * far

    p.options["score_mod"] = p.told["score_mod"] = modify


def score_mod_that_masks(p):
    """Every query of an odd index along the last axis is left with nothing at all."""

    def modify(score, head, query, key):
        where = np.where if isinstance(score, np.ndarray) else jnp.where
        return where((key[0] + query[0] + head) % 3 + query[-1] % 2 > 0, score, -math.inf)

    p.options["score_mod"] = p.told["score_mod"] = modify


def normalize(p, name):
    p.options["normalize"] = p.told["normalize"] = name


def a_function_normalizes(p):
    """It tells the slots apart, so it must see them in order."""
    factor = lambda scores: 0.5 + np.arange(scores.shape[-1])
    p.options["normalize"] = lambda scores, mask: jnp.where(mask, scores * scores, 0) * factor(scores)
    p.told["normalize"] = (
        lambda scores, mask: scores**2 * factor(scores),
        lambda scores, mask, weights, d: 2 * scores * factor(scores) * d,
    )


def precision(p):
    p.options["precision"] = "highest"


def dropout(p, rate=0.4):
    p.options |= dict(dropout_rate=rate, dropout_key=jax.random.key(3))
    p.told["dropout"] = dropped(p) / (1 - rate)


def dropped(p):
    """1 where a weight is kept, [batch, *queries, heads, slots + extra]. Read off the reference, where scores are
    equal and values one-hot: it depends on the key and the shapes alone, and is the same for every implementation."""
    n, extra = math.prod(p.grid), p.operands["extra_key"].shape[-3] if "extra_key" in p.operands else 0
    key_heads = p.operands["key"].shape[-2]
    operands = {name: np.zeros_like(p.operands[name]) for name in PER_TOKEN if name in p.operands}
    shown = np.broadcast_to(np.eye(n + extra)[:, None], (*p.batch, n + extra, key_heads, n + extra))
    operands["value"] = shown[..., :n, :, :].reshape(*p.batch, *p.grid, key_heads, n + extra)
    if extra:
        operands["extra_value"] = shown[..., n:, :, :]
    options = {name: p.options[name] for name in ("dropout_rate", "dropout_key")}
    run = functools.partial(attention, **options, window=p.window, implementation="reference")
    kept = jax.jit(lambda operands: run(**operands), compiler_options=quicker)(operands)
    kept = np.asarray(kept).reshape(math.prod(p.batch), math.prod(p.queries), p.heads, n + extra) > 0
    hidden = -1 - np.arange(p.seen.key.shape[1])
    keys = np.where(p.seen.takes_part & (p.seen.key < n), p.seen.key, hidden)
    assert all(len(set(row)) == len(row) for row in keys), "two slots that hold one key do not show which was dropped"
    index = np.minimum(p.seen.key, n - 1)[:, None]
    of_slots = np.take_along_axis(kept, np.broadcast_to(index, (*kept.shape[:-1], index.shape[-1])), -1)
    kept = np.concatenate([of_slots, kept[..., n:]], -1)
    return kept.reshape(-1, *p.queries, p.heads, kept.shape[-1])


def with_(function, *arguments, **options):
    return lambda p: function(p, *arguments, **options)


EVERYTHING = [
    *(bias, relative_bias, key_embedding, mask_of_keys, segments, extra_tokens),
    *(soft_cap, scale, residuals, sinks, positions_of_extra_tokens),
]
ARGUMENTS = {
    "plain": [],
    "residuals": [residuals],
    "bias": [bias],
    "bias of -inf": [bias, minus_infinity, residuals],
    "bias of -inf, capped, extra": [bias, minus_infinity, soft_cap, extra_tokens, residuals],
    "relative bias": [relative_bias],
    "key embedding": [key_embedding],
    "key embedding shared by heads": [with_(key_embedding, 1), relative_bias],
    "key embedding by axis": [embedding_by_axis],
    "key embedding by axis, some shared": [with_(embedding_by_axis, (1, None)), relative_bias, residuals],
    "key embedding by axis, one after the other": [with_(embedding_by_axis, (1,), (1, 2)), bias],
    "everything, embedded by axis": [embedding_by_axis, *(x for x in EVERYTHING if x is not key_embedding)],
    "mask by slot": [mask_by_slot, residuals],
    "mask of keys": [mask_of_keys, residuals],
    "the first keys": [first_keys, residuals],
    "nothing visible": [nothing_visible, residuals],
    "nothing but extra tokens": [nothing_visible, with_(extra_tokens, 3), residuals],
    "segments": [segments],
    "one array of segments": [one_array_of_segments, residuals],
    "segments of keys for every entry": [with_(segments, (None, ()))],
    "segments for every entry": [with_(one_array_of_segments, ()), mask_of_keys, residuals],
    "one extra token": [with_(extra_tokens, 1)],
    "extra tokens": [extra_tokens, residuals],
    "score_mod": [score_mod],
    "score_mod that masks": [score_mod_that_masks, residuals],
    "soft cap": [soft_cap],
    "scale": [scale],
    "large scores": [large_scores, residuals],
    "a part of the queries": [*EVERYTHING, part_of_the_queries],
    "a part of the queries, traced": [*EVERYTHING, with_(part_of_the_queries, traced=True)],
    "relu": [with_(normalize, "relu"), mask_of_keys],
    "sigmoid": [with_(normalize, "sigmoid"), mask_by_slot, extra_tokens],
    "none": [with_(normalize, "none"), mask_by_slot, scale],
    "sparsemax": [with_(normalize, "sparsemax"), mask_of_keys, extra_tokens],
    "a function normalizes": [a_function_normalizes, mask_by_slot, extra_tokens],
    "dropout": [dropout],
    "dropout, extra": [extra_tokens, dropout, mask_by_slot, with_(normalize, "sigmoid")],
    "precision": [precision, soft_cap],
    "everything": EVERYTHING,
    "everything, modified": [*EVERYTHING, score_mod],
    "everything by slot": [
        *(bias, relative_bias, with_(key_embedding, 1), mask_by_slot, extra_tokens, soft_cap),
        *(with_(normalize, "relu"), dropout),
    ],
}

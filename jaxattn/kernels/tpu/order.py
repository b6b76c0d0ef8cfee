"""Tokens in another order, inside a kernel: once a step a plane is copied within VMEM, as dilation and folding
boundaries want it, for a copy in HBM would cost more than the kernel itself.

Along the last axis tokens lie in words of 32 bits, two of them in bfloat16. A word of the copy takes the halves of two
words, and those that follow it mostly take what follows these in even steps: a *run*, of which the loads and the stores
are strided and the halves always the same. Along the other axes a table says which row is copied.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxattn.kernels.tpu.arrange import Beside
from jaxattn.kernels.tpu.block import MEMBER
from jaxattn.kernels.tpu.plan import ANY, LANES, MATCH, AxisPlan, Plan

I32 = jnp.int32
CHUNK, MOST = 128, 4  # words that are copied at once, and how often before it is a loop
LOW, HIGH = 0xFFFF, -0x10000
FIRST = np.int32(0)  # beside a stride the interpreter takes no Python number


class Part(NamedTuple):
    """What one number of every word of a run is: the `half` of a word, the next one `step` words further on."""

    word: int
    step: int
    half: int


class Run(NamedTuple):
    """`length` words of a copy, `step` apart, with the parts of each; None is a zero."""

    begin: int
    step: int
    length: int
    parts: tuple[Part | None, ...]

    @property
    def chunk(self) -> int:
        """Words at once: one, where some are taken backwards."""
        return 1 if self.step < 1 or any(part is not None and part.step < 0 for part in self.parts) else CHUNK


class Order(NamedTuple):
    """The token at each place along every axis, -1 for none. The first axes' numbers stand in a table, from `at` on."""

    places: tuple[np.ndarray, ...]
    at: int
    period: int  # of the last axis: the dilation

    def runs(self, packing: int) -> tuple[Run, ...]:
        """Of the last axis, in words of so many numbers."""
        return runs_of(self.places[-1], packing, self.period)

    @property
    def partial(self) -> bool:
        """Whether a row may be none."""
        return any((x < 0).any() for x in self.places[:-1])


class Orders(NamedTuple):
    """How queries and keys are put in the order of a plan's tiles, and back; None, where they are as they are."""

    queries: Order | None
    queries_back: Order | None
    keys: Order | None
    keys_back: Order | None
    twins: tuple[np.ndarray, ...]  # along each axis, [twins, 2], the place of a key, and another that it has too
    twins_at: int  # where, in the table, those of the first axes begin
    table: np.ndarray


def orders(plan: Plan) -> Orders:
    """From its axes."""
    tables: list[np.ndarray] = [np.zeros(1, int)]

    def begin(rows: Sequence[np.ndarray]) -> int:
        at = sum(map(len, tables))
        tables.extend(x.ravel() for x in rows)
        return at

    def order(places: Sequence[np.ndarray]) -> Order:
        return Order(tuple(places), begin(places[:-1]), plan.axes[-1].dilation)

    def there_and_back(places: list[np.ndarray | None], counts: list[int]) -> tuple[Order | None, Order | None]:
        if all(x is None for x in places):
            return None, None
        whole = [np.arange(n) if x is None else x for x, n in zip(places, counts, strict=True)]
        homes = [_homes(x, n, axis.dilation) for x, n, axis in zip(whole, counts, plan.axes, strict=True)]
        return order(whole), order(homes)

    queries = there_and_back([axis.queries for axis in plan.axes], [axis.query_count for axis in plan.axes])
    keys = there_and_back([axis.keys for axis in plan.axes], [axis.key_count for axis in plan.axes])
    twins = tuple(map(_twins, plan.axes))
    at = begin(twins[:-1])
    return Orders(*queries, *keys, twins, at, np.concatenate(tables).astype(np.int32))


def _homes(places: np.ndarray, count: int, dilation: int) -> np.ndarray:
    """A place of every token, -1 where it has none: of several, that in the longest run of tokens in order.

    >>> _homes(np.array([2, 1, 0, 1, 2, 3, 2, -1]), 5, 1)
    array([ 2,  3,  4,  5, -1])
    """
    run = np.cumsum(np.diff(places, prepend=places[0]) != dilation)
    longest_first = np.argsort(-np.bincount(run)[run], kind="stable")
    tokens, at = np.unique(places[longest_first], return_index=True)
    found = np.full(count, -1)
    found[tokens[tokens >= 0]] = longest_first[at[tokens >= 0]]
    return found


def _twins(axis: AxisPlan) -> np.ndarray:
    if axis.keys is None:
        return np.zeros((0, 2), int)
    home = _homes(axis.keys, axis.key_count, axis.dilation)[axis.keys]
    place = np.flatnonzero((axis.keys >= 0) & (home != np.arange(axis.length)))
    return np.stack([home[place], place], 1)


def runs_of(tokens: np.ndarray, packing: int, period: int) -> tuple[Run, ...]:
    """The runs by which the tokens at the places of an axis are copied: every word's, or every `period`-th word's and
    so on, which are fewer runs on the way back from residue classes.

    >>> runs_of(np.array([0, 2, 4, 6, 1, 3, 5, 7]), 1, 1)
    (Run(begin=0, step=1, length=4, parts=(Part(word=0, step=2, half=0),)), \
Run(begin=4, step=1, length=4, parts=(Part(word=1, step=2, half=0),)))
    """
    words = tokens.reshape(-1, packing)
    found = []
    for step in sorted({1, period}):
        found.append([run for first in range(min(step, len(words))) for run in _runs(words, first, step, packing)])
    return tuple(min(found, key=len))


def _runs(words: np.ndarray, first: int, step: int, packing: int) -> list[Run]:
    """Of every `step`-th word from the `first` on."""
    words, runs, i = words[first::step], [], 0
    while i < len(words):
        steps = (words[i + 1] - words[i]) // packing if i + 1 < len(words) else np.zeros(packing, int)
        steps = np.where(words[i] < 0, 0, steps)
        same = words[i:] == words[i] + np.arange(len(words) - i)[:, None] * steps * packing
        same = (same & (words[i:] >= 0)) | ((words[i] < 0) & (words[i:] < 0))
        same = same.all(1)
        count = len(same) if same.all() else max(1, int(np.argmin(same)))
        parts = [
            None if k < 0 else Part(int(k) // packing, int(s), int(k) % packing)
            for k, s in zip(words[i], steps, strict=True)
        ]
        runs.append(Run(first + i * step, step, count, tuple(parts)))
        i += count
    return runs


def copies(orders: Orders, plan: Plan, beside: Beside, results: Sequence[Any], cotangent: bool = False) -> list[Any]:
    """What a kernel keeps of VMEM for copies: of queries (and the cotangent), keys and values, the codes of each, and
    of results by query, of these dtypes."""
    found, packing = [], plan.heads.packing
    words = lambda places, lanes: pltpu.VMEM((1, *places[:-1], places[-1] // packing, lanes), I32)
    for order, count, codes in (
        (orders.queries, 1 + cotangent, beside.of_queries),
        (orders.keys, 2, beside.of_keys),
    ):
        if order is not None:
            places = [len(x) for x in order.places]
            found += [words(places, plan.heads.lanes)] * count + [words(places, LANES)] * (codes is not None)
    if orders.queries is not None:
        places = [axis.places for axis in plan.axes]
        found += [pltpu.VMEM((1, *places, plan.heads.lanes), dtype) for dtype in results]
    return found


def arrange(
    orders: Orders, table: Any, copies: list[Any], queries: Sequence[Any], keys: Sequence[Any], dtype: Any
) -> list[list[Any]]:
    """Queries and keys, the last of each codes or None, in words of this dtype: as they are, or in copies, which are
    taken off the list. The members of a key head share its copies."""
    match = int(np.array([MATCH] * (4 // np.dtype(dtype).itemsize), dtype).view(np.int32)[0])
    all_see = jnp.where(lax.broadcasted_iota(I32, (1, LANES), 1) == ANY, I32(match), I32(0))  # zeros around the grid
    found = []
    for order, given, outside in ((orders.queries, queries, I32(0)), (orders.keys, keys, all_see)):
        if order is None:
            found.append(list(given))
            continue
        mine = [None if x is None else copies.pop(0) for x in given]
        zeros = [I32(0)] * (len(given) - 1)
        triples = [x for x in zip(mine, given, [*zeros, outside], strict=True) if x[1] is not None]
        found.append(mine)
        if order is orders.queries:
            fill(order, table, triples)
        else:
            pl.when(pl.program_id(MEMBER) == 0)(functools.partial(fill, order, table, triples))
    return found


def put_back(order: Order, table: Any, source: Any, target: Any, interpret: bool) -> None:
    """A result by place, in its own numbers or in words, as one by token. The interpreter can't write to numbers as
    words."""
    fill(order, table, [(target if interpret else target.bitcast(I32), source.bitcast(I32), I32(0))])


def narrow(total: Any, factor: Any, target: Any, dtype: Any) -> None:
    """Write sums, [*places, lanes] times a factor, to words of a dtype, [1, *places, lanes]."""
    *before, length = total.shape[:-1]
    packing = 4 // np.dtype(dtype).itemsize

    def write(*row: Any) -> None:
        def chunk(i: Any, n: int) -> None:
            x = (total[(*row, pl.ds(i * packing, n * packing), slice(None))] * factor).astype(dtype)
            target[(FIRST, *row, pl.ds(i, n), slice(None))] = pltpu.bitcast(x, I32)

        _in_chunks(Run(0, 1, length // packing, ()), chunk)

    over(before, write)


def fill(order: Order, table: Any, triples: Sequence[tuple[Any, Any, Any]]) -> None:
    """Fill each target, [1, *places, lanes], from its source, [1, *tokens, lanes], both of words; the third is a word
    for what is no token. A target of other numbers is filled row by row."""
    length = len(order.places[-1])
    packings = [length // x.shape[-2] if x.dtype == I32 else 4 // np.dtype(x.dtype).itemsize for x, *_ in triples]
    runs_for = {packing: order.runs(packing) for packing in packings}

    def copy(*row: Any) -> None:
        tokens = [table[begin + place] for begin, place in zip(_begins(order.places, order.at), row, strict=True)]
        some = [token >= 0 for token in tokens] if order.partial else []
        tokens = [jnp.maximum(token, 0) for token in tokens] if order.partial else tokens
        for (target, source, other), packing in zip(triples, packings, strict=True):
            read = lambda *at, source=source: source[(FIRST, *tokens, *at, slice(None))]

            def words(run: Run, i: Any, n: int, read=read, other=other) -> jax.Array:
                x = _words(run, i, n, read, other)
                for there in some:
                    x = jnp.where(there, x, jnp.broadcast_to(other, x.shape))
                return x

            if target.dtype == I32:
                for run in runs_for[packing]:

                    def put(i: Any, n: int, run=run, target=target, words=words) -> None:
                        at = pl.ds(run.begin + i * run.step, n, run.step)
                        target[(FIRST, *row, at, slice(None))] = words(run, i, n)

                    _in_chunks(run, put)
            else:
                whole = jnp.zeros((length // packing, target.shape[-1]), I32)
                for run in runs_for[packing]:
                    for i in range(0, run.length, run.chunk):
                        x = words(run, i, min(run.chunk, run.length - i))
                        whole = whole | _spread(x, run.begin + i * run.step, run.step, len(whole))
                target[(FIRST, *row)] = pltpu.bitcast(whole, target.dtype)

    over([len(x) for x in order.places[:-1]], copy)


def _spread(x: jax.Array, begin: int, step: int, length: int) -> jax.Array:
    """Words among so many, which else are zeros."""
    return lax.pad(x, I32(0), [(begin, length - (begin + step * (len(x) - 1) + 1), step - 1), (0, 0, 0)])


def add_twins(orders: Orders, table: Any, totals: Sequence[Any]) -> None:
    """Of sums by place, [*places, lanes] in float32: add to that of every key those of its other places."""
    assert orders.keys is not None, "keys that are as they are have one place each"
    lengths = [len(x) for x in orders.keys.places]
    for a, begin in enumerate(_begins(orders.twins, orders.twins_at)):
        around = [len(orders.twins[a]) if b == a else n for b, n in enumerate(lengths[:-1])]

        def add(*row: Any, a=a, begin=begin) -> None:
            to, of = (table[begin + 2 * row[a] + n] for n in (0, 1))
            for total in totals:
                at = lambda place: (*row[:a], place, *row[a + 1 :])
                total[at(to)] = total[at(to)] + total[at(of)]

        over(around, add, unroll=1)  # a twin may add to the same key as the one before
    runs = _twin_runs(orders.twins[-1])
    if not runs:
        return

    def fold(*row: Any) -> None:
        for run, part in runs:

            def add(i: Any, n: int, run=run, part=part) -> None:
                to = (*row, pl.ds(run.begin + i * run.step, n, abs(run.step) or 1), slice(None))
                of = (*row, pl.ds(part.word + i * part.step, n, part.step), slice(None))
                for total in totals:
                    total[to] = total[to] + total[of]

            _in_chunks(run, add)

    over(lengths[:-1], fold)


def _twin_runs(twins: np.ndarray) -> list[tuple[Run, Part]]:
    """Runs of places, each with that of the others."""
    runs, i = [], 0
    while i < len(twins):
        to, of = twins[i]
        step, by = twins[i + 1] - twins[i] if i + 1 < len(twins) else (1, 1)
        line = twins[i:] == twins[i] + np.arange(len(twins) - i)[:, None] * np.array([step, by])
        same = line.all(1)
        count = len(same) if same.all() else int(np.argmin(same))
        part = Part(int(of), int(by), 0)
        runs.append((Run(int(to), int(step), count, (part,)), part))
        i += count
    return runs


def _words(run: Run, i: Any, n: int, read: Callable[..., jax.Array], other: Any) -> jax.Array:
    """`n` words of a run, from the i-th on."""
    loaded: dict[tuple[int, int], jax.Array] = {}

    def load(part: Part) -> jax.Array:
        at = part.word, part.step
        if at not in loaded:
            still = part.step == 0 or n == 1
            x = read(pl.ds(part.word + i * part.step, 1) if still else pl.ds(part.word + i * part.step, n, part.step))
            loaded[at] = jnp.broadcast_to(x, (n, x.shape[-1]))
        return loaded[at]

    parts = run.parts
    if all(part is None for part in parts):
        lanes = read(pl.ds(0, 1)).shape[-1]
        return jnp.broadcast_to(other, (n, lanes))
    halves = [None if part is None else part.half for part in parts]
    if halves == list(range(len(parts))) and len({part and part[:2] for part in parts}) == 1:
        return load(parts[0])  # pyright: ignore[reportArgumentType]
    low, high = (None if part is None else load(part) for part in parts)
    low = other & I32(LOW) if low is None else lax.shift_right_logical(low, I32(16)) if halves[0] else low & I32(LOW)
    high = other & I32(HIGH) if high is None else high & I32(HIGH) if halves[1] else high << I32(16)
    return low | high


def _in_chunks(run: Run, body: Callable[[Any, int], None]) -> None:
    """`body(i, n)` of all words of a run, from the i-th on `n` of them."""
    chunk, count = run.chunk, run.length
    whole = count // chunk
    if whole > MOST * (1 if chunk > 1 else 4):
        step = lambda n, _: (body(n * I32(chunk), chunk), I32(0))[1]
        lax.fori_loop(np.int32(0), np.int32(whole), step, I32(0), unroll=1 if chunk > 1 else 4)
        begin = whole * chunk
    else:
        begin = 0
    for i in range(begin, count, chunk):
        body(i, min(chunk, count - i))


def _begins(tables: Sequence[np.ndarray], at: int) -> list[int]:
    """Where those of the first axes begin."""
    return [at + sum(x.size for x in tables[:a]) for a in range(len(tables) - 1)]


def over(counts: Sequence[int], body: Callable[..., None], unroll: int = 4) -> None:
    """`body` of every index along some axes."""
    if math.prod(counts) == 0:
        return
    if not counts:
        body()
        return
    *before, last = counts
    if before:  # loops in loops, of which the innermost is unrolled
        over(before, lambda *row: over([last], lambda n: body(*row, n), unroll), unroll=1)
    else:
        step = lambda n, _: (body(n), I32(0))[1]
        lax.fori_loop(np.int32(0), np.int32(last), step, I32(0), unroll=min(unroll, last))

"""Windowed attention in tiles: `dot_general` on every backend, memory O(N), and a reverse derivative of its own.

A step of the loop takes some tiles of queries, slices the keys that each can see, and writes what it computes in place.
The reverse derivative takes the same steps, computes the weights again, and adds up what overlapping tiles send to a
key. Within a step scores are [tiles, batch, key_heads, columns, rows]: keys come first, which makes four of the
backward pass's five products need no transposition; rows are the queries of a tile times the heads that share a key.
What is masked has a score so low that its exponential is zero.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped

from jaxattn import machine
from jaxattn.kernels import loop as loops
from jaxattn.kernels import single, terms, tiles
from jaxattn.kernels.backend import Backend, Cost
from jaxattn.kernels.loop import Loop, Step
from jaxattn.kernels.operands import (
    Operands,
    Options,
    apply_normalizer,
    hiding_score,
    is_seen,
    soft_capped,
    statistics_dtype,
)
from jaxattn.kernels.terms import Rows
from jaxattn.normalize import softmax

TABLE = 2**18  # bytes of a table that a program may hold, a byte for whom a query sees
Arrays = dict[str, Array]
Scores = Float[Array, "tiles batch heads columns rows"]  # heads are the key's, rows the queries that share one
Term = Float[Array, "#tiles #batch #heads #columns #rows"]  # what is added to them
ByRow = Float[Array, "tiles batch heads 1 rows"]
MATRICES = ("query", "key", "value", "extra_key", "extra_value")
TERMS = ("unscaled", "bias", "relative_bias", "key_embedding")  # unscaled is the query, of which q·r is made
MASKS = ("key_mask", "slot_mask", "key_segments", "slot_ranges")  # of slots


class Role(NamedTuple):
    """What the loop does with an operand: how it is arranged beforehand, what a step takes of it, and how a step adds
    to the sum of its cotangents, which is arranged as it is."""

    arrange: Callable[[Array, Operands, Options, Loop], Array]
    take: Callable[[Array, Loop, Step], Array]
    add: Callable[[Array, Array, Loop, Step], Array]
    tiled: bool  # whether what a step takes has an axis of tiles in front


def forward(operands: Operands, options: Options) -> tuple[Array, ...]:
    """The output [*batch, *queries, heads, value_dim]; with `options.residuals` also lse [*batch, *queries, heads]."""
    if single.fits(operands, options):
        return single.forward(operands, options)
    loop = loops.plan_loop(operands, options)
    roles = _roles(operands, loop)
    work = _prepare(operands, options, loop, roles)
    shape, dtype = work["query"].shape[:-1], operands.query.dtype
    output = [loops.zeros((*shape, operands.value.shape[-1]), dtype, operands)]
    if options.residuals:
        output.append(loops.zeros(shape, statistics_dtype(dtype), operands))

    def body(step: Step, output: list[Array]) -> list[Array]:
        tile = _attend(_Tile(_taken(work, roles, loop, step), roles, options, loop, step))
        return [loops.put_queries(x, y, loop, step) for x, y in zip(output, tile, strict=False)]

    return tuple(loops.restore(x, operands, loop) for x in loops.take_steps(body, output, loop))


def backward(operands: Operands, cotangents: tuple[Array, ...], options: Options, wanted: tuple[str, ...]) -> Arrays:
    """The cotangents of the operands in `wanted`, from those of what `forward` returns."""
    loop = loops.plan_loop(operands, options)
    roles = _roles(operands, loop)
    mine = {name: getattr(operands, name) for name in wanted}
    prepare = lambda mine: _prepare_apart(operands._replace(**mine), options, loop, roles)
    floating, pull, rest = jax.vjp(prepare, mine, has_aux=True)
    work = floating | rest
    given = [loops.arrange_queries(x, operands, loop) for x in cotangents]
    needed = [name for name in (*MATRICES, *TERMS, "soft_cap") if name in work and _sources(name) & set(wanted)]
    total = {
        name: loops.zeros(work[name].shape, _sum_dtype(work[name], roles[name], loop), operands) for name in needed
    }

    def body(step: Step, total: Arrays) -> Arrays:
        tile = _Tile(_taken(work, roles, loop, step), roles, options, loop, step)
        found = _pull(tile, [loops.take_queries(x, loop, step) for x in given], needed)
        return {name: roles[name].add(x, found[name].astype(x.dtype), loop, step) for name, x in total.items()}

    total = loops.take_steps(body, total, loop)
    found = {n: total[n].astype(x.dtype) if n in total else jnp.zeros_like(x) for n, x in floating.items()}
    return pull(found)[0]


class _Tile(NamedTuple):
    """The tiles of one step: their arrays, and where they are."""

    arrays: Arrays
    roles: dict[str, Role]
    options: Options
    loop: Loop
    step: Step

    @property
    def rows(self) -> Rows:
        return loops.rows(self.loop, self.step)

    @property
    def group(self) -> int:
        """The query heads that share a key head."""
        return self.arrays["query"].shape[-2] // self.arrays["key"].shape[2 if self.loop.whole else -2]


def _attend(tile: _Tile) -> tuple[Array, ...]:
    query, key, value = _matrices(tile.arrays, tile)
    additive = _additive(tile.arrays, tile)
    scores = _add_term(_product("kd,qd->kq", key, query, tile.options), additive)
    hidden = _hidden(tile, scores.dtype)
    scores = _add_term(_capped(scores, tile.arrays.get("soft_cap")), hidden)
    if tile.options.normalize is softmax:  # divided last, where there is least to divide
        weights, share, lse = _exponential(scores, _sees_any(tile, additive, hidden))
    else:
        weights, share, lse = _normalized(scores, tile.options), jnp.ones((1, 1), scores.dtype), None
    weights = _dropped(weights, _dropout_factors(tile))
    weights = lax.optimization_barrier(jnp.swapaxes(weights, -1, -2))  # a transposed copy costs less than the product
    output = _product("qk,kd->qd", weights.astype(value.dtype), value, tile.options)
    output = _by_query(output * jnp.swapaxes(share, -1, -2), tile.arrays)
    if lse is None or not tile.options.residuals:
        return (output,)
    return output, _by_query(jnp.swapaxes(lse, -1, -2), tile.arrays)[..., 0]


def _pull(tile: _Tile, cotangents: list[Array], needed: list[str]) -> Arrays:
    """The cotangents of the arrays of a tile, from those of its output (and lse)."""
    arrays, options = tile.arrays, tile.options
    mine = lambda names: {name: arrays[name] for name in names if name in needed}
    (query, key, value), pull_matrices = jax.vjp(lambda x: _matrices(arrays | x, tile), mine(MATRICES))
    additive, pull_terms = jax.vjp(lambda x: _additive(arrays | x, tile), mine(TERMS))
    scores = _add_term(_product("kd,qd->kq", key, query, options), additive)
    scores, pull_cap = jax.vjp(_capped, scores, arrays.get("soft_cap"))
    hidden = _hidden(tile, scores.dtype)
    scores = _add_term(scores, hidden)
    given, kept = _grouped(cotangents[0], key.shape[2]).astype(query.dtype), _dropout_factors(tile)
    if options.normalize is softmax:  # 1 / sum goes to the smaller factor
        weights, share, _ = _exponential(scores, _sees_any(tile, additive, hidden))
        given = (given * jnp.swapaxes(share, -1, -2)).astype(given.dtype)
        of_scores = weights * _dropped(_product("kd,qd->kq", value, given, options), kept)
        inner = of_scores.sum(-2, keepdims=True)
        if options.residuals:
            inner = inner - jnp.swapaxes(_grouped(cotangents[1][..., None], key.shape[2]), -1, -2)
        of_scores = of_scores - weights * (share * inner)
    else:
        weights, pull_weights = jax.vjp(lambda s: _normalized(s, options), scores)
        (of_scores,) = pull_weights(_dropped(_product("kd,qd->kq", value, given, options), kept))
    of_scores, of_cap = pull_cap(of_scores)
    weights = _dropped(weights, kept).astype(value.dtype)
    found = {}
    if additive is not None:  # its sum over what it was broadcast along
        (of_additive,) = jax.linear_transpose(lambda x: jnp.broadcast_to(x, of_scores.shape), additive)(of_scores)
        found = pull_terms(of_additive)[0]
    of_scores = of_scores.astype(key.dtype)
    of_query = _product("qk,kd->qd", lax.optimization_barrier(jnp.swapaxes(of_scores, -1, -2)), key, options)
    of_key = _product("kq,qd->kd", of_scores, query, options)
    of_value = _product("kq,qd->kd", weights, given, options)
    matrices = of_query.astype(query.dtype), of_key.astype(key.dtype), of_value.astype(value.dtype)
    return found | pull_matrices(matrices)[0] | {"soft_cap": of_cap}


# The parts of a tile's attention


def _matrices(
    arrays: Arrays, tile: _Tile
) -> tuple[
    Float[Array, "tiles batch heads rows head_dim"],
    Float[Array, "tiles batch heads columns head_dim"],
    Float[Array, "tiles batch heads columns value_dim"],
]:
    """Query, key and value, with extra tokens as further columns."""
    tiles, dtype = arrays["query"].shape[0], _product_dtype(arrays["key"].dtype)

    def columns(name: str) -> Array:
        x = arrays[name]
        if not tile.loop.whole:
            x = _heads_first(x, len(tile.loop.axes))
        elif tiles > 1:
            x = jnp.broadcast_to(x, (tiles, *x.shape[1:]))
        if "extra_key" in arrays:  # as further columns
            extra = jnp.swapaxes(arrays[f"extra_{name}"], 1, 2)
            x = jnp.concatenate([x, jnp.broadcast_to(extra, (tiles, *extra.shape))], -2)
        return x.astype(dtype)

    key, value = columns("key"), columns("value")
    return _grouped(arrays["query"], key.shape[2]).astype(dtype), key, value


def _heads_first(x: Shaped[Array, "*columns heads dim"], rank: int) -> Shaped[Array, "*rest heads columns dim"]:
    """The `rank` axes of the columns as one, behind the heads."""
    return jnp.swapaxes(x.reshape(*x.shape[: -rank - 2], math.prod(x.shape[-rank - 2 : -2]), *x.shape[-2:]), -2, -3)


def _product_dtype(dtype: Any) -> Any:
    """A CPU has no fast product in half precision."""
    return statistics_dtype(dtype) if machine.backend() == "cpu" else dtype


def _grouped(
    x: Float[Array, "tiles batch *queries query_heads dim"], key_heads: int
) -> Float[Array, "tiles batch {key_heads} rows dim"]:
    """The queries and the heads that share a key head, as rows."""
    x = x.reshape(*x.shape[:2], math.prod(x.shape[2:-2]), key_heads, -1, x.shape[-1])
    return jnp.moveaxis(x, 2, 4).reshape(*x.shape[:2], key_heads, -1, x.shape[-1])


def _by_query(
    x: Float[Array, "tiles batch heads rows dim"], arrays: Arrays
) -> Float[Array, "tiles batch *queries query_heads dim"]:
    """`_grouped`, undone."""
    *grid, heads, _ = arrays["query"].shape
    x = x.reshape(*x.shape[:3], heads // x.shape[2], -1, x.shape[-1])
    return jnp.moveaxis(x, 4, 2).reshape(*grid, heads, x.shape[-1])


def _product(equation: str, left: Array, right: Array, options: Options) -> Array:
    """A product of matrices, summed in float32 at least."""
    ours, theirs, output = equation.replace("->", ",").split(",")
    dtype = statistics_dtype(left.dtype)
    equation = f"...{ours},...{theirs}->...{output}"
    return jnp.einsum(equation, left, right, precision=options.precision, preferred_element_type=dtype)


def _exponential(
    scores: Scores, some: Bool[Array, "#tiles #batch #heads 1 #rows"] | None
) -> tuple[Scores, ByRow, ByRow]:
    """exp(s - max), 1 / its sum, and log sum exp(s); 0 and -inf where there is not `some`.

    The sum alone needs no maximum, so that a compiler may make scores, maximum and exponential in one pass.
    """
    most = scores.max(-2, keepdims=True)
    exponential = jnp.exp(scores - most)
    total = exponential.sum(-2, keepdims=True)
    where_some = lambda x, other: x if some is None else jnp.where(some, x, other)
    return exponential, where_some(1 / total, 0), where_some(jnp.log(total) + most, -jnp.inf)


def _sees_any(
    tile: _Tile, additive: Term | None, hidden: Term | None
) -> Bool[Array, "#tiles #batch #heads 1 #rows"] | None:
    """Which queries see anything; None where all do."""
    by_window = all(axis.someone for axis in tile.loop.axes)
    by_extra = "extra_key" in tile.arrays and "extra_mask" not in tile.arrays
    if by_extra or (by_window and additive is None and not set(MASKS) & set(tile.arrays)):
        return None
    there = [term for term in (additive, hidden) if term is not None]
    return is_seen(sum(there[1:], there[0])).any(-2, keepdims=True)


def _capped(scores: Scores, soft_cap: Float[Array, ""] | None) -> Scores:
    """cap·tanh(s / cap); a score that hides, which a bias may make, stays."""
    if soft_cap is None:
        return scores
    seen = is_seen(scores)
    return jnp.where(seen, soft_capped(jnp.where(seen, scores, 0), soft_cap), hiding_score(scores.dtype))


def _normalized(scores: Scores, options: Options) -> Scores:
    scores = jnp.swapaxes(scores, -1, -2)
    mask = is_seen(scores)
    return jnp.swapaxes(apply_normalizer(options.normalize, jnp.where(mask, scores, 0), mask), -1, -2)


def _add_term(scores: Scores, term: Term | None) -> Scores:
    return scores if term is None else scores + term


def _additive(arrays: Arrays, tile: _Tile) -> Term | None:
    """What is added to q·k: bias, relative_bias[j-i] and q·r[j-i]."""
    if not any(name in arrays for name in TERMS[1:]):
        return None
    dtype, rank = statistics_dtype(arrays["query"].dtype), len(tile.loop.axes)

    def one(arrays: Arrays, rows: Rows) -> Array:
        operands, term = _operands(arrays, tile), jnp.zeros((1,) * (2 * rank + 3), dtype)
        if operands.relative_bias is not None or operands.key_embedding is not None:
            term = term + terms.relative(operands, tile.options, rows, tile.loop.tables, dtype)
        if operands.bias is not None:
            bias = terms.split_heads(operands.bias, operands, rank)
            term = term + terms.to_columns(bias, tile.options, rows, tile.loop.tables).astype(dtype)
        return jnp.maximum(term, hiding_score(dtype))  # for -inf

    return _flat(_over_tiles(one, arrays, tile), tile)


def _hidden(tile: _Tile, dtype: Any) -> Term | None:
    """0 where a query sees, else a score that hides."""
    hidden, extra = _hidden_slots(tile, dtype), tile.arrays.get("extra_mask")
    if extra is None:
        return hidden
    extra = extra.reshape(*extra.shape[:2], 1, 1, -1, extra.shape[-1])
    extra = jnp.broadcast_to(extra, (*extra.shape[:3], tile.group, *extra.shape[4:]))
    extra = jnp.swapaxes(extra.reshape(*extra.shape[:3], -1, extra.shape[-1]), -1, -2)  # [..., extra, rows]
    before = math.prod(axis.columns for axis in tile.loop.axes)
    of_extra = jnp.pad(jnp.where(extra, 0, hiding_score(dtype)).astype(dtype), [(0, 0)] * 3 + [(before, 0), (0, 0)])
    return of_extra if hidden is None else of_extra + hidden


def _hidden_slots(tile: _Tile, dtype: Any) -> Term | None:
    """The same of the slots alone; extra tokens do not hide."""
    arrays, rank = tile.arrays, len(tile.loop.axes)
    if set(MASKS) & set(arrays):
        mask = lambda arrays, rows: terms.visible(_operands(arrays, tile), tile.options, rows, tile.loop.tables)
        seen = _over_tiles(mask, arrays, tile)
        seen = jnp.expand_dims(seen, range(1, 5 + 2 * rank - seen.ndim))
        return _flat(jnp.where(seen, 0, hiding_score(dtype)).astype(dtype), tile)
    if all(axis.everyone for axis in tile.loop.axes):
        return None
    return _hidden_by_geometry(tile, dtype)


def _hidden_by_geometry(tile: _Tile, dtype: Any) -> Term:
    """The same, of the window alone: a table of what its tiles look like, where they are few and small."""
    axes, rank = tile.loop.axes, len(tile.loop.axes)
    number = [loops.of_tiles(axis.pattern, tile.loop, tile.step, a) for a, axis in enumerate(axes)]
    size = tile.group * math.prod(axis.ranges[..., 0].size * axis.columns for axis in axes)
    if size <= TABLE:
        table, combined = np.ones((1,) * (1 + 2 * rank), bool), 0
        for a, (axis, n) in enumerate(zip(axes, number, strict=True)):
            seen = _seen(axis.ranges, axis.columns, a, rank)
            table = (table[:, None] & seen).reshape(-1, *np.broadcast_shapes(table.shape[1:], seen.shape[1:]))
            combined = combined * len(seen) + n
        hidden = _rows_of(_flat(~table[:, None, None, None], tile), combined)
        return jnp.where(hidden, hiding_score(dtype), 0).astype(dtype)
    seen = []
    for a, (axis, n) in enumerate(zip(axes, number, strict=True)):
        ranges = axis.ranges[n] if isinstance(n, np.ndarray) else _ranges(axis.ranges, n)
        seen.append(_seen(ranges, axis.columns, a, rank))
    seen = jnp.asarray(functools.reduce(operator.and_, seen))[:, None, None, None]
    # made once, and not again for every head
    return lax.optimization_barrier(_flat(jnp.where(seen, 0, hiding_score(dtype)).astype(dtype), tile))


def _rows_of(table: np.ndarray, index: Any) -> Any:
    """The rows of a table; in a loop, the step decides which. What many tiles share a program holds once."""
    if isinstance(index, np.ndarray) and index.size * table[0].nbytes <= TABLE:
        return table[index]
    return jnp.asarray(table)[index]


def _ranges(ranges: np.ndarray, index: Array) -> Array:
    """The same of ranges, of which the first and the last columns are each alike but for where they begin."""
    return jnp.stack([tiles.look_up(ranges[..., end], index) for end in (0, 1)], -1)


def _seen(ranges: Any, columns: int, a: int, rank: int) -> Any:
    """Who sees what along one axis, [patterns or tiles, *queries|1, *columns|1], of the ranges [..., queries, 2]."""
    low, high = ranges[..., :1], ranges[..., 1:]
    seen = (low <= np.arange(columns)) & (np.arange(columns) < high)
    shape = [1] * (2 * rank)
    shape[a], shape[rank + a] = seen.shape[1:]
    return seen.reshape(len(seen), *shape)


def _flat(x: Any, tile: _Tile) -> Any:
    """[tiles, batch|1, key_heads|1, group|1, *queries|1, *columns|1] as [tiles, batch|1, key_heads|1, columns, rows];
    0 for extra tokens."""
    rank, xp = (x.ndim - 4) // 2, np if isinstance(x, np.ndarray) else jnp
    arrays, axes = tile.arrays, tile.loop.axes
    queries, columns = arrays["query"].shape[2 : 2 + rank], [axis.columns for axis in axes]
    x = xp.broadcast_to(x, (*x.shape[:3], tile.group, *queries, *columns))
    x = xp.swapaxes(x.reshape(*x.shape[:3], tile.group * math.prod(queries), math.prod(columns)), -1, -2)
    extra = arrays["extra_key"].shape[1] if "extra_key" in arrays else 0
    return xp.pad(x, [(0, 0)] * 3 + [(0, extra), (0, 0)]) if extra else x


def _dropout_factors(tile: _Tile) -> Term | None:
    """What dropout multiplies the weights with."""
    if tile.options.dropout_rate == 0:
        return None
    rank = len(tile.loop.axes)
    dropout = lambda arrays, rows: terms.dropout(_operands(arrays, tile), tile.options, rows, tile.loop.tables)
    kept, extra = _over_tiles(dropout, tile.arrays, tile)
    kept = kept.reshape(*kept.shape[: -2 * rank], math.prod(kept.shape[-2 * rank : -rank]), -1)
    kept = jnp.concatenate([kept, extra], -1)
    return jnp.swapaxes(kept.reshape(*kept.shape[:3], -1, kept.shape[-1]), -1, -2)


def _dropped(x: Scores, kept: Term | None) -> Scores:
    return x if kept is None else x * kept


def _operands(arrays: Arrays, tile: _Tile) -> Operands:
    """One tile as a problem of its own, for what `plain` makes of it."""
    if tile.loop.whole:
        arrays = arrays | {name: jnp.swapaxes(arrays[name][0], -2, -3) for name in ("key", "value")}
    rest = {name: x for name, x in arrays.items() if name not in ("query", "unscaled")}
    return Operands(query=arrays.get("unscaled", arrays["query"]), scale=jnp.ones(()), **rest)


def _over_tiles(function: Callable, arrays: Arrays, tile: _Tile) -> Any:
    in_axes = {name: 0 if tile.roles[name].tiled else None for name in arrays}
    return jax.vmap(function, (in_axes, 0))(arrays, tile.rows)


# What a step takes, and what becomes of its results


def _shared(x: Array, loop: Loop) -> bool:
    """Whether several steps take the same of an array arranged by query: one for all chunks, or along an axis."""
    return 1 in x.shape[1 : loop.lead + len(loop.axes)] and math.prod(loop.steps) > 1


QUERIES = Role(  # differs from query to query, along some axes at least
    arrange=lambda x, operands, options, loop: loops.arrange_queries(x, operands, loop),
    take=loops.take_queries,
    add=lambda x, found, loop, step: loops.put_queries(x, found, loop, step, add=_shared(x, loop)),
    tiled=True,
)
KEYS = Role(  # differs from key to key
    arrange=lambda x, operands, options, loop: loops.arrange_keys(x, operands, loop),
    take=loops.take_columns,
    add=loops.add_columns,
    tiled=True,
)
ALL_KEYS = Role(  # the same, in a loop whose tiles see all keys: heads first, once and for all
    arrange=lambda x, operands, options, loop: _heads_first(loops.arrange_keys(x, operands, loop), len(loop.axes)),
    take=lambda x, loop, step: loops.take_chunk(x, loop, step)[None],
    add=lambda x, found, loop, step: loops.put(x, found[0], (), loop, step, add=True),
    tiled=False,
)
ENTRIES = Role(  # differs from one entry of the batch to the next
    arrange=lambda x, operands, options, loop: loops.chunked(x, operands, loop),
    take=loops.take_chunk,
    add=lambda x, found, loop, step: loops.put(x, found, (), loop, step, add=True),
    tiled=False,
)
SHARED = Role(  # is one for all
    arrange=lambda x, operands, options, loop: x,
    take=lambda x, loop, step: x,
    add=lambda x, found, loop, step: x + found,
    tiled=False,
)


def _roles(operands: Operands, loop: Loop) -> dict[str, Role]:
    """The role of every array that `_prepare` makes."""
    columns = ALL_KEYS if loop.whole else KEYS
    by_name = {
        "query": QUERIES,
        "query_segments": QUERIES,
        "slot_ranges": QUERIES,
        "extra_mask": QUERIES,
        "extra_key": ENTRIES,
        "extra_value": ENTRIES,
    }
    by_name |= {"key": columns, "value": columns, "key_mask": KEYS, "key_segments": KEYS}
    rank = len(loop.axes)
    batch = operands.query.ndim - rank - 2
    for name in ("bias", "slot_mask"):
        x = getattr(operands, name)
        by_name[name] = ENTRIES if x is None or math.prod(x.shape[batch : batch + rank]) == 1 else QUERIES
    given = [name for name, x in operands._asdict().items() if x is not None and name != "scale"]
    unscaled = {"unscaled": QUERIES} if operands.key_embedding is not None else {}
    return {name: by_name.get(name, SHARED) for name in given} | unscaled


def _prepare(operands: Operands, options: Options, loop: Loop, roles: dict[str, Role]) -> Arrays:
    """Every operand, arranged as the loop wants it; the query scaled."""
    query = operands.query
    scaled = (query.astype(statistics_dtype(query.dtype)) * operands.scale).astype(_product_dtype(query.dtype))
    arrays = operands._asdict() | {"query": scaled, "unscaled": query}
    return {name: role.arrange(arrays[name], operands, options, loop) for name, role in roles.items()}


def _prepare_apart(*arguments: Any) -> tuple[Arrays, Arrays]:
    """What it prepares that has a derivative, and what has none."""
    found = _prepare(*arguments)
    floating = {name: x for name, x in found.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    return floating, {name: x for name, x in found.items() if name not in floating}


def _taken(work: Arrays, roles: dict[str, Role], loop: Loop, step: Step) -> Arrays:
    """What a step takes of every array: [tiles, entries, *queries or *columns, ...], [entries, ...], or all; of keys
    that are the same in every step, [1, entries, key_heads, columns, ...]."""
    return {name: roles[name].take(x, loop, step) for name, x in work.items()}


def _sources(name: str) -> set[str]:
    """The operands that an arranged array is made of."""
    return {"query": {"query", "scale"}, "unscaled": {"query"}}.get(name, {name})


def _sum_dtype(x: Array, role: Role, loop: Loop) -> Any:
    """What several steps add to is held in float32 at least."""
    once = role is QUERIES and not _shared(x, loop)
    return x.dtype if once else statistics_dtype(x.dtype)


def _cost(operands: Operands, options: Options) -> Cost:
    """The loop's tiles; a step holds what they need in the dtype of the sums."""
    if single.fits(operands, options):
        return single.cost(operands)
    loop, query = loops.plan_loop(operands, options), operands.query
    heads, dims = query.shape[-2], (query.shape[-1], operands.value.shape[-1])
    extra = 0 if operands.extra_key is None else operands.extra_key.shape[-3]
    tile = tuple(axis.tiles.queries.shape[1] for axis in loop.axes)
    rows, columns = math.prod(tile), math.prod(axis.columns for axis in loop.axes) + extra
    batch = math.prod(query.shape[: -len(tile) - 2])
    at_once = batch // loop.chunks * math.prod(loop.runs)
    held = at_once * heads * tiles.tile_numbers(rows, columns, dims) * statistics_dtype(query.dtype).itemsize
    flops = 2 * batch * heads * math.prod(axis.steps * axis.run for axis in loop.axes) * rows * columns * sum(dims)
    return Cost(tile, columns, math.prod(loop.steps), held, flops)


XLA = Backend(name="xla", supports=lambda operands, options: None, forward=forward, backward=backward, cost=_cost)

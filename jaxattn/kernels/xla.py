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
from jaxtyping import Array

from jaxattn.kernels import plain, problem, target
from jaxattn.kernels import walk as walking
from jaxattn.kernels.problem import Operands, Options
from jaxattn.kernels.walk import Rows, Step, Walk
from jaxattn.normalize import softmax

Arrays = dict[str, Array]
BY_QUERY = ("query", "unscaled", "query_segments")
COLUMNS = ("key", "value")
BY_KEY = (*COLUMNS, "key_mask", "key_segments")
BY_SLOT = ("bias", "slot_mask")  # by query too, or the same for all of them
OF_BATCH = ("extra_key", "extra_value")
MATRICES = ("query", *COLUMNS, *OF_BATCH)
TERMS = ("unscaled", "bias", "relative_bias", "key_embedding")
MASKS = ("key_mask", "slot_mask", "key_segments")
FLOATING = (*MATRICES, *TERMS, "soft_cap")


def forward(operands: Operands, options: Options) -> tuple[Array, ...]:
    """The output [*batch, *queries, heads, value_dim]; with `options.residuals` also lse [*batch, *queries, heads]."""
    walk = walking.plan(operands, options)
    work = _prepare(operands, options, walk)
    shape, dtype = work["query"].shape[:-1], operands.query.dtype
    output = [_zeros((*shape, operands.value.shape[-1]), dtype, operands)]
    if options.residuals:
        output.append(_zeros(shape, problem.statistics_dtype(dtype), operands))

    def body(step: Step, output: list[Array]) -> list[Array]:
        tile = _attend(_Tile(_taken(work, walk, step), options, walk, step))
        return [walking.put_queries(x, y, walk, step) for x, y in zip(output, tile, strict=False)]

    return tuple(walking.restore(x, operands, walk) for x in walking.loop(body, output, walk))


def backward(operands: Operands, cotangents: tuple[Array, ...], options: Options, wanted: tuple[str, ...]) -> Arrays:
    """The cotangents of the operands in `wanted`, from those of what `forward` returns."""
    walk = walking.plan(operands, options)
    mine = {name: getattr(operands, name) for name in wanted}
    work, pull = jax.vjp(lambda mine: _prepare(operands._replace(**mine), options, walk), mine)
    given = [walking.arrange_queries(x, operands, walk) for x in cotangents]
    needed = [name for name in FLOATING if name in work and _sources(name) & set(wanted)]
    total = {name: _zeros(work[name].shape, _sum_dtype(name, work[name].dtype), operands) for name in needed}

    def body(step: Step, total: Arrays) -> Arrays:
        tile = _Tile(_taken(work, walk, step), options, walk, step)
        found = _pull(tile, [walking.take_queries(x, walk, step) for x in given], needed)
        return {name: _add(x, found[name], name, walk, step) for name, x in total.items()}

    total = walking.loop(body, total, walk)
    return pull({name: total[name].astype(x.dtype) if name in total else _no(x) for name, x in work.items()})[0]


class _Tile(NamedTuple):
    """The tiles of one step: their arrays, and where they are."""

    arrays: Arrays
    options: Options
    walk: Walk
    step: Step

    @property
    def rows(self) -> Rows:
        return walking.rows(self.walk, self.step)

    @property
    def group(self) -> int:
        """The query heads that share a key head."""
        return self.arrays["query"].shape[-2] // self.arrays["key"].shape[2 if self.walk.whole else -2]


def _attend(tile: _Tile) -> tuple[Array, ...]:
    query, key, value = _matrices(tile.arrays, tile)
    additive = _additive(tile.arrays, tile)
    scores = _add_term(_product("kd,qd->kq", key, query, tile.options), additive)
    hidden = _hidden(tile, scores.dtype)
    scores = _add_term(_capped(scores, tile.arrays.get("soft_cap")), hidden)
    if tile.options.normalize is softmax:  # divided last, where there is least to divide
        weights, share, lse = _exponential(scores, _some(tile, additive, hidden))
    else:
        weights, share, lse = _normalized(scores, tile.options), jnp.ones((1, 1), scores.dtype), None
    weights = _dropped(weights, _kept(tile))
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
    given, kept = _grouped(cotangents[0], key.shape[2]).astype(query.dtype), _kept(tile)
    if options.normalize is softmax:  # 1 / sum goes to the smaller factor
        weights, share, _ = _exponential(scores, _some(tile, additive, hidden))
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


def _matrices(arrays: Arrays, tile: _Tile) -> tuple[Array, Array, Array]:
    """Query [tiles, batch, key_heads, rows, head_dim], key and value [tiles, batch, key_heads, columns, ...]."""
    tiles, dtype = arrays["query"].shape[0], _product_dtype(arrays["key"].dtype)

    def columns(name: str) -> Array:
        x = arrays[name]
        if not tile.walk.whole:
            x = _heads_first(x, len(tile.walk.axes))
        elif tiles > 1:
            x = jnp.broadcast_to(x, (tiles, *x.shape[1:]))
        if "extra_key" in arrays:  # as further columns
            extra = jnp.swapaxes(arrays[f"extra_{name}"], 1, 2)
            x = jnp.concatenate([x, jnp.broadcast_to(extra, (tiles, *extra.shape))], -2)
        return x.astype(dtype)

    key, value = columns("key"), columns("value")
    return _grouped(arrays["query"], key.shape[2]).astype(dtype), key, value


def _heads_first(x: Array, rank: int) -> Array:
    """[..., *columns, key_heads, head_dim] as [..., key_heads, columns, head_dim]."""
    return jnp.swapaxes(x.reshape(*x.shape[: -rank - 2], math.prod(x.shape[-rank - 2 : -2]), *x.shape[-2:]), -2, -3)


def _product_dtype(dtype: Any) -> Any:
    """A CPU has no fast product in half precision."""
    return problem.statistics_dtype(dtype) if target.backend() == "cpu" else dtype


def _grouped(x: Array, key_heads: int) -> Array:
    """[tiles, batch, *queries, heads, ...] as [tiles, batch, key_heads, rows, ...]."""
    x = x.reshape(*x.shape[:2], math.prod(x.shape[2:-2]), key_heads, -1, x.shape[-1])
    return jnp.moveaxis(x, 2, 4).reshape(*x.shape[:2], key_heads, -1, x.shape[-1])


def _by_query(x: Array, arrays: Arrays) -> Array:
    """`_grouped`, undone."""
    *grid, heads, _ = arrays["query"].shape
    x = x.reshape(*x.shape[:3], heads // x.shape[2], -1, x.shape[-1])
    return jnp.moveaxis(x, 4, 2).reshape(*grid, heads, x.shape[-1])


def _product(equation: str, left: Array, right: Array, options: Options) -> Array:
    """A product of matrices, summed in float32 at least."""
    ours, theirs, output = equation.replace("->", ",").split(",")
    dtype = problem.statistics_dtype(left.dtype)
    equation = f"...{ours},...{theirs}->...{output}"
    return jnp.einsum(equation, left, right, precision=options.precision, preferred_element_type=dtype)


def _exponential(scores: Array, some: Array | None) -> tuple[Array, Array, Array]:
    """exp(s - max), 1 / its sum, and log sum exp(s); 0 and -inf where there is not `some`.

    The sum alone needs no maximum, so that a compiler may make scores, maximum and exponential in one pass.
    """
    most = scores.max(-2, keepdims=True)
    exponential = jnp.exp(scores - most)
    total = exponential.sum(-2, keepdims=True)
    where_some = lambda x, other: x if some is None else jnp.where(some, x, other)
    return exponential, where_some(1 / total, 0), where_some(jnp.log(total) + most, -jnp.inf)


def _some(tile: _Tile, additive: Array | None, hidden: Array | None) -> Array | None:
    """Which queries see anything, [tiles, batch|1, key_heads|1, 1, rows]; None where all do."""
    by_window = all(axis.patterns.any(-1).all() for axis in tile.walk.axes)
    if "extra_key" in tile.arrays or (by_window and additive is None and not set(MASKS) & set(tile.arrays)):
        return None
    terms = [term for term in (additive, hidden) if term is not None]
    return problem.seen(sum(terms[1:], terms[0])).any(-2, keepdims=True)


def _capped(scores: Array, soft_cap: Array | None) -> Array:
    """cap·tanh(s / cap); a score that hides, which a bias may make, stays."""
    if soft_cap is None:
        return scores
    seen = problem.seen(scores)
    return jnp.where(seen, problem.cap(jnp.where(seen, scores, 0), soft_cap), problem.hidden(scores.dtype))


def _normalized(scores: Array, options: Options) -> Array:
    scores = jnp.swapaxes(scores, -1, -2)
    mask = problem.seen(scores)
    return jnp.swapaxes(problem.apply(options.normalize, jnp.where(mask, scores, 0), mask), -1, -2)


def _add_term(scores: Array, term: Array | None) -> Array:
    return scores if term is None else scores + term


def _additive(arrays: Arrays, tile: _Tile) -> Array | None:
    """What is added to q·k: bias, relative_bias[j-i] and q·r[j-i], [tiles, batch|1, key_heads|1, columns, rows]."""
    if not any(name in arrays for name in TERMS[1:]):
        return None
    dtype, rank = problem.statistics_dtype(arrays["query"].dtype), len(tile.walk.axes)

    def one(arrays: Arrays, rows: Rows) -> Array:
        operands, term = _operands(arrays, tile), jnp.zeros((1,) * (2 * rank + 3), dtype)
        if operands.relative_bias is not None or operands.key_embedding is not None:
            term = term + plain.relative(operands, tile.options, rows, tile.walk.tables, dtype)
        if operands.bias is not None:
            bias = plain.split_heads(operands.bias, operands, rank)
            term = term + plain.to_columns(bias, tile.options, rows, tile.walk.tables).astype(dtype)
        return jnp.maximum(term, problem.hidden(dtype))  # for -inf

    return _flat(_over_tiles(one, arrays, tile), tile)


def _hidden(tile: _Tile, dtype: Any) -> Array | None:
    """0 where a query sees, else a score that hides, [tiles, batch|1, key_heads|1, columns, rows]."""
    arrays, rank = tile.arrays, len(tile.walk.axes)
    if set(MASKS) & set(arrays):
        mask = lambda arrays, rows: plain.visible(_operands(arrays, tile), tile.options, rows, tile.walk.tables)
        seen = _over_tiles(mask, arrays, tile)
        seen = jnp.expand_dims(seen, range(1, 5 + 2 * rank - seen.ndim))
        return _flat(jnp.where(seen, 0, problem.hidden(dtype)).astype(dtype), tile)
    if all(axis.everyone for axis in tile.walk.axes):
        return None
    return _hidden_by_geometry(tile, dtype)


def _hidden_by_geometry(tile: _Tile, dtype: Any) -> Array:
    """The same, of the window alone. There are few patterns, mostly: then every combination is made beforehand."""
    axes, rank = tile.walk.axes, len(tile.walk.axes)
    number = [walking.of_tiles(axis.pattern, tile.walk, tile.step, a) for a, axis in enumerate(axes)]
    hide = lambda seen: np.where(seen, 0, problem.hidden(dtype)).astype(dtype)
    spread = [_spread(axis.patterns, a, rank) for a, axis in enumerate(axes)]
    if tile.group * math.prod(axis.patterns.size for axis in axes) <= 2**20:
        table: np.ndarray = np.ones((1,) * (1 + 2 * rank), bool)
        combined = 0
        for seen, n in zip(spread, number, strict=True):
            table = (table[:, None] & seen).reshape(-1, *np.broadcast_shapes(table.shape[1:], seen.shape[1:]))
            combined = combined * len(seen) + n
        return jnp.asarray(_rows_of(_flat(hide(table)[:, None, None, None], tile), combined))
    terms = [_rows_of(hide(seen), n) for seen, n in zip(spread, number, strict=True)]
    return jnp.asarray(_flat(functools.reduce(operator.add, terms)[:, None, None, None], tile))


def _rows_of(table: np.ndarray, index: Any) -> Any:
    """The rows of a table, of which a loop knows only then which."""
    if isinstance(index, np.ndarray):
        return table[index]
    return jnp.asarray(table)[index]


def _spread(patterns: np.ndarray, a: int, rank: int) -> np.ndarray:
    """[patterns, queries, columns] of one axis as [patterns, *queries|1, *columns|1]."""
    shape = [1] * (2 * rank)
    shape[a], shape[rank + a] = patterns.shape[1:]
    return patterns.reshape(len(patterns), *shape)


def _flat(x: Any, tile: _Tile) -> Any:
    """[tiles, batch|1, key_heads|1, group|1, *queries|1, *columns|1] as [tiles, batch|1, key_heads|1, columns, rows];
    0 for extra tokens."""
    rank, xp = (x.ndim - 4) // 2, np if isinstance(x, np.ndarray) else jnp
    arrays, axes = tile.arrays, tile.walk.axes
    queries, columns = arrays["query"].shape[2 : 2 + rank], [axis.tiles.keys.shape[1] for axis in axes]
    x = xp.broadcast_to(x, (*x.shape[:3], tile.group, *queries, *columns))
    x = xp.swapaxes(x.reshape(*x.shape[:3], tile.group * math.prod(queries), math.prod(columns)), -1, -2)
    extra = arrays["extra_key"].shape[1] if "extra_key" in arrays else 0
    return xp.pad(x, [(0, 0)] * 3 + [(0, extra), (0, 0)]) if extra else x


def _kept(tile: _Tile) -> Array | None:
    """What dropout multiplies the weights with."""
    if tile.options.dropout_rate == 0:
        return None
    rank = len(tile.walk.axes)
    dropout = lambda arrays, rows: plain.dropout(_operands(arrays, tile), tile.options, rows, tile.walk.tables)
    kept, extra = _over_tiles(dropout, tile.arrays, tile)
    kept = kept.reshape(*kept.shape[: -2 * rank], math.prod(kept.shape[-2 * rank : -rank]), -1)
    kept = jnp.concatenate([kept, extra], -1)
    return jnp.swapaxes(kept.reshape(*kept.shape[:3], -1, kept.shape[-1]), -1, -2)


def _dropped(x: Array, kept: Array | None) -> Array:
    return x if kept is None else x * kept


def _operands(arrays: Arrays, tile: _Tile) -> Operands:
    """One tile as a problem of its own, for what `plain` makes of it."""
    if tile.walk.whole:
        arrays = arrays | {name: jnp.swapaxes(arrays[name][0], -2, -3) for name in COLUMNS}
    rest = {name: x for name, x in arrays.items() if name not in ("query", "unscaled")}
    return Operands(query=arrays.get("unscaled", arrays["query"]), scale=jnp.ones(()), **rest)


def _over_tiles(function: Callable, arrays: Arrays, tile: _Tile) -> Any:
    rank = len(tile.walk.axes)
    shared = COLUMNS if tile.walk.whole else ()

    def by_tile(name: str, x: Array) -> bool:
        return name not in shared and (name in (*BY_QUERY, *BY_KEY) or (name in BY_SLOT and x.ndim == 2 * rank + 3))

    return jax.vmap(function, ({name: 0 if by_tile(name, x) else None for name, x in arrays.items()}, 0))(
        arrays, tile.rows
    )


# What a step takes, and what becomes of its results


def _prepare(operands: Operands, options: Options, walk: Walk) -> Arrays:
    """Every operand, arranged as the loop wants it; the query scaled."""
    rank, dtype = len(walk.axes), operands.query.dtype
    batch = operands.query.ndim - rank - 2
    work = {name: x for name, x in operands._asdict().items() if x is not None and name != "scale"}
    work["query"] = (operands.query.astype(problem.statistics_dtype(dtype)) * operands.scale).astype(
        _product_dtype(dtype)
    )
    if operands.key_embedding is not None:
        work["unscaled"] = operands.query
    for name, x in work.items():
        if name in BY_SLOT and math.prod(x.shape[batch : batch + rank]) > 1:
            x = jnp.broadcast_to(x, (*x.shape[:batch], *options.queries, *x.shape[batch + rank :]))
            work[name] = walking.arrange_queries(x, operands, walk)
        elif name in BY_QUERY:
            work[name] = walking.arrange_queries(x, operands, walk)
        elif name in BY_KEY:
            x = walking.arrange_keys(x, operands, walk)
            work[name] = _heads_first(x, rank) if walk.whole and name in COLUMNS else x
        elif name in (*BY_SLOT, *OF_BATCH):
            work[name] = walking.chunked(x, operands, walk)
    return work


def _by_place(name: str, x: Array, walk: Walk) -> bool:
    """Whether an arranged array differs from query to query."""
    of_grid = x.shape[walk.lead : walk.lead + len(walk.axes)]
    return name in BY_QUERY or (name in BY_SLOT and math.prod(of_grid) > 1)


def _taken(work: Arrays, walk: Walk, step: Step) -> Arrays:
    """What a step takes of every array: [tiles, entries, *queries or *columns, ...], [entries, ...], or all; of keys
    that are the same in every step, [1, entries, key_heads, columns, ...]."""
    taken = {}
    for name, x in work.items():
        if _by_place(name, x, walk):
            taken[name] = walking.take_queries(x, walk, step)
        elif walk.whole and name in COLUMNS:
            taken[name] = walking.take_chunk(x, walk, step)[None]
        elif name in BY_KEY:
            taken[name] = walking.take_columns(x, walk, step)
        else:
            taken[name] = walking.take_chunk(x, walk, step) if name in (*BY_SLOT, *OF_BATCH) else x
    return taken


def _add(x: Array, found: Array, name: str, walk: Walk, step: Step) -> Array:
    """The sum so far, and what a step found."""
    if _by_place(name, x, walk):
        return walking.put_queries(x, found, walk, step, add=walk.chunks > 1 and x.shape[1] == 1)
    if walk.whole and name in COLUMNS:
        return walking.put(x, found[0], (), walk, step, add=True)
    if name in BY_KEY:
        return walking.add_columns(x, found.astype(x.dtype), walk, step)
    if name in (*BY_SLOT, *OF_BATCH):
        return walking.put(x, found, (), walk, step, add=True)
    return x + found.astype(x.dtype)


def _sources(name: str) -> set[str]:
    """The operands that an arranged array is made of."""
    return {"query": {"query", "scale"}, "unscaled": {"query"}}.get(name, {name})


def _sum_dtype(name: str, dtype: Any) -> Any:
    """What several steps add to is held in float32 at least."""
    return dtype if name in BY_QUERY else problem.statistics_dtype(dtype)


def _no(x: Array) -> Array | np.ndarray:
    """A cotangent of zero."""
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.zeros_like(x) if floating else np.zeros(x.shape, jax.dtypes.float0)


def _zeros(shape: tuple[int, ...], dtype: Any, operands: Operands) -> Array:
    """Zeros that vary over the mesh axes that the operands vary over, as a loop under shard_map must be given."""
    zeros = jnp.zeros(shape, dtype)
    varying = tuple(jax.typeof(operands.query).manual_axis_type.varying)
    return lax.pcast(zeros, varying, to="varying") if varying else zeros

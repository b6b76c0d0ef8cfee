"""Grids of different sizes in one batch: each is attended as it is alone, cropped, by the oracle."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import oracle_gradients
import pytest
from contract import SMALL, agree, quicker, small_tile

from jaxattn.attention import attention
from jaxattn.attention_plan import attention_plan
from jaxattn.window import Axis, Window

HEADS, KEY_HEADS, DIM, VALUE_DIM = 4, 2, 3, 2
BY_QUERY = ("query", "bias", "slot_mask")
GEOMETRIES = {
    "shift and mask": ((9, 10), dict(size=(4, 3), boundary=("shift", "mask"))),
    "shift": ((13,), dict(size=5)),
    "shift, even, dilated": ((14,), dict(size=4, dilation=2)),
    "shift, strided and dilated": ((15,), dict(size=3, stride=2, dilation=3)),
    "shift, block": ((14,), dict(size=5, block=3, dilation=2)),
    "Swin": ((13, 9), dict(size=(4, 3), block=(4, 3))),
    "causal": ((12,), dict(size=4, causal=True)),
    "causal, dilated": ((13,), dict(size=4, causal=True, dilation=3)),
    "causal, block": ((13,), dict(size=5, block=3, causal=True)),
    "as large as the grid": ((6, 5), dict(size=(6, 5))),
    "size 1": ((7,), dict(size=1)),
    "a row": ((1, 11), dict(size=(1, 4))),
    "mask": ((12,), dict(size=4, boundary="mask", stride=2, dilation=2)),
    "zero and mask": ((8, 7), dict(size=(3, 4), boundary=("zero", "mask"), dilation=(2, 1))),
    "valid": ((13,), dict(size=3, boundary="valid", stride=2, dilation=2)),
    "3-D": ((5, 4, 6), dict(size=(3, 2, 3), boundary=("shift", "zero", "shift"), causal=(False, False, True))),
    "no window": ((11,), None),
}


def per_axis(given, rank):
    """The window's arguments, an axis each."""
    return [{name: x[a] if isinstance(x, tuple) else x for name, x in given.items()} for a in range(rank)]


def alone(size, given):
    """The queries and the window's arguments on one grid; a window under "shift" is the largest that fits."""
    if given is None:
        return size, {}
    queries, found = [], []
    for n, axis in zip(size, per_axis(given, len(size)), strict=True):
        k = axis["size"]
        if axis.get("boundary", "shift") == "shift":
            k = max(min(k, n // axis.get("dilation", 1)), 1)
        found.append(axis | {"size": k, "block": min(axis.get("block", 1), k)})
        queries.append(len(oracle.axis_slots(n, found[-1].pop("size"), **found[-1])) if n else 0)
        found[-1]["size"] = k
    return tuple(queries), {name: tuple(axis[name] for axis in found) for name in found[0]}


def draw(geometry, rng, batch=4):
    """Operands of a padded grid, sizes (the first is all of it, the last none), and what is not differentiated."""
    grid, given = GEOMETRIES[geometry]
    window = None if given is None else Window(**given)
    queries = grid if window is None else window.query_grid(grid)
    slots = grid if window is None else window.sizes
    normal = lambda *shape: rng.normal(size=shape)
    operands = {
        "query": normal(batch, *queries, HEADS, DIM),
        "key": normal(batch, *grid, KEY_HEADS, DIM),
        "value": normal(batch, *grid, KEY_HEADS, VALUE_DIM),
        "extra_key": normal(batch, 2, KEY_HEADS, DIM),
        "extra_value": normal(batch, 2, KEY_HEADS, VALUE_DIM),
        "sink_logits": normal(HEADS),
    }
    if window is not None:
        offsets = [2 * k - 1 for k in slots]
        operands |= {"relative_bias": normal(HEADS, *offsets), "key_embedding": normal(1, *offsets, DIM)}
        operands["bias"] = normal(batch, *queries, HEADS, *slots)
    sizes = rng.integers(1, np.array(grid) + 1, (batch, len(grid)))
    sizes[0], sizes[-1, -1] = grid, 0
    told = {"segment_ids": tuple(rng.integers(0, 3, (batch, *x)) // 2 for x in (queries, grid))}
    if window is not None:
        told = {"key_mask": rng.random((batch, *grid)) < 0.8, "slot_mask": rng.random(operands["bias"].shape) < 0.8}
        if any(window.causal):
            told["extra_positions"] = rng.integers(-1, 5, (batch, 2, len(grid)))
    return window, operands, sizes, told


def poisoned(operands, sizes, given):
    """NaN in the padding, which must reach nothing."""
    operands = {name: x.copy() for name, x in operands.items()}
    for b, size in enumerate(sizes):
        queries = alone(tuple(size), given)[0]
        for name, kept in (("query", queries), ("key", size), ("value", size)):
            inside = np.zeros(operands[name].shape[1 : 1 + len(size)], bool)
            inside[tuple(map(slice, kept))] = True
            operands[name][b][~inside] = np.nan
    return operands


def expected(geometry, operands, sizes, told, cotangents):
    """Each grid cropped, by the oracle; the gradients of what the batch shares are summed."""
    given = GEOMETRIES[geometry][1]
    output = np.zeros((*operands["query"].shape[:-1], VALUE_DIM))
    lse = np.full(output.shape[:-1], -np.inf)
    gradients = {name: np.zeros_like(x) for name, x in operands.items()}
    for b, size in enumerate(map(tuple, sizes)):
        queries, window = alone(size, given)
        if 0 in (*size, *queries):
            continue
        shrunk = window.pop("size", None)
        places = {}
        for name, x in operands.items():
            cut = tuple(map(slice, queries if name in BY_QUERY else size))
            if name in ("relative_bias", "key_embedding"):
                less = [(n + 1) // 2 - k for n, k in zip(x.shape[1:], shrunk, strict=False)]
                places[name] = (slice(None), *(slice(m, n - m) for m, n in zip(less, x.shape[1:], strict=False)))
            elif name == "sink_logits":
                places[name] = ()
            elif name.startswith("extra"):
                places[name] = slice(b, b + 1)
            else:
                of_slots = (slice(None), *map(slice, shrunk)) if name == "bias" else ()
                places[name] = (slice(b, b + 1), *cut, *of_slots)
        options = {name: x[b : b + 1] for name, x in told.items() if name == "extra_positions"}
        if "segment_ids" in told:
            cut = tuple(map(slice, size))
            options["segment_ids"] = tuple(x[(slice(b, b + 1), *cut)] for x in told["segment_ids"])
        else:
            options["slot_mask"] = told["slot_mask"][places["bias"]]
            options["key_mask"] = told["key_mask"][(slice(b, b + 1), *map(slice, size))]
        here = (slice(b, b + 1), *map(slice, queries))
        mine = {name: x[places[name]] for name, x in operands.items()}
        found, of = oracle_gradients.attention(
            **mine, **options, size=shrunk, geometry=window, cotangents=tuple(x[here] for x in cotangents)
        )
        output[here], lse[here] = found
        for name, x in of.items():
            if name in gradients:
                gradients[name][places[name]] += x
    return output, lse, gradients


def run(window, implementation, operands, sizes, told):
    told = dict(told)
    mask = (told.pop("key_mask"), told.pop("slot_mask")) if "key_mask" in told else None
    if implementation == MODIFIED:
        told["score_mod"] = lambda score, head, query, key: score
    if implementation in (SMALL, MODIFIED):
        axes = (Axis.everything(*[operands["key"].shape[-3]] * 2),)
        axes = axes if window is None else window.axes(operands["key"].shape[-2 - window.rank : -2])
        told |= dict(implementation="xla", tile=small_tile(axes))
    else:
        told["implementation"] = implementation
    return attention(**operands, mask=mask, window=window, grid_sizes=sizes, return_residuals=True, **told)


MODIFIED = "in tiles that JAX differentiates"
HOW = itertools.chain([SMALL, "xla", MODIFIED], itertools.cycle([SMALL, "reference", SMALL, "xla"]))


@pytest.mark.core(1)
@pytest.mark.parametrize(("geometry", "implementation"), list(zip(GEOMETRIES, HOW, strict=False)))
def test_each_is_what_it_is_alone(geometry, implementation):
    """Values and every gradient, for sizes drawn twice: one program. What the padding holds does not matter."""
    rng = np.random.default_rng(len(geometry))
    window, operands, _, told = draw(geometry, rng)

    @functools.partial(jax.jit, compiler_options=quicker)
    def program(operands, sizes, told, cotangents):
        result, pullback = jax.vjp(lambda x: run(window, implementation, x, sizes, told), operands)
        return result, pullback(cotangents)[0]

    for _ in range(2):
        window, operands, sizes, told = draw(geometry, rng)
        cotangents = tuple(rng.normal(size=x) for x in ((*operands["query"].shape[:-1], n) for n in (VALUE_DIM, 1)))
        cotangents = cotangents[0], cotangents[1][..., 0]
        with jax.numpy_dtype_promotion("strict"):
            given = poisoned(operands, sizes, GEOMETRIES[geometry][1]), sizes, told, cotangents
            (output, lse), gradients = program(*given)
        *values, of = expected(geometry, operands, sizes, told, cotangents)
        np.testing.assert_array_equal(np.isfinite(lse), np.isfinite(values[1]))
        agree([output, jnp.where(jnp.isfinite(lse), lse, 0)], [values[0], np.where(np.isfinite(lse), values[1], 0)], "")
        agree(gradients, of, "gradient")
    assert program._cache_size() == 1


X = np.random.default_rng(0).normal(size=(4, 8, 7, 2, 4))
SIZES = np.array([[8, 7], [3, 5], [6, 1], [0, 4]])
WINDOW = Window((3, 4))


def attend(x, sizes, **options):
    return attention(x, x, x, window=WINDOW, grid_sizes=sizes, **options)


@pytest.mark.full
def test_under_transformations():
    """vmap, jvp, remat, shard_map and bfloat16, of traced sizes in one program."""
    weights, tangent = np.cos(X), np.roll(X, 1, 2)
    value_and_grad = lambda f: lambda x, sizes: jax.value_and_grad(lambda x: (f(x, sizes) * weights).sum())(x)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    cut = jax.shard_map(attend, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"))

    @functools.partial(jax.jit, compiler_options=quicker)
    def run(x, sizes):
        ways = [value_and_grad(f)(x, sizes) for f in (attend, jax.vmap(attend), jax.checkpoint(attend), cut)]
        along = jax.jvp(lambda x: attend(x, sizes), (x,), (tangent,))
        return ways, along, attend(x.astype(jnp.bfloat16), sizes)

    (plain, *others), (output, along), half = run(X, SIZES)
    for other in others:
        agree(other, plain, "transformed")
    np.testing.assert_allclose((along * weights).sum(), (plain[1] * tangent).sum(), rtol=1e-10)
    np.testing.assert_allclose(half.astype(float), output, atol=0.03)


@pytest.mark.full
def test_memory_is_not_the_window_times_the_keys():
    """As without sizes: gathered keys of [2, 64, 64, 4, 32] at 7 × 7 would be 206 MB."""
    x, sizes = jax.ShapeDtypeStruct((2, 64, 64, 4, 32), jnp.float32), jax.ShapeDtypeStruct((2, 2), jnp.int32)
    run = lambda q, k, v, sizes: attention(q, k, v, window=Window((7, 7)), grid_sizes=sizes)
    temporaries = jax.jit(run).lower(x, x, x, sizes).compile().memory_analysis().temp_size_in_bytes
    assert temporaries < 0.3 * 206e6, f"{temporaries / 1e6:.0f} MB"


def folding(boundary):
    return {"window": Window((3, 3), boundary=("mask", boundary))}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (folding("wrap"), "grid_sizes (=int64[4, 2]) must be None with boundary 'wrap'; 'shift', 'mask', 'zero' and"),
        (folding("reflect"), "must be None with boundary 'reflect'; 'shift', 'mask', 'zero' and 'valid' work"),
        (folding("edge"), "must be None with boundary 'edge'"),
        (
            folding("zero") | {"segment_ids": np.zeros((4, 8, 7), int)},
            "must be None with segment_ids and boundary 'zero'; boundary 'mask' or 'shift', or a mask by slot",
        ),
        ({"normalize": lambda s, m: s}, "must be None with a function to normalize and boundary 'shift'; boundary 'm"),
        ({"grid_sizes": SIZES[:, :1]}, "grid_sizes is int64[4, 1]; expected integers (4, 2): a grid for each entry"),
        ({"grid_sizes": SIZES.astype(float)}, "grid_sizes is float64[4, 2]; expected integers (4, 2)"),
        ({"grid_sizes": SIZES + 1}, "grid_sizes (=[9, 8]) must be from 0 to the grid that holds them, [8, 7]"),
        ({"grid_sizes": SIZES - 1}, "grid_sizes (=[-1, 3]) must be from 0 to the grid that holds them, [8, 7]"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        attention(X, X, X, **{"window": WINDOW, "grid_sizes": SIZES} | arguments)


def test_a_plan_takes_sizes():
    plan = attention_plan(X, X, X, window=WINDOW, grid_sizes=jax.ShapeDtypeStruct((4, 2), jnp.int32))
    assert plan.backend == "xla"
    assert plan.operands.slot_ranges.shape == (4, 8, 7, 2, 2)
    with pytest.raises(ValueError, match=r"must be None with 8 queries of 7 keys; a mask says which of them attend"):
        attention(X[:, :, 0], X[:, :7, 0], X[:, :7, 0], grid_sizes=SIZES[:, 1:])

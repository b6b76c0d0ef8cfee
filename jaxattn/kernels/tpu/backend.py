"""The Pallas kernels for a TPU as a backend: what they support, and how operands go in and results come out."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxattn.kernels import xla
from jaxattn.kernels.backend import Backend, Cost
from jaxattn.kernels.operands import Operands, Options
from jaxattn.kernels.tpu import arrange
from jaxattn.kernels.tpu.choose import make_plan
from jaxattn.kernels.tpu.plan import VMEM, WIDE, Heads, Plan, chip, lanes_of
from jaxattn.normalize import softmax

TAKEN = ("query", "key", "value", "scale", "soft_cap", "relative_bias", "key_mask", "query_segments", "key_segments")
TAKEN += ("extra_key", "extra_value", "sink")  # of which `sink` is no kernel's
HELD = "its kernels hold a grid, or strips of its first axis, in VMEM"
PRECISIONS = (None, jax.lax.Precision.DEFAULT, jax.lax.Precision.HIGHEST)


def supports(operands: Operands, options: Options) -> str | None:
    """Why it can't; None where it can."""
    if (reason := refused(operands, options, TAKEN)) is not None:
        return reason
    if options.window is None:
        return "its kernels are for windows, and there is none"
    if any(x.size == 0 for x in operands if x is not None):
        return None  # nothing is computed
    if chip() is None:
        return f"it knows {', '.join(VMEM)}, and this is a {jax.devices()[0].device_kind}"
    plan = _plan(operands, options, "forward")
    return None if isinstance(plan, Plan) else f"{HELD}: {plan}"


def refused(operands: Operands, options: Options, taken: Sequence[str]) -> str | None:
    """Why Pallas kernels for a TPU that take these operands can't, wherever the window is; None where they can."""
    others = [name for name, x in operands._asdict().items() if x is not None and name not in taken]
    if others:
        return f"its kernels do not take {', '.join(others)}"
    if options.normalize is not softmax or options.score_mod is not None:
        return "its kernels have softmax alone, without a score_mod"
    query, value = operands.query, operands.value
    if query.dtype not in (jnp.bfloat16, jnp.float32):
        return f"its kernels have bfloat16 and float32, and these are {query.dtype}"
    if max(query.shape[-1], value.shape[-1]) > 256:
        return f"its heads have at most 256 numbers, and these {max(query.shape[-1], value.shape[-1])}"
    if precision_of(options) not in PRECISIONS:
        return f"its products have the precisions default and highest, and not {options.precision!r}"
    return None


def forward(operands: Operands, options: Options, *, interpret: bool = False) -> tuple[Array, ...]:
    """The output [*batch, *queries, heads, value_dim]; with `options.residuals` also lse [*batch, *queries, heads]."""
    from jaxattn.kernels.tpu import block, score
    from jaxattn.kernels.tpu.forward import attend

    plan = _planned(operands, options, "forward")
    output, *lse = attend(
        arrange.flat_queries(operands.query, plan),
        arrange.flat_keys(operands.key, plan),
        arrange.flat_keys(operands.value, plan),
        score.table(operands.relative_bias, plan, interpret),
        block.numbers(operands.scale, operands.soft_cap),
        arrange.codes(operands, plan)._replace(**_flat_extra(_extra(operands), plan)),
        plan,
        soft_cap=operands.soft_cap is not None,
        residuals=options.residuals,
        some_see_nothing=_some_see_nothing(operands, plan),
        precision=precision_of(options),
        interpret=interpret,
    )
    shape = (*operands.query.shape[:-1], operands.value.shape[-1])
    return arrange.by_query(output, plan, shape), *(arrange.by_query(x, plan, (*shape[:-1], 1))[..., 0] for x in lse)


def backward(
    operands: Operands,
    cotangents: tuple[Array, ...],
    options: Options,
    wanted: tuple[str, ...],
    *,
    interpret: bool = False,
) -> dict[str, Array]:
    """The cotangents of the operands in `wanted`, from those of what `forward` returns."""
    plan = _plan(operands, options, "backward")
    # what is added to keys may not fit into VMEM; and the kernel has no cotangent of a soft cap, which is seldom wanted
    if not isinstance(plan, Plan) or "soft_cap" in wanted:
        return xla.backward(operands, cotangents, options, wanted)
    if "scale" in wanted:  # as a factor of the query, which has a cotangent
        return _with_scale(operands, cotangents, options, wanted, interpret)
    from jaxattn.kernels.tpu import block, score
    from jaxattn.kernels.tpu.backward import pull

    query = operands.query
    key, pull_key = jax.vjp(lambda key: arrange.flat_keys(key, plan), operands.key)
    value, pull_value = jax.vjp(lambda value: arrange.flat_keys(value, plan), operands.value)
    table = score.table(operands.relative_bias, plan, interpret)
    extra, pull_extra = jax.vjp(lambda extra: _flat_extra(extra, plan), _extra(operands))
    bias = operands.relative_bias if "relative_bias" in wanted else None
    (of_query, of_key, of_value, *rest) = pull(
        arrange.flat_queries(query, plan),
        key,
        value,
        arrange.flat_queries(cotangents[0], plan),
        arrange.tiled_rows(cotangents[1], plan) if options.residuals else None,
        table,
        block.numbers(operands.scale, operands.soft_cap),
        arrange.codes(operands, plan)._replace(**extra),
        plan,
        soft_cap=operands.soft_cap is not None,
        of_table=bias is not None,
        some_see_nothing=_some_see_nothing(operands, plan) or plan.overlaps,
        precision=precision_of(options),
        interpret=interpret,
    )
    found = {
        "query": arrange.by_query(of_query, plan, query.shape),
        "key": pull_key(of_key)[0],
        "value": pull_value(of_value)[0],
    }
    found |= pull_extra(dict(zip(extra, rest, strict=False)))[0]
    if bias is not None:
        found["relative_bias"] = score.of_bias(rest[-1], bias, plan, interpret)
    return {name: found[name] for name in wanted}


def _with_scale(
    operands: Operands, cotangents: tuple[Array, ...], options: Options, wanted: tuple[str, ...], interpret: bool
) -> dict[str, Array]:
    def scaled(query: Array, scale: Array) -> Array:
        return (query.astype(scale.dtype) * scale).astype(query.dtype)

    query, pull_query = jax.vjp(scaled, operands.query, operands.scale)
    inner = operands._replace(query=query, scale=jnp.ones_like(operands.scale))
    names = dict.fromkeys((*(name for name in wanted if name != "scale"), "query"))
    found = backward(inner, cotangents, options, tuple(names), interpret=interpret)
    found["query"], found["scale"] = pull_query(found["query"])
    return {name: found[name] for name in wanted}


def cost(operands: Operands, options: Options) -> Cost:
    """The forward kernel's tiles: a step holds what is planned with, and products are as wide as registers are."""
    plan = _planned(operands, options, "forward")
    heads, batch = plan.heads, math.prod(operands.query.shape[: -len(plan.axes) - 2])
    steps = heads.blocks * heads.members * batch * plan.strip_count
    tiles = plan.step_rows * plan.tile_columns
    flops = 4 * steps * tiles * heads.abreast * plan.queries * plan.keys * heads.lanes
    return Cost(tuple(axis.tile for axis in plan.axes), plan.keys, steps, plan.vmem, flops, plan.strip_count)


def _plan(operands: Operands, options: Options, way: str) -> Plan | str:
    extra = 0 if operands.extra_key is None else operands.extra_key.shape[-3]
    relative = operands.relative_bias is not None
    heads = _heads(operands, filled=way == "forward" and options.residuals)  # of which lse's sums go round the lanes
    kind = chip() or "v5e"
    return make_plan(options, heads, extra, relative, _is_masked(operands), way, VMEM[kind], kind in WIDE)


def _planned(operands: Operands, options: Options, way: str) -> Plan:
    plan = _plan(operands, options, way)
    if isinstance(plan, str):
        raise ValueError(
            f"attention: implementation (='tpu') can't, since its kernels hold a grid, or strips, in VMEM: {plan}"
        )
    return plan


def _heads(operands: Operands, filled: bool) -> Heads:
    query, key, value = operands.query, operands.key, operands.value
    return lanes_of(query.shape[-2], key.shape[-2], (query.shape[-1], value.shape[-1]), query.dtype, filled)


def precision_of(options: Options) -> object:
    """One for both factors."""
    try:
        return None if options.precision is None else jax.lax.Precision(options.precision)
    except ValueError:
        return options.precision


def _is_masked(operands: Operands) -> bool:
    """Whether keys may be hidden from a query, or from all, wherever the window is."""
    return operands.key_mask is not None or operands.key_segments is not None


def _extra(operands: Operands) -> dict[str, Array]:
    """The extra tokens that there are."""
    given = {"extra_key": operands.extra_key, "extra_value": operands.extra_value}
    return {name: x for name, x in given.items() if x is not None}


def _flat_extra(extra: dict[str, Array], plan: Plan) -> dict[str, Array]:
    return {name: arrange.flat_extra(x, plan) for name, x in extra.items()}


def _some_see_nothing(operands: Operands, plan: Plan) -> bool:
    """Whether a query may see no key: a relative bias of -inf hides."""
    return operands.relative_bias is not None or _is_masked(operands) or not plan.everyone_sees


TPU = Backend("tpu", supports, forward, backward, cost, platform="tpu", opaque=True)
INTERPRETED = TPU._replace(  # the same on any machine, slowly: for tests
    forward=functools.partial(forward, interpret=True),
    backward=functools.partial(backward, interpret=True),
    platform=None,
)

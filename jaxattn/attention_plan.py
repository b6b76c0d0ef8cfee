"""What `attention` will do with its arguments, and what that costs."""

import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp

from jaxattn import arguments, head_groups, units
from jaxattn.arguments import Arrays
from jaxattn.attention import attention
from jaxattn.kernels import backends, placed
from jaxattn.kernels.backend import Cost
from jaxattn.kernels.operands import Operands, Options
from jaxattn.window import Window


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """What `attention` will do with its arguments; print it.

    `backend` computes it, `refused` says of each backend that can't why not, `cost` is an estimate from shapes alone.

    >>> x = (1, 64, 2, 8)
    >>> made = attention_plan(x, x, x)
    >>> made.backend, made.cost.columns
    ('xla', 64)
    """

    backend: str
    refused: Mapping[str, str]
    cost: Cost
    operands: Operands  # their shapes
    options: Options

    def __str__(self) -> str:
        options, cost = self.options, self.cost
        query, value = self.operands.query, self.operands.value
        given = {name: x for name, x in self.operands._asdict().items() if x is not None and x.ndim}
        slots = math.prod(axis.size for axis in options.axes)
        asked = 2 * math.prod(query.shape[:-1]) * slots * (query.shape[-1] + value.shape[-1])
        rows = [(name, f"{x.dtype}[{','.join(map(str, x.shape))}]") for name, x in given.items()]
        rows.append(("window", "all keys" if options.window is None else str(options.window.size)))
        of_functions = (
            options.has_functions and ", in tiles that JAX differentiates, for a function of yours takes part"
        )
        rows.append(("backend", f"{self.backend}{of_functions or ''}"))
        rows += [("", f"not {name}: {reason}") for name, reason in self.refused.items()]
        tile, steps = " × ".join(map(str, cost.tile)), f"{cost.steps} step{'s' * (cost.steps != 1)}"
        of_strips = "" if cost.strips == 1 else f" of {cost.strips} strips"
        held = f"in {steps}{of_strips} holding {units.si(cost.held)}B"
        rows.append(("tiles", f"{tile} queries by {cost.columns} keys, {held}"))
        rows.append(("cost", f"{units.si(cost.flops)}FLOP, of which the window asks for {units.si(asked)}FLOP"))
        return units.rows("attention", rows)


@overload
def attention_plan(
    query: Any, key: Any, value: Any, bias: Any = ..., mask: Any = ..., *, window: Window | None = ..., **options: Any
) -> AttentionPlan: ...


@overload
def attention_plan(
    query: Any, key: Any, value: Any, bias: Any = ..., mask: Any = ..., *, window: Sequence[Window], **options: Any
) -> tuple[AttentionPlan, ...]: ...


def attention_plan(
    query: Any, key: Any, value: Any, bias: Any = None, mask: Any = None, *, window: Any = None, **options: Any
) -> AttentionPlan | tuple[AttentionPlan, ...]:
    """What `attention` does with these arguments: backend, tiles and cost, without computing anything.

    Args:
        query, key, value: arrays, anything with a shape and a dtype, or shapes (tuples of ints, taken as float32).
        bias, mask, **options: as for `attention`; arrays may be `jax.ShapeDtypeStruct`s, numbers and keys are given.
        window: as for `attention`. Of several, one for each group of heads, it returns a tuple of each group's plan.

    Raises:
        ValueError: as `attention` does.
        TypeError: an argument that `attention` does not have.

    >>> import jaxattn
    >>> x = (1, 32, 32, 4, 16)
    >>> print(jaxattn.attention_plan(x, x, x, window=jaxattn.Window((7, 7)), implementation="reference"))
    attention
      query    float32[1,32,32,4,16]
      key      float32[1,32,32,4,16]
      value    float32[1,32,32,4,16]
      window   (7, 7)
      backend  reference
      tiles    32 × 32 queries by 49 keys, in 1 step holding 26.5 MB
      cost     12.8 MFLOP, of which the window asks for 12.8 MFLOP
    """
    described = (
        jax.ShapeDtypeStruct(x, jnp.float32) if isinstance(x, tuple | list) else x for x in (query, key, value)
    )
    call = inspect.signature(attention).bind(*described, bias=bias, mask=mask, window=window, **options)
    call.apply_defaults()
    if isinstance(window, list | tuple):
        return tuple(attention_plan(**given) for given in head_groups.split(window, call.arguments))
    traced = {name: call.arguments.pop(name) for name in Arrays._fields}
    arrays, settings = arguments.read(Arrays(**traced), **call.arguments)
    found = []

    def check(arrays: Arrays) -> Operands:
        operands, checked = placed.whole(*arguments.check(arrays, settings), arrays.query_offset)
        found.append(checked)
        return operands

    operands = jax.eval_shape(check, arrays)
    backend, refused = backends.choose(settings.asked, operands, found[0])
    empty = any(x.size == 0 for x in operands if x is not None)
    nothing = Cost(found[0].queries, columns=0, steps=0, held=0, flops=0)
    cost = nothing if empty else backend.cost(operands, found[0])
    return AttentionPlan(backend.name, refused, cost, operands, found[0])

"""Tiled attention as primitives, closed under differentiation of any order and under vmap.

`attend_p` is attention. Its tangent, `tangent_p`, is linear in the tangents; the transpose of that is `cotangent_p`,
the reverse derivative that a backend writes out, which is linear in the cotangents, and whose transpose is `tangent_p`.
So reverse mode, forward mode and either over the other's linear part need no derivative of a loop. Only a derivative
of these with respect to the operands, which second derivatives ask for, goes through `differentiable`, whose tiles JAX
itself can differentiate as often as it likes.

A `vmap` over query, key and value is one more batch axis; any other is kept as a parameter, and made at the end.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching
from jaxtyping import Array

from jaxattn import platforms
from jaxattn.kernels import differentiable
from jaxattn.kernels.backend import Backend
from jaxattn.kernels.operands import Operands, Options, statistics_dtype
from jaxattn.platforms import varying_alike
from jaxattn.promotion import broadcasting


class Call(NamedTuple):
    """What a primitive is about: a backend's functions, the operands that are there, those of which there are tangents
    (or cotangents are wanted), and the vmaps, the outermost first: for every argument whether its leading axis is
    mapped.
    """

    forward: Callable[..., tuple[Array, ...]]
    backward: Callable[..., dict[str, Array]]
    names: tuple[str, ...]
    options: Options
    wanted: tuple[str, ...] = ()
    vmaps: tuple[tuple[bool, ...], ...] = ()

    def operands(self, arrays: Sequence[Any]) -> Operands:
        """The first arguments, as operands."""
        return Operands(**dict(zip(self.names, arrays, strict=False)))


def attend(operands: Operands, options: Options, backend: Backend) -> tuple[Array, ...]:
    """The output [*batch, *queries, heads, value_dim]; with `options.residuals` also lse [*batch, *queries, heads]."""
    if backend.backward is None:
        return backend.forward(operands, options)
    found = bound(operands, options, backend)
    return differentiable.attend(operands, options) if found is None else tuple(attend_p.bind(*found[0], call=found[1]))


def bound(operands: Operands, options: Options, backend: Backend) -> tuple[list[Array], Call] | None:
    """What a primitive is given; None where JAX differentiates what it cannot hold, or what is empty."""
    given = {name: x for name, x in operands._asdict().items() if x is not None}
    if backend.backward is None or options.has_functions or any(x.size == 0 for x in given.values()):
        return None
    return varying_alike([*given.values()]), Call(backend.forward, backend.backward, tuple(given), options)


@broadcasting
def _attend(call: Call, *arrays: Any) -> tuple[Array, ...]:
    return call.forward(call.operands(arrays), call.options)


@broadcasting
def _plainly(call: Call, *arrays: Any) -> tuple[Array, ...]:
    return differentiable.attend(call.operands(arrays), call.options)


@broadcasting
def _tangent(call: Call, *arrays: Any) -> tuple[Array, ...]:
    operands, tangents = arrays[: len(call.names)], arrays[len(call.names) :]
    return jax.jvp(functools.partial(_with, call, operands), _mine(call, operands), tangents)[1]


@broadcasting
def _cotangent(call: Call, *arrays: Any) -> tuple[Array, ...]:
    operands, cotangents = arrays[: len(call.names)], arrays[len(call.names) :]
    found = call.backward(call.operands(operands), tuple(cotangents), call.options, call.wanted)
    return tuple(found[name] for name in call.wanted)


@broadcasting
def _cotangent_plainly(call: Call, *arrays: Any) -> tuple[Array, ...]:
    operands, cotangents = arrays[: len(call.names)], arrays[len(call.names) :]
    return jax.vjp(functools.partial(_with, call, operands), *_mine(call, operands))[1](tuple(cotangents))


def _mine(call: Call, operands: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(operands[call.names.index(name)] for name in call.wanted)


def _with(call: Call, operands: Sequence[Any], *mine: Any) -> tuple[Array, ...]:
    """Plain attention as a function of the wanted operands."""
    arrays = dict(zip(call.names, operands, strict=True)) | dict(zip(call.wanted, mine, strict=True))
    return _plainly(call, *arrays.values())


def shapes_of_attention(call: Call, *arrays: Any) -> tuple[Array, ...]:
    """Anything of the shapes, dtypes and varying mesh axes that attention has."""
    operands = call.operands(arrays)
    query, value = operands.query, operands.value
    lse = query.sum(-1)
    output = jnp.broadcast_to(lse[..., None], (*lse.shape, value.shape[-1]))
    return (output, lse.astype(statistics_dtype(query.dtype)))[: 1 + call.options.residuals]


def _shapes_of_cotangent(call: Call, *arrays: Any) -> tuple[Array, ...]:
    return _mine(call, arrays)


def vmapped(function: Callable, call: Call) -> Callable:
    """A primitive's function under the vmaps of a call."""
    function = functools.partial(function, call)
    for axes in reversed(call.vmaps):
        function = jax.vmap(function, tuple(0 if mapped else None for mapped in axes))
    return function


def primitive_of(name: str, function: Callable, shapes: Callable) -> Primitive:
    """A function of a call and its arrays as a primitive, without derivatives; `shapes` is one of the same shapes."""
    under = lambda function: lambda *arrays, call: vmapped(function, call)(*arrays)
    primitive = platforms.primitive_of(name, under(function), under(shapes))
    batching.primitive_batchers[primitive] = functools.partial(_batch, primitive)
    return primitive


def _batch(primitive: Primitive, arrays: Sequence[Any], dims: Sequence[int | None], *, call: Call) -> tuple[Any, Any]:
    arrays = [x if dim is None else jnp.moveaxis(x, dim, 0) for x, dim in zip(arrays, dims, strict=True)]
    mapped = tuple(dim is not None for dim in dims)
    merged = _merged(call, arrays, mapped, primitive is cotangent_p)
    if merged is not None:
        found = primitive.bind(*merged, call=call)
    else:
        found = primitive.bind(*arrays, call=call._replace(vmaps=(mapped, *call.vmaps)))
    return found, [0] * len(found)


def _merged(call: Call, arrays: list[Any], mapped: tuple[bool, ...], reverse: bool) -> list[Any] | None:
    """The arguments with what is mapped as a batch axis; None where that would not be the same."""
    of = dict(zip(call.names, mapped, strict=False))
    batched = {"query", "key", "value", "extra_key", "extra_value"}
    broadcast = {"bias", "slot_mask", "key_mask", "slot_ranges", "extra_mask"}  # [*batch|1, ...]
    broadcast |= {"query_segments", "key_segments"}
    shared = set(call.names) - batched - broadcast
    if call.vmaps or "dropout_key" in of or not all(of[name] for name in batched & set(of)):
        return None
    if any(of[name] for name in shared) or (reverse and not all(of[name] for name in call.wanted)):
        return None
    rest = mapped[len(call.names) :]
    if not reverse and any(is_mapped != of[name] for name, is_mapped in zip(call.wanted, rest, strict=True)):
        return None
    size = arrays[call.names.index("query")].shape[0]
    names, merged = [*call.names, *([""] * len(rest) if reverse else call.wanted)], []
    for name, x, is_mapped in zip(names, arrays, mapped, strict=True):
        if is_mapped or name in shared:
            merged.append(x)
        else:
            merged.append(x[None] if name in broadcast else jnp.broadcast_to(x, (size, *x.shape)))
    return merged


attend_p = primitive_of("windowed_attention", _attend, shapes_of_attention)
tangent_p = primitive_of("windowed_attention_tangent", _tangent, shapes_of_attention)
cotangent_p = primitive_of("windowed_attention_cotangent", _cotangent, _shapes_of_cotangent)


def _attend_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, call: Call) -> tuple[Any, Any]:
    output = attend_p.bind(*primals, call=call)
    there = [k for k, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]
    if not there:
        return output, [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in output]
    call = call._replace(
        wanted=tuple(call.names[k] for k in there),
        vmaps=tuple((*axes, *(axes[k] for k in there)) for axes in call.vmaps),
    )
    return output, tangent_p.bind(*primals, *(tangents[k] for k in there), call=call)


def _linear_jvp(
    primitive: Primitive, plainly: Callable, primals: Sequence[Any], tangents: Sequence[Any], *, call: Call
) -> tuple:
    """Of a primitive that is linear in what follows its operands."""
    n = len(call.names)
    terms = []
    if any(not isinstance(tangent, ad.Zero) for tangent in tangents[n:]):
        linear = [ad.instantiate_zeros(tangent) for tangent in tangents[n:]]
        terms.append(primitive.bind(*primals[:n], *linear, call=call))
    there = [k for k, tangent in enumerate(tangents[:n]) if not isinstance(tangent, ad.Zero)]
    if there:

        def function(*mine: Any) -> tuple[Array, ...]:
            arrays = list(primals)
            for k, x in zip(there, mine, strict=True):
                arrays[k] = x
            return tuple(vmapped(plainly, call)(*arrays))

        terms.append(jax.jvp(function, tuple(primals[k] for k in there), tuple(tangents[k] for k in there))[1])
    return primitive.bind(*primals, call=call), [sum(parts[1:], parts[0]) for parts in zip(*terms, strict=True)]


def _transpose(other: Primitive, cotangents: Sequence[Any], *arrays: Any, call: Call) -> list:
    """Of `tangent_p`, into `cotangent_p`, and back."""
    n = len(call.names)
    given = [ad.instantiate_zeros(cotangent) for cotangent in cotangents]
    vmaps = tuple((*axes[:n], *[True] * len(given)) for axes in call.vmaps)
    found = other.bind(*arrays[:n], *given, call=call._replace(vmaps=vmaps))
    summed = []
    for k, x in enumerate(found, n):
        axis = 0
        for axes in call.vmaps:
            if axes[k]:
                axis += 1
            else:
                x = x.sum(axis)
        summed.append(x if ad.is_undefined_primal(arrays[k]) else None)
    return [None] * n + summed


def transposed(arrays: Sequence[Any], call: Call) -> tuple[list[int], tuple[str, ...]]:
    """The places and the names of what attention is transposed in."""
    there = [k for k, x in enumerate(arrays) if ad.is_undefined_primal(x)]
    names = tuple(call.names[k] for k in there)
    if call.options.residuals:
        raise ValueError(
            "attention: return_residuals (=True) must be False where it is transposed in its values: lse is not linear"
        )
    if not set(names) <= {"value", "extra_value"}:
        raise ValueError(
            f"attention: what is transposed must be value or extra_value, in which it is linear; not {names}"
        )
    return there, names


def _attend_transpose(cotangents: Sequence[Any], *arrays: Any, call: Call) -> list:
    """Attention is linear in its values: there it is its own tangent."""
    there, names = transposed(arrays, call)
    call = call._replace(wanted=names, vmaps=tuple((*axes, *(axes[k] for k in there)) for axes in call.vmaps))
    filled = [jnp.zeros(x.aval.shape, x.aval.dtype) if ad.is_undefined_primal(x) else x for x in arrays]
    linear = [arrays[k] for k in there]
    found = iter(_transpose(cotangent_p, cotangents, *filled, *linear, call=call)[len(arrays) :])
    return [next(found) if k in there else None for k in range(len(arrays))]


ad.primitive_jvps[attend_p] = _attend_jvp
ad.primitive_jvps[tangent_p] = functools.partial(_linear_jvp, tangent_p, _tangent)
ad.primitive_jvps[cotangent_p] = functools.partial(_linear_jvp, cotangent_p, _cotangent_plainly)
ad.primitive_transposes[attend_p] = _attend_transpose
ad.primitive_transposes[tangent_p] = functools.partial(_transpose, cotangent_p)
ad.primitive_transposes[cotangent_p] = functools.partial(_transpose, tangent_p)

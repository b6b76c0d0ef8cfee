"""`attention` over devices: jit under a mesh of either kind, and shard_map, sharded over batch and heads."""

import contextlib
import functools
import math
import re

import jax
import pytest
from contract import (
    IMPLEMENTATIONS,
    SMALL,
    agree,
    bias,
    by_axis,
    embedding_by_axis,
    extra_tokens,
    key_embedding,
    mask_of_keys,
    problem,
    quicker,
    relative_bias,
    residuals,
    scale,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

APART = [bias, mask_of_keys, extra_tokens, residuals]  # every part of it is one device's alone
SHARED = [*APART, relative_bias, key_embedding, scale]  # what the batch shares: its gradient is a sum over devices
BY_AXIS = [*APART, embedding_by_axis]
BOTH, BATCH, HEADS = ("data", "model"), ("data", None), (None, "model")
NAMES = {str(APART): "apart", str(SHARED): "shared", str(BY_AXIS): "by axis"}
NAMES |= {str(BOTH): "both", str(BATCH): "batch", str(HEADS): "heads"}


def mesh_of(kind, shape=(2, 2)):
    return jax.make_mesh(shape, ("data", "model"), axis_types=(kind, kind), devices=jax.devices()[: math.prod(shape)])


def sharded(made, over):
    """What `attention` is given, with the mask, and its specs: the batch over `over[0]`, heads over `over[1]`."""
    data, model = over
    grid, window = [None] * len(made.grid), made.window is not None
    specs = dict(
        **dict.fromkeys(("query", "key", "value"), P(data, *grid, model)),
        **dict.fromkeys(("extra_key", "extra_value"), P(data, None, model)),
        **dict.fromkeys(("relative_bias", "key_embedding", *by_axis(made.operands)), P(model)),
        bias=P(data, *(grid if window else []), model),
        mask=P(data),
        scale=P(),
    )
    given = made.operands | dict(mask=made.options["mask"])
    return given, {name: specs[name] for name in given}


def gradients_of(call, made, cotangents):
    """Of operands and mask: values, and the gradient of each operand."""

    def run(given):
        operands = {name: given[name] for name in made.operands}
        result, pullback = jax.vjp(lambda operands: call(given | operands), operands)
        return result, pullback(cotangents)[0]

    return run


@pytest.mark.core(1)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("implementation", "geometry", "over", "arguments"),
    [
        *((SMALL, geometry, BOTH, APART) for geometry in ("wrap and mask", "129 of 300", "global, more keys")),
        ("xla", "129 of 300", BOTH, APART),
        ("xla", "Swin, ragged", BOTH, APART),
        (SMALL, "dilated", BATCH, APART),
        (SMALL, "causal and not", HEADS, APART),
        (SMALL, "3-D, all at once", BOTH, SHARED),
        (SMALL, "3-D, all at once", BOTH, BY_AXIS),
        ("reference", "halo", BOTH, APART),
    ],
    ids=lambda x: NAMES.get(str(x), str(x)),
)
def test_under_a_mesh(implementation, geometry, over, arguments, kind):
    """No device asks another for an operand: at most, the gradient of what the batch shares is summed."""
    made = problem(geometry, arguments, batch=(6,))  # two devices, perhaps three steps
    cotangents = made.cotangents()
    given, specs = sharded(made, over)
    call = functools.partial(made.call, implementation)
    mesh = mesh_of(kind)
    # arrays that lie on a mesh bring it along, whether or not it is set
    with contextlib.nullcontext() if geometry == "dilated" else jax.set_mesh(mesh):
        place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
        placed = {name: place(x, specs[name]) for name, x in given.items()}
        weights = place(cotangents[0], specs["query"]), place(cotangents[1], P(*specs["query"]))
        run = jax.jit(lambda given, weights: gradients_of(call, made, weights)(given))
        compiled = run.lower(placed, weights).compile(quicker)
        (output, lse), gradients = compiled(placed, weights)
    agree(((output, lse), gradients), made.expected(cotangents), "under a mesh")
    assert output.sharding.is_equivalent_to(placed["query"].sharding, output.ndim)
    for name, x in gradients.items():
        assert x.sharding.is_equivalent_to(placed[name].sharding, x.ndim), name
    sums = [given[name].size for name in ("relative_bias", "key_embedding", "scale") if name in given]
    sums.append(sum(given[name].size for name in by_axis(given)))
    shared = max(sums)
    communicates(compiled.as_text(), shared)


def communicates(text, most):
    """At most in sums of `most` numbers at once."""
    for line in text.splitlines():
        for name in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast"):
            assert not re.search(rf" {name}(-start)?\(", line), line
        if " all-reduce(" in line or " all-reduce-start(" in line:
            shapes = re.findall(r"\w+\[([\d,]*)\]", line.split(" all-reduce")[0])
            sizes = [math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes]
            assert max(sizes) <= most, line


@pytest.mark.core(1)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("geometry", "over"),
    [("wrap and mask", BOTH), ("global, more keys", BATCH), ("129 of 300", HEADS)],
    ids=lambda x: NAMES.get(str(x), str(x)),
)
def test_inside_shard_map(geometry, over, implementation):
    """With the gradient taken outside, through the shard_map, and inside it."""
    made = problem(geometry, APART, batch=(2,))
    cotangents = made.cotangents()
    expected = made.expected(cotangents)
    given, specs = sharded(made, over)
    one, two = specs["query"], P(*specs["query"])
    options = dict(mesh=mesh_of(AxisType.Auto))
    call = functools.partial(made.call, implementation)
    outside = gradients_of(jax.shard_map(call, in_specs=(specs,), out_specs=(one, two), **options), made, cotangents)
    inside = jax.shard_map(
        lambda given, weights: gradients_of(call, made, weights)(given),
        in_specs=(specs, (one, two)),
        out_specs=((one, two), {name: specs[name] for name in made.operands}),
        **options,
    )
    agree(jax.jit(outside, compiler_options=quicker)(given), expected, "outside")
    agree(jax.jit(inside, compiler_options=quicker)(given, cotangents), expected, "inside")


@pytest.mark.full
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_inside_shard_map_over_one_axis_of_two(implementation, kind):
    """The batch by hand, and the other axis as the mesh has it."""
    made = problem("wrap and mask", APART, batch=(2,))
    cotangents = made.cotangents()
    given, specs = sharded(made, BATCH)
    results = specs["query"], P(*specs["query"])
    with jax.set_mesh(mesh := mesh_of(kind)):
        # of Explicit axes, jax 0.12 takes only what lies as in_specs say
        place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
        placed = {name: place(x, specs[name]) for name, x in given.items()}
        weights = tuple(map(place, cotangents, results))
        inside = jax.shard_map(
            lambda given, weights: gradients_of(functools.partial(made.call, implementation), made, weights)(given),
            in_specs=(specs, results),
            out_specs=(results, {name: specs[name] for name in made.operands}),
            axis_names={"data"},
        )
        result = jax.jit(inside, compiler_options=quicker)(placed, weights)
    agree(result, made.expected(cotangents), "inside")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap_over_a_sharded_axis(implementation):
    """Named to vmap, the axis stays where it is."""
    made = problem("wrap and mask", batch=(6,))
    one = lambda *x: made.call(implementation, dict(zip(("query", "key", "value"), x, strict=True)))
    with jax.set_mesh(mesh := mesh_of(AxisType.Auto, (2, 1))):
        x = [jax.device_put(y, NamedSharding(mesh, P("data"))) for y in made.operands.values()]
        compiled = jax.jit(jax.vmap(one, spmd_axis_name="data")).lower(*x).compile(quicker)
        agree(compiled(*x), made.expected(made.cotangents())[0][0], "vmap")
    communicates(compiled.as_text(), 0)

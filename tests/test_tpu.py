"""The Pallas kernels for a TPU, interpreted, against loops in float64: what they support, and what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import (
    GEOMETRIES,
    check,
    extra_tokens,
    mask_of_keys,
    problem,
    relative_bias,
    residuals,
    scalar,
    scale,
)
from jax.sharding import PartitionSpec as P

import jaxattn
from jaxattn.attention import attention
from jaxattn.kernels import backends
from jaxattn.kernels.tpu import backend, choose, plan
from jaxattn.kernels.tpu.backend import INTERPRETED, TPU
from jaxattn.machine import traced_for

CORE = ["strided"]
# an interpreted kernel takes ten seconds, so not all geometries of the contract: each property, and some that meet
WINDOWED = [
    *CORE,
    "5 x 5, mask",
    *("shift", "zero", "reflect", "wrap", "longer than the grid, mask", "dilation 3, wrap", "stride 2, dilation 3"),
    *("block 3, dilation 2", "causal, zero, dilation 2", "causal, block 3", "offset beyond the grid", "one token"),
    *("129 of 300", "every offset of the grid", "Swin, ragged", "halo", "dilated", "edge and reflect", "all at once"),
    *("3 x 3 x 3", "3-D, all at once", "4-D"),
]


@pytest.fixture
def interpreted(monkeypatch):
    """The name "tpu" stands for the interpreted kernels, on this machine."""
    mine = tuple(INTERPRETED if backend is TPU else backend for backend in backends.BACKENDS)
    monkeypatch.setattr(backends, "BACKENDS", mine)
    jax.clear_caches()
    yield
    jax.clear_caches()


def of(geometry, arguments=(relative_bias, residuals, scale), **sizes):
    return problem(geometry, arguments, **sizes)


@pytest.mark.parametrize("geometry", [pytest.param(x, marks=() if x in CORE else pytest.mark.full) for x in WINDOWED])
def test_values_and_gradients(interpreted, geometry):
    """Grouped heads, of a size that is padded, with a relative bias, lse and a scale, each with its derivative."""
    arguments = [relative_bias, residuals, scale]
    if geometry == "every offset of the grid":  # the scale's gradient is a 1600th of what it is the sum of
        arguments.remove(scale)
    check(of(geometry, arguments), "tpu", jnp.float32)


@pytest.mark.full
@pytest.mark.parametrize("geometry", ["shift", "5 x 5, mask", "dilated", "edge and reflect", "3 x 3 x 3"])
def test_in_half_precision(interpreted, geometry):
    check(of(geometry, [residuals]), "tpu", jnp.bfloat16)


@pytest.mark.core(1)
@pytest.mark.parametrize("geometry", ["5 x 5, mask", "dilated", "Swin, ragged", "3 x 3 x 3"])
def test_for_wide_matrix_units(interpreted, monkeypatch, geometry):
    """A v6e's, whose forward kernel has keys first."""
    monkeypatch.setattr(backend, "chip", lambda: "v6e")
    check(of(geometry, [relative_bias, scale]), "tpu", jnp.float32)


HIDDEN = [
    ((9,), dict(size=3, boundary="wrap"), jnp.float32, ("mask", "segment_ids", "logits_soft_cap", "extra")),
    ((6, 5), dict(size=(3, 3), boundary="zero"), jnp.float32, ("mask", "segment_ids", "logits_soft_cap")),
    ((6, 5), dict(size=(3, 3)), jnp.float32, ("mask",)),
    ((6, 5), dict(size=(3, 3)), jnp.float32, ("extra",)),
    ((7, 6), dict(size=(3, 3), boundary="mask", stride=2), jnp.bfloat16, ("segment_ids", "logits_soft_cap", "extra")),
    ((7, 9), dict(size=(3, 3), boundary=("wrap", "zero"), dilation=(1, 2)), jnp.bfloat16, ("mask", "segment_ids")),
    ((14, 15), dict(size=(7, 7), block=7), jnp.bfloat16, ()),
    ((14, 14), dict(size=(7, 7), block=7), jnp.float32, ("mask", "segment_ids", "extra")),
    ((2, 6, 9), dict(size=(1, 3, 5), block=(1, 3, 3)), jnp.bfloat16, ("mask",)),
    ((14, 14), dict(size=(7, 7), block=7), jnp.bfloat16, ("mask", "segment_ids", "shared")),
    ((6, 5), dict(size=(3, 3), boundary="wrap"), jnp.float32, ("mask of each", "segment_ids", "shared")),
]


@pytest.mark.core(1)
@pytest.mark.parametrize(("grid", "given", "dtype", "names"), HIDDEN)
def test_masks_segments_a_soft_cap_and_extra_tokens(interpreted, grid, given, dtype, names):
    """With keys around the grid, that all segments see, and queries that see nothing."""
    against_the_formula(grid, given, dtype, names)


def against_the_formula(grid, given, dtype, names):
    """Values, lse and the derivatives by all arrays, with what the names say of what hides and what all see."""
    window, rng = jaxattn.Window(**given), np.random.default_rng(0)
    queries = window.query_grid(grid)
    entries = () if "shared" in names else (2,)  # of what hides
    ids = tuple(rng.integers(-2, 2, (*entries, *n)) * 2**20 for n in (queries, grid))
    all_of = dict(mask=rng.random((*entries, *grid)) < 0.6, segment_ids=ids, logits_soft_cap=1.5)
    options = {name: x for name, x in all_of.items() if name in names}
    options |= dict(mask=rng.random((2, *grid)) < 0.6) if "mask of each" in names else {}
    shapes = [(2, *queries, 2, 64), (2, *grid, 1, 64), (2, *grid, 1, 64), (2, *(2 * k - 1 for k in window.sizes))]
    shapes += [(2, 3, 1, 64)] * 2 if "extra" in names else []
    arrays = [rng.normal(size=shape).astype(dtype) for shape in shapes]

    def run(implementation, arrays):
        def both(query, key, value, bias, *extra):
            settings = dict(window=window, return_residuals=True, implementation=implementation)
            settings |= dict(zip(("extra_key", "extra_value"), extra, strict=False))
            return attention(query, key, value, relative_bias=bias, **settings, **options)

        found, pull = jax.vjp(both, *arrays)
        weights = [jnp.cos(jnp.arange(x.size)).reshape(x.shape).astype(x.dtype) for x in found]
        return *found, *pull(tuple(jnp.where(jnp.isinf(x), 0, w) for x, w in zip(found, weights, strict=True)))

    ours = jax.jit(functools.partial(run, "tpu"))(arrays)
    theirs = jax.jit(functools.partial(run, "reference"))([x.astype(np.float32) for x in arrays])
    for x, y in zip(ours, theirs, strict=True):
        x, y = (np.asarray(z, np.float64) for z in (x, y))
        np.testing.assert_array_equal(np.isinf(x), np.isinf(y))
        x, y = (np.where(np.isinf(z), 0, z) for z in (x, y))
        assert np.linalg.norm(x - y) <= (1e-5 if dtype == jnp.float32 else 2e-2) * np.linalg.norm(y)


LANES = [
    (8, 8, 16, 12),
    (4, 4, 32, 32),
    (6, 6, 32, 20),
    (5, 5, 16, 32),
    (2, 2, 64, 64),
    (3, 3, 64, 40),
    (2, 1, 128, 128),
    (1, 1, 256, 200),
]


@pytest.mark.core(1)
@pytest.mark.parametrize(("heads", "key_heads", "head_dim", "value_dim"), LANES)
def test_heads_in_lanes(interpreted, heads, key_heads, head_dim, value_dim):
    sizes = dict(batch=(2,), heads=heads, key_heads=key_heads, head_dim=head_dim, value_dim=value_dim)
    check(of(((6, 8), dict(size=(3, 3))), [relative_bias, residuals], **sizes), "tpu", jnp.float32)


# the geometry, the tile that is asked for, key heads and head_dim, and how many heads are together
APART = [
    (((14, 15), dict(size=(7, 7), block=7)), None, 4, 32, jnp.float32, 2),
    (((14, 14), dict(size=(7, 7), block=7)), None, 4, 32, jnp.bfloat16, 2),
    (((9, 17), dict(size=(3, 5), boundary="mask")), (8, 8), 8, 32, jnp.bfloat16, 2),
    (((9, 17), dict(size=(3, 5), boundary="zero")), (8, 16), 4, 32, jnp.float32, 1),
    (((130,), dict(size=9, causal=True, boundary="mask")), (128,), 4, 64, jnp.float32, 1),
    (((3, 4, 9), dict(size=(3, 3, 3))), (2, 4, 8), 4, 30, jnp.float32, 2),
    (((9, 9), dict(size=(3, 3))), (8, 8), 3, 32, jnp.float32, 2),
]


@pytest.mark.core(1)
@pytest.mark.parametrize(("geometry", "tile", "heads", "dim", "dtype", "together"), APART)
def test_heads_whose_values_are_met_apart(interpreted, monkeypatch, geometry, tile, heads, dim, dtype, together):
    """With keys first, where a few heads' queries fill the columns of a matrix unit."""
    monkeypatch.setattr(choose, "_layouts", lambda *_: [True])
    plans, make = {}, choose.make_plan.__wrapped__  # by the way that they are for

    def make_plan(options, heads, extra, relative, masked, way, *chip):
        return plans.setdefault(way, make(options, heads, extra, relative, masked, way, *chip))

    monkeypatch.setattr(backend, "make_plan", make_plan)
    sizes = dict(batch=(2,), heads=heads, key_heads=heads, head_dim=dim, value_dim=dim - 1)
    made = of(geometry, [relative_bias, scale, extra_tokens, mask_of_keys], **sizes)
    made.options |= {} if tile is None else dict(tile=tile)
    check(made, "tpu", dtype)
    assert plans["forward"].apart == together


@pytest.mark.full
def test_scores_of_ten_thousand_and_a_bias_that_hides(interpreted):
    x = 100 * jax.random.normal(jax.random.key(0), (5, 6, 1, 4), jnp.float32)
    bias = jnp.zeros((1, 5, 5)).at[:, :2].set(-jnp.inf).at[:, 2, 1].set(jnp.finfo(float).min).astype(jnp.float32)
    bias = bias.at[:, 3:].set(-jnp.inf)  # what is left is the row of the query, one key behind excluded
    run = lambda implementation: jax.value_and_grad(
        lambda x: (
            attention(
                x,
                x,
                x,
                window=jaxattn.Window((3, 3), boundary="mask"),
                relative_bias=bias,
                implementation=implementation,
            )
            ** 2
        ).sum()
    )(x)
    for ours, theirs in zip(run("tpu"), run("reference"), strict=True):
        assert jnp.isfinite(ours).all()
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=1e-3)


@pytest.mark.full
def test_transformations(interpreted):
    """vmap, over what is shared too; jvp; grad of grad; remat."""
    made = of(((5, 4), dict(size=(3, 3))), [relative_bias], batch=(2,)).cast(np.float32)
    ours, theirs = (scalar(made, implementation) for implementation in ("tpu", "reference"))
    several = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), made.operands)
    one_bias = dict.fromkeys(made.operands, 0) | {"relative_bias": None}
    shared = several | {"relative_bias": made.operands["relative_bias"]}
    cases = [
        lambda loss: jax.vmap(jax.grad(loss))(several),
        lambda loss: jax.vmap(jax.grad(loss), (one_bias,))(shared),
        lambda loss: jax.jvp(loss, (made.operands,), (made.operands,)),
        lambda loss: jax.grad(jax.checkpoint(loss))(made.operands),
        lambda loss: jax.grad(lambda x: sum((y**2).sum() for y in jax.tree.leaves(jax.grad(loss)(x))))(made.operands),
    ]
    for case in cases:
        for x, y in zip(jax.tree.leaves(case(ours)), jax.tree.leaves(case(theirs)), strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-3 * float(jnp.abs(y).max()))


@pytest.mark.full
@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_inside_shard_map(interpreted):
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, 2, 8), jnp.float32)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    window = jaxattn.Window((3, 3))
    run = lambda implementation, x: attention(x, x, x, window=window, implementation=implementation)
    cut = jax.shard_map(  # unchecked, since the interpreter's loop does not know which of its arrays vary
        functools.partial(run, "tpu"), mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
    )
    for ours, theirs in zip(
        jax.jit(jax.value_and_grad(lambda x: (cut(x) ** 2).sum()))(x),
        jax.value_and_grad(lambda x: (run("reference", x) ** 2).sum())(x),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def plan_of(shape=(2, 16, 16, 4, 64), dtype=jnp.bfloat16, devices=1, **options):
    x = jax.ShapeDtypeStruct(shape, dtype)
    with traced_for("tpu", devices):
        return jaxattn.attention_plan(x, x, x, **({"window": jaxattn.Window((7, 7))} | options))


def test_it_is_taken_on_a_tpu_alone_and_by_its_name():
    """No chip has run it yet, so nobody gets it who does not ask."""
    assert (plan_of().backend, plan_of(implementation="tpu").backend) == ("xla", "tpu")
    assert "tpu" not in plan_of().refused
    x = (2, 16, 16, 4, 64)
    here = jaxattn.attention_plan(x, x, x, window=jaxattn.Window((7, 7)))
    assert (here.backend, here.refused) == ("xla", {})
    wrong = (
        r"\(='tpu'\) can't, since it runs on a tpu alone, and this is a \w+; with None, .* is taken: xla, reference$"
    )
    with pytest.raises(ValueError, match=wrong):
        jaxattn.attention_plan(x, x, x, implementation="tpu")


def test_the_environment_goes_before_what_the_program_names(monkeypatch):
    """So kernels are turned off in a job whose code names them, and on in one whose code does not."""
    assert plan_of(implementation="tpu").backend == "tpu"
    x = jnp.ones((4, 1, 8))
    with pytest.raises(ValueError, match="runs on a tpu alone"):
        attention(x, x, x, implementation="tpu")
    monkeypatch.setenv("JAXATTN_IMPLEMENTATION", "xla")
    assert plan_of(implementation="tpu").backend == "xla"
    assert attention(x, x, x, implementation="tpu").shape == x.shape  # also where that call was seen before
    monkeypatch.setenv("JAXATTN_IMPLEMENTATION", "tpu")  # a wish: where it can't, it is as if it were not there
    assert plan_of().backend == "tpu"
    assert plan_of(normalize="relu").backend == "xla"
    assert plan_of(devices=4).backend == "xla"  # the axes of whose mesh are perhaps Auto
    assert attention(x, x, x).shape == x.shape
    monkeypatch.setenv("JAXATTN_IMPLEMENTATION", "cuda")
    with pytest.raises(
        ValueError, match=r"JAXATTN_IMPLEMENTATION \(='cuda'\) must be unset or one of 'splash', 'xla', 'tpu'"
    ):
        attention(x, x, x)
    monkeypatch.setenv("JAXATTN_IMPLEMENTATION", "")
    assert plan_of(implementation="tpu").backend == "tpu"


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_on_several_devices_it_is_for_the_inside_of_shard_map():
    """The compiler would gather what is sharded, to give it to a kernel. Lowered for a TPU, which needs none."""
    assert "the compiler can't split it over the 2 devices: call attention inside" in plan_of(devices=2).refused["tpu"]
    assert plan_of(devices=2, implementation="tpu").backend == "tpu"
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    attend = lambda x, how=None: attention(x, x, x, window=jaxattn.Window((3, 3)), implementation=how)
    loss = lambda x: jax.grad(lambda x: attend(x, "tpu").sum())(x)
    with traced_for("tpu", 2):
        for function, kernels in (  # one, and that of its score table
            (attend, 0),
            (jax.shard_map(loss, mesh=mesh, in_specs=P("data"), out_specs=P("data")), 2),
        ):
            traced = jax.jit(function).trace(jax.ShapeDtypeStruct((2, 16, 16, 2, 64), jnp.float32))
            text = traced.lower(lowering_platforms=("tpu",)).as_text()
            assert text.count("tpu_custom_call") == kernels


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (dict(window=None), "its kernels are for windows, and there is none"),
        (dict(dtype=jnp.float16), "its kernels have bfloat16 and float32, and these are float16"),
        (dict(normalize="relu"), "its kernels have softmax alone, without a score_mod"),
        (dict(bias=np.zeros((7, 7), np.float32)), "its kernels do not take bias"),
        (dict(mask=(None, np.ones((7, 7), bool))), "its kernels do not take slot_mask"),
        (dict(grid_sizes=np.ones((2, 2), int)), "its kernels do not take slot_ranges"),
        (dict(dropout_rate=0.5, dropout_key=jax.random.key(0)), "its kernels do not take dropout_key"),
        (dict(shape=(2, 16, 16, 4, 512)), "its heads have at most 256 numbers, and these 512"),
        (dict(precision="high"), "its products have the precisions default and highest"),
        (dict(shape=(1, 64, 4096, 2, 64)), "its kernels hold a grid, or strips of its first axis, in VMEM: "),
    ],
)
def test_what_it_refuses_goes_to_xla(given, reason):
    made = plan_of(**given)
    assert made.backend in ("xla", "splash")
    assert made.refused["tpu"].startswith(reason)
    assert f"not tpu: {reason}" in str(made)


def test_blocks_that_fill_no_registers_are_taken():
    swin, halo = (jaxattn.Window(size, block=7, boundary="mask") for size in ((7, 7), (13, 13)))
    for window in (swin, halo):
        assert "tpu" not in plan_of(shape=(2, 56, 56, 16, 32), window=window).refused


@pytest.mark.full
@pytest.mark.parametrize("window", [dict(size=(7, 7), block=7), dict(size=(5, 7), block=(3, 5), boundary="mask")])
def test_tiles_that_overlap(interpreted, window):
    """Blocks of odd sizes in half precision; the second grid's last two tiles begin earlier than their own queries."""
    check(of(((7, 28) if window["block"] == 7 else (6, 26), window), [relative_bias, residuals]), "tpu", jnp.bfloat16)


def test_masks_segments_a_soft_cap_and_extra_tokens_are_taken():
    given = dict(mask=np.ones((2, 16, 16), bool), segment_ids=np.ones((2, 16, 16), int), logits_soft_cap=30.0)
    given |= {f"extra_{name}": jax.ShapeDtypeStruct((2, 1, 4, 64), jnp.bfloat16) for name in ("key", "value")}
    assert "tpu" not in plan_of(**given).refused


def test_a_sink_is_no_kernels_affair():
    assert "tpu" not in plan_of(sink_logits=np.zeros(4, np.float32)).refused


def test_a_plan_covers_every_key_of_every_query():
    """Against the window's own indices: what a tile's table shows is what its queries see."""
    for grid, given in (GEOMETRIES[name] for name in WINDOWED):
        window, heads = jaxattn.Window(**given), plan.lanes_of(2, 2, (64, 64), jnp.dtype(jnp.bfloat16))
        for axis in window.axes(grid):
            own = -(-4 // axis.block) * axis.block
            own += own % heads.packing * own
            for tile in (own, own + -own % 16):
                covers(axis, plan.plan_axis(axis, own, 16, heads.packing, tile), heads.packing)
            if axis.block % 2:  # a block in a tile that begins at a whole word
                tile = axis.block + 1 + -(axis.block + 1) % 8
                covers(axis, plan.plan_axis(axis, axis.block, 8, heads.packing, tile), heads.packing, 8)


def covers(axis, made, packing, unit=16):
    keys = np.arange(made.length) if made.keys is None else made.keys
    queries = np.arange(made.places) if made.queries is None else made.queries
    assert len(queries) == made.places
    assert not (made.start % packing).any()
    assert not (made.begin % packing).any()
    assert made.columns % unit == 0
    written = np.full(made.places, -1)  # by which tile, as they come one after the other
    for tile, (begin, before) in enumerate(zip(made.begin, made.before, strict=True)):
        written[begin + before : begin + made.tile] = tile
    for place, query in enumerate(queries):
        if not 0 <= query < len(axis.query):
            continue
        tile = written[place]
        t = place - made.begin[tile]
        low, high = (int(x[made.pattern[tile], t]) for x in (made.low, made.high))
        assert high <= made.columns or low >= high
        sees = keys[made.start[tile] + np.arange(low, max(low, high))]
        np.testing.assert_array_equal(sees, axis.keys()[query][axis.visible()[query]])
        for other in np.flatnonzero((made.begin <= place) & (place < made.begin + made.tile)):
            if other != tile:  # where it is no tile's own, it sees nothing
                at = made.pattern[other], place - made.begin[other]
                assert made.low[at] >= made.high[at]

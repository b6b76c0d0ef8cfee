"""JAX's splash attention as a backend, interpreted, against loops in float64: what it supports, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import (
    check,
    close,
    first_keys,
    large_scores,
    mask_of_keys,
    precision,
    problem,
    residuals,
    scalar,
    scale,
    segments,
    sinks,
    soft_cap,
)
from jax.sharding import PartitionSpec as P

import jaxattn
from jaxattn.attention import attention
from jaxattn.kernels import backends
from jaxattn.kernels.operands import Operands, Options
from jaxattn.kernels.tpu import splash
from jaxattn.kernels.tpu.splash import INTERPRETED, SPLASH
from jaxattn.machine import traced_for


@pytest.fixture
def interpreted(monkeypatch):
    """The name "splash" stands for the interpreted kernel, on this machine, of any length and in small blocks."""
    mine = tuple(INTERPRETED if backend is SPLASH else backend for backend in backends.BACKENDS)
    monkeypatch.setattr(backends, "BACKENDS", mine)
    monkeypatch.setattr(splash, "BLOCK", 128)
    jax.clear_caches()
    yield
    jax.clear_caches()


CASES = [
    ("global, more keys", [mask_of_keys, segments, scale]),
    ("causal", [scale]),
    ("global, one query", [segments, residuals]),
    ("global, 700", [first_keys]),
    ("129 of 300, causal, mask", [mask_of_keys, segments]),
    (((37,), dict(size=6, boundary="mask")), [mask_of_keys, segments, residuals]),
    ("global", [large_scores, residuals]),
    ("causal", [sinks]),
    ("causal", [precision]),
]


@pytest.mark.core(1)
@pytest.mark.parametrize(("geometry", "arguments"), CASES)
def test_values_and_gradients(interpreted, geometry, arguments):
    """Grouped heads, of sizes that are padded; queries that see nothing; several blocks, and what fills up the last."""
    check(problem(geometry, arguments, batch=(2,)), "splash", jnp.float32)


@pytest.mark.full
def test_several_blocks_that_are_not_one(interpreted, monkeypatch):
    """Then there are two kernels of derivatives."""
    monkeypatch.setattr(splash, "TOGETHER", 2**17)
    check(problem((((300, 600)), None), [], batch=(1,), heads=2, key_heads=1), "splash", jnp.bfloat16)


@pytest.mark.full
def test_transformations(interpreted):
    """vmap, over what is shared too; jvp; grad of grad; remat."""
    made = problem("global, more keys", batch=(2,), heads=2, key_heads=1).cast(np.float32)
    ours, theirs = (scalar(made, implementation) for implementation in ("splash", "reference"))
    several = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), made.operands)
    one_key = dict.fromkeys(made.operands, 0) | {"key": None}
    shared = several | {"key": made.operands["key"]}

    @functools.partial(jax.jit, static_argnums=0)
    def run(loss):
        return [
            jax.vmap(jax.grad(loss))(several),
            jax.vmap(jax.grad(loss), (one_key,))(shared),
            jax.jvp(loss, (made.operands,), (made.operands,)),
            jax.grad(jax.checkpoint(loss))(made.operands),
            jax.grad(lambda x: sum((y**2).sum() for y in jax.tree.leaves(jax.grad(loss)(x))))(made.operands),
        ]

    for x, y in zip(jax.tree.leaves(run(ours)), jax.tree.leaves(run(theirs)), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-3 * float(jnp.abs(y).max()))


@pytest.mark.full
def test_a_soft_cap_that_is_known(interpreted):
    made = problem("global", [soft_cap, mask_of_keys], batch=(1,), heads=2, key_heads=1)
    made.options["logits_soft_cap"] = float(made.operands["logits_soft_cap"])
    expected = made.expected(made.cotangents())
    run = lambda x: made.call("splash", x)
    operands = {name: made.operands[name].astype(np.float32) for name in ("query", "key", "value")}
    with traced_for("tpu"):
        found, pull = jax.vjp(run, operands)
    close(found, expected[0][0], jnp.float32, "output")
    gradients = pull(jnp.asarray(made.cotangents()[0], jnp.float32))[0]
    for name, gradient in gradients.items():
        close(gradient, expected[1][name], jnp.float32, name)


def plan_of(shape=(2, 4096, 4, 64), dtype=jnp.bfloat16, devices=1, **options):
    x = jax.ShapeDtypeStruct(shape, dtype)
    with traced_for("tpu", devices):
        return jaxattn.attention_plan(x, x, x, **options)


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        (dict(), 4096),
        (dict(mask=np.ones((2, 1, 1, 4096), bool), segment_ids=np.ones((2, 4096), int)), 4096),
        (dict(sink_logits=np.zeros(4, np.float32), precision="highest", scale=0.3), 4096),
        (dict(window=jaxattn.Window(4096, causal=True), logits_soft_cap=50.0), 4096),
        (dict(window=jaxattn.Window(513, boundary="mask")), 1536),  # a block of 512 on either side
        (dict(window=jaxattn.Window(512, causal=True, boundary="zero", offset=-511), shape=(1, 512, 1, 8)), None),
    ],
)
def test_what_it_takes_on_a_tpu(given, seen):
    made = plan_of(**given)
    assert made.backend == ("splash" if seen else "xla")
    assert seen is None or made.cost.columns == seen


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (dict(logits_soft_cap=jnp.asarray(50.0)), "its soft cap is a number that the program is traced with"),
        (dict(dtype=jnp.float16), "its kernels have bfloat16 and float32, and these are float16"),
        (dict(normalize="relu"), "its kernels have softmax alone, without a score_mod"),
        (dict(bias=np.zeros((4096, 4096), np.float32)), "its kernels do not take bias"),
        (dict(mask=np.ones((4096, 4096), bool)), "its kernels do not take slot_mask"),
        (dict(shape=(2, 4096, 4, 512)), "its heads have at most 256 numbers, and these 512"),
        (dict(precision="high"), "its products have the precisions default and highest"),
        (dict(shape=(2, 64, 64, 4, 64), window=jaxattn.Window((7, 7))), "it takes all keys, or a window of one axis"),
        (dict(window=jaxattn.Window(511)), "it takes all keys, or a window of one axis that slides"),
        (dict(window=jaxattn.Window(511, boundary="zero")), "it takes all keys, or a window of one axis that slides"),
        (dict(window=jaxattn.Window(511, boundary="mask", dilation=2)), "it takes all keys, or a window of one axis"),
        (dict(window=jaxattn.Window(31, boundary="mask")), "it is for 256 queries and slots and more"),
        (dict(shape=(64, 197, 4, 64)), "it is for 256 queries and slots and more"),
        (dict(devices=2), "the compiler can't split it over the 2 devices"),
    ],
)
def test_what_it_refuses_goes_to_xla(given, reason):
    made = plan_of(**given)
    assert made.backend == "xla"
    assert made.refused["splash"].startswith(reason)


@pytest.mark.parametrize(("window", "most"), [(None, 2**16), (jaxattn.Window(600, causal=True), 2**14)])
def test_of_too_many_tokens_the_blocks_would_take_minutes_to_look_through(window, most):
    def supports(tokens):
        x, scale = jax.ShapeDtypeStruct((tokens, 1, 64), jnp.bfloat16), jax.ShapeDtypeStruct((), jnp.float32)
        return splash.supports(Operands(x, x, x, scale), Options(window, (tokens,), (tokens,)))

    assert supports(most) is None
    assert f"so there may be {most} tokens at most" in supports(most + 1)


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize(("checked", "over"), [(True, P("data")), (True, P()), (False, P("data"))])
def test_inside_shard_map_it_needs_one_that_does_not_check_what_varies(checked, over):
    """Elsewhere its call would fail. Lowered for a TPU, which needs none."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    cut = jax.shard_map(lambda x: attention(x, x, x), mesh=mesh, in_specs=over, out_specs=over, check_vma=checked)
    with traced_for("tpu", 2):
        traced = jax.jit(cut).trace(jax.ShapeDtypeStruct((2, 512, 2, 64), jnp.float32))
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == (not checked)


def test_it_is_not_elsewhere():
    x = jnp.ones((1, 512, 1, 8), jnp.float32)
    with pytest.raises(ValueError, match=r"implementation \(='splash'\) can't, since it runs on a tpu alone"):
        attention(x, x, x, implementation="splash")

"""Windows over a grid that is split over devices, against the same windows on the whole grid."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxattn import attention, conv
from jaxattn.halo import halo, split_attention, split_pad
from jaxattn.models import pooling
from jaxattn.models.attention_stem import AttentionStem
from jaxattn.nn import Attention, Conv
from jaxattn.window import Window

MODES = {"zero": "constant", "edge": "edge", "reflect": "reflect", "wrap": "wrap"}
SPACE = P("space")
quicker = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def mesh_of(shards):
    return jax.make_mesh((shards,), ("space",), axis_types=(jax.sharding.AxisType.Auto,))


def split(function, shards, in_specs, out_specs=SPACE):
    return jax.jit(jax.shard_map(function, mesh=mesh_of(shards), in_specs=in_specs, out_specs=out_specs))


def agree(whole, parts, operands, tolerance=1e-10):
    """Two functions of the same operands: values, and the gradients of all operands."""
    cotangent = normal(99, jax.eval_shape(whole, *operands).shape)

    def both(function):
        y, pull = jax.vjp(function, *operands)
        return y, pull(cotangent)

    expected = jax.jit(functools.partial(both, whole), compiler_options=quicker)()
    result = jax.jit(functools.partial(both, parts), compiler_options=quicker)()
    chex.assert_trees_all_close(result, expected, atol=tolerance, rtol=tolerance)


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


@pytest.mark.parametrize("boundary", MODES)
@pytest.mark.parametrize(("shards", "length"), [(4, 3), (2, 1), (1, 4)])
def test_halo_is_numpys_padding(boundary, shards, length):
    """Also longer than a shard, and than the whole grid; also in the middle axis, and negative."""
    n = shards * length
    whole = np.random.default_rng(0).normal(size=(2, n, 3))
    padded = np.pad(whole, [(0, 0), (9, 9), (0, 0)], MODES[boundary])
    halos = [(1, 0), (2, 5), (7, 4), (0, 0), (-1, 2), (3, -1)]
    specs = P(None, "space")
    wider = split(lambda x: [halo(x, 1, "space", *each, boundary) for each in halos], shards, specs, specs)
    for result, (before, after) in zip(wider(whole), halos, strict=True):
        expected = [padded[:, 9 + p * length - before : 9 + (p + 1) * length + after] for p in range(shards)]
        np.testing.assert_array_equal(result, np.concatenate(expected, axis=1))


@pytest.mark.parametrize("boundary", MODES)
def test_the_adjoint_and_the_tangent_of_a_halo(boundary):
    """⟨y, H x⟩ = ⟨Hᵀ y, x⟩, where H is linear: its tangent is itself."""
    exchange = split(lambda x: halo(x, 0, "space", 3, 4, boundary), 4, P("space"))
    x = normal(0, (8,))
    y, tangent = jax.jvp(exchange, (x,), (normal(1, (8,)),))
    np.testing.assert_allclose(tangent, exchange(normal(1, (8,))), rtol=1e-12)
    cotangent = normal(2, y.shape)
    (back,) = jax.vjp(exchange, x)[1](cotangent)
    np.testing.assert_allclose(back @ x, cotangent @ y, rtol=1e-12)


def test_halos_of_any_dtype():
    for dtype in (bool, np.int8, jnp.bfloat16, np.float32):
        x = jnp.arange(8).astype(dtype)
        result = split(lambda x: halo(x, 0, "space", 1, 0, "wrap"), 4, P("space"))(x)
        assert result.dtype == x.dtype
        np.testing.assert_array_equal(result[:3], x[jnp.array([7, 0, 1])])


def test_what_a_halo_refuses():
    with pytest.raises(ValueError, match=r"halo: boundary \(='mask'\) must be one of zero, edge"):
        split(lambda x: halo(x, 0, "space", 1, 1, "mask"), 4, P("space"))(jnp.ones(8))
    with pytest.raises(ValueError, match=r"before \(=-1\) and after \(=-1\) must leave some of the 2 tokens"):
        split(lambda x: halo(x, 0, "space", -1, -1), 4, P("space"))(jnp.ones(8))


# name: grid, kernel, the arguments of conv; the shards are 4
CONVOLUTIONS = {
    "1-D, even, lopsided": ((8,), (4,), dict(padding=[(0, 3)], boundary="edge")),
    "1-D, longer than two shards": ((8,), (7,), dict(padding=[(3, 3)], boundary="reflect")),
    "1-D, longer than the grid": ((4,), (9,), dict(padding=[(4, 4)], boundary="wrap")),
    "2-D, wrap and zero": ((8, 5), (3, 2), dict(padding=[(1, 1), (0, 0)], boundary=["wrap", "zero"])),
    "strided": ((16, 9), (7, 7), dict(padding=[(3, 3), (3, 3)], strides=2)),
    "strided, pointwise": ((8, 5), (1, 1), dict(padding=[(0, 0), (0, 0)], strides=2)),
    "strided past the kernel": ((12, 4), (2, 2), dict(padding=[(0, 0), (0, 0)], strides=3)),
    "dilated": ((12, 7), (3, 3), dict(padding=[(3, 3), (2, 2)], dilation=(3, 2))),
    "negative padding": ((8, 7), (3, 3), dict(padding=[(-1, 3), (1, 1)])),
    "depthwise": ((8, 6), (3, 3), dict(padding=[(1, 1), (1, 1)], groups=4)),
    "3-D": ((4, 3, 2), (3, 3, 3), dict(padding=[(1, 1)] * 3, boundary="edge")),
}


@pytest.mark.core(4)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_split_convolution(name):
    grid, size, options = CONVOLUTIONS[name]
    first = lambda name, default=1: (lambda v: v[0] if isinstance(v, list | tuple) else v)(options.get(name, default))

    def part(x, kernel):
        geometry = dict(stride=first("strides"), dilation=first("dilation"), boundary=first("boundary", "zero"))
        x = split_pad(x, 1, "space", options["padding"][0], size=size[0], **geometry)
        return conv(x, kernel, **{**options, "padding": [(0, 0), *options["padding"][1:]]})

    operands = normal(0, (2, *grid, 4)), normal(1, (*size, 4 // options.get("groups", 1), 4))
    specs = P(None, "space")
    agree(functools.partial(conv, **options), split(part, 4, (specs, P()), specs), operands)


def test_what_a_split_convolution_refuses():
    def run(length, pads, **geometry):
        split(lambda x: split_pad(x, 0, "space", pads, **geometry), 4, P("space"))(jnp.ones(length))

    with pytest.raises(ValueError, match=r"split_pad: stride \(=2\) must divide the 3 tokens"):
        run(12, (1, 1), size=3, stride=2)
    with pytest.raises(ValueError, match=r"pads \(=0, 0\) must give 12 positions, .*, and give 10"):
        run(12, (0, 0), size=3)


# name: grid, window; the shards are 4
WINDOWS = {
    "mask": ((8,), Window(3, boundary="mask")),
    "mask, longer than a shard": ((8, 3), Window((7, 3), boundary="mask")),
    "mask, dilated": ((12, 5), Window((3, 3), boundary="mask", dilation=(2, 1))),
    "mask, strided": ((8, 4), Window((3, 3), boundary="mask", stride=2)),
    "mask, offset": ((8, 3), Window((4, 3), boundary="mask", offset=(-3, None))),
    "mask, causal, offset": ((8, 3), Window((4, 3), boundary="mask", causal=(True, False), offset=(-1, None))),
    "zero": ((8, 5), Window((3, 3), boundary="zero")),
    "reflect": ((8, 5), Window((7, 3), boundary="reflect")),
    "wrap": ((8, 5), Window((5, 3), boundary="wrap")),
    "wrap, longer than the grid": ((4,), Window(7, boundary="wrap")),
    "shift, even, 2-D": ((8, 5), Window((4, 3))),
    "shift, longer than two shards": ((8, 3), Window((7, 3))),
    "shift, the whole grid": ((8, 3), Window((8, 3))),
    "shift, dilated past a shard": ((12,), Window(3, dilation=4)),
    "shift, causal": ((8, 3), Window((3, 3), causal=(True, False))),
    "shift, strided": ((8, 3), Window((5, 3), stride=(2, 1))),
    "Swin": ((16, 4), Window((2, 2), block=2, boundary="mask")),
    "Halo": ((16, 4), Window((4, 4), block=2, boundary="zero")),
    "blocks across shards, a ragged one last": ((12, 4), Window((5, 2), block=(5, 2), boundary="zero")),
    "Halo that wraps": ((8,), Window(4, block=2, boundary="wrap")),
}


def operands_of(grid, window, heads=2, head_dim=3):
    keys = (2, *grid, heads, head_dim)
    queries = (2, *window.query_grid(grid), heads, head_dim)
    offsets = [2 * k - 1 for k in window.sizes]
    return {
        "query": normal(0, queries),
        "key": normal(1, keys),
        "value": normal(2, keys),
        "relative_bias": normal(3, (heads, *offsets)),
        "key_embedding": normal(4, (heads, *offsets, head_dim)),
    }


@pytest.mark.core(1)
@pytest.mark.parametrize("name", WINDOWS)
def test_split_attention(name):
    grid, window = WINDOWS[name]
    made = operands_of(grid, window)
    if name == "mask, causal, offset":
        del made["relative_bias"], made["key_embedding"]  # its offsets are not a table's
    specs = {n: P(None, "space") if n in ("query", "key", "value") else P() for n in made}
    whole = lambda made: attention(**made, window=window)
    parts = split(lambda made: split_attention(**made, axis_name="space", window=window), 4, (specs,), P(None, "space"))
    agree(whole, parts, (made,))


@pytest.mark.full
def test_a_shard_computes_its_own_queries_alone():
    """Where every query sees the whole grid, so that no shard's keys are fewer."""
    x = normal(0, (256, 1, 32))
    attend = lambda x: split_attention(x, x, x, axis_name="space", window=Window(256))
    parts = jax.jit(split(attend, 4, (P("space"),), P("space"))).lower(x).compile()
    whole = jax.jit(lambda x: attention(x, x, x, window=Window(256))).lower(x).compile()
    np.testing.assert_allclose(parts(x), whole(x), atol=1e-10)
    assert parts.cost_analysis()["flops"] < whole.cost_analysis()["flops"] / 2


@pytest.mark.core(1)
@pytest.mark.parametrize("name", ["mask, offset", "shift, strided"])
def test_split_attention_with_embeddings_by_axis(name):
    grid, window = WINDOWS[name]
    made = operands_of(grid, window)
    made["key_embedding"] = tuple(
        normal(4, (heads, 2 * k - 1, 3)) for heads, k in zip((1, 2), window.sizes, strict=True)
    )
    specs = {n: P(None, "space") if n in ("query", "key", "value") else P() for n in made}
    specs["key_embedding"] = (P(), P())
    whole = lambda made: attention(**made, window=window)
    parts = split(lambda made: split_attention(**made, axis_name="space", window=window), 4, (specs,), P(None, "space"))
    agree(whole, parts, (made,))


@pytest.mark.full
@pytest.mark.parametrize("boundary", ["mask", "zero", "shift"])
def test_split_attention_with_everything(boundary):
    """Key mask, bias by slot, extra tokens, grouped heads and the log-sum-exp."""
    window = Window((3, 3), boundary=boundary)
    made = operands_of((8, 4), window)
    made["query"] = normal(5, (2, 8, 4, 4, 3))
    made["relative_bias"], made["key_embedding"] = normal(3, (4, 5, 5)), normal(4, (1, 5, 5, 3))
    made["bias"] = normal(6, (8, 1, 4, 3, 3))
    made["extra_key"], made["extra_value"] = normal(7, (2, 1, 2, 3)), normal(8, (2, 1, 2, 3))
    mask = jnp.asarray(np.random.default_rng(9).random((2, 8, 4)) < 0.7)
    specs = {n: P(None, "space") if n in ("query", "key", "value") else P() for n in made}
    specs["bias"] = P("space")

    def joined(attend, made, mask):
        y, lse = attend(**made, mask=mask, window=window, return_residuals=True)
        return jnp.concatenate([y, lse[..., None]], -1)

    part = functools.partial(joined, functools.partial(split_attention, axis_name="space"))
    parts = split(part, 4, (specs, P(None, "space")), P(None, "space"))
    agree(lambda made: joined(attention, made, mask), lambda made: parts(made, mask), (made,))


def test_split_attention_without_a_window():
    made = {name: normal(n, (2, 8, 2, 3)) for n, name in enumerate(("query", "key", "value"))}
    mask = jnp.asarray(np.random.default_rng(9).random((2, 1, 8, 8)) < 0.7)
    spec = P(None, "space")
    part = lambda made, mask: split_attention(**made, mask=mask, axis_name="space")
    parts = split(part, 4, (spec, P(None, None, "space")), spec)
    agree(lambda made: attention(**made, mask=mask), lambda made: parts(made, mask), (made,))


@pytest.mark.core(1)
@pytest.mark.parametrize("boundary", ["mask", "shift"])
def test_tangents_of_split_attention(boundary):
    window = Window((3, 3), boundary=boundary)
    made = operands_of((8, 4), window)
    tangents = {name: normal(10 + n, x.shape) for n, (name, x) in enumerate(made.items())}
    specs = {n: P(None, "space") if n in ("query", "key", "value") else P() for n in made}
    attend = lambda made: split_attention(**made, axis_name="space", window=window)
    parts = split(attend, 4, (specs,), P(None, "space"))
    expected = jax.jvp(lambda made: attention(**made, window=window), (made,), (tangents,))
    chex.assert_trees_all_close(jax.jvp(parts, (made,), (tangents,)), expected, atol=1e-10)


@pytest.mark.core(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_split_attention_mapped_and_in_other_dtypes(dtype):
    """vmap inside the shards, over an axis before the batch; the result keeps its dtype."""
    x, spec = normal(0, (3, 2, 8, 2, 4)).astype(dtype), P(None, None, "space")
    for window in (Window(3, boundary="mask"), Window(3)):
        attend = jax.vmap(lambda x, window=window: split_attention(x, x, x, axis_name="space", window=window))
        y = split(attend, 4, (spec,), spec)(x)
        expected = attention(x, x, x, window=window)
        assert y.dtype == expected.dtype == jnp.dtype(dtype)
        np.testing.assert_allclose(
            np.asarray(y, float), np.asarray(expected, float), atol=1e-6 if dtype == "float32" else 2e-2
        )


@pytest.mark.parametrize(
    ("length", "queries", "options", "message"),
    [
        (
            8,
            8,
            dict(window=Window(3, boundary="valid")),
            r"boundary \(='valid'\) must be one of .* over 'space'",
        ),
        (12, 4, dict(window=Window(3, stride=2)), r"stride \(=2\) must divide the 3 keys of a shard over 'space'"),
        (
            16,
            16,
            dict(window=Window(4, dilation=5, block=3, boundary="wrap")),
            r"block·dilation \(=15\) must divide the 4 tokens of a shard",
        ),
        (8, 8, dict(window=Window(3), mask=jnp.ones((2, 3), bool)), r"mask \(=\(2, 3\)\) must be of keys, \(2,\)"),
        (8, 8, dict(window=Window(3), mask=(None, jnp.ones(3, bool))), r"mask\[1\] must be None over a split axis"),
        (8, 8, dict(score_mod=lambda *x: x[0]), "score_mod must be left out over the split axis 'space'"),
        (8, 8, dict(segment_ids=jnp.zeros(2, int)), "segment_ids must be left out"),
        (8, 8, dict(grid_sizes=jnp.zeros((2, 1), int)), "grid_sizes must be left out"),
        (8, 8, dict(extra_positions=jnp.zeros((1, 1), int)), "extra_positions must be left out"),
        (8, 8, dict(dropout_rate=0.1), "dropout_rate must be left out"),
    ],
)
def test_what_split_attention_refuses(length, queries, options, message):
    with pytest.raises(ValueError, match=message):
        split(lambda q, x: split_attention(q, x, x, axis_name="space", **options), 4, (P("space"), P("space")))(
            jnp.ones((queries, 2, 3)), jnp.ones((length, 2, 3))
        )


LAYERS = {
    "conv": lambda: Conv(4, 6, (3, 3), param_dtype=float, rngs=nnx.Rngs(0)),
    "conv, strided, SAME": lambda: Conv(4, 6, (3, 2), (2, 3), param_dtype=float, rngs=nnx.Rngs(0)),
    "conv, SAME_LOWER": lambda: Conv(4, 6, (4, 2), padding="SAME_LOWER", param_dtype=float, rngs=nnx.Rngs(0)),
    "conv, circular": lambda: Conv(4, 6, (4, 3), padding="CIRCULAR", param_dtype=float, rngs=nnx.Rngs(0)),
    "conv, reflect": lambda: Conv(4, 6, (3, 3), padding="REFLECT", param_dtype=float, rngs=nnx.Rngs(0)),
    "attention": lambda: Attention(
        2,
        4,
        16,
        window=Window((3, 3), stride=2, boundary="mask"),
        relative_bias=True,
        key_embedding="factorized",
        normalize_qk=True,
        param_dtype=float,
        rngs=nnx.Rngs(0),
    ),
    "attention, shift": lambda: Attention(2, 4, window=(3, 3), relative_bias=True, param_dtype=float, rngs=nnx.Rngs(0)),
    "attention stem": lambda: AttentionStem(4, 4, num_heads=2, param_dtype=float, rngs=nnx.Rngs(0)),
}


@pytest.mark.core(2)
@pytest.mark.parametrize("name", LAYERS)
def test_a_split_layer(name):
    layer, x = LAYERS[name](), normal(0, (2, 8, 6, 4))
    whole, weights = nnx.split(layer)
    layer.axis_name = "space"
    parts = nnx.graphdef(layer)
    spec = P(None, "space")
    agree(
        lambda weights, x: nnx.merge(whole, weights)(x),
        split(lambda weights, x: nnx.merge(parts, weights)(x), 4, (P(), spec), spec),
        (weights, x),
    )


@pytest.mark.parametrize("padding", ["SAME", ((1, 1), (1, 1))])
def test_split_pools(padding):
    x, spec = normal(0, (2, 16, 6, 3)), P(None, "space")
    pools = lambda x, axis_name: (
        pooling.max_pool(x, (3, 3), (2, 2), padding, axis_name) + pooling.average_pool(x, axis_name)
    )
    agree(lambda x: pools(x, None), split(lambda x: pools(x, "space"), 4, (spec,), spec), (x,))


def test_what_split_layers_refuse():
    def run(layer, **options):
        split(lambda x: layer(x, **options), 4, P(None, "space"))(jnp.ones((1, 8, 4, 4)))

    layer = Attention(2, 4, window=(3, 3), axis_name="space", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="sow_weights needs the whole grid, and it is split over 'space'"):
        run(layer, sow_weights=True)
    with pytest.raises(
        ValueError, match=r"input_dilation \(=\(2, 2\)\) must be 1 where axis_name \(='space'\) is given"
    ):
        run(Conv(4, 4, (3, 3), padding=1, input_dilation=2, axis_name="space", rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"pads \(=0, 0\) must give 8 positions, .*, and give 6"):
        run(Conv(4, 4, (3, 3), padding="VALID", axis_name="space", rngs=nnx.Rngs(0)))

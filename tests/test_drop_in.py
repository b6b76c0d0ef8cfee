"""Flax's own layers beside ours, with every argument that they have: the same parameters, the same results."""

import inspect
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import quicker
from flax import nnx

from jaxattn.nn import Attention, Conv, ConvTranspose

PAIRS = [(Conv, nnx.Conv), (ConvTranspose, nnx.ConvTranspose), (Attention, nnx.MultiHeadAttention)]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda layer: layer.__name__)
@pytest.mark.parametrize("method", ["__init__", "__call__"])
def test_every_argument_is_there(ours, theirs, method):
    """In their order, where they may be given by position; with their defaults, but for what the docstring says."""
    mine, other = (inspect.signature(getattr(layer, method)).parameters for layer in (ours, theirs))
    assert set(other) <= set(mine)
    by_position = [name for name, p in other.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [name for name, p in mine.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == by_position
    said = {"kernel_init", "bias_init", "broadcast_dropout", "attention_fn"}  # the first two are the same, made twice
    for name in set(other) - said:
        assert mine[name].default == other[name].default, name


def drawn(shape, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), dtype)


def assert_same(pairs, x, calls=None, **tolerance):
    """Values and gradients of all pairs of layers, in one program; theirs take our parameters, drawn at random."""
    calls = calls or [{}] * len(pairs)
    split = []
    for ours, theirs in pairs:
        graph, params, rest = nnx.split(ours, nnx.Param, ...)
        params = jax.tree.map(lambda p: drawn(p.shape, p.dtype), params)
        split.append((graph, nnx.graphdef(theirs), params, rest))

    @partial(jax.jit, compiler_options=quicker)
    def run_all(x, every):
        found = []
        for (mine, other, _, rest), params, call in zip(split, every, calls, strict=True):
            for graph in (mine, other):
                run = lambda p, x, graph=graph, rest=rest, call=call: nnx.merge(graph, p, rest)(x, **call)
                y, pull = jax.vjp(run, params, x)
                found.append((y, jax.tree.leaves(pull(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)))))
        return found[::2], found[1::2]

    ours, theirs = run_all(x, [params for _, _, params, _ in split])
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, **tolerance)


def test_conv_transpose_is_that_of_flax():
    """Over strides, both kernels, masks and dtypes; what is written goes around the torus once and twice."""
    made, mask = [], np.tril(np.ones((5, 2, 3, 4)))
    settings = itertools.product(["CIRCULAR"], [None, (2, 3)], [False, True])  # test_convolution.py has the others
    for n, (padding, strides, transposed) in enumerate(settings):
        given = {"padding": padding, "transpose_kernel": transposed, "kernel_dilation": [None, (2, 3)][n % 2]}
        given |= {"use_bias": n % 3 > 0, "mask": None if transposed or n % 2 else mask, "param_dtype": jnp.float64}
        layers = [make(3, 4, (5, 2), strides, **given, rngs=nnx.Rngs(0)) for make in (ConvTranspose, nnx.ConvTranspose)]
        made.append(layers)
    assert_same(made, drawn((2, 4, 5, 3)), rtol=1e-12, atol=1e-12)
    half = {
        "dtype": jnp.bfloat16,
        "preferred_element_type": jnp.float32,
        "mask": np.ones((2, 3, 4)),
        "rngs": nnx.Rngs(0),
    }
    ours, theirs = (jax.eval_shape(make(3, 4, 2, **half), drawn((5, 3))) for make in (ConvTranspose, nnx.ConvTranspose))
    assert ours.dtype == theirs.dtype == jnp.float32


def test_what_convolves_may_be_given():
    """And is called as flax calls it."""
    calls = []

    def convolve(*args, **kwargs):
        calls.append((args[2:], kwargs))
        return jax.lax.conv_general_dilated(*args, **kwargs)

    made = []
    for padding in ("CIRCULAR", "REFLECT", "SAME", (4, 2)):
        given = {"padding": padding, "kernel_dilation": (2, 1), "param_dtype": jnp.float64}
        given |= {"conv_general_dilated": convolve, "preferred_element_type": jnp.float64}
        made.append([make(3, 4, (5, 2), 2, **given, rngs=nnx.Rngs(0)) for make in (Conv, nnx.Conv)])
    assert_same(made, drawn((2, 2, 9, 7, 3)), rtol=1e-12, atol=1e-12)
    same = lambda call: (*map(list, call[0][:1]), str(call[0][1]).replace("(", "[").replace(")", "]"), call[1])
    assert list(map(same, calls[::2])) == list(map(same, calls[1::2]))
    with pytest.raises(ValueError, match=r"Conv: conv_general_dilated \(=.*\) must be left at its default where impl"):
        Conv(2, 3, 3, conv_general_dilated=convolve, implementation="xla", rngs=nnx.Rngs(0))


def test_attention_is_that_of_flax():
    """What it takes besides `test_nn.py`'s. Flax keeps float64 in float64 only where it has a dropout rate."""
    products = []

    def multiply(*args, **kwargs):
        products.append(args)
        return jax.lax.dot_general(*args, **kwargs)

    attend = lambda query, key, value, *, mask, **rest: nnx.dot_product_attention(query, key, value, mask=mask, **rest)
    mask = jnp.asarray(np.random.default_rng(0).random((2, 1, 5, 5)) < 0.6) | jnp.eye(5, dtype=bool)
    always = {"param_dtype": jnp.float64, "dropout_rate": 0.5, "deterministic": True, "keep_rngs": False}
    settings = [
        ({"attention_fn": attend, "broadcast_dropout": False}, {"mask": mask, "is_causal": True}),
        ({"num_kv_heads": 2, "qkv_dot_general": multiply, "out_dot_general_cls": lambda: multiply}, {"mask": mask}),
        ({"normalize_qk": True, "ln_promote_dtype": nnx.nn.dtypes.promote_dtype}, {"is_causal": True, "mask": mask}),
    ]
    pairs = [
        [
            make(4, 8, **given, **always, rngs=nnx.Rngs(0))
            for make in (Attention, partial(nnx.MultiHeadAttention, decode=False))
        ]
        for given, _ in settings
    ]
    assert_same(pairs, drawn((2, 5, 8)), [call for _, call in settings], rtol=1e-6, atol=1e-6)
    assert len(products) == 8  # three of q, k, v, and the output's, of two layers


def test_weights_are_sown_and_metadata_is_kept_as_flax_does():
    named = (
        "kernel_metadata",
        "out_kernel_metadata",
        "bias_metadata",
        "query_ln_scale_metadata",
        "key_ln_scale_metadata",
    )
    given = {name: {"note": name} for name in named} | {"normalize_qk": True}
    ours, theirs = (make(4, 8, **given, rngs=nnx.Rngs(0)) for make in (Attention, nnx.MultiHeadAttention))
    notes = lambda layer: [(path, x.get_metadata().get("note")) for path, x in nnx.to_flat_state(nnx.state(layer))]
    assert notes(ours) == notes(theirs)
    x = drawn((2, 5, 8), jnp.float32)
    graphs, states = zip(*map(nnx.split, (ours, theirs)), strict=True)

    def look(states):
        layers = map(nnx.merge, graphs, states)
        seen = [nnx.capture(layer, nnx.Intermediate)(x, sow_weights=True, decode=False) for layer in layers]
        return [(y, sown["attention_weights"].get_value()[0]) for y, sown in seen]

    found, expected = jax.jit(look, compiler_options=quicker)(states)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), found, expected)


@pytest.mark.full
def test_dropout_may_be_the_same_everywhere():
    """Of the batch and of the heads, as flax draws it: with equal rows and heads, equal results."""
    layer = Attention(2, 4, dropout_rate=0.5, broadcast_dropout=True, out_projection=False, rngs=nnx.Rngs(0))
    for projection in (layer.query, layer.key, layer.value):
        projection.kernel[...] = jnp.repeat(projection.kernel[:, :1], 2, 1)
    x = jnp.broadcast_to(drawn((5, 4), jnp.float32), (3, 5, 4))
    run = jax.jit(lambda x, key: layer(x, deterministic=False, rngs=nnx.Rngs(dropout=key)).reshape(3, 5, 2, 2))
    y = run(x, jax.random.key(0))
    np.testing.assert_allclose(y, jnp.broadcast_to(y[:1, :, :1], y.shape), rtol=1e-5)
    assert not np.allclose(y, run(x, jax.random.key(1)))
    layer.broadcast_dropout = False
    y = layer(x, deterministic=False).reshape(3, 5, 2, 2)
    assert not np.allclose(y[0], y[1])
    assert not np.allclose(y[:, :, 0], y[:, :, 1])


@pytest.mark.parametrize(
    ("given", "call", "message"),
    [
        ({"window": 3}, {}, r"window \(=.*\) must be left out with an attention_fn \(=.*\), which does not know it"),
        ({"normalize": "relu"}, {}, r"normalize \(='relu'\) must be left out with an attention_fn"),
        ({}, {"bias": jnp.ones((5, 5))}, r"bias \(=float.*\) must be left out with an attention_fn"),
        (
            {"attention_fn": None},
            {"input_positions": jnp.arange(5)},
            "input_positions must be None without an attention_fn",
        ),
        ({"attention_fn": None, "window": 3}, {"is_causal": True}, r"is_causal \(=True\) must be False with a window"),
        (
            {"attention_fn": None, "out_projection": False},
            {"out_sharding": jax.P()},
            r"out_sharding \(=.*\) must be None without an output projection",
        ),
    ],
)
def test_attention_errors(given, call, message):
    given = {"attention_fn": nnx.dot_product_attention} | given
    with pytest.raises(ValueError, match="Attention: " + message):
        Attention(2, 8, **given, rngs=nnx.Rngs(0))(jnp.ones((1, 5, 8)), **call)

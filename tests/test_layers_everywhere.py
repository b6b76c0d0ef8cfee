"""What holds of every layer: sizes and their ranks, NumPy's ints, initialisers, empty batches, ranks not promoted."""

import inspect
import pathlib
import re
import traceback
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calls import NN, ZOO, X
from flax import nnx

import jaxattn
from jaxattn import nn, zoo
from jaxattn.window import Window
from jaxattn.zoo import shifted

HERE = str(pathlib.Path(jaxattn.__file__).parent)
named = lambda value: getattr(value, "__name__", None)
# Einsums of which a lowering can't: without a batch, or without promoting ranks. To be emptied.
EMPTY_EINSUM = {zoo.dynamic_depthwise_conv}
PROMOTING_EINSUM = {
    zoo.conv, zoo.depthwise_conv, zoo.light_conv, zoo.aft_conv, zoo.cvt_attention, zoo.dynamic_depthwise_conv,
    nn.Conv, nn.DepthwiseConv, nn.LightConv, nn.AFTConv, nn.CvTAttention, nn.DynamicDepthwiseConv,
}  # fmt: skip
SIZES = ("window", "block", "kernel_size", "grid")  # any of which says how many axes there are
SIZED = [module for module in NN if set(SIZES) & set(inspect.signature(module.__init__).parameters)]
SIZED = [module for module in SIZED if module not in (nn.AxialAttention, nn.QuadraticAttention)]  # one axis; rank=2
TABLES = {"relative_init": {"key_embedding": True}, "out_kernel_init": {}, "out_bias_init": {}}


def shapes(module, **kwargs):
    """The module's graph, and the shapes of its parameters by name."""
    graph, params = nnx.split(nnx.eval_shape(lambda: module(**kwargs, rngs=nnx.Rngs(0))), nnx.Param)
    return graph, {path: p.shape for path, p in nnx.to_flat_state(params)}


def output(module, x, **kwargs):
    return jax.eval_shape(lambda x: module(**kwargs, rngs=nnx.Rngs(0))(x), x).shape


@pytest.mark.core(10)
@pytest.mark.parametrize("module", SIZED, ids=named)
def test_an_int_is_of_every_axis_where_the_rank_is_said(module):
    """And without it of one, whose input must not look like a grid: [1, 8, 8, 8] is refused."""
    sizes = {name: 2 for name in SIZES if name in NN[module]} | {name: 8 for name in ("grid",) if name in NN[module]}
    kwargs = {**NN[module], **sizes, **({"halo": 0} if "halo" in NN[module] else {})}
    kwargs.pop("rank", None)
    pairs = {name: (size, size) for name, size in sizes.items()}
    assert shapes(module, **kwargs, rank=2)[1] == shapes(module, **{**kwargs, **pairs})[1]
    x = jnp.ones((1, 8, 8, 8))
    whole = output(module, x, **kwargs, rank=2)
    assert whole[:-1] == x.shape[:-1]
    if module is nn.Conv:  # as nnx.Conv
        assert output(module, x, **kwargs) == whole
    else:
        with pytest.raises(ValueError, match=r"must be \[batch, tokens, features\] where .*: give rank=2 .* or rank=1"):
            output(module, x, **kwargs)
    assert output(module, x, **kwargs, rank=1) == whole
    assert output(module, x[0], **kwargs) == whole[1:]
    with pytest.raises(ValueError, match=r"rank"):
        shapes(module, **{**kwargs, **pairs}, rank=3)


def test_attention_without_a_window_or_a_rank_is_of_a_sequence():
    x = jnp.ones((1, 6, 6, 8))
    with pytest.raises(ValueError, match=r"inputs_q \(=\[1, 6, 6, 8\]\) must be \[batch, tokens, features\]"):
        output(nn.GlobalAttention, x, num_heads=2, in_features=8)
    assert output(nn.Attention, x, num_heads=2, in_features=8) == x.shape  # as nnx.MultiHeadAttention
    for module in (nn.Attention, nn.GlobalAttention):
        assert output(module, x, num_heads=2, in_features=8, rank=2) == x.shape
    params = {name: jnp.ones((8, 2, 4)) for name in ("query", "key", "value")}
    with pytest.raises(ValueError, match=r"global_attention: x .* must be \[batch, tokens, features\] .* rank=2"):
        zoo.global_attention(x, params)
    assert nn.Attention(2, 8, window=Window(3), rngs=nnx.Rngs(0)).rank_is_said  # a Window has its rank


@pytest.mark.parametrize("module", NN, ids=named)
def test_numpy_ints_are_ints(module):
    """Alone and in arrays; what a module keeps of them is static, and equal to what it keeps of Python's."""
    kwargs = NN[module]
    as_numpy = {
        name: np.array(value) if isinstance(value, tuple) else np.int64(value) if type(value) is int else value
        for name, value in kwargs.items()
    }
    (graph, params), (expected, drawn) = shapes(module, **as_numpy), shapes(module, **kwargs)
    assert params == drawn
    assert hash(graph) == hash(expected)


INITIALISERS = [
    (module, name) for module in NN for name in inspect.signature(module.__init__).parameters if name.endswith("_init")
]


@pytest.mark.core(30)
@pytest.mark.parametrize(("module", "name"), INITIALISERS, ids=named)
def test_initialisers(module, name):
    """Called as `(key, shape, dtype)`, plain or annotated; what they draw and say reaches the same parameters."""
    calls = []

    def init(key, shape, dtype):
        calls.append((shape, dtype))
        return jnp.full(shape, 0.25, dtype)

    given = inspect.signature(module.__init__).parameters
    tables = {option: value for option, value in TABLES.get(name, {}).items() if option in given}
    if "identity_value" in given:  # which draws no value
        tables["identity_value"] = False
    kwargs = {**NN[module], **tables, "param_dtype": jnp.bfloat16}
    annotated = nnx.with_metadata(init, note="annotated")
    for given in (init, annotated):
        calls.clear()
        make = partial(module, **kwargs, **{name: given})
        params = nnx.state(nnx.eval_shape(lambda make=make: make(rngs=nnx.Rngs(0))), nnx.Param)
        noted = [p for _, p in nnx.to_flat_state(params) if p.get_metadata().get("note") == "annotated"]
        assert calls
        assert all(dtype == jnp.bfloat16 for _, dtype in calls)
        assert len(noted) == (len(calls) if given is annotated else 0)
        assert sorted(p.size for p in noted) == sorted(np.prod(shape) for shape, _ in calls if given is annotated)


def refused_or_empty(call):
    try:
        return 0 in call().shape
    except ValueError as error:
        return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(HERE)


@pytest.mark.core(10)
@pytest.mark.parametrize("function", [f for f in ZOO if f not in EMPTY_EINSUM], ids=named)
def test_an_empty_batch_and_an_empty_grid(function):
    """No images are no outputs. A grid without tokens is refused, or has as few."""
    kwargs = ZOO[function]
    full = jax.eval_shape(lambda x: function(x, **kwargs), X).shape
    assert jax.eval_shape(lambda x: function(x, **kwargs), X[:0]).shape == (0, *full[1:])
    assert function(X[:0], **kwargs).shape == (0, *full[1:])
    assert refused_or_empty(lambda: jax.eval_shape(lambda x: function(x, **kwargs), X[:, :0]))


@pytest.mark.parametrize("function", [f for f in (*ZOO, *NN) if f not in PROMOTING_EINSUM], ids=named)
def test_ranks_are_not_promoted(function):
    if function in ZOO:
        call = lambda x: function(x, **ZOO[function])
    else:
        call = lambda x: function(**NN[function], rngs=nnx.Rngs(0))(x)
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(call, X)


# What a registered shape calls an axis, and what docstrings call it.
WRITTEN = {
    "heads|1": "heads or 1", "*offsets": "*(2k-1)", "offsets": "2m-1", "offsets_{axis}": "2k-1",
    "coordinates": "rank + 1", "axes": "rank", "features/groups": "features / groups",
    "groups·head_dim": "groups · head_dim",
    "out_features/groups": "out_features / groups", "features·m": "features · m", "*grid": "*grid",
}  # fmt: skip


@pytest.mark.parametrize("name", zoo.ROWS)
def test_a_docstring_states_the_registered_shapes(name):
    """Each parameter by its name, and its shape in brackets."""
    function = getattr(zoo, name)
    text = " ".join((function.__doc__ or "").split()).replace("2n-1", "2k-1").replace("2n - 1", "2k-1")
    text = text.replace("2m-1", "2k-1")
    for parameter, axes in zoo.ROWS[name].shapes.items():
        axes = [
            WRITTEN.get(axis, axis).replace("2m-1", "2k-1") for axis in axes.lstrip("?").replace(" -> ", " ").split()
        ]
        said = f"[{', '.join(axes)}]"
        assert re.search(rf"\b{parameter.partition('_{')[0]}", text), f"{parameter} is not there"
        assert said.removesuffix(", width]") in text, said  # a width has more than one


@pytest.mark.parametrize(("shift", "grid", "segmented"), [(0, (4, 6), False), (1, (4, 6), True), (0, (4, 7), True)])
def test_swin_pays_for_segments_where_it_has_some(monkeypatch, shift, grid, segmented):
    """Neither shifted nor padded, all tokens are of one segment."""
    seen = []
    attend = shifted.attention
    monkeypatch.setattr(shifted, "attention", lambda *args, **kw: seen.append(kw["segment_ids"]) or attend(*args, **kw))
    params = ZOO[zoo.shifted_window_attention]["params"]
    function = partial(zoo.shifted_window_attention, params=params, window=(2, 3), shift=shift)
    jax.eval_shape(function, jnp.ones((2, *grid, 8)))
    assert (seen[0] is not None) == segmented

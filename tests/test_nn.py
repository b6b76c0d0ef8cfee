"""`Conv` and `Attention` against Flax's own modules, values and gradients, and what only ours can do."""

import inspect
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from jax.test_util import check_grads
from tiers import examples

from jaxattn.attention import attention
from jaxattn.nn import Attention, Conv
from jaxattn.window import Window

# Two orders of the same float64 sums of a few hundred products; float32 and bfloat16 by their epsilons.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2}


def normal(seed, *shape, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def randomized(layer):
    """The layer with every parameter drawn anew, so that no zero bias hides a mistake."""
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    leaves, structure = jax.tree.flatten(params)
    leaves = [normal(n, *leaf.shape, dtype=leaf.dtype) for n, leaf in enumerate(leaves)]
    return nnx.merge(graphdef, jax.tree.unflatten(structure, leaves), rest)


def values_and_gradients(layer, *inputs, **kwargs):
    """The output, and the gradients of a fixed random projection of it, by parameter name and by input."""
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    @partial(jax.jit)  # each is run once
    def run(params, inputs):
        y, pull = jax.vjp(lambda params, inputs: nnx.merge(graphdef, params, rest)(*inputs, **kwargs), params, inputs)
        return y, pull(normal(99, *y.shape, dtype=y.dtype))  # drawn while tracing: a constant

    y, (by_param, by_input) = run(params, inputs)
    return y, nnx.to_pure_dict(by_param), by_input


def assert_same(ours, theirs, *inputs, **kwargs):
    mine, other = values_and_gradients(ours, *inputs, **kwargs), values_and_gradients(theirs, *inputs, **kwargs)
    assert jax.tree.structure(mine) == jax.tree.structure(other)
    assert mine[0].dtype == other[0].dtype
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(other), strict=True):
        assert_close(a, b, TOLERANCE[str(mine[0].dtype)])


def assert_close(ours, theirs, tolerance):
    """Within `tolerance` of the largest entry (or of one)."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    np.testing.assert_allclose(ours, theirs, atol=tolerance * max(1.0, np.abs(theirs).max()), rtol=0)


def conv_pair(*args, **kwargs):
    """Our layer and Flax's with the same parameters, drawn at random."""
    zeros = {"kernel_init": nnx.initializers.zeros, **kwargs, "rngs": nnx.Rngs(0)}
    ours, theirs = randomized(Conv(*args, **zeros)), nnx.Conv(*args, **zeros)
    nnx.update(theirs, nnx.state(ours))
    return ours, theirs


@st.composite
def convolutions(draw):
    rank = draw(st.integers(1, 3))

    def axes(low, high):
        return draw(st.one_of(st.integers(low, high), st.lists(st.integers(low, high), min_size=rank, max_size=rank)))

    kernel = draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank))
    dilation, stride = axes(1, 2), draw(st.sampled_from([None, 1, 2, (3, 1, 2)[:rank]]))
    groups = draw(st.sampled_from([1, 2, 4]))
    pads = st.one_of(st.integers(0, 2), st.tuples(st.integers(0, 2), st.integers(0, 2)))
    named = ["SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT"] + ["CAUSAL"] * (rank == 1)
    in_numbers = st.one_of(st.integers(0, 2), st.lists(pads, min_size=rank, max_size=rank))
    input_dilation = draw(st.sampled_from([None, 1, 1, 2, (2, 1, 3)[:rank]]))
    # Flax takes named paddings only without input dilation
    padding = draw(st.one_of(st.sampled_from(named), in_numbers) if input_dilation in (None, 1) else in_numbers)
    sizes = draw(st.lists(st.integers(7, 9) if rank < 3 else st.just(7), min_size=rank, max_size=rank))
    batch = draw(st.sampled_from([(), (2,), (2, 1)]))
    return (
        (*batch, *sizes, 4),
        (4, draw(st.sampled_from([4, 8])), kernel, stride),
        {
            "padding": padding,
            "input_dilation": input_dilation,
            "kernel_dilation": dilation,
            "feature_group_count": groups,
            "use_bias": draw(st.booleans()),
        },
    )


@examples(1)
@given(convolutions())
def test_conv_is_nnx_conv(case):
    shape, args, kwargs = case
    assert_same(*conv_pair(*args, **kwargs, param_dtype=jnp.float64), normal(7, *shape))


@pytest.mark.core(7)
@pytest.mark.parametrize(("rank", "strides", "kernel_dilation"), [(1, 1, 1), (2, 1, 2), (3, 2, 1)])
@pytest.mark.parametrize("padding", ["SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", "CAUSAL", 1])
def test_conv_paddings(padding, rank, strides, kernel_dilation):
    """Every named padding in every rank, whatever hypothesis draws."""
    if padding == "CAUSAL" and rank > 1:
        with pytest.raises(ValueError, match=r"Conv: padding \(='CAUSAL'\) must be another where kernel_size has"):
            Conv(2, 3, (3,) * rank, padding=padding, rngs=nnx.Rngs(0))
        return
    kwargs = {"padding": padding, "kernel_dilation": kernel_dilation, "param_dtype": jnp.float64}
    assert_same(*conv_pair(2, 3, (3, 2, 4)[:rank], strides, **kwargs), normal(7, 2, *(7, 6, 8)[:rank], 2))


@pytest.mark.parametrize("padding", ["CIRCULAR", "REFLECT"])
def test_conv_kernel_longer_than_the_grid(padding):
    """Copies of copies: the torus goes around more than once, the mirror reflects again."""
    assert_same(*conv_pair(2, 3, (9, 4), padding=padding, param_dtype=jnp.float64), normal(7, 2, 3, 2, 2))


def test_conv_negative_padding_crops():
    assert_same(*conv_pair(2, 3, (2, 2), padding=((-1, 2), (0, -1)), param_dtype=jnp.float64), normal(7, 2, 6, 5, 2))


def test_conv_mask():
    mask = jnp.tril(jnp.ones((3, 2, 4)))
    ours, theirs = conv_pair(2, 4, 3, mask=mask, param_dtype=jnp.float64)
    assert_same(ours, theirs, normal(7, 2, 6, 2))
    with pytest.raises(ValueError, match=r"Conv: mask \(of shape \(2, 4\)\) must have the kernel's, \(3, 2, 4\)"):
        Conv(2, 4, 3, mask=jnp.ones((2, 4)), rngs=nnx.Rngs(0))


DTYPES = [None, jnp.float32, jnp.bfloat16]


@pytest.mark.core(4)
@pytest.mark.parametrize(("dtype", "param_dtype", "preferred"), itertools.product(DTYPES, DTYPES[1:], DTYPES[:2]))
def test_conv_dtypes(dtype, param_dtype, preferred):
    """The result has the dtype that Flax's has, whatever comes in."""
    kwargs = {"dtype": dtype, "param_dtype": param_dtype, "preferred_element_type": preferred}
    ours, theirs = conv_pair(2, 3, (3, 3), **kwargs)
    for input_dtype in (jnp.float32, jnp.bfloat16, jnp.int8):
        x = (4 * normal(7, 2, 5, 5, 2)).astype(input_dtype)
        y, expected = nnx.jit(ours)(x), nnx.jit(theirs)(x)
        assert y.dtype == expected.dtype
        computed = jnp.promote_types(input_dtype if input_dtype != jnp.int8 else jnp.float32, param_dtype)
        assert_close(y, expected, TOLERANCE[str(jnp.dtype(dtype or computed))])


def test_conv_starts_where_nnx_conv_starts():
    ours, theirs = (module(3, 4, (3, 2), rngs=nnx.Rngs(5)) for module in (Conv, nnx.Conv))
    np.testing.assert_array_equal(ours.kernel[...], theirs.kernel[...])
    np.testing.assert_array_equal(ours.bias[...], theirs.bias[...])
    for name in ("kernel_size", "kernel_shape", "in_features", "out_features", "use_bias", "padding", "param_dtype"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_conv_arguments_reach_their_place():
    """None of `nnx.Conv`'s arguments is accepted and then dropped."""
    arguments = set(inspect.signature(nnx.Conv.__init__).parameters)
    assert arguments <= set(inspect.signature(Conv.__init__).parameters)
    promoted = []

    def promote(args, *, dtype):
        promoted.append(dtype)
        return nnx.nn.dtypes.promote_dtype(args, dtype=dtype)

    layer = Conv(
        2, 3, 3, promote_dtype=promote, dtype=jnp.float32, bias_init=nnx.initializers.ones, precision="highest",
        kernel_metadata={"note": "k"}, bias_metadata={"note": "b"}, rngs=nnx.Rngs(0),
    )  # fmt: skip
    assert (layer.kernel.note, layer.bias.note) == ("k", "b")
    assert (layer.bias[...] == 1).all()
    assert layer(jnp.ones((1, 5, 2))).shape == (1, 5, 3)
    assert promoted == [jnp.float32]
    assert "HIGHEST" in jax.jit(layer).lower(jnp.ones((1, 5, 2))).as_text()


def test_conv_in_linen():
    linen = nnx.bridge.to_linen(Conv, 2, 3, (3, 3), padding="CIRCULAR")
    x = normal(7, 2, 5, 6, 2, dtype=jnp.float32)
    variables = linen.init(jax.random.key(1), x)
    ours = Conv(2, 3, (3, 3), padding="CIRCULAR", rngs=nnx.Rngs(0))
    ours.kernel[...], ours.bias[...] = variables["params"]["kernel"], variables["params"]["bias"]
    assert_close(linen.apply(variables, x), ours(x), TOLERANCE["float32"])


def test_conv_sharded_over_the_batch():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    layer, x = Conv(2, 4, 3, rngs=nnx.Rngs(0)), normal(7, 8, 6, 2, dtype=jnp.float32)
    expected = layer(x)
    with jax.set_mesh(mesh):
        y = layer(jax.device_put(x, PartitionSpec("data")), out_sharding=PartitionSpec(None, None, "data"))
    assert y.sharding.spec == PartitionSpec(None, None, "data")
    assert_close(y, expected, TOLERANCE["float32"])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"feature_group_count": 2}, r"Conv: feature_group_count \(=2\) must divide in_features \(=3\)"),
        ({"feature_group_count": 3}, r"Conv: feature_group_count \(=3\) must divide out_features \(=4\)"),
        ({"strides": (1, 2, 3)}, r"Conv: strides \(=\(1, 2, 3\)\) must be an int >= 1, or one for each of the 2 axes"),
        ({"kernel_dilation": 0}, r"Conv: kernel_dilation \(=0\) must be an int >= 1, or one for each"),
        ({"padding": "SOME"}, r"Conv: padding \(='SOME'\) must be 'SAME', "),
        ({"padding": (1, 2, 3)}, r"Conv: padding \(=\(1, 2, 3\)\) must be 'SAME', "),
        ({"input_dilation": 2}, r"Conv: padding \(='SAME'\) must be 'VALID'.* where input_dilation is given \(=2\)"),
    ],
)
def test_conv_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Conv(3, 4, (3, 3), **kwargs, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("shape", [(5, 5, 4), (5, 3), (3,)])
def test_conv_input_errors(shape):
    with pytest.raises(ValueError, match=r"Conv: inputs \(=\[.*\) must be \[\*batch, 2 axes of a grid, 3 features\]"):
        Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))(jnp.ones(shape))


# Attention


def attention_pair(*args, **kwargs):
    """Our layer and Flax's with the same parameters, drawn at random; copied there and back.

    Only where it has a dropout rate does Flax keep float64 scores in float64, hence the rate, which never acts.
    """
    zeros = {"kernel_init": nnx.initializers.zeros, "param_dtype": jnp.float64, "dropout_rate": 0.5} | kwargs
    zeros |= {"deterministic": True, "keep_rngs": False, "rngs": nnx.Rngs(0)}
    ours, theirs = randomized(Attention(*args, **zeros)), nnx.MultiHeadAttention(*args, **zeros, decode=False)
    nnx.update(theirs, nnx.state(ours))
    back = Attention(*args, **zeros)
    nnx.update(back, nnx.state(theirs))
    return back, theirs


@pytest.mark.core(2)
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"qkv_features": 8, "out_features": 5},
        {"use_bias": False, "num_kv_heads": 2},
        {"num_kv_heads": 1, "normalize_qk": True},
    ],
)
def test_attention_is_nnx_attention(kwargs):
    ours, theirs = attention_pair(4, 12, **kwargs)
    x = normal(7, 2, 5, 12)
    assert_same(ours, theirs, x)
    mask = np.random.default_rng(0).random((2, 1, 5, 5)) < 0.6
    mask |= np.eye(5, dtype=bool)  # a query that sees nothing differs by design
    assert_same(ours, theirs, x, mask=jnp.asarray(mask))


def test_attention_takes_number_masks_as_flax_does():
    x = normal(7, 2, 5, 12)
    ours, theirs = attention_pair(4, 12)
    causal = nnx.make_causal_mask(x[..., 0])
    assert_same(ours, theirs, x, mask=causal)
    np.testing.assert_array_equal(ours(x, mask=(None, causal)), ours(x, mask=causal))


@pytest.mark.core(1)
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_cross_attention_is_nnx_attention(batch):
    ours, theirs = attention_pair(2, 6, 8, 5, in_kv_features=7)
    inputs = normal(7, *batch, 4, 6), normal(8, *batch, 3, 7), normal(9, *batch, 3, 7)
    assert_same(ours, theirs, *inputs)
    assert_same(ours, theirs, *inputs[:2])


@pytest.mark.core(3)
@pytest.mark.parametrize(("dtype", "param_dtype"), itertools.product(DTYPES, DTYPES[1:]))
def test_attention_dtypes(dtype, param_dtype):
    ours, theirs = attention_pair(2, 8, dtype=dtype, param_dtype=param_dtype)
    for input_dtype in DTYPES[1:]:
        x = normal(7, 2, 5, 8, dtype=input_dtype) / 4
        y, expected = nnx.jit(ours)(x), nnx.jit(theirs)(x)
        assert y.dtype == expected.dtype
        computed = jnp.dtype(dtype or jnp.promote_types(input_dtype, param_dtype))
        assert_close(y, expected, TOLERANCE[str(computed)])


def test_attention_starts_where_nnx_attention_starts():
    """Also beside tables, which are drawn last."""
    theirs = nnx.to_pure_dict(nnx.state(nnx.MultiHeadAttention(2, 6, normalize_qk=True, rngs=nnx.Rngs(5))))
    window = {"window": 3, "relative_bias": True, "key_embedding": True}
    for kwargs in ({}, window):
        ours = nnx.to_pure_dict(nnx.state(Attention(2, 6, normalize_qk=True, **kwargs, rngs=nnx.Rngs(5))))
        assert set(ours) - set(theirs) == set(list(window)[1:] if kwargs else [])
        jax.tree.map(np.testing.assert_array_equal, {name: ours[name] for name in theirs}, theirs)


def dense(kernel, bias, x, axes=1):
    return np.tensordot(x, kernel, axes) + bias


def attention_loop(layer, x):
    """The formula of `Attention`'s docstring, one query, head and slot at a time, and its weights. `x` has no batch."""
    window, grid = layer.window, x.shape[:-1]
    state = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(layer)))
    indices, visible = window.indices(grid), window.mask(grid)
    queries, k = window.query_grid(grid), np.array(window.size)
    query, key, value = (dense(**state[name], x=x) for name in ("query", "key", "value"))
    outputs = np.zeros((*queries, layer.num_heads, layer.head_dim))
    weights = np.zeros((*queries, layer.num_heads, int(np.prod(k))))
    for i in np.ndindex(*queries):
        at = tuple(np.array(i) * window.stride)
        for head in range(layer.num_heads):
            scores = np.full(len(weights[i][head]), -np.inf)
            values = np.zeros((len(scores), layer.head_dim))
            for n, slot in enumerate(np.ndindex(*k)):
                if not visible[i][slot]:
                    continue
                j = tuple(indices[i][slot])
                offset = tuple((np.array(j) - at) // window.dilation + k - 1)
                q = query[at][head]
                scores[n] = layer.head_dim**-0.5 * q @ key[j][head]
                values[n] = value[j][head]
                table = state.get("key_embedding")
                if isinstance(table, dict):
                    parts = [table[axis][head, o] for axis, o in enumerate(offset)]
                    scores[n] += q @ (np.concatenate(parts) if len(parts[0]) < len(q) else sum(parts))
                elif table is not None:
                    scores[n] += q @ table[(head if len(table) > 1 else 0, *offset)]
                if "relative_bias" in state:
                    scores[n] += state["relative_bias"][(head, *offset)]
            weight = np.exp(scores - scores.max())
            weights[i][head] = weight / weight.sum()
            outputs[i][head] = weights[i][head] @ values
    return dense(**state["out"], x=outputs, axes=2), weights


MASKED = Window((3, 2), boundary="mask")


@pytest.mark.core(1)
@pytest.mark.parametrize(
    ("window", "grid", "relative_bias", "key_embedding"),
    [
        (MASKED, (5, 4), False, False),
        (MASKED, (5, 4), True, False),
        (MASKED, (5, 4), False, True),
        (MASKED, (5, 4), False, "shared"),
        (MASKED, (5, 4), True, "factorized"),
        (Window((3, 3), stride=(2, 1), boundary="mask"), (5, 4), True, "factorized"),
        (Window((3, 2), dilation=(1, 2)), (4, 5), True, True),
        (Window(3, stride=2, boundary="valid"), (8,), True, True),
        (Window((2, 3, 1), block=(2, 1, 1)), (4, 3, 2), False, "factorized"),
        (MASKED, (5, 4), False, "decomposed"),
        (Window((2, 3, 1), block=(2, 1, 1)), (4, 3, 2), True, "decomposed"),
    ],
)
def test_attention_is_its_formula(window, grid, relative_bias, key_embedding):
    kwargs = {"window": window, "relative_bias": relative_bias, "key_embedding": key_embedding}
    # 12 features: a head's 6 are two or three axes' embeddings
    layer = randomized(Attention(2, 3, 12, 4, param_dtype=jnp.float64, **kwargs, rngs=nnx.Rngs(0)))
    x = normal(7, 2, *grid, 3)
    y, weights = nnx.jit(layer)(x), layer.weights(x)
    for n in range(2):
        expected, expected_weights = attention_loop(layer, np.asarray(x[n]))
        assert_close(y[n], expected, 1e-12)
        assert_close(weights[n], expected_weights, 1e-12)


def test_attention_gradients():
    """By finite differences, with respect to every parameter and the input."""
    layer = Attention(
        2, 3, 4, window=Window((3, 3), stride=2, boundary="mask"), relative_bias=True, key_embedding="factorized",
        normalize_qk=True, param_dtype=jnp.float64, rngs=nnx.Rngs(0),
    )  # fmt: skip
    graphdef, params, rest = nnx.split(randomized(layer), nnx.Param, ...)

    @jax.jit
    def run(params, x):
        return nnx.merge(graphdef, params, rest)(x)

    # finite differences of a smooth function in float64: the eps² of the third derivatives
    check_grads(run, (params, normal(7, 1, 4, 4, 3)), order=1, eps=1e-4, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", [(Conv, 3, 4, (3, 3)), (Attention, 1, 3, None, 4)])
def test_numpy_arrays_are_inputs(layer):
    make, *args = layer
    layer, x = make(*args, rank=2, rngs=nnx.Rngs(0)), np.ones((2, 5, 5, 3), np.float32)
    np.testing.assert_array_equal(layer(x), layer(jnp.asarray(x)))


def test_window_may_be_a_size():
    assert Attention(2, 4, window=5, rngs=nnx.Rngs(0)).window == Window(5)
    assert Attention(2, 4, window=(3, 5), rngs=nnx.Rngs(0)).window == Window((3, 5))


def test_arguments_reach_the_primitive():
    """A module is the primitive between projections: same inputs, same numbers."""
    window = Window((3, 3), boundary="mask")
    kwargs = {"normalize": "sigmoid", "logits_soft_cap": 2.0, "scale": 1.0}
    layer = randomized(Attention(2, 4, 6, window=window, **kwargs, out_projection=False, rngs=nnx.Rngs(0)))
    x, bias = normal(7, 2, 5, 4, 4, dtype=jnp.float32), normal(8, 5, 4, 2, 3, 3, dtype=jnp.float32)
    mask, segments = normal(9, 2, 5, 4) > -0.5, jnp.asarray(normal(10, 2, 5, 4) > 0, jnp.int32)
    call = {"bias": bias, "mask": mask, "segment_ids": segments}
    heads = attention(layer.query(x), layer.key(x), layer.value(x), window=window, **kwargs, **call)
    assert_close(layer(x, **call), heads.reshape(2, 5, 4, 6), TOLERANCE["float32"])
    reference = randomized(Attention(2, 4, 6, window=window, **kwargs, out_projection=False, rngs=nnx.Rngs(0)))
    reference.implementation = "reference"
    assert_close(layer(x, **call), reference(x, **call), TOLERANCE["float32"])
    with pytest.raises(ValueError, match="implementation"):
        Attention(2, 4, implementation="fast", rngs=nnx.Rngs(0))(x[0])


@pytest.mark.core(2)
@pytest.mark.parametrize("normalize", ["softmax", "relu", "sigmoid", "sparsemax", "none", lambda s, mask: mask * s**2])
@pytest.mark.parametrize("window", [None, Window(3, boundary="mask")], ids=["global", "local"])
def test_weights_make_the_output(normalize, window):
    layer = randomized(Attention(2, 4, 6, window=window, normalize=normalize, out_projection=False, rngs=nnx.Rngs(0)))
    x, mask = normal(7, 2, 6, 4, dtype=jnp.float32), jnp.arange(6) != 2
    mask = mask if window is None else jnp.broadcast_to(mask, (2, 6))
    value = layer.value(x)
    if window is not None:
        value = value[:, np.maximum(window.indices((6,))[..., 0], 0)]
    equation = "bihs,bshd->bihd" if window is None else "bihs,bishd->bihd"
    expected = jnp.einsum(equation, layer.weights(x, mask=mask), value).reshape(2, 6, 6)
    assert_close(layer(x, mask=mask), expected, 1e-5)


def test_sinks_and_grid_sizes_reach_the_primitive():
    window = Window((3, 3), boundary="mask")
    layer = Attention(2, 4, 6, window=window, sinks=True, out_projection=False, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer.sink_logits[...], 0)
    layer = randomized(layer)
    x, sizes = normal(7, 2, 5, 4, 4, dtype=jnp.float32), jnp.array([[3, 4], [5, 2]])
    given = {"window": window, "sink_logits": layer.sink_logits[...]}
    heads = lambda **call: attention(layer.query(x), layer.key(x), layer.value(x), **given, **call)
    assert_close(layer(x, grid_sizes=sizes), heads(grid_sizes=sizes).reshape(2, 5, 4, 6), TOLERANCE["float32"])
    row, column = np.moveaxis(np.maximum(window.indices((5, 4)), 0), -1, 0)
    mixed = jnp.einsum(
        "bijhrs,bijrshd->bijhd", layer.weights(x).reshape(2, 5, 4, 2, 3, 3), layer.value(x)[:, row, column]
    )
    assert_close(layer(x), mixed.reshape(2, 5, 4, 6), 1e-5)
    with pytest.raises(ValueError, match=r"sinks \(=True\) must be False with normalize='relu'"):
        Attention(2, 4, normalize="relu", sinks=True, rngs=nnx.Rngs(0))


def test_an_empty_batch_has_no_weights():
    for settings in ({"window": (3, 3)}, {"rank": 2}, {"grid": (4, 5), "relative_bias": True}):
        layer = lambda x, settings=settings: Attention(2, 8, **settings, rngs=nnx.Rngs(0)).weights(x)
        full = jax.eval_shape(layer, jnp.ones((1, 4, 5, 8))).shape
        assert jax.eval_shape(layer, jnp.ones((0, 4, 5, 8))).shape == (0, *full[1:])


def test_sown_weights():
    layer, x = Attention(2, 4, window=(3, 3), rngs=nnx.Rngs(0)), normal(7, 2, 4, 4, 4, dtype=jnp.float32)
    y, sown = nnx.capture(layer, nnx.Intermediate)(x, sow_weights=True)
    (weights,) = sown["attention_weights"].get_value()
    np.testing.assert_array_equal(weights, layer.weights(x))
    np.testing.assert_array_equal(y, layer(x))


def test_a_query_that_sees_nothing():
    layer = randomized(Attention(2, 4, rngs=nnx.Rngs(0)))
    x, mask = normal(7, 1, 3, 4, dtype=jnp.float32), jnp.array([[True] * 3, [False] * 3, [True] * 3])
    np.testing.assert_allclose(layer(x, mask=mask)[0, 1], layer.out.bias[...], rtol=1e-6)
    gradient = jax.grad(lambda x: layer(x, mask=mask)[0, 1].sum())(x)
    np.testing.assert_array_equal(gradient, 0)


def test_dropout_obeys_flax_rules():
    x = normal(7, 2, 5, 8, dtype=jnp.float32)
    layer = Attention(2, 8, dropout_rate=0.5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"Attention: with dropout_rate \(=0.5\), deterministic must be given"):
        layer(x)
    kept = layer(x, deterministic=True)
    layer.train()
    first, second = layer(x), layer(x)
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(layer(x, deterministic=True), kept)
    np.testing.assert_array_equal(layer(x, rngs=nnx.Rngs(dropout=1)), layer(x, rngs=nnx.Rngs(dropout=1)))
    np.testing.assert_array_equal(layer(x, rngs=nnx.Rngs(dropout=1)), layer(x, rngs=nnx.Rngs(dropout=1).dropout))
    np.testing.assert_array_equal(nnx.view(layer, deterministic=True)(x), kept)
    layer.eval()
    np.testing.assert_array_equal(layer(x), kept)
    homeless = Attention(2, 8, dropout_rate=0.5, deterministic=False, keep_rngs=False, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="Attention: with keep_rngs=False, a call that drops must be given rngs"):
        homeless(x)
    assert homeless(x, rngs=nnx.Rngs(1)).shape == x.shape


def test_dropout_keeps_the_mean():
    layer = Attention(2, 4, window=3, dropout_rate=0.3, deterministic=False, out_projection=False, rngs=nnx.Rngs(0))
    x = normal(7, 6, 4, dtype=jnp.float32)
    drawn = jax.jit(jax.vmap(lambda key: layer(x, rngs=nnx.Rngs(dropout=key))))(
        jax.random.split(jax.random.key(0), 4000)
    )
    error = drawn.std(0) / 4000**0.5
    # 24 means of 4000 draws: five standard errors are passed once in 70,000 runs, and the keys are fixed
    assert (jnp.abs(drawn.mean(0) - layer(x, deterministic=True)) < 5 * error).all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_heads": 3}, r"Attention: num_heads \(=3\) must divide qkv_features \(=8\)"),
        ({"num_heads": 0}, r"Attention: num_heads \(=0\) must be an int >= 1"),
        ({"num_kv_heads": 3}, r"Attention: num_kv_heads \(=3\) must divide num_heads \(=4\)"),
        ({"relative_bias": True}, r"Attention: relative_bias \(=True\) and key_embedding \(=False\) need a window"),
        ({"key_embedding": "row"}, r"Attention: key_embedding \(='row'\) must be one of .*'factorized'"),
        (
            {"window": (3, 3, 3), "key_embedding": "factorized"},
            r"Attention: with key_embedding='factorized', the window's 3 axes must divide head_dim \(=2\)",
        ),
        ({"normalize": "max"}, r"Attention: normalize \(='max'\) must be one of .*'softmax'.* or a function"),
        ({"dropout_rate": 1.0}, r"Attention: dropout_rate \(=1.0\) must be in \[0, 1\)"),
        (
            {"out_projection": False, "out_features": 5},
            r"Attention: without an output projection, out_features \(=5\) must be qkv_features \(=8\)",
        ),
        ({"window": 0}, r"Attention: window \(=0\) must be a Window, or an int >= 1"),
    ],
)
def test_attention_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Attention(**{"num_heads": 4, "in_features": 8, **kwargs}, rngs=nnx.Rngs(0))


def test_attention_input_errors():
    layer = Attention(2, 4, window=7, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"Attention: inputs_q \(=\[2, 9, 5\]\) must be \[\*batch, 1 axis of a grid, 4 features\]"
    ):
        layer(jnp.ones((2, 9, 5)))
    with pytest.raises(ValueError, match="Attention: inputs_v is given without inputs_k"):
        layer(jnp.ones((2, 9, 4)), None, jnp.ones((2, 9, 4)))
    with pytest.raises(ValueError, match=r"Attention: inputs_k \(=\[9, 3\]\) must be"):
        layer(jnp.ones((9, 4)), jnp.ones((9, 3)))


@pytest.mark.full
def test_transformations():
    """jit, vmap, checkpoint and jvp leave the numbers as they are, in float32 and bfloat16."""
    for dtype in (jnp.float32, jnp.bfloat16):
        conv = Conv(4, 4, (3, 3), dtype=dtype, rngs=nnx.Rngs(0))
        local = Attention(2, 4, window=(3, 3), key_embedding=True, dtype=dtype, rngs=nnx.Rngs(1))
        x = normal(7, 2, 5, 5, 4, dtype=dtype)
        run = lambda x, conv=conv, local=local: local(jax.nn.relu(conv(x)))
        expected, tolerance = run(x), TOLERANCE[str(jnp.dtype(dtype))]
        assert expected.dtype == dtype
        for transformed in (run, jax.vmap(run), jax.checkpoint(run), lambda x, f=run: jax.jvp(f, (x,), (x,))[0]):
            compiled = jax.jit(transformed, compiler_options={"xla_backend_optimization_level": 0})
            assert_close(compiled(x), expected, tolerance)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_a_training_step_lowers_the_loss(dtype):
    class Net(nnx.Module):
        def __init__(self, rngs):
            tables = {"relative_bias": True, "key_embedding": True}
            self.conv = Conv(1, 8, (3, 3), dtype=dtype, rngs=rngs)
            self.attention = Attention(2, 8, window=(3, 3), **tables, dtype=dtype, rngs=rngs)

        def __call__(self, x):
            return self.attention(jax.nn.relu(self.conv(x))).mean(axis=(1, 2))

    net = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, optax.adam(1e-2), wrt=nnx.Param)
    x, labels = normal(7, 16, 6, 6, 1, dtype=jnp.float32), jnp.arange(16) % 8

    @nnx.jit
    def step(net, optimizer):
        def loss_fn(net):
            logits = net(x)
            assert logits.dtype == dtype
            return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()

        loss, gradients = nnx.value_and_grad(loss_fn)(net)
        optimizer.update(net, gradients)
        return loss, gradients

    losses_and_gradients = [step(net, optimizer) for _ in range(5)]
    assert losses_and_gradients[-1][0] < losses_and_gradients[0][0]
    # every parameter learns, except the key's bias, which softmax does not see (and the first tables' unused rows)
    for path, gradient in nnx.to_flat_state(losses_and_gradients[-1][1]):
        assert path == ("attention", "key", "bias") or jnp.abs(gradient[...]).max() > 0, path

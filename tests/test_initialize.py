"""`init_as_cnn`: what each way promises, measured on the layers that it has set."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from test_nn import normal

import jaxattn
from jaxattn import nn
from jaxattn.equivalence import error_bound, init_as_cnn


def gpsa(features, heads, rank, *, head_dim=None, param_dtype=jnp.float64):
    width = None if head_dim is None else heads * head_dim
    return nn.GPSA(heads, features, width, rank=rank, identity_value=False, param_dtype=param_dtype, rngs=nnx.Rngs(0))


def without_a_square():
    layer = gpsa(16, 4, 2)
    layer.position = nnx.Param(jnp.zeros((8, 3)))
    return layer


@pytest.mark.core(1)
@pytest.mark.parametrize("alpha", [8.0, 16.0])
@pytest.mark.parametrize(("grid", "heads"), [((7,), 5), ((5, 4), 9), ((4, 4), 4), ((3, 2, 3), 8)])
def test_gpsa_is_a_convolution(grid, heads, alpha):
    """With a closed gate: by the taps W_V W_O, with edge padding, which is the limit; borders included."""
    rank, features = len(grid), 2 * heads
    layer = gpsa(features, heads, rank)
    init_as_cnn(layer, "gpsa", alpha=alpha, gate=50.0)
    side = round(heads ** (1 / rank))
    kernel = jnp.einsum("chd,hdo->hco", layer.value[...], layer.out[...])
    np.testing.assert_allclose(layer.value[...].reshape(features, features), np.eye(features))
    x = normal(5, *grid, features)
    low = (side - 1) // 2
    padded = jnp.asarray(np.pad(x, [(low, side - 1 - low)] * rank + [(0, 0)], mode="edge"))
    letters = "XYZ"[:rank]
    expected = lax.conv_general_dilated(
        padded[None],
        kernel.reshape(*(side,) * rank, features, features),
        (1,) * rank,
        "VALID",
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
    )[0]
    bound = 2 * error_bound(alpha, rank) * jnp.abs(kernel).sum((0, 1)).max() * jnp.abs(x).max()
    error = jnp.abs(jax.jit(layer)(x) - expected).max()
    assert error <= bound
    assert error >= bound / 1000  # the bound says something


def test_gpsa_as_in_the_paper():
    """α = 1 and λ = 1: a soft start, with 68 % of a head's weight off its token and 73 % of the gate positional."""
    layer = gpsa(18, 9, 2)
    init_as_cnn(layer, "gpsa")
    np.testing.assert_array_equal(layer.gate[...], np.ones(9))
    np.testing.assert_array_equal(layer.position[...][0], [-1, -2, -2])  # -α(1, -2Δ₁, -2Δ₂) at Δ = (-1, -1)
    np.testing.assert_array_equal(layer.position[...][4], [-1, 0, 0])
    assert round(error_bound(1.0, 2), 2) == 0.68
    assert round(float(jax.nn.sigmoid(layer.gate[0])), 2) == 0.73


@pytest.mark.core(1)
@pytest.mark.parametrize(("window", "heads"), [((5,), 3), ((5, 4), 10), ((3, 3, 3), 6)])
def test_impulse_by_a_relative_bias(window, heads):
    rank = len(window)
    layer = nn.Attention(
        heads,
        heads,
        window=jaxattn.Window(window, boundary="mask"),
        relative_bias=True,
        param_dtype=jnp.float64,
        rngs=nnx.Rngs(0),
    )
    init_as_cnn(layer, "impulse", alpha=6.0)
    grid = (5, 5, 5)[:rank]
    weights = jax.jit(layer.weights)(normal(6, *grid, heads))[(2, 2, 2)[:rank]]  # [heads, slots]
    offsets = np.stack(np.meshgrid(*[np.arange(k) - k // 2 for k in window], indexing="ij"), -1).reshape(-1, rank)
    wanted = np.stack(np.meshgrid(*[np.arange(-1, 2)] * rank, indexing="ij"), -1).reshape(-1, rank)
    for h in range(heads):
        slot = int(weights[h].argmax())
        np.testing.assert_array_equal(offsets[slot], wanted[h % len(wanted)])
        assert 1 - weights[h, slot] <= error_bound(6.0, rank)


@pytest.mark.parametrize("kind", [nn.Attention, nnx.MultiHeadAttention])
def test_impulse_by_positions(kind):
    """Linearly independent positions: the weights are the softmax of -α‖j - i - Δ_h‖² over all tokens, to rounding."""
    grid, alpha = (4, 5), 2.0
    features = {"in_features": 36, "param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
    layer = kind(9, **features) if kind is nn.Attention else kind(9, **features, decode=False)
    positions = normal(7, *grid, 36)
    init_as_cnn(layer, "impulse", alpha=alpha, positions=positions)
    tokens = positions.reshape(20, 36)
    query, key = layer.query(tokens), layer.key(tokens)
    weights = jax.nn.softmax(jnp.einsum("ihd,jhd->hij", query, key) * query.shape[-1] ** -0.5)
    token = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, 2)
    wanted = np.stack(np.meshgrid(*[np.arange(-1, 2)] * 2, indexing="ij"), -1).reshape(-1, 2)
    for h in range(9):
        scores = -alpha * ((token[None] - token[:, None] - wanted[h]) ** 2).sum(-1)
        expected = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        np.testing.assert_allclose(weights[h], expected, atol=1e-9)


@pytest.mark.parametrize("kind", [nn.Attention, nnx.MultiHeadAttention])
@pytest.mark.parametrize("heads", [1, 4])
def test_mimetic(kind, heads):
    """The products as described: a diagonal of ±, noise of the right size, shared evenly by the factors."""
    features = 64
    kwargs = {"in_features": features, "param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
    layer = kind(heads, **kwargs) if kind is nn.Attention else kind(heads, **kwargs, decode=False)
    init_as_cnn(layer, "mimetic", rngs=nnx.Rngs(1))
    query, key, value, out = (np.asarray(getattr(layer, name).kernel[...]) for name in ("query", "key", "value", "out"))
    off = ~np.eye(features, dtype=bool)
    mixed = np.einsum("chd,hdo->co", value, out)  # all heads together have full rank: 0.4 Z - 0.4 I itself
    np.testing.assert_allclose(np.diag(mixed).mean(), -0.4, atol=0.03)
    np.testing.assert_allclose(mixed[off].std(), 0.4 / np.sqrt(features), rtol=0.05)
    np.testing.assert_allclose(mixed[off].mean(), 0, atol=0.005)
    for h in range(heads):
        product = query[:, h] @ key[:, h].T
        diagonal, noise = np.diag(product).mean(), product[off].std()
        assert diagonal > 3 * noise  # like attends to like
        np.testing.assert_allclose(product[off].mean(), 0, atol=0.01)
        if heads == 1:
            np.testing.assert_allclose(diagonal, 0.7, atol=0.05)
            np.testing.assert_allclose(noise, 0.7 / np.sqrt(features), rtol=0.05)
        scale = np.linalg.svd(product, compute_uv=False)[: features // heads]
        np.testing.assert_allclose(np.linalg.norm(query[:, h], axis=0) ** 2, scale, rtol=1e-8)
        np.testing.assert_allclose(np.linalg.norm(key[:, h], axis=0) ** 2, scale, rtol=1e-8)
    heads_apart = [query[:, h] @ key[:, h].T for h in range(heads)]
    assert heads == 1 or np.abs(heads_apart[0] - heads_apart[1]).max() > 0.1  # each its own noise


@pytest.mark.full
@pytest.mark.parametrize(
    ("how", "dtype"), [("gpsa", jnp.bfloat16), ("impulse", jnp.float32), ("mimetic", jnp.bfloat16)]
)
def test_training_can_leave_it(how, dtype):
    """Every parameter has a gradient, but for the content that a relative impulse starts without."""
    kwargs = {"gpsa": {}, "impulse": {"alpha": 1.0}, "mimetic": {"rngs": nnx.Rngs(1)}}[how]
    if how == "gpsa":
        layer, dead = gpsa(8, 4, 2), set()
        for _, parameter in nnx.iter_graph(layer):
            if isinstance(parameter, nnx.Param):
                parameter.set_value(parameter[...].astype(dtype))
    else:
        layer = nn.Attention(4, 8, window=(3, 3), relative_bias=True, param_dtype=dtype, rngs=nnx.Rngs(0))
        dead = {"key"} if how == "impulse" else set()
    init_as_cnn(layer, how, **kwargs)
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    assert all(p.dtype == dtype for p in jax.tree.leaves(params))
    x = normal(8, 5, 4, 8)
    x = x.astype(dtype) if how != "gpsa" else x

    @jax.jit
    def gradient(params):
        return jax.grad(lambda params: jnp.square(nnx.merge(graphdef, params, rest)(x) - 1).sum().astype(float))(params)

    for name, found in nnx.to_pure_dict(gradient(params)).items():
        for leaf in [found["kernel"]] if isinstance(found, dict) else [found]:
            assert jnp.isfinite(leaf).all()
            assert (leaf != 0).any() != (name in dead), name


def attention(**kwargs):
    return nn.Attention(**{"num_heads": 4, "in_features": 8, "rngs": nnx.Rngs(0), **kwargs})


@pytest.mark.parametrize(
    ("make", "how", "kwargs", "message"),
    [
        (attention, "cnn", {}, r"how \(='cnn'\) must be one of 'gpsa', 'impulse', 'mimetic'"),
        (attention, "impulse", {"alpha": 0}, r"alpha \(=0\) must be None or a finite number > 0"),
        (attention, "gpsa", {}, r"attention \(=Attention\) must have the parameter 'position'"),
        (without_a_square, "gpsa", {}, r"num_heads \(=8\) must be .* the power of 2 .*: 9 or 16"),
        (lambda: gpsa(9, 9, 2, head_dim=2), "gpsa", {}, r"heads \(=9\) · head_dim \(=2\) must be 9"),
        (attention, "impulse", {}, r"positions \(=None\) must be given .* no relative_bias"),
        (lambda: attention(window=(2, 3), relative_bias=True), "impulse", {}, r"size \(=3\) must fit in .*\[2, 3\]"),
        (lambda: attention(window=3, relative_bias=True), "impulse", {"size": 0}, r"size \(=0\) must be an int >= 1"),
        (
            attention,
            "impulse",
            {"positions": np.ones((3, 3, 5))},
            r"positions .* as many features as query \(=8\)",
        ),
        (
            attention,
            "impulse",
            {"positions": np.ones((3, 3, 8))},
            r"head_dim \(=2\) must be at least 3 for positions",
        ),
        (attention, "mimetic", {}, r"rngs \(=None\) must be given"),
        (lambda: attention(out_features=6), "mimetic", {"rngs": nnx.Rngs(0)}, "as many features in as out"),
        (lambda: attention(num_kv_heads=2), "mimetic", {"rngs": nnx.Rngs(0)}, "must have as many heads as query"),
        (
            lambda: attention(normalize_qk=True),
            "mimetic",
            {"rngs": nnx.Rngs(0)},
            r"normalize_qk \(=True\) must be",
        ),
        (lambda: attention(rotary=True), "mimetic", {"rngs": nnx.Rngs(0)}, "rotary must be left out with"),
    ],
)
def test_refuses(make, how, kwargs, message):
    with pytest.raises(ValueError, match=f"init_as_cnn: .*{message}"):
        init_as_cnn(make(), how, **kwargs)

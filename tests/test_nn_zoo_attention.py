"""The modules of the zoo's attention layers: each is its formula, trains, and begins where its paper begins."""

from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import layers
import numpy as np
import pytest
from flax import nnx
from layers.attention_loops import attend, directional
from layers.shifted import shifted_window_attention
from layers.sliding import halo_attention, neighborhood_attention, sasa
from zoo_names import zoo_params

from jaxattn import nn, zoo
from jaxattn.window import Window

ATTENTION = layers.of("attention").values()
# module: its arguments, the input's shape, and the loop that it is
LAYERS = {layer.module: layer.step for layer in ATTENTION if layer.step is not None}
compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # each is run once or twice
# The rounding of a few products of numbers near one, of the largest entry.
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 5e-2}


def drawn(module, *args, **kwargs):
    """A module's graph and parameters, all of them drawn at random, so that no zero bias hides a mistake."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: module(*args, **kwargs, rngs=nnx.Rngs(0))), nnx.Param)
    rng = np.random.default_rng(0)
    return graphdef, jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) / 2, p.dtype), params)


@pytest.mark.core(1)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("module", LAYERS, ids=lambda module: module.__name__)
def test_a_training_step(module, dtype):
    """A jitted step: its output is the formula's, its loss finite, and every parameter gets a gradient."""
    kwargs, shape, loop = LAYERS[module]
    graphdef, params = drawn(module, **kwargs, dtype=dtype)
    x = jnp.asarray(np.random.default_rng(9).normal(size=(1, *shape)), dtype)

    @compiled
    def step(params, x):
        def loss_of(params):
            y = nnx.merge(graphdef, params)(x)
            return (y.astype(jnp.float32) ** 2).mean(), y

        (loss, y), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        return loss, y, gradients, jax.tree.map(lambda p, g: p - 0.01 * g, params, gradients)

    with jax.numpy_dtype_promotion("strict"):
        loss, y, gradients, stepped = step(params, x)
    assert y.dtype == dtype
    assert step(stepped, x)[0] < loss < np.inf
    for path, gradient in nnx.to_flat_state(gradients):
        # softmax does not see the key's bias, which adds the same to all of a query's scores
        assert path in (("key_bias",), ("key", "bias")) or abs(gradient[...]).max() > 0, path
    exact = {name: p.astype(float) for name, p in zoo_params(nnx.merge(graphdef, params)).items()}
    expected = loop(np.asarray(x[0], float), exact)
    assert abs(y[0].astype(float) - expected).max() < TOLERANCE[dtype] * max(1, abs(expected).max())


@pytest.mark.core(4)
@pytest.mark.parametrize("module", LAYERS, ids=lambda module: module.__name__)
def test_precision_reaches_every_product(module):
    kwargs, shape, _ = LAYERS[module]
    graphdef, params = drawn(module, **kwargs, precision="highest")
    run = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))
    lowered = run.lower(params, jnp.ones(shape)).as_text()
    products = [line for line in lowered.splitlines() if "dot_general" in line]
    assert len(products) >= 4
    assert all("HIGHEST" in line for line in products)


def test_where_gpsa_begins():
    """Centres around the token, α and λ as given, and the value the identity."""
    layer = nn.GPSA(9, 18, locality_strength=2.0, gate=0.5, rngs=nnx.Rngs(0))
    for head, (d1, d2) in enumerate((a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)):
        np.testing.assert_array_equal(layer.position[head], [-2, 4 * d1, 4 * d2])
    np.testing.assert_array_equal(layer.gate[...], 0.5)
    np.testing.assert_array_equal(layer.value[...].reshape(18, 18), np.eye(18))
    np.testing.assert_array_equal(nn.GPSA(3, 6, rank=1, rngs=nnx.Rngs(0)).position[...], [[-1, -2], [-1, 0], [-1, 2]])
    np.testing.assert_array_equal(nn.GPSA(8, 8, rank=3, rngs=nnx.Rngs(0)).position[1], [-1, -1, -1, 1])
    drawn_value = nn.GPSA(4, 8, 4, identity_value=False, rngs=nnx.Rngs(0)).value
    assert drawn_value.shape == (8, 4, 1)


def test_a_gpsa_head_leaves_two_thirds_of_its_weight_elsewhere():
    """d'Ascoli et al.'s α = 1 is soft: 1 - θ(1)^-2 with θ(α) = Σ_m exp(-α m²), far from the border."""
    layer = nn.GPSA(1, 1, gate=60.0, out_features=1, rngs=nnx.Rngs(0))
    layer.out[...] = jnp.ones((1, 1, 1), jnp.float32)
    x = jnp.zeros((15, 15, 1), jnp.float32).at[7, 7].set(1)
    theta = sum(np.exp(-float(m**2)) for m in range(-9, 10))
    np.testing.assert_allclose(layer(x)[7, 7, 0], theta**-2, rtol=1e-5)
    assert 0.67 < 1 - theta**-2 < 0.69


def test_projections_begin_with_the_fans_of_a_matrix():
    """lecun_normal of 1/in_features, whatever the heads, and in tables head_dim ** -0.5."""
    layer = nn.BoTNetAttention(4, 64, 128, 64, grid=(64, 64), out_projection=True, rngs=nnx.Rngs(0))
    for kernel, fan in ((layer.query, 64), (layer.out, 128), (layer.embedding_0, 32)):
        np.testing.assert_allclose(kernel[...].std(), fan**-0.5, rtol=0.05)
    spread = nn.GlobalAttention(4, 64, 128, rngs=nnx.Rngs(0)).query.kernel[...].std()
    np.testing.assert_allclose(spread, (2 / (64 + 128)) ** 0.5, rtol=0.05)  # Glorot's


@pytest.mark.parametrize(("make", "message"), [refused for layer in ATTENTION for refused in layer.refused])
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make(rngs=nnx.Rngs(0))


def test_input_errors():
    layer = nn.CoAtNetAttention(2, 8, grid=(3, 4), rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"inputs_q \(=\[3, 4, 5\]\) must be \[\*batch, 2 axes of a grid, 8 features\]"
    ):
        layer(jnp.ones((3, 4, 5)))
    for other in ((4, 4), (3, 3)):
        with pytest.raises(
            ValueError, match=r"inputs_q .* must be \[\*batch, \*grid, 8 features\] with grid \(=\(3, 4\)\)"
        ):
            layer(jnp.ones((*other, 8)))


NAMED = {  # module: its function, and what both take
    nn.GlobalAttention: (zoo.global_attention, {"rank": 2}),
    nn.SASA: (zoo.sasa, {"window": Window((3, 3), boundary="zero", stride=2)}),
    nn.HaloAttention: (zoo.halo_attention, {"block": (2, 3), "halo": 1, "boundary": "mask"}),
    nn.NeighborhoodAttention: (zoo.neighborhood_attention, {"window": (3, 2)}),
    nn.ShiftedWindowAttention: (zoo.shifted_window_attention, {"window": (2, 4), "shift": 1}),
    nn.CoAtNetAttention: (zoo.coatnet_attention, {}),
}


@pytest.mark.core(4)
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("module", NAMED, ids=lambda module: module.__name__)
def test_a_named_attention_is_its_function(module, scale):
    """To the rounding of float64, with biases and an output projection, and a scale that is the same in both."""
    function, kwargs = NAMED[module]
    own = {"grid": (4, 6)} if module is nn.CoAtNetAttention else {}
    bare = module in (nn.SASA, nn.HaloAttention)
    projections = {"use_bias": True, "out_projection": True} if bare else {}
    graphdef, params = drawn(module, 2, 6, 8, 5, **kwargs, **own, **projections, scale=scale, param_dtype=jnp.float64)
    layer = nnx.merge(graphdef, params)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 6, 6)))
    both = compiled(lambda x: (layer(x), function(x, zoo_params(layer), **kwargs, scale=scale)))
    np.testing.assert_allclose(*both(x), atol=1e-12)


@pytest.mark.core(1)
@pytest.mark.parametrize("module", NAMED, ids=lambda module: module.__name__)
def test_a_named_attention_has_what_attention_has(module):
    """A mask, grouped heads, dropout and weights."""
    own = {"grid": (4, 6)} if module is nn.CoAtNetAttention else {}
    layer = module(4, 8, **NAMED[module][1], **own, num_kv_heads=2, dropout_rate=0.5, rngs=nnx.Rngs(0))
    assert layer.key.kernel.shape == (8, 2, 2)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 4, 6, 8)), jnp.float32)
    mask = jnp.arange(24) > 0 if module is nn.GlobalAttention else ((jnp.arange(24) > 0).reshape(1, 4, 6), None)

    @compiled
    def run(x):
        dropped = layer(x, deterministic=False, rngs=nnx.Rngs(dropout=0))
        masked = layer(x, mask=mask, deterministic=True)
        return layer(x, deterministic=True), dropped, masked, layer.weights(x), layer.weights(x, mask=mask)

    whole, dropped, masked, weights, seen = run(x)
    assert abs(dropped - whole).max() > 0
    assert weights.shape[:-2] == whole.shape[:-1]
    assert (seen == 0).sum() > (weights == 0).sum()
    assert abs(masked - whole).max() > 0


SEEING = {  # a layer, and the loops that it is
    nn.NeighborhoodAttention: ({"window": (3, 2)}, partial(neighborhood_attention, size=(3, 2))),
    nn.SASA: ({"window": Window((3, 2), boundary="mask")}, partial(sasa, size=(3, 2))),
    nn.HaloAttention: ({"block": (2, 2), "halo": 1}, partial(halo_attention, block=(2, 2), halo=(1, 1))),
    nn.ShiftedWindowAttention: (
        {"window": (2, 4), "shift": 1, "boundary": ("wrap", "mask")},
        partial(shifted_window_attention, size=(2, 4), shift=(1, 1), wrap=(True, False)),
    ),
}


def test_padded_images_documents_and_shared_heads(monkeypatch):
    """A mask of keys and segments, other for each entry, with key heads that queries share."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 4, 6, 8))
    there, ids = rng.random((2, 4, 6)) < 0.8, rng.integers(0, 2, (2, 4, 6)) + 7
    layers = {}
    for module, (kwargs, _) in SEEING.items():
        layers[module] = drawn(module, 4, 8, num_kv_heads=2, **kwargs, scale=0.5, param_dtype=jnp.float64)

    @compiled
    def run(x):
        return [nnx.merge(*parts)(x, **given) for parts in layers.values()]

    given = {"mask": (there, None), "segment_ids": ids}
    for (module, (_, loop)), y in zip(SEEING.items(), run(x), strict=True):
        params = zoo_params(nnx.merge(*layers[module]))
        turned = partial(np.roll, shift=-1 if module is nn.ShiftedWindowAttention else 0, axis=1)  # as its loop is
        shared = {n: np.repeat(p, 2, -2) for n, p in params.items() if n.startswith(("key", "value"))}
        for n in range(2):
            seen, own = turned(there)[n], turned(ids)[n]
            sees = lambda i, j, seen=seen, own=own: seen[j] and own[i] == own[j]

            def masked(x, params, neighbours, score, sees=sees):
                of = lambda i: [(j, inside) for j, inside in neighbours(i) if not inside or sees(i, j)]
                return attend(x, params, of, score)

            monkeypatch.setattr(f"{loop.func.__module__}.attend", masked)
            expected = loop(x[n], params | shared, scale=0.5)
            np.testing.assert_allclose(y[n], expected, atol=1e-10, err_msg=module.__name__)


@pytest.mark.full
def test_what_is_by_slot_turns_with_the_grid():
    """On a torus, Swin's shift is a roll: of the input, and of a bias and a mask of each token's slots."""
    rng, make = np.random.default_rng(0), partial(nn.ShiftedWindowAttention, 2, 4, window=(2, 3), boundary="wrap")
    shifted, still = (make(shift=shift, param_dtype=jnp.float64, rngs=nnx.Rngs(0)) for shift in ((1, 2), 0))
    x, bias, mask = rng.normal(size=(2, 4, 6, 4)), rng.normal(size=(4, 6, 2, 2, 3)), rng.random((4, 6, 1, 2, 3)) < 0.8

    @compiled
    def run(x, bias, mask):
        given, rolled = {"bias": bias, "mask": (None, mask)}, lambda a, first, by: jnp.roll(a, by, (first, first + 1))
        back = {"bias": rolled(bias, 0, (-1, -2)), "mask": (None, rolled(mask, 0, (-1, -2)))}
        of = lambda layer, x, given: (layer(x, **given), layer.weights(x, **given), layer(x, bias=bias[0, 0]))
        return of(shifted, x, given), [rolled(y, 1, (1, 2)) for y in of(still, rolled(x, 1, (-1, -2)), back)]

    for found, expected in zip(*run(x, bias, mask), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-12)
    with pytest.raises(
        ValueError, match=r"ShiftedWindowAttention: inputs_k .* must have the batch and the grid of inp"
    ):
        still(x, x[:1])


CLIPPED = {  # a layer whose window is larger than its grid, and the loops that it is, with the same parameters
    "nearest, dilated": (
        nn.NeighborhoodAttention,
        {"window": Window((7, 5), dilation=(1, 2), stride=(2, 1))},
        lambda x, p: neighborhood_attention(x, p, (7, 5), (1, 2), (2, 1), sees=(4, 3)),
    ),
    "dilated by more than there is": (
        nn.NeighborhoodAttention,
        {"window": Window((3, 5), dilation=(9, 1))},
        lambda x, p: neighborhood_attention(x, p, (3, 5), (4, 1), sees=(1, 5)),
    ),
    "cut off at the border": (
        nn.SASA,
        {"window": Window((9, 6), boundary="mask", stride=2), "scale": 0.5},
        lambda x, p: sasa(x, p, (9, 6), scale=0.5, stride=2),
    ),
    "zeros outside": (
        nn.SASA,
        {"window": Window((5, 9), boundary=("zero", "mask"))},
        lambda x, p: sasa(x, p, (5, 9), zeros=(True, False)),
    ),
}


@pytest.mark.core(1)
@pytest.mark.parametrize("name", CLIPPED)
def test_a_window_larger_than_the_grid_is_cut(name):
    """Values, and the derivative along a direction of every parameter; what no query reads of a table gets none."""
    module, kwargs, loop = CLIPPED[name]
    graphdef, params = drawn(module, 2, 8, 8, **kwargs, clip=True, param_dtype=jnp.float64)
    x = np.random.default_rng(1).normal(size=(4, 7 if "dilated" in name else 3, 8))
    with pytest.raises(ValueError, match=r"must have .* tokens or more") if module is not nn.SASA else nullcontext():
        module(2, 8, **kwargs, rngs=nnx.Rngs(0))(jnp.asarray(x, jnp.float32))

    @jax.jit
    def run(params, x):
        y, pull = jax.vjp(lambda params: nnx.merge(graphdef, params)(x), params)
        return y, pull(jnp.cos(y))[0], nnx.merge(graphdef, params).weights(x).sum(-1)

    y, gradients, sums = run(params, x)
    arrays, slopes = (zoo_params(nnx.merge(graphdef, p)) for p in (params, gradients))
    expected = loop(x, arrays)
    np.testing.assert_allclose(y, expected, atol=1e-10)
    np.testing.assert_allclose(sums, 1, atol=1e-12)
    for n, (operand, array) in enumerate(arrays.items()):
        direction = np.random.default_rng(n).normal(size=array.shape)
        along = lambda moved, operand=operand: (np.cos(expected) * loop(x, {**arrays, operand: moved})).sum()
        slope = directional(along, array, direction)
        np.testing.assert_allclose((slopes[operand] * direction).sum(), slope, atol=1e-10 * max(1, abs(slope)))

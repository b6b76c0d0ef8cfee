"""Vision transformers: their arithmetic against loops, what is random in training, remat, and that they learn."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxattn import plots
from jaxattn.models import ViT, convit_ti, cordonnier, tiny, vit_small32, vit_ti, vit_tiny8
from jaxattn.models.residual import depth_rates, drop_path
from jaxattn.models.vit_tokens import sincos_2d

FAST_COMPILATION = {"xla_backend_optimization_level": 0}  # each is run a few times at most
SIZES = {
    "image_size": (6, 8),
    "patch_size": 2,
    "in_features": 2,
    "num_classes": 3,
    "width": 8,
    "depth": 2,
    "num_heads": 4,
    "mlp_dim": 12,
}
SETTINGS = {
    "global": {},
    "local": {"mix": "local", "window": (3, 2), "class_token": False, "position": "sincos2d"},
    "quadratic": {"mix": "quadratic", "class_token": False, "position": "none", "norm": "post"},
    "convit": {"mix": ("gpsa", "global"), "qkv_bias": False},
    "mean": {"mix": ("global", "local"), "window": 3, "class_token": False, "qkv_bias": False},
    "pooled": {"pool": "mean", "position": "none"},
}
settings = pytest.mark.parametrize("setting", SETTINGS)


def small(setting, **kwargs):
    return ViT(**{**SIZES, **SETTINGS[setting], "rngs": nnx.Rngs(0), **kwargs})


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def compiled(model):
    """images, seed -> logits, with what is random drawn from the seed; the model stays as it is."""
    graphdef, state = nnx.split(model)

    @partial(jax.jit, compiler_options=FAST_COMPILATION)
    def run(images, seed):
        return nnx.merge(graphdef, state, copy=True)(images, rngs=nnx.Rngs(dropout=jax.random.key(seed)))

    return lambda images, seed=0: np.asarray(run(images, seed))


# The networks as their papers have them, one token and one head at a time.


def linear(p, x):
    """From the last axis, or for a kernel [heads, head_dim, features] from the last two."""
    axes = 2 if p["kernel"].ndim == 3 and x.ndim >= 2 and x.shape[-2:] == p["kernel"].shape[:2] else 1
    return np.tensordot(x, p["kernel"], axes) + p.get("bias", 0)


def norm(p, x):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * p["scale"] + p["bias"]


def softmax(scores):
    weights = np.exp(np.asarray(scores) - np.max(scores))
    return weights / weights.sum()


def attend(p, x, near, bias):
    """x [tokens, features]; query i sees near(i), with bias(head, i, j) added to its scores."""
    query, key, value = (linear(p[name], x) for name in ("query", "key", "value"))
    y = np.zeros_like(value)
    for i, head in np.ndindex(y.shape[:2]):
        seen = near(i)
        scores = [query[i, head] @ key[j, head] / np.sqrt(y.shape[2]) + bias(head, i, j) for j in seen]
        y[i, head] = softmax(scores) @ value[seen, head]
    return linear(p["out"], y)


def local(p, x, grid, window):
    """Each window stands as near to centred on its query as it fits in the grid (NAT)."""
    places = list(np.ndindex(*grid))

    def near(i):
        start = [min(max(q - k // 2, 0), n - k) for q, k, n in zip(places[i], window, grid, strict=True)]
        return [j for j, at in enumerate(places) if all(0 <= at[a] - start[a] < window[a] for a in (0, 1))]

    def bias(head, i, j):
        row, column = (places[j][a] - places[i][a] + window[a] - 1 for a in (0, 1))
        return p["relative_bias"][head, row, column]

    return attend(p, x, near, bias)


def quadratic(p, x, grid):
    places, y = np.array(list(np.ndindex(*grid))), np.zeros_like(x)
    for i in range(len(x)):
        for head, (centre, alpha) in enumerate(zip(p["centre"], p["alpha"], strict=True)):
            weights = softmax([-alpha * ((place - places[i] - centre) ** 2).sum() for place in places])
            y[i] += weights @ x @ p["value"][:, head]
    return y + p["bias"]


def gpsa(p, x, grid):
    places, heads = list(np.ndindex(*grid)), len(p["gate"])
    query, key, value = (np.tensordot(x, p[name], 1) for name in ("query", "key", "value"))
    y = np.zeros_like(value)
    for i, head in np.ndindex(len(x), heads):
        offsets = [(a - places[i][0], b - places[i][1]) for a, b in places]
        where = softmax([p["position"][head] @ (a * a + b * b, a, b) for a, b in offsets])
        what = softmax(key[:, head] @ query[i, head] / np.sqrt(query.shape[2]))
        gate = 1 / (1 + np.exp(-p["gate"][head]))
        y[i, head] = ((1 - gate) * what + gate * where) @ value[:, head]
    return np.tensordot(y, p["out"], 2) + p["out_bias"]


def mixed(p, x, mix, grid, window):
    if mix == "quadratic":
        return linear(p["out"], quadratic(p["layer"], x, grid))
    if mix == "gpsa":
        return gpsa(p["layer"], x, grid)
    if mix == "local":
        return local(p["layer"], x, grid, window)
    return attend(p["layer"], x, lambda i: list(range(len(x))), lambda head, i, j: 0.0)


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def expected_logits(p, image, *, mix="global", window=7, norm_at="pre", position="learned", pool="token", **_):
    """The logits of one image, from parameters by name; SIZES' network with these settings."""
    mixes = (mix,) * 2 if isinstance(mix, str) else mix
    window = (window, window) if isinstance(window, int) else window
    grid, joins = (3, 4), max([n + 1 for n, m in enumerate(mixes) if m != "global"], default=0)
    patches = image.reshape(3, 2, 4, 2, 2).transpose(0, 2, 1, 3, 4).reshape(12, 2, 2, 2)
    x = np.tensordot(patches, p["patches"]["kernel"], 3) + p["patches"]["bias"]
    x = x + (p["position"].reshape(12, 8) if position == "learned" else 0)
    for token, (row, column) in enumerate(np.ndindex(grid) if position == "sincos2d" else ()):
        angles = [at / 10_000 ** (m / 2) for at in (column, row) for m in (0, 1)]
        x[token] += [f(a) for pair in (angles[:2], angles[2:]) for f in (math.sin, math.cos) for a in pair]
    for n, block in enumerate(p["blocks"][n] for n in range(2)):
        if "class_token" in p and n == joins:
            x = np.concatenate([(p["class_token"] + p.get("class_position", 0))[None], x])
        mixing = lambda x, mix=mixes[n], p=block["mix"]: mixed(p, x, mix, grid, window)
        mlp = lambda x, p=block["mlp"]: linear(p["second"], gelu(linear(p["first"], x)))
        for branch, scale in ((mixing, block["mix_norm"]), (mlp, block["mlp_norm"])):
            x = x + branch(norm(scale, x)) if norm_at == "pre" else norm(scale, x + branch(x))
    x = norm(p["norm"], x) if norm_at == "pre" else x
    tokens = x[1:] if "class_token" in p else x
    return linear(p["head"], x[0] if pool == "token" and "class_token" in p else tokens.mean(0))


@pytest.mark.core(2)
@settings
def test_values_and_gradients_are_the_formulas(setting):
    """Forward, reverse and forward-mode, in three directions of all parameters and the image at once; float64."""
    model = nnx.eval_shape(lambda: small(setting, param_dtype=jnp.float64))
    graphdef, weights, rest = nnx.split(model, nnx.Param, ...)
    rng = np.random.default_rng(0)
    draw = lambda tree: jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), tree)
    # of order one, so that everything matters; α positive
    weights = jax.tree.map(lambda leaf: leaf / 2, draw(weights))
    for block in weights["blocks"].values() if setting == "quadratic" else ():
        block["mix"]["layer"]["alpha"].set_value(np.abs(block["mix"]["layer"]["alpha"].get_value()))
    point, cotangent = (weights, rng.normal(size=(6, 8, 2))), rng.normal(size=3)
    loops = {"norm_at" if k == "norm" else k: v for k, v in SETTINGS[setting].items()}

    def reference(weights, image):
        return expected_logits(nnx.to_pure_dict(weights), image, **loops)

    @partial(jax.jit, compiler_options=FAST_COMPILATION)
    def run(point, along):
        forward = lambda weights, image: nnx.merge(graphdef, weights, rest)(image)
        y, pull = jax.vjp(forward, *point)
        return y, pull(cotangent), jax.jvp(forward, point, along)[1]

    for _ in range(3):
        along, step = draw(point), 1e-5
        y, gradients, tangent = run(point, along)
        np.testing.assert_allclose(y, reference(*point), rtol=1e-10, atol=1e-10)
        move = lambda sign: jax.tree.map(lambda p, d: p + sign * step * d, point, along)  # noqa: B023
        slope = cotangent @ (reference(*move(1)) - reference(*move(-1))) / (2 * step)
        dot = sum(jax.tree.leaves(jax.tree.map(lambda a, b: (np.asarray(a) * b).sum(), gradients, along)))
        np.testing.assert_allclose(dot, slope, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(cotangent @ tangent, dot, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(1, 1, 4), (3, 2, 12)])
def test_sincos_2d(shape):
    """Sines and cosines of the column, then of the row, at wavelengths from 2π up."""
    quarter = shape[2] // 4
    for i, j, m in np.ndindex(shape[0], shape[1], quarter):
        omega = 10_000 ** (-m / quarter)
        expected = [math.sin(j * omega), math.cos(j * omega), math.sin(i * omega), math.cos(i * omega)]
        np.testing.assert_allclose(sincos_2d(*shape)[i, j, m::quarter], expected, atol=1e-15)


@pytest.mark.full
@pytest.mark.parametrize("setting", ["mean", "quadratic", "convit"])
def test_any_batch_axes_and_vmap(setting):
    model, images = small(setting), normal(0, 2, 3, 6, 8, 2)
    forward = lambda images: (model(images), jax.vmap(jax.vmap(model))(images))
    together, alone = jax.jit(forward, compiler_options=FAST_COMPILATION)(images)
    assert together.shape == (2, 3, 3)
    np.testing.assert_allclose(alone, together, rtol=1e-4, atol=1e-6)


@pytest.mark.full
def test_features_keep_the_grid_until_a_class_token_joins():
    shape = lambda setting: jax.eval_shape(small(setting).features, jnp.ones((5, 6, 8, 2))).shape
    assert shape("local") == (5, 3, 4, 8)
    assert shape("global") == shape("convit") == (5, 13, 8)
    assert [block.axes for block in nnx.eval_shape(lambda: convit_ti(rngs=nnx.Rngs(0))).blocks] == [2] * 10 + [1] * 2


def test_without_learned_positions_images_may_have_any_size():
    for setting, position in (("local", "sincos2d"), ("quadratic", "none"), ("pooled", "sincos2d")):
        model = small(setting, position=position)
        assert jax.eval_shape(model, jnp.ones((5, 10, 6, 2))).shape == (5, 3)


def loss_and_gradients(model, images, labels, key=None):
    """(loss, gradients, what BatchNorm keeps), as the training loop has them."""
    graphdef, weights, rest = nnx.split(model, nnx.Param, ...)

    def loss_fn(weights):
        model = nnx.merge(graphdef, weights, rest, copy=True)
        logits = model(images) if key is None else model(images, rngs=nnx.Rngs(dropout=key))
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, nnx.state(model, nnx.Not(nnx.Param))

    step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), compiler_options=FAST_COMPILATION)
    (loss, rest), gradients = step(weights)
    return loss, gradients, rest


@pytest.mark.full
@pytest.mark.parametrize(
    ("setting", "dtype"), [("global", None), *((s, jnp.bfloat16) for s in ("global", "local", "quadratic", "convit"))]
)
def test_a_training_step(setting, dtype):
    """The loss and every parameter's gradient are finite float32, and no gradient is zero."""
    model = small(setting, dtype=dtype, drop_path=0.1, dropout=0.1)
    images, labels = normal(0, 8, 6, 8, 2), jnp.arange(8) % 3
    loss, gradients, _ = loss_and_gradients(model, images, labels, jax.random.key(0))
    assert np.isfinite(loss)
    for path, gradient in nnx.to_flat_state(gradients):
        assert gradient[...].dtype == jnp.float32
        assert np.isfinite(gradient[...]).all(), path
        # a key's bias adds q·b to all scores of a query alike: its gradient is zero but for rounding
        assert (gradient[...] != 0).any() or path[-3:] == ("layer", "key", "bias"), path


@pytest.mark.core(2)
@settings
def test_bfloat16(setting):
    """Computes in bfloat16, near what float32 gives; parameters, logits and the norms' statistics are float32."""
    single, half = small(setting), small(setting, dtype=jnp.bfloat16)
    images = normal(0, 4, 6, 8, 2)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half))} == {jnp.dtype("float32")}
    assert jax.eval_shape(half.features, images).dtype == jnp.bfloat16
    a, b = compiled(single)(images), compiled(half)(images)
    assert b.dtype == jnp.float32
    # some ten roundings to 8 bits of features of order one, and a head of 0.02
    np.testing.assert_allclose(a, b, atol=0.01)
    assert not np.array_equal(a, b)


def test_layer_norms_statistics_are_float32():
    """The mean and the variance of numbers that bfloat16 sums could not tell apart."""
    x = jnp.asarray(256 + np.arange(8) % 2 * 2, jnp.bfloat16)  # 256 and 258: neighbours in bfloat16
    np.testing.assert_array_equal(small("global", dtype=jnp.bfloat16).norm(x), [-1, 1] * 4)


def test_drop_path_is_one_draw_for_each_example():
    y = jnp.ones((400, 3, 2, 5))
    dropped = np.asarray(drop_path(0.25, 3)(y, rngs=nnx.Rngs(dropout=0)))
    each = dropped.reshape(400, -1)
    assert (each == each[:, :1]).all()
    np.testing.assert_allclose(np.unique(each), [0, 4 / 3], rtol=1e-6)
    # 400 draws: the standard deviation of their mean is 0.43 / 20
    assert abs((each[:, 0] == 0).mean() - 0.25) < 4 * 0.43 / 20


def test_drop_path_rises_with_depth():
    model = nnx.eval_shape(lambda: vit_ti(drop_path=0.3, rngs=nnx.Rngs(0)))
    rates = [block.drop_path.rate for block in model.blocks]
    np.testing.assert_allclose(rates, np.linspace(0.025, 0.3, 12), rtol=1e-12)
    assert depth_rates(0.2, 1) == [0.2]


@pytest.mark.core(1)
@pytest.mark.parametrize("setting", ["local", "global"])
def test_a_block_that_is_left_out_is_the_identity(setting):
    """Each example of a block takes each of its two branches twofold, or not at all; in evaluation, once."""
    model = small(setting, drop_path=0.5, depth=1)
    (block,), shape = model.blocks, (3, 4, 8) if setting == "local" else (12, 8)
    x = normal(0, 40, *shape)
    y = np.asarray(block(x, rngs=nnx.Rngs(dropout=3)))
    mix = block.mix(block.mix_norm(x), axes=block.axes)
    mlp = lambda x: block.mlp(block.mlp_norm(x))
    options = [x, x + 2 * mix, x + 2 * mlp(x), x + 2 * mix + 2 * mlp(x + 2 * mix)]
    chosen = [[np.allclose(y[n], option[n], atol=1e-4) for option in options] for n in range(40)]
    np.testing.assert_array_equal(np.sum(chosen, axis=1), 1)
    assert (np.sum(chosen, axis=0) > 0).all()
    model.eval()
    np.testing.assert_allclose(block(x), x + mix + mlp(x + mix), rtol=1e-4, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("make", [partial(small, "local", drop_path=0.5), partial(small, "global", dropout=0.5)])
def test_keys_decide_what_is_dropped(make):
    model, images = make(), normal(0, 8, 6, 8, 2)
    run = compiled(model)
    np.testing.assert_array_equal(run(images, 0), run(images, 0))
    assert not np.allclose(run(images, 0), run(images, 1))
    assert not jax.tree.leaves(nnx.state(model, nnx.RngState))
    model.eval()
    run = compiled(model)
    np.testing.assert_array_equal(run(images, 0), run(images, 1))
    assert nnx.view(model, deterministic=True)(images).shape == (8, 3)
    model.train()
    with pytest.raises(ValueError, match=r"ViT: in training, .* needs random numbers: model\(images, rngs=nnx.Rngs"):
        model(images)


def resnet(**kwargs):
    return tiny(mix=("conv", "attention"), window=3, width=8, zero_init_residual=False, rngs=nnx.Rngs(0), **kwargs)


@pytest.mark.full
def test_resnet_drops_paths():
    images = normal(0, 8, 8, 8, 1)
    model = resnet(drop_path=0.5)
    assert [block.drop_path.rate for block in model.blocks] == [0.25, 0.5]
    run = compiled(model)
    np.testing.assert_array_equal(run(images, 0), run(images, 0))
    assert not np.allclose(run(images, 0), run(images, 1))
    with pytest.raises(ValueError, match=r"ResNet: in training, drop_path \(=0.5\) needs random numbers"):
        model(images)


@pytest.mark.full
def test_a_resnets_block_that_is_left_out_is_its_shortcut():
    """relu(shortcut + 2 · branch), or relu(shortcut); what BatchNorm keeps is the branch's all the same."""
    block = resnet(drop_path=0.5).blocks[1]
    x = jax.nn.relu(normal(0, 20, 4, 4, 8))
    branch = block.norms[1](block.layers[1](jax.nn.relu(block.norms[0](block.layers[0](x)))))
    shortcut = block.shortcut_norm(block.shortcut(x))
    y = block(x, rngs=nnx.Rngs(dropout=1))
    options = [jax.nn.relu(shortcut), jax.nn.relu(shortcut + 2 * branch)]
    chosen = [[np.allclose(y[n], option[n], atol=1e-4) for option in options] for n in range(20)]
    np.testing.assert_array_equal(np.sum(chosen, axis=1), 1)
    assert (np.sum(chosen, axis=0) > 0).all()
    block.drop_path.deterministic = True
    np.testing.assert_allclose(block(x), jax.nn.relu(shortcut + branch), atol=1e-5)


REMAT = {
    "vit": (partial(small, "convit", drop_path=0.3, dropout=0.2), (6, 8, 2)),
    "resnet": (partial(resnet, drop_path=0.3), (8, 8, 1)),
}


@pytest.mark.full
@pytest.mark.parametrize("name", REMAT)
def test_remat_changes_no_number(name):
    """The same loss, gradients, and running statistics, what is random included."""
    make, shape = REMAT[name]
    images, labels = normal(0, 6, *shape), jnp.arange(6) % 3
    results = [loss_and_gradients(make(remat=remat), images, labels, jax.random.key(5)) for remat in (False, True)]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("name", ["vit_small32", "resnet"])
def test_remat_keeps_a_blocks_input_alone(name):
    """What the backward pass keeps of the forward one, in numbers, by the shapes of the derivative's closure."""
    make = {"vit_small32": vit_small32, "resnet": tiny}[name]
    images = jnp.ones((16, 32, 32, 3), jnp.float32)

    def kept(depth, remat):
        sizes = {"depth": depth} if name == "vit_small32" else {}
        model = nnx.eval_shape(lambda: make(in_features=3, remat=remat, rngs=nnx.Rngs(0), **sizes))
        graphdef, weights, rest = nnx.split(model, nnx.Param, ...)

        def closure(weights, rest):
            return jax.vjp(lambda w: nnx.merge(graphdef, w, rest, copy=True)(images), weights)[1]

        size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
        return size(jax.eval_shape(closure, weights, rest)) - size(weights)

    if name == "resnet":
        assert kept(2, remat=True) < kept(2, remat=False) / 2
    else:  # each further block: its input, [16, 8, 8, 128]; without remat, more than ten times so much
        block = 16 * 8 * 8 * 128
        assert kept(4, remat=True) - kept(3, remat=True) <= block
        assert kept(4, remat=False) - kept(3, remat=False) > 10 * block


@pytest.mark.parametrize("remat", [False, True])
def test_weights_are_sown_by_every_attention(remat):
    images = normal(0, 5, 6, 8, 2)
    for setting, shapes in {
        "global": [(5, 4, 13, 13)] * 2,
        "mean": [(5, 4, 12, 12), (5, 3, 4, 4, 9)],
        "convit": [(5, 4, 13, 13)],
    }.items():
        model = small(setting, remat=remat)
        look = lambda model, images: nnx.capture(model, nnx.Intermediate)(images, sow_weights=True)[1]
        sown = nnx.eval_shape(look, model, images)
        assert [weights.get_value()[0].shape for _, weights in nnx.to_flat_state(sown)] == shapes


@pytest.mark.full
def test_a_quadratic_network_learns_and_its_centres_are_drawn():
    """Of Cordonnier et al., small: the class is where a bright pixel is seen, and the heads' centres move."""
    model = cordonnier(image_size=8, in_features=1, width=16, depth=2, mlp_dim=16, num_heads=4, rngs=nnx.Rngs(0))
    before = model.centers()
    graphdef, weights, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.adam(1e-2)
    images, labels = normal(0, 16, 8, 8, 1), jnp.arange(16) % 10

    @partial(jax.jit, compiler_options=FAST_COMPILATION)
    def step(weights, moments):
        def loss_fn(weights):
            logits = nnx.merge(graphdef, weights, rest, copy=True)(images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, gradients = jax.value_and_grad(loss_fn)(weights)
        updates, moments = optimizer.update(gradients, moments, weights)
        return optax.apply_updates(weights, updates), moments, loss

    moments, losses = optimizer.init(weights), []
    for _ in range(20):
        weights, moments, loss = step(weights, moments)
        losses.append(loss)
    assert losses[-1] < 0.7 * losses[0]
    nnx.update(model, weights)
    assert (np.abs(model.centers() - before).max(axis=-1) > 1e-3).all()
    np.testing.assert_allclose(model.spreads()[1, 2], np.eye(2) / (2 * float(model.blocks[1].mix.layer.alpha[2])))
    figure = plots.head_centers_on_grid(model.centers(), model.spreads())
    assert [axes.get_title() for axes in figure.axes] == ["layer 1", "layer 2"]


@pytest.mark.full
def test_where_the_papers_start():
    """ViT: Xavier's kernels. ConViT: N(0, 0.02²), and a convolution's heads. Cordonnier: centres of N(0, 2)."""
    block = small("global").blocks[0]
    for kernel, fans in ((block.mix.layer.query.kernel, 8 + 8), (block.mlp.first.kernel, 8 + 12)):
        bound = (6 / fans) ** 0.5
        assert 0.9 * bound < np.abs(kernel[...]).max() <= bound
    model = convit_ti(depth=2, mix=("gpsa", "global"), image_size=32, rngs=nnx.Rngs(0))
    gpsa = model.blocks[0].mix.layer
    np.testing.assert_array_equal(gpsa.value[...].reshape(192, 192), np.eye(192))
    np.testing.assert_array_equal(gpsa.position[...], [[-1, -1, -1], [-1, -1, 1], [-1, 1, -1], [-1, 1, 1]])
    np.testing.assert_array_equal(gpsa.gate[...], 1)
    layer = model.blocks[1].mix.layer
    assert layer.query.bias is None
    assert layer.out.bias.shape == (192,)
    for kernel in (gpsa.query, layer.query.kernel, layer.out.kernel, model.head.kernel, model.position):
        np.testing.assert_allclose(np.std(kernel[...]), 0.02, rtol=0.1)
    centers = cordonnier(width=2, depth=6, num_heads=100, rngs=nnx.Rngs(0)).centers()
    np.testing.assert_allclose(centers.var(), 2, rtol=0.2)  # of 1,200 draws


@pytest.mark.full
def test_a_function_makes_the_mixing_layer():
    """In every block or in some; it is given the width and what all layers are given, and its layer sees the grid."""
    seen = []

    def mix(width, **kwargs):
        seen.append((width, sorted(kwargs)))
        return nnx.Conv(width, width, (3, 3), kernel_init=nnx.initializers.zeros, **kwargs)

    model = vit_tiny8(depth=2, mix=("local", mix), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert seen == [(64, ["dtype", "param_dtype", "rngs"])]
    assert isinstance(model.blocks[1].mix.layer, nnx.Conv)
    assert not model.blocks[1].mix.flat
    # a convolution of zeros adds its bias alone, so that the block is its MLP
    model = vit_tiny8(depth=1, mix=mix, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (4, 4, 64))
    block = model.blocks[0]
    np.testing.assert_allclose(block(x), x + block.mlp(block.mlp_norm(x)), atol=1e-6)
    assert model(jnp.ones((3, 8, 8, 1))).shape == (3, 10)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"patch_size": 3}, r"ViT: patch_size \(=\(3, 3\)\) must divide the image's size \(=\(8, 8\)\)"),
        ({"depth": 0}, r"ViT: depth \(=0\) must be an int >= 1"),
        ({"mlp_dim": 0}, r"ViT: mlp_dim \(=0\) must be an int >= 1"),
        ({"mix": "conv"}, r"ViT: mix \(='conv'\) must be one of 'global', 'local', 'quadratic', 'gpsa', or a function"),
        (
            {"mix": ("global",) * 3},
            r"ViT: mix \(=\('global', 'global', 'global'\)\) must be a string, a function, or one per block \(4\)",
        ),
        ({"pool": "max"}, r"ViT: pool \(='max'\) must be one of 'token', 'mean', 'attention'"),
        (
            {"pool": "attention", "class_token": True},
            r"ViT: class_token \(=True\) must be False with pool='attention', whose query stands for it",
        ),
        ({"pool": "token"}, r"ViT: class_token \(=False\) must be True with pool='token'; pool='mean' needs none"),
        ({"position": "rope"}, r"ViT: position \(='rope'\) must be one of 'learned', 'sincos2d', 'none'"),
        ({"position": "sincos2d", "width": 6}, r"ViT: width \(=6\) must be a multiple of 4 with position='sincos2d'"),
        ({"norm": "both"}, r"ViT: norm \(='both'\) must be one of 'pre', 'post'"),
        ({"drop_path": 1.0}, r"ViT: drop_path \(=1.0\) must be in \[0, 1\)"),
        ({"dropout": -0.1}, r"ViT: dropout \(=-0.1\) must be in \[0, 1\)"),
        ({"mix": "local", "window": 9}, r"ViT: window \(=\(9, 9\)\) must fit in the grid of the patches, \(4, 4\)"),
        ({"mix": "gpsa", "num_heads": 2}, r"GPSA: num_heads \(=2\) must be K\^2"),
        ({"num_heads": 3}, r"Attention: num_heads \(=3\) must divide qkv_features \(=64\)"),
        *(
            (
                {"mix": mix, "class_token": True},
                rf"ViT: class_token \(=True\) must be False .* with mix={mix!r}",
            )
            for mix in ("local", "quadratic", "gpsa")
        ),
    ],
)
def test_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: vit_tiny8(**kwargs, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (8, 1), (8, 9, 1), (4, 4, 1)])
def test_image_errors(shape):
    with pytest.raises(ValueError, match=r"ViT: images \(=.*\) must be \[\*batch, 8, 8, in_features \(=1\)\]"):
        nnx.eval_shape(lambda: vit_tiny8(rngs=nnx.Rngs(0))(jnp.ones(shape)))


def test_other_errors():
    with pytest.raises(ValueError, match=r"ViT: images \(=.*\) must be \[\*batch, height, width, in_features \(=2\)\]"):
        jax.eval_shape(small("local"), jnp.ones((6, 8, 3)))
    with pytest.raises(ValueError, match=r"ViT: patch_size \(=\(2, 2\)\) must divide the image's size \(=\(7, 8\)\)"):
        jax.eval_shape(small("local"), jnp.ones((7, 8, 2)))
    with pytest.raises(ValueError, match="ViT: mix must be 'quadratic' in some block"):
        small("global").centers()
    with pytest.raises(ValueError, match=r"ResNet: drop_path \(=2.0\) must be in \[0, 1\)"):
        tiny(drop_path=2.0, rngs=nnx.Rngs(0))

"""`remix`: every weight is kept, bit by bit, and the function where it must be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_networks import randomize

import jaxattn
from jaxattn import models, nn, pretrained
from jaxattn.models.nat_windows import ShiftedWindows
from jaxattn.models.swin_attention import WindowAttention

FAST_COMPILATION = {"xla_backend_optimization_level": 0}  # each is run once
SWIN = {"num_classes": 5, "window": 4}
SMALL = {  # a network, and what its mixers become
    "swin": (models.Swin, ((1, 2), 8, (2, 2)), {**SWIN, "image_size": 32}, "neighborhood"),
    "dinat": (models.NAT, ((1, 2), 8, (2, 2)), {"num_classes": 5, "window": 3, "dilations": (1, 2)}, "window"),
    "convnext": (models.ConvNeXt, ((1, 1), (8, 16)), {"num_classes": 5, "layer_scale": 1.0}, "attention"),
    "resnet": (models.ResNet, ((1, 1),), {"width": 4, "num_classes": 5, "num_heads": 1}, "attention"),
    "efficientnet": (models.EfficientNet, (((1, 3, 1, 1, 8), (1, 5, 2, 2, 8)),), {"num_classes": 5}, "attention"),
}


@functools.cache
def abstract(name, **more):
    make, sizes, kwargs, _ = SMALL[name]
    return nnx.eval_shape(lambda: make(*sizes, **kwargs | more, rngs=nnx.Rngs(0)))


def drawn(make, *sizes, **kwargs):
    """A network whose numbers are drawn, without the programs that would draw its initial ones."""
    return randomize(nnx.eval_shape(lambda: make(*sizes, **kwargs, rngs=nnx.Rngs(0))))


@functools.cache
def network(name):
    """A network, which no test changes, and what it becomes."""
    model = randomize(nnx.clone(abstract(name)))
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.BatchStat)):
        variable.set_value(abs(variable[...]))
    model.eval()
    return model, SMALL[name][-1]


def arrays(model):
    state = model if isinstance(model, nnx.State) else nnx.state(model, (nnx.Param, nnx.BatchStat))
    flat = nnx.to_flat_state(state)
    return {".".join(map(str, path)): np.asarray(variable[...]) for path, variable in flat}


def images_of(*size, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(2, *size, 3)), jnp.float32)


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_COMPILATION)
def outputs(graphdef, state, images):
    return [model(images) for model in nnx.merge(graphdef, state)]


def run(networks, images):
    """The outputs of each of the networks, in one program."""
    return outputs(*nnx.split(networks), images)


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_COMPILATION)
def gradient(graphdef, params, rest, images):
    return jax.grad(lambda p: (nnx.merge(graphdef, p, rest)(images) ** 2).sum())(params)


@pytest.mark.core(2)
@pytest.mark.parametrize("name", SMALL)
def test_every_weight_is_kept(name):
    """In one stage of two: the report is of all arrays before and after, and what it says holds bit by bit."""
    model, to = network(name)
    report = jaxattn.remix_report(model, to, stages=[1])
    before, after = arrays(model), arrays(report.model)
    assert set(report.kept) | set(report.moved) == before.keys()
    assert sorted([*report.kept, *report.moved.values(), *report.new]) == sorted(after)
    for array in report.kept:
        np.testing.assert_array_equal(after[array], before[array], err_msg=array)
    for old, new in report.moved.items():  # [*taps, in / groups, out] to [in / groups, taps, out]
        kernel = before[old].reshape(-1, *before[old].shape[-2:])
        np.testing.assert_array_equal(np.moveaxis(after[new], 1, 0), kernel, err_msg=new)
    assert bool(report.moved) == bool(report.new) == (to == "attention")
    assert f"{len(report.kept)} kept:\n  {report.kept[0]}" in str(report)


def test_what_changes():
    """The mixers of the stages that were named, and nothing else; not the model that was given."""
    kinds = lambda model: [[type(block.mix).__name__ for block in stage.blocks] for stage in model.stages]
    model, _ = network("swin")
    changed = jaxattn.remix(model, "neighborhood", stages=[0])
    assert kinds(changed) == [["Neighborhood"], ["WindowAttention"] * 2]
    assert kinds(jaxattn.remix(changed, "neighborhood")) == [["Neighborhood"], ["Neighborhood"] * 2]  # what is left
    assert kinds(model) == [["WindowAttention"], ["WindowAttention"] * 2]
    before, after = (pretrained.torch_arrays(each) for each in (model, changed))  # files of them are the same
    assert before.keys() == after.keys()
    assert all(np.array_equal(array, after[name]) for name, array in before.items())
    attends = jaxattn.remix(network("resnet")[0], "attention", stages=[1])
    where = [path for path, layer in nnx.iter_modules(attends) if isinstance(layer, nn.QuadraticAttention)]
    assert where == [("blocks", 1, "layers", 1, "layer")]  # the 3 × 3, not the 1 × 1, nor the shortcut


@pytest.mark.full
def test_swin_there_and_back():
    """Shifted windows of neighbourhoods of Swin's windows are Swin's; between the two the function is another."""
    model, to = network("swin")
    changed = jaxattn.remix(model, to)
    expected, other, found = run((model, changed, jaxattn.remix(changed, "window")), images_of(32, 32))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    assert np.abs(other - expected).max() > 1e-3


def test_dinat_there_and_back():
    """Its windows, and which tokens they look at, are as before."""
    model, to = network("dinat")
    back = jaxattn.remix(jaxattn.remix(model, to), "neighborhood")
    before, after = (
        [block.mix.attention.window for stage in m.stages for block in stage.blocks] for m in (model, back)
    )
    assert before == after
    assert before[0] != before[2]
    assert all(np.array_equal(array, arrays(back)[name]) for name, array in arrays(model).items())


@pytest.mark.full
@pytest.mark.parametrize("name", ["swin", "dinat"])
def test_gradients_are_finite(name):
    """On ragged grids; from the attention's tables down to the images' first convolution."""
    model, to = network(name)
    gradients = arrays(gradient(*nnx.split(jaxattn.remix(model, to), nnx.Param, ...), images_of(52, 40)))
    assert gradients.keys() == arrays(model).keys()
    for path, each in gradients.items():
        assert np.isfinite(each).all(), path
        assert path.endswith("key.bias") or (each != 0).any(), path  # a key's bias changes no softmax


@pytest.mark.full
def test_one_window_is_everyones_neighborhood():
    """Swin's window that is its grid, and DiNAT's, on a smaller grid too, which ends in zeros."""
    swin = drawn(models.Swin, (1,), 8, (2,), **SWIN, image_size=16)
    (expected, found) = run((swin, jaxattn.remix(swin, "neighborhood")), images_of(16, 16))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    nat = drawn(models.NAT, (2,), 8, (2,), window=3, dilations=(2,), num_classes=5)
    nat.stages[0].blocks = nnx.List(nat.stages[0].blocks[1:])
    nat.stages[0].blocks.insert(0, nat.stages[0].blocks[0])  # both look at every other token, and one is shifted
    for size in ((24, 24), (20, 14)):  # 6 × 6 tokens are one window of 3 × 3 of every other
        expected, found = run((nat, jaxattn.remix(nat, "window")), images_of(*size))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.full
def test_dilated_windows():
    """On each of the grids of every other token, ragged ones, Swin's own, whose padding is masked."""
    windows = drawn(ShiftedWindows, 2, 8, (3, 3), 2, shifted=True)
    swin = drawn(WindowAttention, 2, 8, (3, 3), (1, 1), padding="mask", version=1, pretrained=0)
    for name in ("query", "key", "value", "out", "relative_bias"):
        setattr(swin.attention, name, getattr(windows.attention, name))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 13, 11, 8)), jnp.float32)
    graphdef, state = nnx.split((windows, swin))

    @functools.partial(jax.jit, compiler_options=FAST_COMPILATION)
    def both(state):
        windows, swin = nnx.merge(graphdef, state)
        return windows(x), {(p, q): swin(x[:, p::2, q::2]) for p in range(2) for q in range(2)}

    y, parts = both(state)
    assert y.shape == x.shape
    for (p, q), part in parts.items():
        np.testing.assert_allclose(y[:, p::2, q::2], part, rtol=1e-4, atol=1e-4)


@pytest.mark.full
def test_attention_starts_as_the_convolution():
    """The same function; with a finite alpha near it, and then where the heads look has gradients."""
    model, to = network("convnext")
    hard, soft = jaxattn.remix(model, to), jaxattn.remix(model, to, alpha=6.0)
    images = images_of(32, 24)
    expected, same, near = run((model, hard, soft), images)
    gradients = gradient(*nnx.split(soft, nnx.Param, ...), images)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(same, expected, atol=1e-5 * scale)
    assert 1e-5 < np.abs(near - expected).max() / scale < 0.5
    centres = [each[...] for path, each in nnx.to_flat_state(gradients) if path[-1] == "centre"]
    assert centres
    assert all(np.abs(centre).max() > 0 for centre in centres)


REFUSED = [
    ("swin", {}, "windows", {}, r"to \(='windows'\) must be one of 'neighborhood', 'window', 'attention'"),
    ("swin", {}, "neighborhood", {"stages": [2]}, r"stages \(=\[2\]\) must be from 0 to 1"),
    ("swin", {}, "neighborhood", {"stages": [-1]}, r"stages \(=\[-1\]\) must be from 0 to 1"),
    ("swin", {}, "neighborhood", {"stages": 1}, r"stages \(=1\) must be a sequence, each an int"),
    ("swin", {}, "neighborhood", {"alpha": 1.0}, r"alpha \(=1.0\) must be None with to='neighborhood'"),
    ("swin", {}, "neighborhood", {"stages": []}, r"model \(=Swin, stages \[\]\) must have windows"),
    ("swin", {"version": 2}, "neighborhood", {}, r"model \(=Swin\) must have windows with a bias .* Swin of version 1"),
    ("swin", {}, "window", {}, r"model \(=Swin\) must have neighbourhoods: a NAT or a DiNAT"),
    ("swin", {}, "attention", {}, r"model \(=Swin\) must have convolutions of more than one tap in its blocks: "),
    ("resnet", {"mix": "attention"}, "attention", {"stages": [1]}, r"model \(=ResNet, stages \[1\]\) must"),
]


@pytest.mark.parametrize(("name", "more", "to", "kwargs", "message"), REFUSED)
def test_refuses(name, more, to, kwargs, message):
    with pytest.raises(ValueError, match=message):
        jaxattn.remix(abstract(name, **more), to, **kwargs)


def test_refuses_a_network_without_stages():
    model = nnx.eval_shape(lambda: models.vit_tiny8(rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"remix: model \(=ViT, stages \[0\]\) must have neighbourhoods: a NAT"):
        jaxattn.remix(model, "window", stages=[0])

"""The network for volumes: against the mean of what a split grid says, a step of training, and what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from jaxattn import pretrained
from jaxattn.models import SwinVolume, VolumeNet
from jaxattn.models.swin_volume import CORNERS, VolumeAttention
from jaxattn.train.sharding import make_mesh, on_mesh

SIZES = {"in_features": 1, "num_classes": 3, "patch_size": (2, 2, 2), "width": 8, "depth": 2, "num_heads": 2}


def make(**kwargs):
    return VolumeNet(**{**SIZES, "mlp_dim": 8, "param_dtype": jnp.float64, "rngs": nnx.Rngs(0), **kwargs})


def volumes(batch=2):
    return jnp.asarray(np.random.default_rng(0).normal(size=(batch, 16, 6, 8, 1)))


@pytest.mark.full
def test_a_split_volume_gives_the_same_logits_and_gradients():
    model, x, mesh = make(depth=1), volumes(), make_mesh("data=2,space=4")
    whole, weights = nnx.split(model)
    on_mesh(model, mesh)
    split = nnx.graphdef(model)
    spec = PartitionSpec(("data", "fsdp"), "space")
    forward = jax.shard_map(
        lambda weights, x: nnx.merge(split, weights)(x),
        mesh=mesh,
        in_specs=(PartitionSpec(), spec),
        out_specs=PartitionSpec(("data", "fsdp")),
    )

    def of(f):
        return jax.jit(jax.value_and_grad(lambda weights, x: jnp.square(f(weights, x)).sum(), (0, 1)))(weights, x)

    for one, other in zip(
        jax.tree.leaves(of(lambda weights, x: nnx.merge(whole, weights)(x))), jax.tree.leaves(of(forward)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.full
def test_a_token_sees_its_window_alone():
    """Of one block with windows of 3 patches, a patch moves with the patches beside it and no farther."""
    model = make(depth=1)
    features = lambda x: model.blocks[0](model.patches(x))[0, :, 1, 2]  # along depth, [8, features]
    moved = jax.jacobian(features)(volumes(1))[..., 0, :, :, :, 0]  # [8, features, 16, 6, 8]
    seen = np.abs(moved).max((1, 3, 4)).reshape(8, 8, 2).max(-1)  # patches by patches
    middle = np.clip(np.arange(8), 1, 6)  # at the border the window is moved inwards
    np.testing.assert_array_equal(seen > 0, np.abs(middle[:, None] - np.arange(8)) <= 1)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_step_moves_every_weight(dtype):
    model = make(dtype=dtype, param_dtype=jnp.float32, drop_path=0.2, remat=True)
    graph, weights, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def gradients(weights, x):
        logits = nnx.merge(graph, weights, rest)(x, rngs=nnx.Rngs(dropout=jax.random.key(0)))
        return -jax.nn.log_softmax(logits.astype(jnp.float32))[:, 0].mean()

    found = jax.grad(gradients)(weights, volumes().astype(jnp.float32))
    for path, gradient in nnx.to_flat_state(found):
        assert np.isfinite(gradient[...]).all()
        # softmax does not see what all keys have in common
        assert (np.abs(gradient[...]).max() > 0) or path[-2:] == ("key", "bias"), path


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"patch_size": (2, 2)}, r"patch_size \(=\(2, 2\)\) must be an int >= 1, or one for each of the 3"),
        ({"window": (3, 3, 0)}, r"window \(=\(3, 3, 0\)\) must be an int >= 1, or one for each"),
        ({"depth": 0}, r"depth \(=0\) must be an int >= 1"),
        ({"drop_path": 1.5}, r"drop_path"),
    ],
)
def test_a_bad_setting_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


@pytest.mark.parametrize("shape", [(2, 16, 6, 8, 2), (6, 8, 1), (2, 15, 6, 8, 1)])
def test_a_volume_that_does_not_fit(shape):
    with pytest.raises(ValueError, match=r"volumes \(=.*\) must be \[\*batch, depth, .*, in_features \(=1\)\]"):
        make()(jnp.zeros(shape))


def see_and_offset(n, k, shift, around):
    """Of an axis of n tokens, padded to whole windows: which pairs share a window, and the key's place in it less the
    query's."""
    size = n + -n % min(k, n)
    shift, k = (0, n) if n <= k else (shift, k)
    token = np.arange(size)
    window, place = np.divmod((token - shift) % size, k)
    seam = (token < shift) & (not around)  # what the roll brings to the last window
    pairs = (window == window[:, None]) & (seam == seam[:, None])
    return pairs, place


def attended(x, layer, window, shift, around):
    """What `VolumeAttention` computes of x [depth, height, width, features]: every pair of tokens, in float64."""
    p = {".".join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(layer.attention))}
    grid, axes = x.shape[:3], [see_and_offset(*each) for each in zip(x.shape[:3], window, shift, around, strict=True)]
    x = np.pad(x, [(0, len(place) - n) for n, (_, place) in zip(grid, axes, strict=True)] + [(0, 0)])
    query, key, value = (
        (np.einsum("dhwi,ine->dhwne", x, p[f"{n}.kernel"]) + p[f"{n}.bias"]).reshape(-1, *p[f"{n}.bias"].shape)
        for n in ("query", "key", "value")
    )
    index = np.indices(x.shape[:3]).reshape(3, -1)
    sees = np.logical_and.reduce([pairs[i[:, None], i] for (pairs, _), i in zip(axes, index, strict=True)])
    places = [place[i] for (_, place), i in zip(axes, index, strict=True)]
    if any(n < k for n, k in zip(grid, window, strict=True)):  # MONAI's, of the first tokens of a whole window
        flat = np.ravel_multi_index(places, [min(n, k) for n, k in zip(grid, window, strict=True)])
        places = np.unravel_index(flat, window)
    offsets = [k - 1 + place - place[:, None] for k, place in zip(window, places, strict=True)]
    scores = np.einsum("ine,jne->nij", query, key) / query.shape[-1] ** 0.5 + p["relative_bias"][:, *offsets]
    weights = np.where(sees, np.exp(scores), 0)
    mixed = np.einsum("nij,jne->ine", weights / weights.sum(-1, keepdims=True), value)
    y = np.einsum("ine,neo->io", mixed, p["out.kernel"]) + p["out.bias"]
    return y.reshape(*x.shape[:3], -1)[tuple(map(slice, grid))]


def test_shifted_windows_of_a_volume():
    """Ragged, cyclic, and smaller than a window; against every pair of tokens."""
    window, shift, boundary = (3, 4, 2), (1, 2, 1), ("mask", "wrap", "mask")
    layer = VolumeAttention(2, 6, window, shift, boundary, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    state = jax.tree.map(lambda v: jnp.asarray(np.random.default_rng(0).normal(size=v.shape)), state)
    grids = [np.random.default_rng(1).normal(size=(*grid, 6)) for grid in ((4, 8, 3), (2, 8, 3))]
    found = jax.jit(lambda state, grids: [nnx.merge(graph, state)(x) for x in grids])(state, grids)
    for x, y in zip(grids, found, strict=True):
        expected = attended(x, nnx.merge(graph, state), window, shift, (False, True, False))
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12)


WEATHER = {"depths": (2,), "width": 4, "num_heads": (2,), "window": (2, 2, 3), "num_classes": 0, "in_features": 2}


@pytest.mark.full
def test_longitude_has_no_seam():
    """A weather model of a turned earth is the turned model, and split over devices, the same."""
    model = SwinVolume(**WEATHER, boundary=("mask", "mask", "wrap"), param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        variable.set_value(jnp.asarray(np.random.default_rng(2).normal(size=variable.shape)))
    x = np.random.default_rng(0).normal(size=(2, 16, 8, 24, 2))
    turned = np.roll(x, 12, 3)  # a merged window: 2 · 2 · 3 voxels
    graph, state = nnx.split(model)
    one, other, pooled = jax.jit(
        lambda state, x, turned: (
            *(nnx.merge(graph, state).pyramid(each)[1] for each in (x, turned)),
            nnx.merge(graph, state)(x),
        )
    )(state, x, turned)
    np.testing.assert_allclose(np.roll(one, 3, 3), other, rtol=0, atol=1e-10)
    assert not np.allclose(np.roll(one, 1, 3), other)
    mesh = make_mesh("data=2,space=4")
    on_mesh(model, mesh)
    spec, split = PartitionSpec(("data", "fsdp"), "space"), nnx.graphdef(model)
    parts = jax.shard_map(
        lambda state, x: nnx.merge(split, state)(x), mesh=mesh, in_specs=(PartitionSpec(), spec),
        out_specs=PartitionSpec(("data", "fsdp")),
    )  # fmt: skip
    np.testing.assert_allclose(jax.jit(parts)(state, x), pooled, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("kwargs", "shape", "message"),
    [
        ({}, (8, 8, 6, 2), r"volumes \(=\(8, 8, 6, 2\)\) must have a multiple of 4 voxels along cyclic axis 2"),
        ({"boundary": "mask"}, (8, 8, 2), r"volumes .* must be \[\*batch, depth, height, width, in_features \(=2\)\]"),
        ({"boundary": "edge"}, (8, 8, 8, 2), r"boundary \(='edge'\) must be 'mask' or 'wrap'"),
        ({"num_heads": (3,)}, (8, 8, 8, 2), r"num_heads \(=\(3,\)\) must divide width \(=4\)"),
    ],
)
def test_what_a_swin_of_a_volume_refuses(kwargs, shape, message):
    settings = {**WEATHER, "boundary": ("mask", "mask", "wrap"), **kwargs}
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda x: SwinVolume(**settings, rngs=nnx.Rngs(0))(x), jnp.ones(shape))


@pytest.mark.full
def test_swin_unetr(tmp_path):
    """Against MONAI's, from its own file and back: ragged windows, and in the later stages smaller ones."""
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch")
    monai = pytest.importorskip("monai.networks.nets", reason="MONAI is not installed: pip install monai einops")
    from test_networks_timm import assert_close, ours_from, randomized

    whole = randomized(
        monai.SwinUNETR(2, 3, feature_size=12, window_size=(2, 3, 5), depths=(2, 1, 1, 1), downsample="mergingv2")
    )
    theirs = whole.swinViT
    torch.save({"state_dict": whole.state_dict()}, tmp_path / "theirs.pt")
    settings = {"window": (2, 3, 5), "merging": "mergingv2", "num_classes": 0, "in_features": 2}
    ours = ours_from(
        lambda **kwargs: SwinVolume((2, 1, 1, 1), 12, (3, 6, 12, 24), **settings, **kwargs), tmp_path / "theirs.pt"
    )
    x = np.random.default_rng(0).normal(size=(1, 32, 32, 32, 2))
    tensor = torch.tensor(x, requires_grad=True)
    expected = theirs(tensor.permute(0, 4, 1, 2, 3))
    graph, state = nnx.split(ours)
    cotangent = np.random.default_rng(1).normal(size=expected[-1].shape)
    (expected[-1] * torch.tensor(cotangent)).sum().backward()

    def loss(x):
        pyramid = nnx.merge(graph, state).pyramid(x)
        return (jnp.moveaxis(pyramid[-1], -1, 1) * cotangent).sum(), pyramid

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, pyramid), gradient = run(jnp.asarray(x))
    for features, theirs_features, width in zip(pyramid, expected, ours.widths, strict=True):
        assert features.shape[-1] == width
        assert_close(features, theirs_features.detach().permute(0, 2, 3, 4, 1).numpy(), 1e-10)
    assert_close(gradient, tensor.grad.numpy(), 1e-8)
    written = {name: torch.tensor(array) for name, array in pretrained.torch_arrays(ours).items()}
    derived = {f"swinViT.{name}" for name in theirs.state_dict() if name.endswith("relative_position_index")}
    missing, unexpected = whole.load_state_dict(written, strict=False)
    assert unexpected == []
    assert {name for name in missing if name.startswith("swinViT.")} == derived
    tokens = torch.arange(8.0).reshape(1, 2, 2, 2, 1)
    orders = {}
    for merging in ("merging", "mergingv2"):
        merge = monai.swin_unetr.MERGING_MODE[merging](1)
        merge.norm = merge.reduction = torch.nn.Identity()
        orders[merging] = merge(tokens).flatten().tolist()
    ours = {merging: [4 * i + 2 * j + k for i, j, k in corners] for merging, corners in CORNERS.items()}
    assert orders["mergingv2"] == ours["mergingv2"]
    assert orders["merging"] in (ours["merging"], ours["merging-1.3"])

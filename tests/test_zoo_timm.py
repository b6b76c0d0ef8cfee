"""The attention layers of the zoo against timm's, from the same weights; where torch and timm are installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import nn, zoo

torch = pytest.importorskip("torch")
pytest.importorskip("timm")

from flax import nnx  # noqa: E402
from timm.layers.bottleneck_attn import BottleneckAttn  # noqa: E402
from timm.layers.halo_attn import HaloAttn  # noqa: E402
from timm.layers.lambda_layer import LambdaLayer  # noqa: E402
from timm.models import convit, swin_transformer, vision_transformer, volo  # noqa: E402

HEADS, FEATURES = 2, 16


def randomized(layer):
    """In float64, with every parameter drawn anew."""
    torch.manual_seed(0)
    layer = layer.double().eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    for name, statistic in layer.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            torch.nn.init.uniform_(statistic, 0.5, 2)
    return layer


def array(tensor):
    return tensor.detach().numpy()


def by_heads(weight, heads=HEADS):
    """A projection to heads `[features, heads, head_dim]` of torch's `[heads · head_dim, features]`."""
    weight = array(weight).reshape(heads, -1, weight.shape[1])
    return weight.transpose(2, 0, 1)


def out(linear, heads=HEADS):
    return {"out": array(linear.weight).T.reshape(heads, -1, len(linear.weight)), "out_bias": array(linear.bias)}


def three(linear, heads=HEADS):
    """query, key, value and their biases of one projection."""
    names = ("query", "key", "value")
    params = {name: by_heads(part, heads) for name, part in zip(names, linear.weight.flatten(1).chunk(3), strict=True)}
    if linear.bias is not None:
        parts = linear.bias.chunk(3)
        params |= {f"{name}_bias": array(part).reshape(heads, -1) for name, part in zip(names, parts, strict=True)}
    return params


def assert_same(ours, theirs, *grid, channels_first=False):
    """Values, and the input's gradient of a random projection of them, to 1e-10: float64 in other orders."""
    x = np.random.default_rng(0).normal(size=(2, *grid, FEATURES))
    tensor = torch.tensor(x, requires_grad=True)
    y = theirs(tensor.movedim(-1, 1) if channels_first else tensor)
    y = y.movedim(1, -1) if channels_first else y
    cotangent = np.random.default_rng(1).normal(size=tuple(y.shape))
    y.backward(torch.tensor(cotangent))
    mine, pull = jax.vjp(jax.jit(ours), jnp.asarray(x))
    np.testing.assert_allclose(mine, array(y), atol=1e-10)
    np.testing.assert_allclose(pull(jnp.asarray(cotangent))[0], array(tensor.grad), atol=1e-10)


def test_vit():
    theirs = randomized(vision_transformer.Attention(FEATURES, num_heads=HEADS, qkv_bias=True))
    params = three(theirs.qkv) | out(theirs.proj)
    assert_same(lambda x: zoo.global_attention(x, params), theirs, 7)


@pytest.mark.parametrize(("window", "shift"), [((4, 2), (0, 0)), ((4, 4), (2, 1)), ((8, 4), (3, 1))])
def test_swin(window, shift):
    """timm's table is indexed by query less key, ours by key less query. Neither shifts along an axis of one window."""
    block = swin_transformer.SwinTransformerBlock(
        FEATURES, (8, 8), num_heads=HEADS, window_size=window, shift_size=shift
    )
    theirs = randomized(block)
    table = array(theirs.attn.relative_position_bias_table).T.reshape(HEADS, *(2 * k - 1 for k in window))
    params = three(theirs.attn.qkv) | out(theirs.attn.proj) | {"relative_bias": table[:, ::-1, ::-1]}
    ours = lambda x: zoo.shifted_window_attention(x, params, window=window, shift=shift)
    assert_same(ours, theirs._attn, 8, 8)


def test_halo():
    """timm's table is indexed by slot less query within its block, so it begins a halo earlier than ours."""
    theirs = randomized(HaloAttn(FEATURES, num_heads=HEADS, block_size=4, halo_size=1, scale_pos_embed=False))
    dim = theirs.dim_head_qk
    key_value = by_heads(theirs.kv.weight.flatten(1))
    params = {"query": by_heads(theirs.q.weight.flatten(1)), "key": key_value[..., :dim], "value": key_value[..., dim:]}
    for axis, table in enumerate((theirs.pos_embed.height_rel, theirs.pos_embed.width_rel)):
        params[f"embedding_{axis}"] = np.roll(array(table), -1, axis=0)[None]
    ours = lambda x: zoo.halo_attention(x, params, block=(4, 4), halo=1, scale=None)
    assert_same(ours, theirs, 8, 12, channels_first=True)


def test_botnet():
    theirs = randomized(BottleneckAttn(FEATURES, feat_size=(3, 5), num_heads=HEADS, scale_pos_embed=True))
    params = three(theirs.qkv)
    for axis, table in enumerate((theirs.pos_embed.height_rel, theirs.pos_embed.width_rel)):
        params[f"embedding_{axis}"] = array(table)[None]
    assert_same(lambda x: zoo.botnet_attention(x, params), theirs, 3, 5, channels_first=True)


def gpsa_params(theirs, heads):
    """timm's position is of (δ2, δ1, ‖δ‖²), and has a bias that softmax does not see."""
    query, key = (by_heads(part, heads) for part in theirs.qk.weight.chunk(2))
    params = {"query": query, "key": key, "value": by_heads(theirs.v.weight, heads), **out(theirs.proj, heads)}
    return params | {"position": array(theirs.pos_proj.weight)[:, ::-1], "gate": array(theirs.gating_param)}


def test_gpsa():
    theirs = randomized(convit.GPSA(FEATURES, num_heads=HEADS))
    params = gpsa_params(theirs, HEADS)
    ours = lambda x: zoo.gpsa(x, params)
    assert_same(ours, lambda x: theirs(x.flatten(1, 2)).unflatten(1, (4, 4)), 4, 4)


@pytest.mark.parametrize("heads", [4, 9])
def test_gpsa_begins_where_timm_does(heads):
    """Up to the order of the heads: timm's number the offsets column by column."""
    theirs = convit.GPSA(36, num_heads=heads, locality_strength=0.5)
    theirs.local_init()
    expected = gpsa_params(theirs, heads)
    layer = nn.GPSA(heads, 36, locality_strength=0.5, rngs=nnx.Rngs(0))
    side = int(heads**0.5)
    rows = expected["position"].reshape(side, side, 3).swapaxes(0, 1).reshape(heads, 3)
    np.testing.assert_allclose(layer.position[...], rows, atol=1e-6)
    np.testing.assert_allclose(layer.gate[...], expected["gate"])
    np.testing.assert_array_equal(layer.value[...], expected["value"])


def normalized(weight, bias, norm):
    """A projection and its bias that hold the batch normalisation after it."""
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return weight.flatten(1) * scale[:, None], (bias - norm.running_mean) * scale + norm.bias


@pytest.mark.parametrize("radius", [3, None])
def test_lambda_layer(radius):
    """timm normalises queries and values by batch statistics, and its local convolution has a bias b: what a second
    intra-depth sees, of values 1, keys 0 and E = b - 1 at the token itself, for its content lambda is 1."""
    grid, dim = (4, 5), 3
    theirs = randomized(LambdaLayer(FEATURES, num_heads=HEADS, dim_head=dim, r=radius, feat_size=grid, qkv_bias=True))
    sizes = (HEADS * dim, dim, FEATURES // HEADS)
    (query, key, value), biases = theirs.qkv.weight.split(sizes), theirs.qkv.bias.split(sizes)
    query, query_bias = normalized(query, biases[0], theirs.norm_q)
    value, value_bias = normalized(value, biases[2], theirs.norm_v)
    params = {"query": by_heads(query), "query_bias": array(query_bias).reshape(HEADS, dim)}
    params |= {"key": array(key.flatten(1)).T[..., None], "key_bias": array(biases[1])[:, None]}
    params |= {"value": array(value).T[..., None], "value_bias": array(value_bias)[:, None]}
    if radius is None:
        params["position"] = array(theirs.pos_emb)[..., None]
    else:
        kernel, bias = array(theirs.conv_lambda.weight)[:, 0, ..., 0], array(theirs.conv_lambda.bias)
        params |= {name: np.pad(params[name], [(0, 0), (0, 0), (0, 1)]) for name in ("key", "value")}
        params["key_bias"] = np.pad(params["key_bias"], [(0, 0), (0, 1)])
        params["value_bias"] = np.pad(params["value_bias"], [(0, 0), (0, 1)], constant_values=1)
        params["position"] = np.stack([kernel.transpose(1, 2, 0), np.zeros((radius, radius, dim))], -1)
        params["position"][radius // 2, radius // 2, :, 1] = bias - 1
    assert_same(lambda x: zoo.lambda_layer(x, params), theirs, *grid, channels_first=True)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("grid", [(4, 6), (5, 3)])
def test_outlook(grid, stride):
    theirs = randomized(volo.OutlookAttention(FEATURES, num_heads=HEADS, stride=stride, qkv_bias=True))
    params = {"value": by_heads(theirs.v.weight), "value_bias": array(theirs.v.bias).reshape(HEADS, -1)}
    params |= {"attention": array(theirs.attn.weight).T.reshape(FEATURES, HEADS, 3, 3, 3, 3), **out(theirs.proj)}
    params["attention_bias"] = array(theirs.attn.bias).reshape(HEADS, 3, 3, 3, 3)
    assert_same(lambda x: zoo.outlook_attention(x, params, strides=stride), theirs, *grid)

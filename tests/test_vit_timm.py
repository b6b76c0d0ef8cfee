"""Vision transformers against timm's, from the same weights; where torch and timm are installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")

from flax import nnx  # noqa: E402
from timm.models import convit, vision_transformer  # noqa: E402

from jaxattn.models import ViT  # noqa: E402

WIDTH, HEADS = 8, 4
SIZES = {"patch_size": 2, "num_classes": 3, "num_heads": HEADS, "depth": 2}
OURS = {"image_size": 8, "in_features": 3, "width": WIDTH, "mlp_dim": 4 * WIDTH, **SIZES, "param_dtype": jnp.float64}
FAST_COMPILATION = {"xla_backend_optimization_level": 0}


def linear(module):
    """A kernel `[in, out]` and the bias, of torch's `[out, in]`."""
    names = {"kernel": module.weight.T} | ({} if module.bias is None else {"bias": module.bias})
    return {name: parameter.detach().numpy() for name, parameter in names.items()}


def norm(module):
    return {"scale": module.weight.detach().numpy(), "bias": module.bias.detach().numpy()}


def heads(kernel):
    """`[in, heads, head_dim]`, or for a bias `[heads, head_dim]`."""
    return kernel.reshape(*kernel.shape[:-1], HEADS, -1)


def attention(module):
    if isinstance(module, convit.GPSA):
        query, key = np.split(linear(module.qk)["kernel"], 2, axis=-1)
        out, position = linear(module.proj), module.pos_proj.weight.detach().numpy()
        return {
            "query": heads(query),
            "key": heads(key),
            "value": heads(linear(module.v)["kernel"]),
            "out": out["kernel"].reshape(HEADS, -1, WIDTH),
            "out_bias": out["bias"],
            "position": position[:, ::-1],  # theirs counts (column, row, squared distance)
            "gate": module.gating_param.detach().numpy(),
        }
    parts = {name: np.split(value, 3, axis=-1) for name, value in linear(module.qkv).items()}
    out = linear(module.proj)
    return {
        "query": {name: heads(value[0]) for name, value in parts.items()},
        "key": {name: heads(value[1]) for name, value in parts.items()},
        "value": {name: heads(value[2]) for name, value in parts.items()},
        "out": {"kernel": out["kernel"].reshape(HEADS, -1, WIDTH), "bias": out["bias"]},
    }


def state_of(theirs):
    """timm's parameters by our names."""
    position, token = theirs.pos_embed.detach().numpy()[0], theirs.cls_token.detach().numpy()[0, 0]
    kernel = theirs.patch_embed.proj.weight.detach().numpy().transpose(2, 3, 1, 0)
    state = {
        "patches": {"kernel": kernel, "bias": theirs.patch_embed.proj.bias.detach().numpy()},
        "class_token": token,
        "position": position[-16:].reshape(4, 4, WIDTH),
        "norm": norm(theirs.norm),
        "head": linear(theirs.head),
        "blocks": {
            n: {
                "mix": {"layer": attention(block.attn)},
                "mlp": {"first": linear(block.mlp.fc1), "second": linear(block.mlp.fc2)},
                "mix_norm": norm(block.norm1),
                "mlp_norm": norm(block.norm2),
            }
            for n, block in enumerate(theirs.blocks)
        },
    }
    return state | ({"class_position": position[0]} if len(position) == 17 else {})


CASES = {
    "vit": (vision_transformer.VisionTransformer, {}, {}),
    "mean": (vision_transformer.VisionTransformer, {"global_pool": "avg", "fc_norm": False}, {"pool": "mean"}),
    "convit": (convit.ConVit, {"local_up_to_layer": 1}, {"mix": ("gpsa", "global"), "qkv_bias": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_same_logits_and_gradients(case):
    """Values, and the images' gradient of a random sum of them, to 1e-10: float64 in other orders."""
    make, their_kwargs, kwargs = CASES[case]
    torch.manual_seed(0)
    width = WIDTH // HEADS if make is convit.ConVit else WIDTH
    theirs = make(img_size=8, embed_dim=width, **SIZES, **their_kwargs).double().eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    ours = ViT(**OURS, **kwargs, rngs=nnx.Rngs(0))
    shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(ours, nnx.Param)))
    state = state_of(theirs)
    assert jax.tree.map(np.shape, state) == shapes
    nnx.update(ours, jax.tree.map(jnp.asarray, state))

    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3))
    cotangent = np.random.default_rng(1).normal(size=(2, 3))
    tensor = torch.tensor(images, requires_grad=True)
    logits = theirs(tensor.permute(0, 3, 1, 2))
    logits.backward(torch.tensor(cotangent))
    run = jax.jit(lambda images: jax.vjp(ours, images), compiler_options=FAST_COMPILATION)
    mine, pull = run(jnp.asarray(images))
    np.testing.assert_allclose(mine, logits.detach().numpy(), rtol=0, atol=1e-10)
    np.testing.assert_allclose(pull(jnp.asarray(cotangent))[0], tensor.grad.numpy(), rtol=0, atol=1e-10)

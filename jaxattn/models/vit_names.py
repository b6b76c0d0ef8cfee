"""What a ViT's weights are called in PyTorch."""

from collections.abc import Mapping

import numpy as np

from jaxattn.models import latent_pool
from jaxattn.models.layout import Entry
from jaxattn.models.resize import resize_positions
from jaxattn.models.translation import BY_HEAD, FUSED, OUT, Rule, Table, Translation, below, under


def resize(position: np.ndarray, entry: Entry) -> np.ndarray:
    """Positions of a square grid for ours; a class token's stays."""
    rows, columns, _ = entry.shapes[-1]
    return resize_positions(position, len(entry.ours) - 1, (rows, columns))


# the class token's position stands before the grid's
POSITION = ("c -> 1 +1 c", "row column c -> 1 +(row column) c")
TIMM: Table = {
    "patches": "patch_embed.proj", "class_token": Rule("cls_token", "c -> 1 1 c"),
    "registers": Rule("reg_token", "n c -> 1 n c"), "class_position|position": Rule("pos_embed", POSITION, resize),
    "norm_before": "norm_pre", **under("latent_pool", "attn_pool", latent_pool.TIMM),
    **under("blocks.*", "blocks.*", {
        "mix.layer.query|key|value": Rule("attn.qkv", FUSED), "mix.layer.out": Rule("attn.proj", OUT),
        "mix_norm": "norm1", "mlp_norm": "norm2", "mlp.first": "mlp.fc1", "mlp.second": "mlp.fc2",
        "gamma1": "ls1.gamma", "gamma2": "ls2.gamma",
    }),
}  # fmt: skip
DEIT: Table = {**TIMM, "blocks.*.gamma1": "blocks.*.gamma_1", "blocks.*.gamma2": "blocks.*.gamma_2"}
# ConViT's positions are (column, row, squared distance) there, and have a bias, which no softmax sees
GPSA: Table = {
    "query|key": Rule("qk.weight", "i head dim -> +(head dim) i"),
    "value": Rule("v.weight", "i head dim -> (head dim) i"),
    "out": Rule("proj.weight", "head dim o -> o (head dim)"), "out_bias": "proj.bias",
    "position": Rule("pos_proj.weight", "head -axis -> head axis"), "gate": "gating_param",
}  # fmt: skip
EMBEDDINGS: Table = {
    "patches": "embeddings.patch_embeddings.projection", "class_token": Rule("embeddings.cls_token", "c -> 1 1 c"),
    "class_position|position": Rule("embeddings.position_embeddings", POSITION, resize),
    "registers": Rule("embeddings.register_tokens", "n c -> 1 n c"), "norm": "layernorm",
    **under("blocks.*.mix.layer", "encoder.layer.*.attention", {
        "query": Rule("attention.query", BY_HEAD), "key": Rule("attention.key", BY_HEAD),
        "value": Rule("attention.value", BY_HEAD), "out": Rule("output.dense", OUT),
    }),
}  # fmt: skip
HUGGING_FACE: Table = {
    **EMBEDDINGS,
    **under("blocks.*", "encoder.layer.*", {
        "mix_norm": "layernorm_before", "mlp_norm": "layernorm_after", "mlp.first": "intermediate.dense",
        "mlp.second": "output.dense",
    }),
}  # fmt: skip
DINOV2: Table = {
    **EMBEDDINGS,
    **under("blocks.*", "encoder.layer.*", {
        "mix_norm": "norm1", "mlp_norm": "norm2", "mlp.first": "mlp.fc1", "mlp.second": "mlp.fc2",
        "gamma1": "layer_scale1.lambda1", "gamma2": "layer_scale2.lambda1",
    }),
}  # fmt: skip
SIGLIP: Table = {
    "patches": "embeddings.patch_embedding", "norm": "post_layernorm",
    "position": Rule("embeddings.position_embedding.weight", "row column c -> (row column) c", resize),
    **under("blocks.*", "encoder.layers.*", {
        "mix_norm": "layer_norm1", "mlp_norm": "layer_norm2", "mlp.first": "mlp.fc1", "mlp.second": "mlp.fc2",
        "mix.layer.query": Rule("self_attn.q_proj", BY_HEAD), "mix.layer.key": Rule("self_attn.k_proj", BY_HEAD),
        "mix.layer.value": Rule("self_attn.v_proj", BY_HEAD), "mix.layer.out": Rule("self_attn.out_proj", OUT),
    }),
    **under("latent_pool", "head", latent_pool.HUGGING_FACE),
}  # fmt: skip


def translations_of(gated: Mapping[int, int]) -> tuple[Translation, ...]:
    """The tables of a network, of whose blocks some are ConViT's, with so many heads each.

    >>> [translation.publisher for translation in translations_of({})]
    ['timm', 'Facebook', 'Hugging Face', 'Hugging Face, DINOv2', 'Hugging Face, SigLIP']
    """
    timm: dict[str, str | Rule] = {}
    for n in gated:
        timm |= under(f"blocks.{n}.mix.layer", f"blocks.{n}.attn", GPSA)
    zeros = {f"blocks.{n}.attn.pos_proj.bias": np.zeros(heads, np.float32) for n, heads in gated.items()}
    face = {**below("vit", HUGGING_FACE), "head": "classifier"}
    derived = ("rel_indices", "mask_token")
    return (
        Translation("timm", {**timm, **TIMM}, derived=derived, constants=zeros),
        Translation("Facebook", DEIT, derived=derived),
        Translation("Hugging Face", face),
        Translation("Hugging Face, DINOv2", DINOV2, derived=derived),
        Translation("Hugging Face, SigLIP", below("vision_model", SIGLIP), head="classifier"),
    )

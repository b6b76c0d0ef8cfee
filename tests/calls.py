"""A call of every public function and constructor, with every argument that it has in some call."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from layers import GRID, LAYERS, X
from layers.case import numbers as draw

import jaxattn
from jaxattn import equivalence, measure, models, nn, plots, position, zoo
from jaxattn.window import Window

PACKAGES = (jaxattn, zoo, nn, equivalence, measure, models, plots, position)
ZOO: dict[Any, dict[str, Any]] = {layer.function: layer.call for layer in LAYERS.values()}
NN: dict[Any, dict[str, Any]] = {
    nn.Attention: {"num_heads": 2, "in_features": 8, "window": (3, 3), "relative_bias": True},
    **{layer.module: layer.arguments for layer in LAYERS.values()},
}
IMAGES = {"image_size": 8, "patch_size": 2, "in_features": 1, "num_classes": 3}
TINY = IMAGES | {"width": 8, "depth": 1, "num_heads": 2, "mlp_dim": 8}
MODELS: dict[Any, dict[str, Any]] = {
    models.ViT: TINY,
    models.ResNet: {"stage_sizes": (1,), "block": "basic", "width": 8, "num_heads": 2},
    models.EfficientNet: {"stages": ((1, 3, 1, 1, 8),)},
    models.DigitNet: {},
    models.ConvNeXt: {"depths": (1, 1), "widths": (4, 8)},
    models.Swin: {"depths": (1, 1), "width": 4, "num_heads": (1, 2), "window": 2, "image_size": 16},
    models.NAT: {"depths": (1, 1), "width": 4, "num_heads": (1, 2), "window": 3},
    models.MaxViT: {"depths": (1, 1), "widths": (32, 64), "stem": 4, "image_size": 64},
    models.CoAtNet: {"depths": (1, 1, 1, 1), "widths": (4, 32, 32, 32), "stem": (4, 4), "image_size": 32},
    models.BoTNet: {
        "depths": (1, 1),
        "widths": (16, 32),
        "mixed": ((), (0,)),
        "num_heads": (1, 2),
        "stem": 8,
        "image_size": 32,
    },
    models.MetaFormer: {"depths": (1, 1), "widths": (8, 32), "mix": ("conv", "attention")},
    models.ConvMixer: {"width": 8, "depth": 1, "kernel_size": 3},
    models.VOLO: {"depths": (1, 1), "widths": (4, 8), "num_heads": (1, 2), "stem": 4, "image_size": 32},
    models.SAMViT: {"depths": (2,), "width": 8, "num_heads": 2, "window": 3, "neck": 4, "image_size": 64},
    models.SwinVolume: {
        "depths": (2,),
        "width": 4,
        "num_heads": (2,),
        "window": 2,
        "num_classes": 2,
        "in_features": 1,
    },
    models.VolumeNet: {"in_features": 1, "num_classes": 2, "width": 8, "depth": 1, "num_heads": 2, "mlp_dim": 8},
}
WINDOW = Window((3, 3), boundary="mask")
LOOK = {"weights": np.asarray(draw(4, 6, 2, 9)), "indices": WINDOW.indices(GRID)}
KERNEL = draw(3, 3, 4, 6)
MEASURE: dict[Any, dict[str, Any]] = {
    measure.attention_distance: LOOK | {"stride": 1},
    measure.locality: LOOK | {"size": 3, "stride": 1},
    measure.head_centers: LOOK | {"stride": 1},
    measure.head_spreads: LOOK | {"stride": 1},
    measure.entropy: LOOK,
    measure.attention_maps: LOOK | {"shape": GRID},
    measure.mean_by_offset: LOOK | {"weights": np.asarray(draw(2, 4, 6, 2, 9)), "stride": 1},
    measure.query_key_metric: {"query_kernel": draw(4, 2, 3), "key_kernel": draw(4, 1, 3)},
    measure.effective_receptive_field: {"function": jnp.tanh, "x": draw(1, 3, 3, 2), "position": (1, 1)},
}
EQUIVALENCE: dict[Any, dict[str, Any]] = {
    equivalence.convert: {"model": nn.Conv(1, 2, (2, 2), rngs=nnx.Rngs(0)), "to": "attention", "alpha": 8.0},
    equivalence.init_as_cnn: {
        "attention": nn.Attention(2, 8, window=(3, 3), relative_bias=True, rngs=nnx.Rngs(0)),
        "how": "impulse", "alpha": 8.0, "gate": 1.0, "size": 3,
    },
    equivalence.patch_kernel: {"kernel": KERNEL, "patch": 2},
    equivalence.conv_to_attention: {
        "kernel": KERNEL, "alpha": 8.0, "strides": 1, "padding": "SAME", "dilation": 1, "groups": 2, "boundary": "zero"
    },
    equivalence.attention_to_conv: {"params": equivalence.conv_to_attention(KERNEL)[0], "groups": 2},
    equivalence.error_bound: {"alpha": 8.0, "ndim": 2},
    equivalence.nearest_conv: {"weights": draw(5, 2, 9), "value": draw(2, 3, 4), "mask": np.ones((5, 9), bool)},
}  # fmt: skip
EPOCH = {"epoch": 1, "train_loss": 2.0, "train_accuracy": 0.3, "validation_accuracy": 0.5}
PICTURES = np.asarray(draw(2, 8, 8))
PLOTS: dict[Any, dict[str, Any]] = {
    plots.learning_curves: {"runs": {"conv": [EPOCH]}},
    plots.attention_maps: {
        "images": PICTURES, "queries": np.ones((2, 2), int), "maps": np.asarray(draw(2, 3, 4, 4)), "titles": ["a", "b"]
    },
    plots.predictions: {"images": PICTURES[..., None], "titles": ["a"] * len(PICTURES), "maps": PICTURES},
    plots.kernels: {"kernel": np.asarray(draw(3, 3, 1, 4)), "columns": 2},
    plots.mean_attention: {"means": np.asarray(draw(2, 3, 3)), "low": (-1, -1), "columns": 2},
    plots.heads_by_layers: {"maps": np.asarray(draw(2, 3, 4, 4)), "query": (1, 1), "image": PICTURES[0]},
    plots.head_centers_on_grid: {
        "centers": np.asarray(draw(2, 3, 2)), "spreads": np.tile(np.eye(2), (2, 3, 1, 1)), "columns": 2
    },
    plots.receptive_fields: {"fields": PICTURES, "titles": ["a", "b"]},
    plots.inline_svg: {"figure": plots.kernels(np.ones((1, 1, 1, 1))), "name": "one"},
    plots.styled: {"size": 10},
    plots.plain: {"text": "a", "most": 24},
    plots.can_be_drawn: {"text": "a"},
}  # fmt: skip
POSITION: dict[Any, dict[str, Any]] = {
    position.rotary: {"grid": GRID, "head_dim": 8},
    position.rotary_at: {"positions": draw(5, 2), "frequencies": draw(4, 2), "pairing": "halves"},
    position.rotate: {"x": draw(5, 3, 8), "tables": position.rotary(5, 8)},
    position.axial_frequencies: {"head_dim": 8, "rank": 2},
    position.mixed_frequencies: {"key": jax.random.key(0), "num_heads": 2, "head_dim": 8, "rank": 2},
    position.alibi: {"window": (3, 3), "num_heads": 2},
    position.alibi_slopes: {"num_heads": 3},
    position.crop: {"table": draw(2, 5, 5), "window": Window((3, 3)), "clipped": Window((2, 3))},
}
REMIX = {"model": models.ConvNeXt((1,), (4,), rngs=nnx.Rngs(0)), "to": "attention", "stages": [0], "alpha": 8.0}
OWN: dict[Any, dict[str, Any]] = {
    zoo.Slide: {"size": (3, 3), "strides": 1, "padding": "SAME", "dilation": 1, "boundary": "zero"},
    Window: {"size": (3, 3), "stride": 1, "dilation": 1, "block": 1, "causal": False, "boundary": "shift"},
    jaxattn.remix: REMIX,
    jaxattn.remix_report: REMIX,
    jaxattn.attention: {
        "query": draw(1, 8, 2, 4), "key": draw(1, 8, 2, 4), "value": draw(1, 8, 2, 4), "window": Window(3),
        "bias": draw(8, 2, 3), "scale": 0.5, "relative_bias": draw(2, 5), "logits_soft_cap": 5.0, "tile": 4,
        "dropout_rate": 0.0,
    },
    jaxattn.attention_scores: {
        "query": draw(1, 8, 2, 4), "key": draw(1, 8, 2, 4), "window": Window(3), "bias": draw(8, 2, 3), "scale": 0.5,
        "relative_bias": draw(2, 5), "logits_soft_cap": 5.0,
    },
    jaxattn.attention_weights: {
        "query": draw(1, 8, 2, 4), "key": draw(1, 8, 2, 4), "window": Window(3), "bias": draw(8, 2, 3), "scale": 0.5,
        "relative_bias": draw(2, 5), "logits_soft_cap": 5.0, "dropout_rate": 0.0,
    },
    jaxattn.attention_at: {
        "query": draw(1, 5, 2, 4), "positions": draw(1, 5, 1), "key": draw(1, 8, 2, 4), "value": draw(1, 8, 2, 4),
        "window": Window(3), "bias": draw(5, 2, 3), "scale": 0.5, "relative_bias": draw(2, 5), "logits_soft_cap": 5.0,
    },
    jaxattn.traced_for: {"backend": "tpu", "devices": 2, "chip": "v6e"},
    jaxattn.mix: {
        "weights": draw(1, 8, 2, 5), "value": draw(1, 8, 2, 4), "window": Window(3), "extra_value": draw(1, 2, 2, 4)
    },
    jaxattn.attention_plan: {"query": draw(1, 8, 2, 4), "key": draw(1, 8, 2, 4), "value": draw(1, 8, 2, 4)},
    jaxattn.merge_attentions: {"outputs": [draw(4, 2, 3)], "lses": [draw(4, 2)]},
    jaxattn.einsum: {"equation": "i+r c, r c o -> i o", "operands": (draw(5, 2), draw(3, 2, 4)), "padding": "SAME"},
    jaxattn.plan: {"equation": "i+r c, r c o -> i o", "operands": ((5, 2), (3, 2, 4)), "padding": "SAME"},
}  # fmt: skip
CALLS = {
    **{f: {"x": X, **kwargs} for f, kwargs in ZOO.items()},
    **{f: {**kwargs, "rngs": nnx.Rngs(0)} for f, kwargs in (NN | MODELS).items()},
    **MEASURE, **EQUIVALENCE, **PLOTS, **POSITION, **OWN,
}  # fmt: skip

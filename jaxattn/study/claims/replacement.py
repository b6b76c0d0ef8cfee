"""Claim 22: a whole network whose convolutions are local attention, by one flag."""

import functools
from typing import Any

from flax import nnx

from jaxattn import models
from jaxattn.study import figures
from jaxattn.study.claim import Measurement, Numbers, Published, Setting, claim
from jaxattn.study.fit import classifier, examples
from jaxattn.study.seeds import difference, negated, points, together
from jaxattn.train.evaluate import count_parameters, flops_per_image

KINDS: dict[str, dict[str, Any]] = {
    "convolution": {"mix": "conv"},
    "convolution stem, then attention": {"mix": "attention"},
    "attention alone": {"mix": "attention", "stem_mix": "attention"},
}
MOST = 0.03
STEPS, BATCH = {"quick": 200, "full": 300}, 32
ATTENTION = tuple(KINDS)[1:]


def resnet(kind: str, shape: tuple[int, ...], classes: int, window: int, rngs: nnx.Rngs) -> models.ResNet:
    """Two stages of one block; images of more than 16 pixels go through ImageNet's stem, which keeps a quarter."""
    return models.ResNet(
        (1, 1),
        block="basic",
        width=16,
        window=window,
        num_heads=2,
        in_features=shape[-1],
        num_classes=classes,
        stem="cifar" if shape[0] <= 16 else "imagenet",
        rngs=rngs,
        **KINDS[kind],
    )


@functools.cache
def trainer(kind: str, shape: tuple[int, ...], classes: int, window: int, steps: int, batch: int):
    return classifier(lambda rngs: resnet(kind, shape, classes, window, rngs), steps, batch, 1e-2)


def replaces(numbers: Numbers) -> Measurement:
    """Whether each network with attention is as good, and no larger."""
    lost = {kind: difference(numbers["accuracy: convolution"], numbers[f"accuracy: {kind}"]) for kind in ATTENTION}
    larger = [numbers[f"parameters: {kind}"][0] > numbers["parameters: convolution"][0] for kind in ATTENTION]
    as_good = [negated(value.above(MOST)) for value in lost.values()]
    verdict = together([False if more else good for more, good in zip(larger, as_good, strict=True)], "the stem")
    notes = "Lost: " + "; ".join(f"with {kind} {points(value)}" for kind, value in lost.items()) + "."
    accuracy = {kind: numbers[f"accuracy: {kind}"] for kind in KINDS}
    extra = {f"lost with {kind}": value.mean for kind, value in lost.items()}
    return Measurement(extra, verdict, [figures.dots({"images": accuracy}, "test accuracy")], notes)


@claim(
    number=22,
    author="mof.ii",
    text="Convolution is not local attention, yet local attention can replace it in a whole network.",
    chinese="卷积不是局部注意力，但局部注意力可以在整个网络里替代卷积。",
    about="One ResNet, one flag: its blocks have convolutions of 3 × 3, or local attention in windows of 5 × 5 with "
    "relative embeddings (SASA), with a convolution as stem or with attention there too. All are trained for the "
    "same steps on the study's images. Accuracy, parameters and XLA's count of operations are compared. (That a "
    "layer of local attention is no convolution is claim 18.)",
    hypothesis="It can, at fewer parameters.",
    threshold="Holds if both networks with attention lose at most 3 points of accuracy, with no more parameters; "
    "depends on the stem if one does; fails if none; depends on the seed if a 95 % interval has 3 points in it.",
    judge=replaces,
    published=[
        Published(
            "ImageNet, ResNet-50, Ramachandran et al. 2019 (arXiv 1906.05909)",
            ("network", "GFLOPs", "M parameters", "top-1"),
            [
                ("convolution", "8.2", "25.6", "76.9"),
                ("convolution stem, then attention", "7.0", "18.0", "77.4"),
                ("attention alone", "7.2", "18.0", "77.6"),
            ],
        ),
        Published(
            "the same: the side of the window",
            ("3", "5", "7", "9", "11"),
            [("76.4", "77.2", "77.4", "77.7", "77.6")],
        ),
        Published(
            "the same: positions, on validation images",
            ("none", "absolute", "relative"),
            [("77.6", "78.2", "80.2")],
        ),
    ],
    cost=38,
)
def one_flag(setting: Setting, window: int = 5, steps: int | None = None) -> Measurement:
    shape, classes = setting.data.image_shape, len(setting.data.class_names)
    known, test = examples(setting.data, setting.seed, len(setting.data.train))
    numbers = {}
    for kind in KINDS:
        run = trainer(kind, shape, classes, window, (STEPS[setting.profile] if steps is None else steps), BATCH)
        numbers[f"accuracy: {kind}"] = run(setting.seed, known, test).accuracy
        model = resnet(kind, shape, classes, window, nnx.Rngs(setting.seed))
        numbers[f"parameters: {kind}"] = count_parameters(model)
        numbers[f"operations for an image: {kind}"] = flops_per_image(model, setting.data)
    return Measurement(numbers)

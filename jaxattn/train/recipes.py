"""Recipes: what a run's settings default to, with what each was measured to cost and to reach."""

import dataclasses
import re

from jaxattn.errors import InputError
from jaxattn.train.config import Config, DtypeName, Mix, OptimizerName, RecipeName


class Digits(Config):
    """Scikit-learn's digits, 8×8, by a network of two residual blocks, with AdamW.

    Accuracy: 98.99 % of 397 test images, by convolution and by local attention alike (medians of three seeds).
    Cost: some 20 s a network on two CPU cores.
    """


@dataclasses.dataclass(frozen=True)
class Fashion(Config):
    """Fashion-MNIST, 28×28, by the same two blocks, with SGD, Nesterov's momentum, warm-up and a cosine.

    Accuracy: 91.17 % of the 10,000 test images, by convolution; 85.86 % by local attention after one epoch
    (`--mix attention --epochs 1`). One seed each.
    Cost: 14 minutes on two CPU cores that trained 394 images/s; quiet ones have done 600. An epoch of local attention
    takes as long, at 68 images/s.
    """

    recipe: RecipeName = "fashion"
    mix: Mix = "conv"
    epochs: int = 6
    batch_size: int = 128
    optimizer: OptimizerName = "sgd"
    learning_rate: float = 0.4
    weight_decay: float = 5e-4
    flip: bool = True


@dataclasses.dataclass(frozen=True)
class Resnet(Config):
    """ResNet-18 on pictures of 32 px, as CIFAR is usually trained: SGD, Nesterov's momentum, a cosine, pad and crop.

    Not trained to its end here: two CPU cores train 55 images/s, so an epoch of 50,000 takes a quarter of an hour.
    """

    recipe: RecipeName = "resnet"
    model: str = "resnet18"
    mix: Mix = "conv"
    epochs: int = 100
    batch_size: int = 128
    optimizer: OptimizerName = "sgd"
    learning_rate: float = 0.1
    warmup: float = 0.05
    weight_decay: float = 5e-4
    shift: int = 4
    flip: bool = True


@dataclasses.dataclass(frozen=True)
class Vit(Config):
    """A small Vision Transformer on pictures of 28 or 32 px: AdamW, clipped gradients, smoothed labels, a mean of the
    weights (Dosovitskiy et al. 2021, arXiv 2010.11929; Touvron et al. 2021, arXiv 2012.12877, for the regularisers).

    With `--epochs 2 --ema 0 --drop-path 0 --shift 2 --learning-rate 2e-3` on Fashion-MNIST: 78.17 % of the 10,000 test
    images (one seed), 280 images/s on two CPU cores. The same with `--mix quadratic --epochs 1`, whose heads' centres
    are drawn: 77.54 %, 219 images/s.
    """

    recipe: RecipeName = "vit"
    model: str = "vit_small32"
    mix: Mix = "global"
    epochs: int = 100
    batch_size: int = 128
    learning_rate: float = 1e-3
    label_smoothing: float = 0.1
    clip: float = 1.0
    ema: float = 0.999
    drop_path: float = 0.1
    shift: int = 4
    flip: bool = True


@dataclasses.dataclass(frozen=True)
class Cordonnier(Config):
    """Six layers of quadratic heads on pictures of 32 px, as Cordonnier et al. 2020 (arXiv 1911.03584) train them:
    SGD with momentum and a cosine. Theirs reaches 93.8 % on CIFAR-10 after 300 epochs; not repeated here."""

    recipe: RecipeName = "cordonnier"
    model: str = "cordonnier"
    mix: Mix = "quadratic"
    epochs: int = 300
    batch_size: int = 100
    optimizer: OptimizerName = "sgd"
    learning_rate: float = 0.1
    warmup: float = 0.05
    weight_decay: float = 1e-4
    shift: int = 4
    flip: bool = True


@dataclasses.dataclass(frozen=True)
class VitB(Config):
    """ViT-B/16 on pictures of 224 px for a TPU pod: AdamW, bfloat16, mixup and CutMix (Touvron et al. 2021).

    Planned with `jaxattn compile --recipe vit_b`; not trained here.
    """

    recipe: RecipeName = "vit_b"
    model: str = "vit_b"
    mix: Mix = "global"
    data: str = "folder:imagenet"
    epochs: int = 300
    batch_size: int = 4096
    learning_rate: float = 4e-3
    warmup: float = 0.02
    label_smoothing: float = 0.1
    clip: float = 1.0
    ema: float = 0.9999
    drop_path: float = 0.1
    dtype: DtypeName = "bfloat16"
    shift: int = 0
    flip: bool = True
    mixup: float = 0.8
    cutmix: float = 1.0
    erasing: float = 0.25


@dataclasses.dataclass(frozen=True)
class Finetune(Config):
    """A network with the weights of a file, on other images: AdamW with a tenth of the usual rate, which falls by a
    quarter with every block towards the images (Bao et al. 2022, arXiv 2106.08254), a new head, few epochs.

    Cost: as the network's.
    """

    recipe: RecipeName = "finetune"
    model: str = "resnet18"
    mix: Mix = "own"
    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 5e-4
    layer_decay: float = 0.75
    label_smoothing: float = 0.1
    clip: float = 1.0
    shift: int = 0
    flip: bool = True


RECIPES: dict[str, Config] = {
    recipe.recipe: recipe for recipe in (Digits(), Fashion(), Resnet(), Vit(), Cordonnier(), VitB(), Finetune())
}


def recipe(name: str | None, data: str | None) -> Config:
    """The recipe of that name, or without one the recipe that suits the data; with that data in it."""
    kind = re.split("[:?]", (data or "digits").removeprefix("compose:"))[0]
    name = name or {"digits": "digits", "mnist": "digits", "fashion-mnist": "fashion"}.get(kind, "resnet")
    if name not in RECIPES:
        raise InputError(f"recipe (={name!r}) must be one of {', '.join(RECIPES)}")
    return dataclasses.replace(RECIPES[name], **({} if data is None else {"data": data}))


def changed(config: Config) -> dict[str, object]:
    """The fields in which a configuration differs from its recipe."""
    default = dataclasses.asdict(RECIPES[config.recipe])
    return {name: value for name, value in dataclasses.asdict(config).items() if value != default[name]}

"""What is trained: the fields of a run, which are also the flags of the command."""

import dataclasses
import math
from pathlib import Path
from typing import Literal, get_args

from jaxattn.errors import InputError

RecipeName = Literal["digits", "fashion", "resnet", "vit", "cordonnier", "vit_b", "finetune"]
ResnetName = Literal["tiny", "resnet18", "resnet34", "resnet50"]
VitName = Literal["vit_tiny8", "vit_small32", "vit_ti", "vit_s", "vit_b", "convit_ti", "convit_s", "cordonnier"]
ModelName = Literal[ResnetName, VitName, "volume_small"]
Mix = Literal["both", "conv", "attention", "global", "quadratic", "gpsa", "own"]
OptimizerName = Literal["adamw", "sgd"]
DtypeName = Literal["float32", "bfloat16"]

RESNETS, VITS = get_args(ResnetName), get_args(VitName)
CHOICES = {"recipe": RecipeName, "mix": Mix, "optimizer": OptimizerName, "dtype": DtypeName}
# ints, at least this
COUNTS = {"epochs": 1, "batch_size": 1, "accumulate": 1, "freeze": 0, "shift": 0, "cutout": 0, "seed": 0}
AMOUNTS = ("learning_rate", "layer_decay", "weight_decay", "clip", "mixup", "cutmix")  # numbers, not negative
SHARES = ("warmup", "momentum", "label_smoothing", "ema", "drop_path", "erasing")  # numbers from 0 up to 1
SEEDS = 2**32  # JAX draws from the lower 32 bits, so larger seeds would be others again
SWITCHES = ("new_head", "flip", "remat", "skip_bad")


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides what is trained, and the flags of `jaxattn train`. The defaults are recipe "digits"."""

    recipe: RecipeName = "digits"
    """What the other fields default to. Chosen by the data where it is not given."""
    model: str = "tiny"
    """Network: `tiny`, `resnet18`, `vit_small32` and so on, or a published one, such as `swin_tiny`."""
    mix: Mix = "both"
    """What mixes the pixels. Of a ResNet: convolution, local attention, or two runs, one with each. Of a ViT: global
    attention, local attention, quadratic heads, or gated positional ones (gpsa). `own` is what a network is made with,
    and all that there is for a published one."""
    weights: str = ""
    """File of weights to begin with, `.safetensors` or PyTorch's, as `jaxattn export` writes; of the same network, for
    images of any size that it takes."""
    new_head: bool = True
    """With `weights`: the layer that makes the logits begins anew, for other classes. Else the file's is taken."""
    freeze: int = 0
    """With `weights`: so many stages (blocks, of a network without stages), and all before them, stay as they are."""
    layer_decay: float = 1.0
    """What the learning rate of each block is multiplied by for every block behind it, from the images on."""
    data: str = "digits"
    """Data set: `digits` (scikit-learn's), `fashion-mnist:PATH`, `mnist:PATH`, `cifar10:PATH`, `cifar100:PATH`,
    `folder:PATH`, `parquet:PATH`, `numpy:PATH.npz`, `relational:TASK` (made on the fly), or `compose:DATA` (made of
    several images of another data set)."""
    epochs: int = 15
    """Passes over the training images."""
    batch_size: int = 50
    """Images per step, on all devices together."""
    optimizer: OptimizerName = "adamw"
    """AdamW, or stochastic gradient descent with Nesterov's momentum."""
    learning_rate: float = 3e-3
    """Highest learning rate, reached after the warm-up; a half cosine then takes it to zero."""
    warmup: float = 0.1
    """Share of all steps in which the learning rate rises linearly from zero."""
    weight_decay: float = 0.05
    """Decay of the weights that multiply features, as a share of the learning rate."""
    momentum: float = 0.9
    """Of SGD; AdamW has its usual 0.9 and 0.999."""
    label_smoothing: float = 0.0
    """Share of each target that is spread over all classes."""
    clip: float = 0.0
    """Longest gradient, as a norm over all weights; 0 leaves it as it is."""
    accumulate: int = 1
    """Steps whose mean gradient makes one update."""
    ema: float = 0.0
    """Decay of the mean of the weights that is evaluated in their place; 0 for none."""
    drop_path: float = 0.0
    """Stochastic depth: share of images for which the last block is skipped, less for those before it."""
    dtype: DtypeName = "float32"
    """What the network computes in; weights, moments and losses are float32."""
    remat: bool = False
    """Keep each block's input alone, and compute the rest again for the gradient: less memory, a third more time."""
    shift: int = 1
    """Training images are moved by up to so many pixels each way."""
    flip: bool = False
    """Every other training image is mirrored left to right."""
    cutout: int = 0
    """Side of a square that is blanked in every training image, in pixels."""
    mixup: float = 0.0
    """Alpha of the Beta distribution by which pairs of images are blended; 0 for none."""
    cutmix: float = 0.0
    """Alpha of the Beta distribution that sizes the rectangle taken from another image; 0 for none."""
    erasing: float = 0.0
    """Share of training images in which a random rectangle is erased."""
    skip_bad: bool = False
    """Leave out images that cannot be read, count them and list them, in place of an error."""
    seed: int = 0
    """Draws the initial weights, the validation images, the order of the batches and the augmentation."""

    def check(self):
        """Raises a ValueError that names the first field out of its range."""
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in get_args(allowed):
                raise InputError(f"{name} (={getattr(self, name)!r}) must be one of {', '.join(get_args(allowed))}")
        if not isinstance(self.data, str):
            raise InputError(f"data (={self.data!r}) must be a string, such as 'digits'")
        if self.model not in get_args(ModelName) and self.model not in models():
            raise InputError(f"model (={self.model!r}) must be one of {', '.join(models())}")
        if not isinstance(self.weights, str):
            raise InputError(f"weights (={self.weights!r}) must be a string, the path of a file")
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} (={getattr(self, name)!r}) must be True or False")
        for name in (*COUNTS, *AMOUNTS, *SHARES):
            value, low = getattr(self, name), COUNTS.get(name, 0)
            if isinstance(value, bool) or not isinstance(value, int if name in COUNTS else int | float):
                raise InputError(f"{name} (={value!r}) must be {'an int' if name in COUNTS else 'a number'}")
            if not low <= value < math.inf:
                raise InputError(f"{name} (={value}) must be at least {low}{'' if name in COUNTS else ', and finite'}")
            if name == "learning_rate" and value == 0:
                raise InputError("learning_rate (=0) must be more than 0: nothing would be learned")
            if name == "layer_decay" and not 0 < value <= 1:
                raise InputError(f"layer_decay (={value}) must be more than 0, and at most 1, which is none")
            if name == "seed" and value >= SEEDS:
                raise InputError(f"seed (={value}) must be less than {SEEDS}")
            if name in SHARES and (value > 1 or (value == 1 and name != "warmup")):
                raise InputError(f"{name} (={value}) must be {'at most' if name == 'warmup' else 'less than'} 1")
        if self.weights == "" and (self.freeze or not self.new_head):
            name = "freeze" if self.freeze else "new_head"
            raise InputError(
                f"{name} (={getattr(self, name)}) must not be given without weights, a file, to begin with"
            )
        if self.model in RESNETS:
            fitting = ("both", "conv", "attention", "own")
        elif self.model == "volume_small":
            fitting = ("attention", "own")
        elif self.model not in VITS:
            fitting = ("own",)
        else:
            gated = self.model.startswith("convit")
            fitting = ("gpsa", "own") if gated else ("global", "attention", "quadratic", "gpsa", "own")
        if self.mix not in fitting:
            raise InputError(f"mix (={self.mix!r}) must be one of {', '.join(fitting)} for the model {self.model}")

    @property
    def label(self) -> str:
        """What the lines of a run begin with: what mixes, or the network where that is all its own."""
        return self.model if self.mix == "own" else self.mix


def models() -> tuple[str, ...]:
    """The names of the networks that can be trained."""
    from jaxattn.pretrained.registry import names  # which imports every network

    return tuple(dict.fromkeys([*get_args(ModelName), *names()]))


@dataclasses.dataclass(frozen=True)
class Options:
    """How a run is run, which changes nothing in what it ends with."""

    out: Path | None = None
    """Folder of the run; by default one under runs/, named after data, network, mix and seed."""
    resume: bool = False
    """Go on with the run in that folder from its newest checkpoint, or start it where there is none. One that is whole
    goes on to more `epochs`; `data` may name a place to which the same images were moved."""
    overwrite: bool = False
    """Replace the run that the folder holds."""
    checkpoint_every: int = 0
    """Save after so many steps, beside the end of every epoch; 0 for the epochs alone."""
    mesh: str | None = None
    """Devices, as in `data=4,space=2`: the batch is split over data and fsdp, the weights over fsdp, and the images'
    first axis over space. By default one device, or of several processes all, over data."""
    coordinator: str | None = None
    """HOST:PORT of the first of several processes that train together. TPU pods, SLURM and GKE say it by themselves."""
    processes: int | None = None
    """How many processes there are."""
    process: int | None = None
    """Which of them this is, from 0."""

    def check(self):
        """Raises a ValueError that names the first field out of its range."""
        if self.resume and self.overwrite:
            raise InputError(
                "resume (=True) and overwrite (=True) must not both be set: go on with the run, or replace it"
            )
        if self.checkpoint_every < 0:
            raise InputError(f"checkpoint_every (={self.checkpoint_every}) must be at least 0")

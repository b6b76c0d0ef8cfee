"""What is trained: the fields of a run, which are also the flags of the command."""

import dataclasses
import math
from typing import Literal, get_args

from jaxattn.train.extras import InputError

ModelName = Literal["tiny", "resnet18", "resnet34", "resnet50"]
Mix = Literal["both", "conv", "attention"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides what is trained; `jaxattn train --help` shows it."""

    model: ModelName = "tiny"
    """Network."""
    mix: Mix = "both"
    """What mixes the pixels: convolution, local attention, or two runs, one with each."""
    data: str = "digits"
    """`digits` (scikit-learn's), or `fashion-mnist:PATH` where PATH holds the idx files."""
    epochs: int = 15
    """Passes over the training images."""
    batch_size: int = 50
    """Images per step."""
    learning_rate: float = 3e-3
    """Highest learning rate, reached after the warm-up; a half cosine then takes it to zero."""
    warmup: float = 0.1
    """Share of all steps in which the learning rate rises linearly from zero."""
    weight_decay: float = 0.05
    """AdamW's decay of the weights that have two axes or more."""
    shift: int = 1
    """Training images are moved by up to so many pixels each way."""
    seed: int = 0
    """Draws the initial weights, the validation images and the order of the batches."""

    def check(self):
        """Raises a ValueError that names the first field out of its range."""
        for name, allowed in (("model", get_args(ModelName)), ("mix", get_args(Mix))):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} (={getattr(self, name)!r}) must be one of {', '.join(allowed)}")
        least = {
            "epochs": 1,
            "batch_size": 1,
            "learning_rate": 0,
            "warmup": 0,
            "weight_decay": 0,
            "shift": 0,
            "seed": 0,
        }
        if not isinstance(self.data, str):
            raise InputError(f"data (={self.data!r}) must be a string, such as 'digits'")
        for name, low in least.items():
            value, real = getattr(self, name), name in ("learning_rate", "warmup", "weight_decay")
            if isinstance(value, bool) or not isinstance(value, int | float if real else int):
                raise InputError(f"{name} (={value!r}) must be {'a number' if real else 'an int'}")
            if not low <= value < math.inf:
                raise InputError(f"{name} (={value}) must be at least {low}{', and finite' if real else ''}")
        if self.warmup > 1:
            raise InputError(f"warmup (={self.warmup}) is a share of all steps: at most 1")

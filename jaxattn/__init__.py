"""Convolution, attention, and everything between, as one einsum."""

from .attention import attention as attention
from .attention import merge_attentions as merge_attentions
from .einsum import Plan as Plan
from .einsum import einsum as einsum
from .einsum import plan as plan
from .window import Window as Window
from .zoo import conv as conv

__version__ = "0.1.0"


def __getattr__(name: str):
    """`jaxattn.nn`, `models`, `equivalence`, `measure` and `plots`, imported when first asked for."""
    if name in ("nn", "models", "equivalence", "measure", "plots"):
        import importlib

        return importlib.import_module(f"jaxattn.{name}")
    raise AttributeError(f"module 'jaxattn' has no attribute {name!r}")

"""Convolution, attention, and everything between, as one einsum."""

from .attention import attention as attention
from .attention import merge_attentions as merge_attentions
from .einsum import Plan as Plan
from .einsum import einsum as einsum
from .einsum import plan as plan
from .window import Window as Window
from .zoo import conv as conv

__version__ = "0.1.0"

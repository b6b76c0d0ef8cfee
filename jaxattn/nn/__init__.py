"""Layers as Flax nnx modules."""

from .attention import Attention as Attention
from .conv import Conv as Conv
from .quadratic import QuadraticAttention as QuadraticAttention

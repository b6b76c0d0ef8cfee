"""Layers as Flax nnx modules."""

from .attention import Attention as Attention
from .axial import AxialAttention as AxialAttention
from .conv import Conv as Conv
from .gated import GPSA as GPSA
from .grids import BoTNetAttention as BoTNetAttention
from .grids import CoAtNetAttention as CoAtNetAttention
from .grids import GlobalAttention as GlobalAttention
from .grids import LearnedRelativeAttention as LearnedRelativeAttention
from .quadratic import QuadraticAttention as QuadraticAttention
from .shifted import ShiftedWindowAttention as ShiftedWindowAttention
from .windows import SASA as SASA
from .windows import HaloAttention as HaloAttention
from .windows import NeighborhoodAttention as NeighborhoodAttention

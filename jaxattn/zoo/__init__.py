"""Each layer as a pure function of a few lines over `einsum` and `attention`; `table()` prints them all."""

from .axial import axial_attention as axial_attention
from .dense import conv as conv
from .gated import gpsa as gpsa
from .grids import botnet_attention as botnet_attention
from .grids import coatnet_attention as coatnet_attention
from .grids import global_attention as global_attention
from .grids import learned_relative_attention as learned_relative_attention
from .quadratic import quadratic_attention as quadratic_attention
from .row import ROWS as ROWS
from .row import Row as Row
from .row import table as table
from .shifted import shifted_window_attention as shifted_window_attention
from .slide import Slide as Slide
from .windows import halo_attention as halo_attention
from .windows import neighborhood_attention as neighborhood_attention
from .windows import sasa as sasa

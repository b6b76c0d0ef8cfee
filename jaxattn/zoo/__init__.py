"""Each layer as a pure function of a few lines over `einsum` and `attention`; `table()` prints them all.

All of them take

- `x`: `[*batch, *grid, features]`, real numbers, with any number of batch axes;
- `params`: arrays by name; those that may be missing are named as such, and what has a bias has it by its name;
- `precision`: of every product, as in `jax.lax.dot_general`;

and most of them

- `implementation`: as in `jaxattn.attention`;
- `axis_name`: the mesh axis, inside `jax.shard_map`, over which the grid's first axis is split.

How many axes the grid has is seen from the parameters, so that an int for a window, a stride or a dilation is every
axis's. Arguments are checked before anything is computed (`jaxattn.checked`).
"""

from .aft import aft as aft
from .aft import aft_conv as aft_conv
from .augmented import augmented_conv as augmented_conv
from .axial import axial_attention as axial_attention
from .cvt import cvt_attention as cvt_attention
from .dense import conv as conv
from .depthwise import depthwise_conv as depthwise_conv
from .depthwise import light_conv as light_conv
from .dynamic import dynamic_conv as dynamic_conv
from .dynamic import dynamic_depthwise_conv as dynamic_depthwise_conv
from .dynamic import involution as involution
from .gated import gpsa as gpsa
from .lambdas import lambda_layer as lambda_layer
from .learned import parameter_key_attention as parameter_key_attention
from .learned import qna as qna
from .outlook import outlook_attention as outlook_attention
from .quadratic import quadratic_attention as quadratic_attention
from .registry import ROWS as ROWS
from .registry import Row as Row
from .registry import table as table
from .shifted import shifted_window_attention as shifted_window_attention
from .slide import Slide as Slide
from .sliding import halo_attention as halo_attention
from .sliding import neighborhood_attention as neighborhood_attention
from .sliding import sasa as sasa
from .transposed import conv_transpose as conv_transpose
from .whole_grid import botnet_attention as botnet_attention
from .whole_grid import coatnet_attention as coatnet_attention
from .whole_grid import global_attention as global_attention
from .whole_grid import learned_relative_attention as learned_relative_attention

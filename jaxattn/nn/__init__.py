"""Layers as Flax nnx modules.

All of them take

- `rank`: how many axes the grid has;
- `dtype`: of the computation; None promotes the inputs' and the parameters' dtypes;
- `param_dtype`: of the parameters;
- `precision`: of every product, as in `jax.lax.dot_general`;
- `rngs`: `nnx.Rngs`, of which `params` is used.

A size (window, block, kernel_size or grid) has an int for each axis of the grid; with `rank`, one int is every axis's:
`NeighborhoodAttention(4, 32, window=7, rank=2)` looks at 7 × 7 tokens. An int without a rank is of one axis, and so is
`GlobalAttention`. Then an input has at most one batch axis, `[batch, tokens, features]`, and one that could be a batch
of grids is refused, but for `Conv` and for `Attention` without a window, which do what flax's layers do. Strides,
dilations, shifts and halos are each an int, or one for each axis.
"""

from .aft import AFT as AFT
from .aft import AFTConv as AFTConv
from .attention import Attention as Attention
from .augmented import AugmentedConv as AugmentedConv
from .axial import AxialAttention as AxialAttention
from .configured import SASA as SASA
from .configured import CoAtNetAttention as CoAtNetAttention
from .configured import GlobalAttention as GlobalAttention
from .configured import HaloAttention as HaloAttention
from .configured import NeighborhoodAttention as NeighborhoodAttention
from .conv import Conv as Conv
from .cvt import CvTAttention as CvTAttention
from .depthwise import DepthwiseConv as DepthwiseConv
from .depthwise import LightConv as LightConv
from .dynamic import DynamicConv as DynamicConv
from .dynamic import DynamicDepthwiseConv as DynamicDepthwiseConv
from .dynamic import Involution as Involution
from .gated import GPSA as GPSA
from .lambdas import LambdaLayer as LambdaLayer
from .learned import ParameterKeyAttention as ParameterKeyAttention
from .learned import QnA as QnA
from .outlook import OutlookAttention as OutlookAttention
from .quadratic import QuadraticAttention as QuadraticAttention
from .shifted import ShiftedWindowAttention as ShiftedWindowAttention
from .transposed import ConvTranspose as ConvTranspose
from .whole_grid import BoTNetAttention as BoTNetAttention
from .whole_grid import LearnedRelativeAttention as LearnedRelativeAttention

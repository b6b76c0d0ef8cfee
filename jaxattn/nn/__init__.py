"""Layers as Flax nnx modules."""

from .attention import Attention as Attention
from .conv import Conv as Conv
from .depthwise import DepthwiseConv as DepthwiseConv
from .depthwise import LightConv as LightConv
from .dynamic import DynamicConv as DynamicConv
from .dynamic import DynamicDepthwiseConv as DynamicDepthwiseConv
from .dynamic import Involution as Involution
from .outlook import OutlookAttention as OutlookAttention
from .transposed import ConvTranspose as ConvTranspose

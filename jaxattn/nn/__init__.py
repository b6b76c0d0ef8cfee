"""Layers as Flax nnx modules."""

from .aft import AFT as AFT
from .aft import AFTConv as AFTConv
from .attention import Attention as Attention
from .augmented import AugmentedConv as AugmentedConv
from .conv import Conv as Conv
from .cvt import CvTAttention as CvTAttention
from .depthwise import DepthwiseConv as DepthwiseConv
from .depthwise import LightConv as LightConv
from .dynamic import DynamicConv as DynamicConv
from .dynamic import DynamicDepthwiseConv as DynamicDepthwiseConv
from .dynamic import Involution as Involution
from .lambdas import LambdaLayer as LambdaLayer
from .learned import ParameterKeyAttention as ParameterKeyAttention
from .learned import QnA as QnA
from .outlook import OutlookAttention as OutlookAttention
from .transposed import ConvTranspose as ConvTranspose

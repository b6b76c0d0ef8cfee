"""Convolution as attention, and attention as convolution."""

from .convert import convert as convert
from .initialize import init_as_cnn as init_as_cnn
from .patches import patch_kernel as patch_kernel
from .theorem import attention_to_conv as attention_to_conv
from .theorem import conv_to_attention as conv_to_attention
from .theorem import error_bound as error_bound
from .theorem import nearest_conv as nearest_conv

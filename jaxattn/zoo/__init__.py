"""Each layer as a pure function of a few lines over `einsum` and `attention`; `table()` prints them all."""

from .dense import conv as conv
from .depthwise import depthwise_conv as depthwise_conv
from .depthwise import light_conv as light_conv
from .dynamic import dynamic_conv as dynamic_conv
from .dynamic import dynamic_depthwise_conv as dynamic_depthwise_conv
from .dynamic import involution as involution
from .outlook import outlook_attention as outlook_attention
from .row import ROWS as ROWS
from .row import Row as Row
from .row import table as table
from .transposed import conv_transpose as conv_transpose

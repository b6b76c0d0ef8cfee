"""Each layer as a pure function of a few lines over `einsum` and `attention`; `table()` prints them all."""

from .aft import aft as aft
from .aft import aft_conv as aft_conv
from .augmented import augmented_conv as augmented_conv
from .cvt import cvt_attention as cvt_attention
from .dense import conv as conv
from .depthwise import depthwise_conv as depthwise_conv
from .depthwise import light_conv as light_conv
from .dynamic import dynamic_conv as dynamic_conv
from .dynamic import dynamic_depthwise_conv as dynamic_depthwise_conv
from .dynamic import involution as involution
from .lambdas import lambda_layer as lambda_layer
from .learned import parameter_key_attention as parameter_key_attention
from .learned import qna as qna
from .outlook import outlook_attention as outlook_attention
from .row import ROWS as ROWS
from .row import Row as Row
from .row import table as table
from .transposed import conv_transpose as conv_transpose

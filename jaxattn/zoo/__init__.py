"""Each layer as a pure function of a few lines over `einsum` and `attention`; `table()` prints them all."""

from .dense import conv as conv
from .quadratic import quadratic_attention as quadratic_attention
from .row import ROWS as ROWS
from .row import Row as Row
from .row import table as table
from .slide import Slide as Slide

"""Convolution, attention, and everything between, as one einsum."""

from .einsum import Plan as Plan
from .einsum import einsum as einsum
from .einsum import plan as plan
from .zoo import conv as conv

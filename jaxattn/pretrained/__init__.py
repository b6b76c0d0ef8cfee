"""Trained networks: read from files of weights, and written back."""

from .files import read_weights as read_weights
from .packaged import digit_net as digit_net
from .packaged import efficientnet_lite0 as efficientnet_lite0
from .packaged import imagenet_input as imagenet_input
from .packaged import packaged_file as packaged_file
from .registry import Preprocess as Preprocess
from .registry import Published as Published
from .registry import names as names
from .registry import preprocess as preprocess
from .registry import published as published
from .table import table as table
from .weights import fill as fill
from .weights import load as load
from .weights import save as save
from .weights import torch_arrays as torch_arrays

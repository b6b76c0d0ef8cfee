"""Measurements: where attention looks, how far an output sees, what a head compares. Arrays in, NumPy arrays out."""

from .heads import attention_distance as attention_distance
from .heads import entropy as entropy
from .heads import head_centers as head_centers
from .heads import head_spreads as head_spreads
from .heads import locality as locality
from .maps import attention_maps as attention_maps
from .maps import mean_by_offset as mean_by_offset
from .metric import QueryKeyMetric as QueryKeyMetric
from .metric import query_key_metric as query_key_metric
from .receptive_field import effective_receptive_field as effective_receptive_field

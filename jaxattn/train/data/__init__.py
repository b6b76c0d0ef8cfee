"""Data sets as sources of uint8 images and their classes, and the batches drawn from them."""

from jaxattn.train.data.dataset import Arrays as Arrays
from jaxattn.train.data.dataset import Dataset as Dataset
from jaxattn.train.data.dataset import Source as Source
from jaxattn.train.data.fingerprint import fingerprint as fingerprint
from jaxattn.train.data.load import absolute as absolute
from jaxattn.train.data.load import load as load
from jaxattn.train.data.pipeline import batches as batches

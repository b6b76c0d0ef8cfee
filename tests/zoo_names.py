"""The parameters of a module by the names that the zoo's functions take."""

import numpy as np
from flax import nnx


def zoo_params(layer):
    """Those of a module of the zoo as they are; of `Attention`, "query.kernel" is "query", a table for each axis
    "embedding_0" and so on."""
    params = {}
    for path, value in nnx.to_flat_state(nnx.state(layer, nnx.Param)):
        name = ".".join(map(str, path)).removesuffix(".kernel").replace(".bias", "_bias")
        params[name.replace("key_embedding.", "embedding_")] = np.asarray(value[...])
    return params

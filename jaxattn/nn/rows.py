"""Around a TPU's kernels, projections of tokens that stand in one axis: products of matrices.

Left alone, the compiler puts the batch innermost, for the sake of convolutions, or a token's heads one under the
other. It then turns every array around a kernel, there and back.
"""

import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec, Sharding
from jaxtyping import Array, Float

from jaxattn import machine
from jaxattn.kernels.backends import asked

ROWS = 8  # of a register


class RowLinear(nnx.LinearGeneral):
    """`nnx.LinearGeneral` from features to heads, or from heads to features, with its parameters. Where tokens go in
    one axis (`in_line`), it is one product of matrices,

        Y = X W + b,   X [tokens, in],   W [in, out],

    and what goes to heads lies in rows, as the kernels take it: a token's heads are next to each other in memory. So do
    the weights; and the gradients of both.

    `implementation` is the layer's. A caller's `dot_general` or `out_sharding`, and parameters that a mesh of
    Explicit axes splits, go flax's own way.
    """

    def __init__(self, *args: Any, implementation: str | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.implementation = implementation

    def __call__(self, inputs: Any, out_sharding: PartitionSpec | Sharding | None = None) -> Float[Array, "..."]:
        n, kernel, bias = len(self.in_features), self.kernel[...], None if self.bias is None else self.bias[...]
        own = out_sharding is not None or self.dot_general is not None or self.dot_general_cls is not None
        own = own or _is_split(kernel) or (bias is not None and _is_split(bias))
        if own or not in_line(inputs, n, self.implementation):
            return super().__call__(inputs, out_sharding=out_sharding)
        x, kernel, bias = self.promote_dtype((inputs, kernel, bias), dtype=self.dtype)
        features, rows = math.prod(self.in_features), Layout(major_to_minor=(0, 1))
        tokens, kernel = x.reshape(-1, features), with_layout_constraint(kernel.reshape(features, -1), rows)
        y = lax.dot_general(tokens, kernel, (((1,), (0,)), ((), ())), precision=self.precision)
        y = y if bias is None else y + bias.reshape(-1)
        y = with_layout_constraint(y, rows) if n == 1 else y
        return y.reshape(*x.shape[:-n], *self.out_features)


def in_line(x: Array | np.ndarray, features: int = 1, implementation: str | None = None) -> bool:
    """Whether the tokens of x, whose last axes are so many of features, should stand in one axis: the TPU's kernels are
    asked for, x is all on one device, and the last axis of the grid fills registers of 8 rows; else that is a copy."""
    if machine.backend() != "tpu" or "tpu" not in asked(implementation) or x.ndim < features + 2:
        return False
    return machine.alone() and not _is_split(x) and x.shape[-features - 1] % ROWS == 0


def _is_split(x: Array | np.ndarray) -> bool:
    """Whether its type says so, also over a single device: such an array can't be reshaped at will."""
    return any(jax.typeof(x).sharding.spec)

"""The linear maps around attention, such that a TPU's kernels take and give what they make as it lies."""

import math
from typing import Any

import jax
from flax import nnx
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec, Sharding
from jaxtyping import Array, Float

from jaxattn import machine
from jaxattn.kernels.backends import asked

ROWS = 8  # of a register


class RowLinear(nnx.LinearGeneral):
    """`nnx.LinearGeneral` from features to heads, or from heads to features, with its parameters. Where the TPU's
    kernels are asked for, it is one product of matrices,

        Y = X W + b,   X [*batch, *grid, in],   W [in, out],

    whose X lies in rows: a token's features, all heads together, are next to each other in memory, tokens follow in
    the order of the grid, and so does the gradient. The kernels need them so. Left alone, the compiler puts the batch
    innermost, for a convolution's sake, and turns every array around a kernel there and back. Where the grid's last
    axis does not fill registers of 8 rows, the compiler's way has less padding and is left alone.

    `implementation` is the layer's. A caller's `dot_general` or `out_sharding`, and parameters or inputs that are split
    over a mesh of Explicit axes within a head, go flax's own way.
    """

    def __init__(self, *args: Any, implementation: str | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.implementation = implementation

    def __call__(
        self, inputs: Float[Array, "..."], out_sharding: PartitionSpec | Sharding | None = None
    ) -> Float[Array, "..."]:
        if out_sharding is not None or not self._in_rows(inputs):
            return super().__call__(inputs, out_sharding=out_sharding)
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = self.promote_dtype((inputs, self.kernel[...], bias), dtype=self.dtype)
        features, n = math.prod(self.in_features), len(self.in_features)
        x = x.reshape(*x.shape[:-n], features)
        x = with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))
        last_by_first = ((x.ndim - 1,), (0,)), ((), ())
        y = lax.dot_general(x, kernel.reshape(features, -1), last_by_first, precision=self.precision)
        y = y if bias is None else y + bias.reshape(-1)
        return y.reshape(*y.shape[:-1], *self.out_features)

    def _in_rows(self, inputs: Array) -> bool:
        if machine.backend() != "tpu" or "tpu" not in asked(self.implementation):
            return False
        n = len(self.in_features)
        if self.dot_general is not None or self.dot_general_cls is not None or inputs.ndim < n + 2:
            return False
        whole = _whole(inputs, inputs.ndim - n) and _whole(self.kernel[...], 0, n) and _whole(self.kernel[...], n)
        return whole and inputs.shape[-n - 1] % ROWS == 0


def _whole(x: Array, begin: int, end: int | None = None) -> bool:
    """Whether of these axes of x, which become one, a mesh of Explicit axes splits none but the first."""
    return not any(jax.typeof(x).sharding.spec[begin + 1 : end])

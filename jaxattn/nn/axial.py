"""The module of axial attention."""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from jaxattn import zoo
from jaxattn.checked import AnyInt, checked
from jaxattn.nn.layer import Init, Layer, default_kernel_init, head_sizes


class AxialAttention(Layer):
    """Position-sensitive attention along one axis: `jaxattn.zoo.axial_attention` with its parameters.

    As in the paper, the heads share the embeddings, and stand one after the other. (Wang et al. 2020, Axial-DeepLab,
    arXiv 2003.07853.)

    Args:
      num_heads, in_features, qkv_features, out_features: as in `Attention`.
      length: tokens along the axis; with a window, None.
      axis: which axis of the input; -2 is the grid's last.
      window: how many tokens each one attends to; None means all.
      use_bias: whether the projections have biases.
      out_projection: whether there is an output projection.
      kernel_init: initialiser of the projections.
      embedding_init: initialiser of the embeddings; None is normal, of standard deviation head_dim ** -0.5.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> rows, columns = (AxialAttention(4, 32, length=9, axis=n, rngs=nnx.Rngs(0)) for n in (-3, -2))
    >>> columns(rows(jnp.ones((2, 9, 9, 32)))).shape
    (2, 9, 9, 32)
    """

    function = staticmethod(zoo.axial_attention)
    needs_whole_grid = "it does not know which axis of its input is split"

    @checked
    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        length: int | None = None,
        axis: AnyInt = -2,
        window: int | None = None,
        use_bias: bool = False,
        out_projection: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Init = default_kernel_init,
        embedding_init: Init | None = None,
        rngs: nnx.Rngs,
    ):
        given = locals()  # the arguments, by name
        if axis == -1:
            raise ValueError("AxialAttention: axis (=-1) must be another than the last, the features")
        tokens = [n for n in (length, window) if n is not None]
        if len(tokens) != 1:
            raise ValueError(f"AxialAttention: give one of length (={length}) and window (={window})")
        self.axis, self.window = axis, window
        sizes = head_sizes(self, given) | {"heads|1": 1, "offsets": 2 * tokens[0] - 1}
        init = nnx.initializers.normal(sizes["head_dim"] ** -0.5) if embedding_init is None else embedding_init
        self.draw(
            given, sizes, without=() if out_projection else ("out",),
            query_embedding=init, key_embedding=init, value_embedding=init,
        )  # fmt: skip

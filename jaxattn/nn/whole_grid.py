"""Modules of attention over a whole grid."""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from jaxattn import zoo
from jaxattn.checked import checked
from jaxattn.nn.layer import Init, Layer, default_kernel_init, head_sizes, small_init
from jaxattn.sizes import Size
from jaxattn.zoo.heads import offsets


class BoTNetAttention(Layer):
    """Attention over a grid with embeddings of rows and columns: `jaxattn.zoo.botnet_attention` with its parameters.

    As in the paper, the heads share the embeddings, and stand one after the other. (Srinivas et al. 2021, BoTNet, arXiv
    2101.11605.)

    Args:
      num_heads, in_features, qkv_features, out_features: as in `Attention`.
      grid: the tokens along each axis of the input.
      use_bias: whether the projections have biases.
      out_projection: whether there is an output projection.
      kernel_init: initialiser of the projections.
      embedding_init: initialiser of the embeddings; None is normal, of standard deviation head_dim ** -0.5.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> BoTNetAttention(4, 32, grid=(7, 7), rngs=nnx.Rngs(0))(jnp.ones((2, 7, 7, 32))).shape
    (2, 7, 7, 32)
    """

    function = staticmethod(zoo.botnet_attention)

    @checked
    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        rank: int | None = None,
        grid: Size,
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
        sizes = head_sizes(self, given)
        init = nnx.initializers.normal(sizes["head_dim"] ** -0.5) if embedding_init is None else embedding_init
        sizes |= {"heads|1": 1, "offsets": offsets(self.sized("grid", grid, rank)), "width": sizes["head_dim"]}
        self.draw(given, sizes, without=() if out_projection else ("out",), embedding=init)


class LearnedRelativeAttention(Layer):
    """Attention by learned relative positions, and by content or not: `jaxattn.zoo.learned_relative_attention`.

    (Cordonnier, Loukas & Jaggi 2020, arXiv 1911.03584.)

    Args:
      num_heads, in_features, qkv_features, out_features: as in `Attention`.
      grid: the tokens along each axis of the input.
      content: whether the scores have q·k; without it there is no key.
      use_bias: whether query, key and value have biases; the output projection has one.
      kernel_init: initialiser of the projections.
      embedding_init: initialiser of the embeddings.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> LearnedRelativeAttention(9, 36, grid=(7, 7), content=False, rngs=nnx.Rngs(0))(jnp.ones((2, 7, 7, 36))).shape
    (2, 7, 7, 36)
    """

    function = staticmethod(zoo.learned_relative_attention)

    @checked
    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        rank: int | None = None,
        grid: Size,
        content: bool = True,
        use_bias: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Init = default_kernel_init,
        embedding_init: Init = small_init,
        rngs: nnx.Rngs,
    ):
        given = locals()  # the arguments, by name
        sizes = head_sizes(self, given)
        sizes |= {"heads|1": num_heads, "offsets": offsets(self.sized("grid", grid, rank)), "width": sizes["head_dim"]}
        self.draw(given, sizes, biased=("out",), without=() if content else ("key",))

"""Attention as a Flax module: projections around `jaxattn.attention`, with tables for its relative terms.

What surrounds it has files of its own: `projected`, before and after it attends; `attend`, by what it does, and what
it shows of it; `attention_terms`, what else it depends on; `attention_checks`, what it refuses; `decode`, one token
after another.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax
from jax.sharding import PartitionSpec, Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Real

from jaxattn import position
from jaxattn.checked import checked
from jaxattn.nn import attend
from jaxattn.nn import attention_checks as checks
from jaxattn.nn import attention_terms as terms
from jaxattn.nn import decode as decoding
from jaxattn.nn.dropout import dropout_key
from jaxattn.nn.layer import Init, Normalize, default_bias_init, default_kernel_init, small_init
from jaxattn.nn.projected import Projected
from jaxattn.nn.rotary import learned_frequencies
from jaxattn.sizes import Size
from jaxattn.window import Window


class Attention(Projected):
    """Multi-head attention, local (in a window, on a grid of any rank) or global,

        y_i = b_O + Σ_h W_O,h Σ_{j in N(i)} A_h(i, j) (W_V,h x_j),
        A_h(i, ·) = normalize(scale · q_i·k_j + q_i·r_h[j-i] + b_h[j-i]),   q = W_Q x, k = W_K x,

    with r (`key_embedding`) and b (`relative_bias`) learned if asked for. Without a window and those two it computes
    what `flax.nnx.MultiHeadAttention` computes from the same parameters, which have the same names, shapes and initial
    values, and it takes the same arguments. Differences: a query that the mask leaves nothing takes zeros to the output
    projection, not the mean of all values; and dropout is drawn for each entry of the batch and each head, unless
    `broadcast_dropout` is True, as it is in flax without being said.
    (Vaswani et al. 2017, arXiv 1706.03762; with a window and r, Ramachandran et al. 2019, arXiv 1906.05909.)

    Args:
      num_heads: heads; they divide `qkv_features`.
      in_features: size of the input's last axis.
      qkv_features: of query, key and value, all heads together; None means `in_features`.
      out_features: size of the output's last axis; None means `in_features`, or without an output projection
        `qkv_features`.
      num_kv_heads: heads of key and value; they divide `num_heads` (grouped queries). None means `num_heads`.
      in_kv_features: size of the last axis of the inputs of key and value; None means `in_features`.
      window: None for all tokens, a `Window`, or its size: (7, 7) is `Window((7, 7))`, whose boundary is "shift".
        Several, of one rank and stride, are one for each of as many groups of heads; the tables are then lists, and the
        call's mask may be one. Neither `decode` nor `weights` takes several.
      grid: the tokens along each axis of the input, all of which see each other: `Window(grid)`, on no other grid.
      rank: how many axes the grid has; an int for `window` or `grid` is then every axis's. None: as many as these have,
        and one where they are ints; the input is then `[tokens, in_features]` or `[batch, tokens, in_features]`.
        Without a window or a grid, None is `nnx.MultiHeadAttention`'s one axis of tokens after any batch axes; with a
        `rank` all tokens of the grid see each other, and masks, biases and segments are those of their sequence.
      relative_bias: learns b, `[num_heads, *(2k-1)]`. Needs a window or a grid.
      key_embedding: learns r. True: a table per head, `[num_heads, *(2k-1), head_dim]`. "shared": one for all heads.
        "factorized": a table per head and axis, `[num_heads, 2k-1, head_dim / rank]`, an offset's embedding being its
        axes' embeddings one after the other (Ramachandran et al.). "decomposed": a table per head and axis,
        `[num_heads, 2k-1, head_dim]`, which are added (Srinivas et al. 2021, arXiv 2101.11605; MViTv2, Li et al. 2022,
        arXiv 2112.01526). Needs a window or a grid.
      normalize: as `jaxattn.attention`: "softmax", "relu", "sigmoid", "sparsemax", "none", or a callable.
      logits_soft_cap: scores become cap · tanh(score / cap).
      scale: of q·k alone; None means head_dim ** -0.5.
      rotary: turns queries and keys by where they stand, along every axis of the grid. True: `position.rotary`. Or a
        function that is called as it is: `functools.partial(position.rotary, base=100.0)`. "mixed": with learned
        frequencies, [num_kv_heads, head_dim / 2, rank] (Heo et al. 2024, arXiv 2403.13298).
      transform_qk: ``transform_qk(query, key, offset) -> (query, key)``, a function or a module, which has the last
        word on the projected queries and keys, `[*batch, *grid, heads, head_dim]` (`[*batch, tokens, heads, head_dim]`
        without a window). `offset` is where the first of them stands along each axis: 0, but on a shard of a grid and
        for a token that follows others (`decode`).
      clip: where the grid is smaller than the window, it and its tables are cut to what fits (`Window.clipped`).
      normalize_qk: a LayerNorm without bias on each query and key (Dehghani et al. 2023, arXiv 2302.05442).
      dtype: of the computation. None promotes the inputs' and the parameters' dtypes.
      param_dtype: of the parameters.
      dropout_rate: of the weights, after the normaliser; each query and head its own.
      deterministic: True drops nothing. The call's argument goes before it; `train()` and `eval()` set it.
      precision: of the projections and the attention.
      kernel_init, out_kernel_init: initialisers of the projections; without the second the first serves both.
      bias_init, out_bias_init: the same for their biases.
      relative_init: initialiser of the relative tables; small, so that training starts near content alone. None is
        normal, of standard deviation head_dim ** -0.5.
      sinks: learns `sink_logits`, `[num_heads]`, at first 0, as in `jaxattn.attention`. Needs softmax.
      use_bias: whether the projections have biases.
      out_projection: False leaves out W_O: the heads' outputs are concatenated.
      implementation: as `jaxattn.attention`.
      broadcast_dropout: drops the same weights in every entry of the batch and every head.
      attention_fn: what attends in place of `jaxattn.attention`, without a window, called as flax calls it:
        `attention_fn(query, key, value, mask=, dropout_rng=, dropout_rate=, broadcast_dropout=, deterministic=, dtype=,
        precision=, module=, is_causal=)`.
      decode: True takes one token at each call, and keeps the keys and values of those before in a cache, which
        `init_cache` makes. Without a window, or with one of one axis that is causal.
      qkv_promote_dtype, out_promote_dtype, ln_promote_dtype, qkv_dot_general, out_dot_general, qkv_dot_general_cls,
        out_dot_general_cls: as `nnx.LinearGeneral` and `nnx.LayerNorm` take them, of the projections and of
        `normalize_qk`.
      kernel_metadata, out_kernel_metadata, bias_metadata, out_bias_metadata, query_ln_scale_metadata,
        key_ln_scale_metadata: metadata of the parameters, such as their sharding; those of `out` that are empty are
        those of the other projections.
      rngs: `nnx.Rngs`; `params` is used, and `dropout` if there is any.
      keep_rngs: False leaves no random stream in the module; each call that drops must bring its own.
      axis_name: the mesh axis, inside `jax.shard_map`, over which the grid's first axis is split, as in
        `jaxattn.halo.split_attention`; None where it is whole. Weights that drop or are shown need it whole.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> layer = Attention(4, 32, window=(7, 7), relative_bias=True, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 14, 14, 32))).shape
    (2, 14, 14, 32)
    >>> layer.weights(jnp.ones((2, 14, 14, 32))).shape
    (2, 14, 14, 4, 49)
    """

    @checked
    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        *,
        window: Window | Size | Sequence[Window] | None = None,
        grid: Size | None = None,
        rank: int | None = None,
        relative_bias: bool = False,
        key_embedding: bool | str = False,
        normalize: Normalize = "softmax",
        logits_soft_cap: float | None = None,
        scale: float | None = None,
        normalize_qk: bool = False,
        rotary: bool | Literal["mixed"] | Callable[..., position.Rotary] = False,
        transform_qk: Callable[..., Any] | None = None,
        clip: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        dropout_rate: float = 0.0,
        deterministic: bool | None = None,
        precision: lax.PrecisionLike = None,
        kernel_init: Init = default_kernel_init,
        out_kernel_init: Init | None = None,
        bias_init: Init = default_bias_init,
        out_bias_init: Init | None = None,
        relative_init: Init | None = small_init,
        sinks: bool = False,
        use_bias: bool = True,
        out_projection: bool = True,
        implementation: str | None = None,
        broadcast_dropout: bool = False,
        attention_fn: Callable[..., Any] | None = None,
        decode: bool | None = None,
        qkv_promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        out_promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        ln_promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        qkv_dot_general: Callable[..., Any] | None = None,
        out_dot_general: Callable[..., Any] | None = None,
        qkv_dot_general_cls: Callable[..., Any] | None = None,
        out_dot_general_cls: Callable[..., Any] | None = None,
        rngs: nnx.Rngs,
        keep_rngs: bool = True,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        out_kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        out_bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        query_ln_scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        key_ln_scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        axis_name: str | None = None,
    ):
        given = locals()  # the arguments, by name
        self.set_heads(given)
        self.set_window(window, grid, rank)
        self.axis_name, self.clip, self.transform_qk, self.decode = axis_name, clip, transform_qk, decode
        self.normalize, self.logits_soft_cap, self.scale = normalize, logits_soft_cap, scale
        self.dtype, self.precision, self.implementation = dtype, precision, implementation
        self.dropout_rate, self.deterministic = dropout_rate, deterministic
        self.broadcast_dropout, self.attention_fn = broadcast_dropout, attention_fn
        self.rotary = rotary if callable(rotary) else position.rotary if rotary else None
        checks.check(self, given)
        self.make_projections(given)
        terms.make(self, given)
        self.rotary_frequencies = learned_frequencies(
            rotary, self.num_kv_heads, self.head_dim, self.rank, rngs, param_dtype
        )
        self.rngs = rngs.dropout.fork() if keep_rngs and dropout_rate > 0 else None
        self.cached_key = self.cached_value = self.cache_index = nnx.data(None)

    @property
    def keys_axis_name(self) -> str | None:
        """The mesh axis over which the keys that a query sees may be split."""
        return self.axis_name

    @checked
    def __call__(
        self,
        inputs_q: Real[ArrayLike, "*batch_and_grid in_features"],
        inputs_k: Real[ArrayLike, "*batch_and_key_grid in_kv_features"] | None = None,
        inputs_v: Real[ArrayLike, "*batch_and_value_grid in_value_features"] | None = None,
        *,
        mask: Any = None,  # checked by `attention`, which takes a pair as well
        bias: Real[ArrayLike, "*bias"] | None = None,
        segment_ids: Any = None,
        grid_sizes: Any = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        sow_weights: bool = False,
        decode: bool | None = None,
        is_causal: bool = False,
        input_positions: ArrayLike | None = None,
        out_sharding: PartitionSpec | Sharding | None = None,
        qkv_sharding: PartitionSpec | Sharding | None = None,
    ) -> Float[Array, "*batch_and_query_grid out_features"]:
        """Attends.

        Args:
          inputs_q: `[*batch, *grid, in_features]`. In self-attention (`inputs_k` None) under a window with strides the
            queries are made of the tokens at which they stand, stride·i; otherwise of all of `inputs_q`, whose grid
            then is the window's query grid.
          inputs_k: what the keys are made of, `[*batch, *grid, in_kv_features]`; None means `inputs_q`.
          inputs_v: what the values are made of; None means `inputs_k`.
          mask, bias, segment_ids, grid_sizes: as in `jaxattn.attention`; numbers serve as a mask too, nonzero attends.
            What is in the padding takes zeros to the output projection.
          deterministic: True drops nothing; None asks the constructor's argument.
          rngs: where dropout takes its key from, `nnx.Rngs` (its `dropout`) or a stream; None means the module's own.
          sow_weights: also stores the weights as `nnx.Intermediate` "attention_weights", for `nnx.capture`: as
            `weights` gives them, or without a window [*batch, num_heads, T, S], as flax stores them.
          decode: whether this is a token that follows those of earlier calls, [*batch, 1, in_features]; None asks the
            constructor's argument. A mask is then of the cached tokens, [..., 1, max_length], or with a window of its
            slots, as a bias is; there are no segments.
          is_causal: also masks what comes after a query, the first query standing on the first key; without a window,
            which says so itself (`Window(size, causal=True)`). A token that follows others sees no more in any case.
          input_positions: handed to `attention_fn`.
          out_sharding, qkv_sharding: those of the results of the projections, under a mesh with explicit axes.

        Returns:
          `[*batch, *query_grid, out_features]`.
        """
        decode, first, place = bool(self.decode if decode is None else decode), None, {}
        if decode:
            checks.check_one_window(self, "decode (=True)")
            inputs_k = inputs_q if inputs_k is None else inputs_k  # one token, which is no grid
            first = None if self.cache_index is None else self.cache_index[...]
        query, key, value = self.project(inputs_q, inputs_k, inputs_v, qkv_sharding, first)
        if decode:
            key, value, mask, place = decoding.follow(self, key, value, mask, segment_ids, sow_weights)
        elif is_causal and self.attention_fn is None:
            checks.check_one_window(self, "is_causal (=True)")
            mask = decoding.causal(self, query, key, mask)
        dropped = dropout_key(self, deterministic, rngs)
        checks.check_call(
            self, input_positions, out_sharding, bias=bias, segment_ids=segment_ids, grid_sizes=grid_sizes
        )
        if self.attention_fn is not None:
            known = {} if input_positions is None else {"input_positions": input_positions}
            known |= {"is_causal": is_causal and not decode, "module": self if sow_weights else None}
            y = attend.by_function(self, query, key, value, mask, dropped, **known)
        else:
            given = terms.of_call(self, query.dtype, mask, bias, segment_ids, grid_sizes)
            given = given | place if decode else terms.clipped(self, given, key)
            if sow_weights:
                attend.sow(self, query, key, given, jnp.shape(inputs_q))
            y = attend.by_terms(self, query, key, value, given, dropped)
        return self.project_back(y, jnp.shape(inputs_q), out_sharding)

    @checked
    def init_cache(self, input_shape: Sequence[int], dtype: DTypeLike = jnp.float32):
        """Makes an empty cache, for calls with `decode`, as `nnx.MultiHeadAttention` does.

        Under a window it holds the tokens that a window reaches and no more, a ring that is written over, so that any
        number may follow one another in the same memory.

        Args:
          input_shape: `[*batch, max_length, in_features]`, of all tokens together.
          dtype: of keys and values.

        >>> from flax import nnx
        >>> import jax.numpy as jnp
        >>> from jaxattn.window import Window
        >>> layer = Attention(4, 32, window=Window(64, causal=True), decode=True, rngs=nnx.Rngs(0))
        >>> layer.init_cache((2, 2000, 32))
        >>> layer(jnp.ones((2, 1, 32))).shape, layer.cached_key.shape
        ((2, 1, 32), (2, 64, 4, 8))
        """
        checks.check_one_window(self, "init_cache")
        decoding.init_cache(self, tuple(input_shape[:-1]), dtype)

    @checked
    def weights(
        self,
        inputs_q: Real[ArrayLike, "*batch_and_grid in_features"],
        inputs_k: Real[ArrayLike, "*batch_and_key_grid in_kv_features"] | None = None,
        *,
        mask: Any = None,  # checked by `attention`, which takes a pair as well
        bias: Real[ArrayLike, "*bias"] | None = None,
        segment_ids: Any = None,
    ) -> Float[Array, "*batch_and_query_grid num_heads slots"]:
        """The weights A, for figures: `[*batch, *query_grid, num_heads, slots]`, without dropout.

        The slots are the window's, row-major (`Window.indices` says which token each is); without a window, all tokens.
        """
        checks.check_weights(self, "weights")
        query, key, _ = self.project(inputs_q, inputs_k, None)
        given = terms.clipped(self, terms.of_call(self, query.dtype, mask, bias, segment_ids), key)
        return attend.weights(self, query, key, given, jnp.shape(inputs_q))

    @checked
    def set_view(
        self,
        deterministic: bool | None = None,
        decode: bool | None = None,
        batch_size: Size | None = None,
        max_length: int | None = None,
    ):
        """For `nnx.view`.

        Args:
          deterministic: if True, drops nothing.
          decode: whether calls take one token after another.
          batch_size: the batch axes of the cache, where there is none yet.
          max_length: the tokens that may follow one another.
        """
        if deterministic is not None:
            self.deterministic = deterministic
        if decode is not None:
            self.decode = decode
            if decode and self.cached_key is None:
                batch: Any = batch_size if isinstance(batch_size, tuple | None) else (batch_size,)
                if batch is None or max_length is None:
                    raise ValueError(
                        f"{type(self).__name__}: batch_size (={batch_size}) and max_length (={max_length}) must be "
                        "given where decode (=True) makes a cache"
                    )
                self.init_cache((*batch, max_length, self.in_features), self.dtype or jnp.float32)

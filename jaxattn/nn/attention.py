"""Attention as a Flax module: projections around `jaxattn.attention`, with tables for its relative terms."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
from jaxattn.checked import checked, shown
from jaxattn.halo import shard_count, split_attention
from jaxattn.nn import decode as decoding
from jaxattn.nn.grid import GridModule
from jaxattn.nn.layer import Normalize, default_bias_init, default_kernel_init, small_init
from jaxattn.nn.rotary import learned_frequencies, rotated
from jaxattn.normalize import NORMALIZERS
from jaxattn.parts import attention_weights
from jaxattn.sizes import Size
from jaxattn.window import Window

KEY_EMBEDDINGS = (False, True, "shared", "factorized", "decomposed")
TABLES = ("relative_bias", "key_embedding")


class Attention(GridModule):
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
        window: Window | Size | None = None,
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
        kernel_init: Callable[..., Any] = default_kernel_init,
        out_kernel_init: Callable[..., Any] | None = None,
        bias_init: Callable[..., Any] = default_bias_init,
        out_bias_init: Callable[..., Any] | None = None,
        relative_init: Callable[..., Any] | None = small_init,
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
        self.axis_name = axis_name
        where = type(self).__name__
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.in_features = in_features
        self.in_kv_features = in_features if in_kv_features is None else in_kv_features
        self.qkv_features = in_features if qkv_features is None else qkv_features
        default = in_features if out_projection else self.qkv_features
        self.out_features = default if out_features is None else out_features
        if window is not None and grid is not None:
            raise ValueError(f"{where}: window (={window}) must be None where grid (={grid}) is given, a window itself")
        self.grid = None if grid is None else self.sized("grid", grid, rank)
        if isinstance(window, Window):
            self.window, self.rank = window, window.rank
            if rank not in (None, window.rank):
                raise ValueError(f"{where}: rank (={rank}) must be None, or that of window (={window})")
        elif window is not None:
            self.window = Window(self.sized("window", window, rank))
        elif self.grid is not None:
            self.window = Window(self.grid)
        else:
            self.window, self.rank = None, rank or 1  # as nnx.MultiHeadAttention, with any batch axes
        self.normalize, self.logits_soft_cap, self.scale = normalize, logits_soft_cap, scale
        self.clip, self.transform_qk = clip, transform_qk
        self.rotary = rotary if callable(rotary) else position.rotary if rotary else None
        _check(self, relative_bias, key_embedding, sinks, dropout_rate, out_projection)
        self.head_dim = self.qkv_features // num_heads
        self.dtype, self.precision, self.implementation = dtype, precision, implementation
        self.dropout_rate, self.deterministic = dropout_rate, deterministic
        self.broadcast_dropout, self.attention_fn, self.decode = broadcast_dropout, attention_fn, decode
        _check_attention_fn(self, sinks)
        if decode:
            decoding.check(self)

        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        linear = partial(nnx.LinearGeneral, use_bias=use_bias, precision=precision, **kwargs)
        inner = partial(
            linear, kernel_init=kernel_init, bias_init=bias_init, promote_dtype=qkv_promote_dtype,
            dot_general=qkv_dot_general, dot_general_cls=qkv_dot_general_cls,
            kernel_metadata=kernel_metadata, bias_metadata=bias_metadata,
        )  # fmt: skip
        self.query = inner(in_features, (num_heads, self.head_dim))
        self.key = inner(self.in_kv_features, (self.num_kv_heads, self.head_dim))
        self.value = inner(self.in_kv_features, (self.num_kv_heads, self.head_dim))
        norm = partial(nnx.LayerNorm, self.head_dim, use_bias=False, promote_dtype=ln_promote_dtype, **kwargs)
        self.query_ln = norm(scale_metadata=query_ln_scale_metadata) if normalize_qk else nnx.data(None)
        self.key_ln = norm(scale_metadata=key_ln_scale_metadata) if normalize_qk else nnx.data(None)
        self.out = nnx.data(None)
        if out_projection:
            inits = {"kernel_init": out_kernel_init or kernel_init, "bias_init": out_bias_init or bias_init}
            inits |= {"kernel_metadata": out_kernel_metadata or kernel_metadata, "promote_dtype": out_promote_dtype}
            inits |= {"bias_metadata": out_bias_metadata or bias_metadata, "dot_general": out_dot_general}
            inits |= {"dot_general_cls": out_dot_general_cls}
            self.out = linear((num_heads, self.head_dim), self.out_features, axis=(-2, -1), **inits)
        relative_init = nnx.initializers.normal(self.head_dim**-0.5) if relative_init is None else relative_init
        self._make_tables(relative_bias, key_embedding, relative_init, param_dtype, rngs)
        self.sink_logits = nnx.Param(jnp.zeros(num_heads, param_dtype)) if sinks else nnx.data(None)
        self.rotary_frequencies = learned_frequencies(
            rotary, self.num_kv_heads, self.head_dim, self.rank, rngs, param_dtype
        )
        self.rngs = rngs.dropout.fork() if keep_rngs and dropout_rate > 0 else None
        self.cached_key = self.cached_value = self.cache_index = nnx.data(None)

    def _make_tables(self, relative_bias: bool, key_embedding: bool | str, init: Callable[..., Any], dtype, rngs):
        def table(*shape):
            return nnx.Param(init(rngs.params(), shape, dtype))

        offsets = () if self.window is None else tuple(2 * k - 1 for k in self.window.sizes)
        self.relative_bias = table(self.num_heads, *offsets) if relative_bias else nnx.data(None)
        if key_embedding in ("factorized", "decomposed"):
            dim = self.head_dim // (len(offsets) if key_embedding == "factorized" else 1)
            self.key_embedding = nnx.List([table(self.num_heads, n, dim) for n in offsets])
        elif key_embedding:
            heads = 1 if key_embedding == "shared" else self.num_heads
            self.key_embedding = table(heads, *offsets, self.head_dim)
        else:
            self.key_embedding = nnx.data(None)

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
        first = None
        if decode := bool(self.decode if decode is None else decode):
            inputs_k = inputs_q if inputs_k is None else inputs_k  # one token, which is no grid
            first = None if self.cache_index is None else self.cache_index[...]
        query, key, value = self._project(inputs_q, inputs_k, inputs_v, qkv_sharding, first)
        place = {}
        if decode:
            key, value, mask, place = decoding.follow(self, key, value, mask, segment_ids, sow_weights)
        elif is_causal and self.attention_fn is None:
            mask = decoding.causal(self, query, key, mask)
        dropout_key = self._dropout_key(deterministic, rngs)
        if out_sharding is not None and self.out is None:
            raise ValueError(
                f"{type(self).__name__}: out_sharding (={out_sharding}) must be None without an output projection"
            )
        if self.attention_fn is not None:
            _refuse_with_attention_fn(self, bias=bias, segment_ids=segment_ids, grid_sizes=grid_sizes)
            y = self.attention_fn(
                query,
                key,
                value,
                mask=mask,
                dropout_rng=dropout_key,
                dropout_rate=self.dropout_rate,
                broadcast_dropout=self.broadcast_dropout,
                deterministic=dropout_key is None,
                dtype=self.dtype,
                precision=self.precision,
                module=self if sow_weights else None,
                is_causal=is_causal and not decode,
                **({} if input_positions is None else {"input_positions": input_positions}),
            )
        else:
            if input_positions is not None:
                raise ValueError(f"{type(self).__name__}: input_positions must be None without an attention_fn")
            terms = self._terms(query.dtype, mask, bias, segment_ids, grid_sizes)
            terms = terms | place if decode else self._clipped(terms, key)
            if sow_weights:
                self._check_whole("sow_weights")
                weights = self._weights(query, key, terms, jnp.shape(inputs_q))
                if self.window is None:
                    weights = jnp.swapaxes(weights.reshape(*query.shape[:-1], -1), -2, -3)
                self.sow(nnx.Intermediate, "attention_weights", weights)
            y = split_attention(
                query,
                key,
                value,
                **terms,
                axis_name=self.keys_axis_name,
                dropout_rate=0.0 if dropout_key is None else self.dropout_rate,
                dropout_key=dropout_key,
                broadcast_dropout=self.broadcast_dropout,
                precision=self.precision,
                implementation=self.implementation,
            )
        out = None if self.out is None else partial(self.out, out_sharding=out_sharding)
        y = y.reshape(*y.shape[:-2], self.qkv_features) if out is None else out(y)
        return y if self.window is not None else y.reshape(*jnp.shape(inputs_q)[:-1], self.out_features)

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
        self._check_whole("weights")
        query, key, _ = self._project(inputs_q, inputs_k, None)
        terms = self._clipped(self._terms(query.dtype, mask, bias, segment_ids), key)
        return self._weights(query, key, terms, jnp.shape(inputs_q))

    def set_view(
        self,
        deterministic: bool | None = None,
        decode: bool | None = None,
        batch_size: int | Sequence[int] | None = None,
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
                batch = (batch_size,) if isinstance(batch_size, int) else batch_size
                if batch is None or max_length is None:
                    raise ValueError(
                        f"{type(self).__name__}: batch_size (={batch_size}) and max_length (={max_length}) must be "
                        "given where decode (=True) makes a cache"
                    )
                decoding.init_cache(self, (*batch, max_length), self.dtype or jnp.float32)

    def _check_whole(self, what: str):
        if self.axis_name is not None:
            raise ValueError(
                f"{type(self).__name__}: {what} needs the whole grid, and it is split over {self.axis_name!r}"
            )

    def _project(self, inputs_q, inputs_k, inputs_v, sharding=None, first=None):
        if inputs_k is None and inputs_v is not None:
            raise ValueError(f"{type(self).__name__}: inputs_v is given without inputs_k; give inputs_k alone for both")
        queries = self._standing(inputs_q) if inputs_k is None else inputs_q
        inputs_k = inputs_q if inputs_k is None else inputs_k
        inputs_v = inputs_k if inputs_v is None else inputs_v
        for name, x, features in (
            ("inputs_q", queries, self.in_features),
            ("inputs_k", inputs_k, self.in_kv_features),
            ("inputs_v", inputs_v, self.in_kv_features),
        ):
            self._check_input(name, x, features)
        grids = [jnp.shape(x)[-1 - self.rank : -1] for x in (queries, inputs_k)]
        queries, inputs_k, inputs_v = map(self._in_a_row, (queries, inputs_k, inputs_v))
        pairs = (self.query, queries), (self.key, inputs_k), (self.value, inputs_v)
        query, key, value = (project(x, out_sharding=sharding) for project, x in pairs)
        if self.query_ln is not None and self.key_ln is not None:
            query, key = self.query_ln(query), self.key_ln(key)
        query, key, value = dtypes.promote_dtype((query, key, value), dtype=self.dtype)
        return *self._placed(query, key, grids, first), value

    def _placed(self, query, key, grids, first):
        """Queries and keys with what depends on where they stand: along the first axis, from `first` on."""
        offset: list[Any] = [0 if first is None else first, *[0] * (self.rank - 1)]
        if self.axis_name is not None:
            offset[0] = lax.axis_index(self.axis_name) * grids[1][0]
        if self.rotary is not None:
            learned, still = self.rotary_frequencies, (1,) * self.rank
            frequencies = None if learned is None else learned[...]
            stride: Any = still if self.window is None else self.window.stride
            query = rotated(query, self.rotary, frequencies, grids[0], stride, offset)
            key = rotated(key, self.rotary, frequencies, grids[1], still, offset)
        return (query, key) if self.transform_qk is None else self.transform_qk(query, key, tuple(offset))

    def _in_a_row(self, x):
        """Without a window, the tokens of a grid one after the other."""
        if self.window is not None or self.rank == 1:
            return x
        *batch, features = *jnp.shape(x)[: -1 - self.rank], jnp.shape(x)[-1]
        return jnp.reshape(x, (*batch, math.prod(jnp.shape(x)[-1 - self.rank : -1]), features))

    def _standing(self, x):
        """The tokens at which a strided window's queries stand."""
        if self.window is None or self.grid is not None or jnp.ndim(x) < self.rank + 1:
            return x
        x = jnp.asarray(x)
        whole = self._whole(x.shape[-1 - self.rank : -1])
        queries, *grid = (self.window.clipped(whole) if self.clip else self.window).query_grid(whole)
        grid = (queries // shard_count(self.axis_name), *grid)
        strides: Any = self.window.stride
        steps = (slice(0, n * s, s) for n, s in zip(grid, strides, strict=True))
        return x[(..., *steps, slice(None))]

    def _whole(self, grid) -> tuple[int, ...]:
        """The grid of which this one is a shard."""
        first, *others = grid
        return (first * shard_count(self.axis_name), *others)

    def _check_input(self, name: str, x, features: int):
        grid = self.check_input(name, x, features)
        if self.grid is not None and self._whole(grid) != self.grid:
            raise ValueError(
                f"{type(self).__name__}: {name} (={list(jnp.shape(x))}) must be [*batch, *grid, {features} features] "
                f"with grid (={self.grid})"
            )

    def _terms(self, dtype, mask, bias, segment_ids, grid_sizes=None) -> dict[str, Any]:
        """What `attention` and its weights depend on besides query, key and value."""
        embedding = self.key_embedding
        if isinstance(embedding, nnx.List):
            embedding = tuple(jnp.asarray(table[...], dtype) for table in embedding)
        elif embedding is not None:
            embedding = jnp.asarray(embedding[...], dtype)
        return {
            "window": self.window,
            "mask": _bools(mask),
            "bias": None if bias is None else jnp.asarray(bias, dtype),
            "segment_ids": segment_ids,
            "grid_sizes": grid_sizes,
            "sink_logits": None if self.sink_logits is None else self.sink_logits[...],
            "relative_bias": None if self.relative_bias is None else jnp.asarray(self.relative_bias[...], dtype),
            "key_embedding": embedding,
            "normalize": self.normalize,
            "logits_soft_cap": self.logits_soft_cap,
            "scale": self.scale,
        }

    def _clipped(self, terms: dict[str, Any], key) -> dict[str, Any]:
        """The terms on this grid of keys, whose window and tables `clip` makes no larger than the grid."""
        if not self.clip or self.window is None:
            return terms
        window = self.window.clipped(self._whole(key.shape[-2 - self.rank : -2]))
        cut = {n: position.crop(terms[n], self.window, window) for n in TABLES if terms[n] is not None}
        return {**terms, **cut, "window": window}

    def _weights(self, query: Array, key: Array, terms: dict[str, Any], shape: tuple[int, ...]) -> Array:
        """[*batch, *query_grid, heads, slots]."""
        terms = dict(terms)
        if terms.pop("grid_sizes") is not None:
            raise ValueError(f"{type(self).__name__}: grid_sizes must be None where the weights are asked for")
        weights = attention_weights(query, key, **terms, precision=self.precision)
        before = query.shape[:-2] if self.window is not None else shape[:-1]
        return weights.reshape(*before, self.num_heads, -1)

    def _dropout_key(self, deterministic: bool | None, rngs: nnx.Rngs | nnx.RngStream | None):
        deterministic = self.deterministic if deterministic is None else deterministic
        if self.dropout_rate == 0.0 or deterministic:
            return None
        if deterministic is None:
            raise ValueError(
                f"{type(self).__name__}: with dropout_rate (={self.dropout_rate}), deterministic must be given to the "
                "constructor or the call, or set by train() or eval(); got None"
            )
        stream = self.rngs if rngs is None else rngs.dropout if isinstance(rngs, nnx.Rngs) else rngs
        if stream is not None and not isinstance(stream, nnx.RngStream):
            raise ValueError(
                f"{type(self).__name__}: rngs must be nnx.Rngs or one of its streams, got {type(rngs).__name__}"
            )
        if stream is None:
            raise ValueError(
                f"{type(self).__name__}: with keep_rngs=False, a call that drops must be given rngs; got None"
            )
        return stream()


def _bools(mask: Any) -> Any:
    """A mask, or a pair of them, of any numbers as bools."""
    if mask is None:
        return None
    return tuple(map(_bools, mask)) if isinstance(mask, tuple) else jnp.asarray(mask, bool)


def _check(layer: Attention, relative_bias, key_embedding, sinks, dropout_rate, out_projection):
    name = type(layer).__name__
    heads, kv_heads, features = layer.num_heads, layer.num_kv_heads, layer.qkv_features
    if features % heads:
        raise ValueError(f"{name}: num_heads (={heads}) must divide qkv_features (={features})")
    if heads % kv_heads:
        raise ValueError(f"{name}: num_kv_heads (={kv_heads}) must divide num_heads (={heads})")
    if key_embedding not in KEY_EMBEDDINGS:
        raise ValueError(f"{name}: key_embedding (={key_embedding!r}) must be one of {KEY_EMBEDDINGS}")
    if layer.window is None and (relative_bias or key_embedding):
        raise ValueError(
            f"{name}: relative_bias (={relative_bias}) and key_embedding (={key_embedding!r}) need a window; "
            "for a global layer, give the grid"
        )
    if layer.clip and (layer.window is None or layer.grid is not None):
        raise ValueError(f"{name}: clip (=True) must be False without a window that may be larger than a grid")
    if layer.window is not None and key_embedding == "factorized" and features // heads % layer.window.rank:
        raise ValueError(
            f"{name}: with key_embedding='factorized', the window's {layer.window.rank} axes must divide "
            f"head_dim (={features // heads})"
        )
    if isinstance(layer.normalize, str) and layer.normalize not in NORMALIZERS:
        raise ValueError(f"{name}: normalize (={layer.normalize!r}) must be one of {tuple(NORMALIZERS)}, or a function")
    if sinks and layer.normalize != "softmax":
        raise ValueError(f"{name}: sinks (=True) must be False with normalize={layer.normalize!r}: 'softmax' has them")
    if not 0 <= dropout_rate < 1:
        raise ValueError(f"{name}: dropout_rate (={dropout_rate}) must be in [0, 1)")
    if layer.logits_soft_cap is not None and layer.logits_soft_cap <= 0:
        raise ValueError(f"{name}: logits_soft_cap (={layer.logits_soft_cap}) must be None or a number > 0")
    if not out_projection and layer.out_features != features:
        raise ValueError(
            f"{name}: without an output projection, out_features (={layer.out_features}) "
            f"must be qkv_features (={features})"
        )


def _check_attention_fn(layer: Attention, sinks: bool):
    """What is `jaxattn.attention`'s alone needs it."""
    plain = {"normalize": "softmax"}
    names = ("window", "logits_soft_cap", "scale", "implementation", "axis_name")
    ours = {name: getattr(layer, name) for name in (*names, *plain)}
    given = {name: x for name, x in ours.items() if x != plain.get(name)}
    _refuse_with_attention_fn(layer, **given, sinks=sinks or None)


def _refuse_with_attention_fn(layer: Attention, **given: Any):
    for name, value in given.items():
        if layer.attention_fn is not None and value is not None:
            raise ValueError(
                f"{type(layer).__name__}: {name} (={shown(value)}) must be left out with an attention_fn "
                f"(={layer.attention_fn!r}), which does not know it"
            )

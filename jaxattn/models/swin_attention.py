"""What Swin mixes tokens by: attention in windows that part the grid, shifted or not."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from jaxattn.attention import attention
from jaxattn.halo import halo, shard_count
from jaxattn.models.backbone import small_init
from jaxattn.nn.attention import Attention
from jaxattn.nn.grid import Splittable
from jaxattn.nn.rows import RowLinear
from jaxattn.window import Window


class WindowAttention(Splittable):
    """Swin's mixing of tokens. The grid is parted into windows, after a roll by `shift`, so that they stand across the
    last block's; tokens that only the roll brought together do not attend to each other. In version 2, scores are
    cosines, and an MLP makes the bias of the offset:

        A = softmax_j(τ cos(q_i, k_j) + b[j-i]),   τ = exp(min(scale, ln 100)),
        b[δ] = 16 σ(W₂ relu(W₁ c + b₁)),   c = sign(δ) log₂(1 + 8|δ| / (pretrained - 1)) / log₂ 8.

    Where the windows do not part the grid evenly, it is padded: "after" the roll (timm), or "before" it (the authors,
    Hugging Face), with zeros that take part; "mask": before, and nothing attends to them.
    """

    def __init__(
        self, num_heads: int, width: int, window: tuple[int, ...], shift: tuple[int, ...], *, padding: str,
        version: int, pretrained: int, **kwargs: Any,
    ):  # fmt: skip
        self.window, self.shift, self.padding, self.pretrained = window, shift, padding, pretrained
        self.attention = Attention(
            num_heads, width, window=Window(window, block=window), relative_bias=version == 1, kernel_init=small_init,
            **kwargs,
        )  # fmt: skip
        if version == 2:
            heads = (num_heads, width // num_heads)
            self.attention.key = RowLinear(width, heads, use_bias=False, kernel_init=small_init, **kwargs)
            self.scale = nnx.Param(jnp.full((num_heads,), math.log(10), kwargs["param_dtype"]))
            self.hidden = nnx.Linear(2, 512, **kwargs)
            self.bias = nnx.Linear(512, num_heads, use_bias=False, kernel_init=small_init, **kwargs)

    def __call__(self, x: Float[Array, "*batch height width features"], *, sow_weights: bool = False):
        grid = x.shape[-3:-1]
        whole = (grid[0] * shard_count(self.axis_name), grid[1])
        pads = [(0, 0)] * (x.ndim - 3) + [(0, -n % k) for n, k in zip(grid, self.window, strict=True)] + [(0, 0)]
        if self.axis_name is not None and pads[-3] != (0, 0):
            raise ValueError(
                f"Swin: window (={self.window}) must divide the {grid[0]} rows of a shard of the grid, which is split "
                f"over {self.axis_name!r}"
            )
        x = jnp.pad(self._rolled(x, -1), pads) if self.padding == "after" else self._rolled(jnp.pad(x, pads), -1)
        segments = jnp.asarray(regions(whole, self.window, self.shift, self.padding == "mask"))
        if self.axis_name is not None:
            segments = lax.dynamic_slice_in_dim(segments, lax.axis_index(self.axis_name) * grid[0], grid[0])
        y = self._attend(x, segments, sow_weights)
        crop = (..., slice(grid[0]), slice(grid[1]), slice(None))
        return self._rolled(y[crop], 1) if self.padding == "after" else self._rolled(y, 1)[crop]

    def _rolled(self, x: Array, sign: int) -> Array:
        """By the shift, along both axes of the grid; the first may be split."""
        rows, columns = (sign * s for s in self.shift)
        if self.axis_name is not None:
            x, rows = halo(x, x.ndim - 3, self.axis_name, rows, -rows, "wrap"), 0
        return jnp.roll(x, (rows, columns), (-3, -2))

    def _attend(self, x: Array, segments: Array, sow_weights: bool) -> Array:
        """No window reaches beyond a shard: each attends by itself."""
        layer: Any = self.attention
        query, key, value = layer.query(x), layer.key(x), layer.value(x)
        if layer.relative_bias is not None:
            terms: dict[str, Any] = {"relative_bias": layer.relative_bias[...].astype(query.dtype)}
            if sow_weights:
                self.sow(nnx.Intermediate, "attention_weights", layer.weights(x, segment_ids=segments))
        else:
            temperature = jnp.exp(jnp.minimum(self.scale[...], math.log(100)))[:, None].astype(query.dtype)
            offsets = jnp.asarray(_log_offsets(self.window, self.pretrained), query.dtype)
            bias = 16 * jax.nn.sigmoid(self.bias(jax.nn.relu(self.hidden(offsets))))
            query, key = _unit(query) * temperature, _unit(key)
            terms = {"relative_bias": jnp.moveaxis(bias, -1, 0).astype(query.dtype), "scale": 1.0}
        return layer.out(attention(query, key, value, window=layer.window, segment_ids=segments, **terms))


def _unit(x: Array) -> Array:
    """Each vector over its length; a vector of zeros, as the keys of padding are, has a gradient of zeros."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    squares = (wide * wide).sum(axis=-1, keepdims=True)
    return (wide * lax.rsqrt(jnp.maximum(squares, 1e-24))).astype(x.dtype)


def _log_offsets(window: Sequence[int], pretrained: int) -> np.ndarray:
    """The c of `WindowAttention`, of query less key, at each offset of key less query: `[*(2k-1), 2]`."""
    scaled = [8 * np.arange(k - 1, -k, -1) / max((pretrained or k) - 1, 1) for k in window]
    offsets = np.stack(np.meshgrid(*scaled, indexing="ij"), axis=-1)
    return np.sign(offsets) * np.log2(np.abs(offsets) + 1) / np.log2(8)


def regions(grid: Sequence[int], window: Sequence[int], shift: Sequence[int], mask: bool) -> np.ndarray:
    """A number for each token of the padded and rolled grid; those with the same one attend to each other.

    >>> regions((5,), (3,), (1,), False)  # of two windows the last holds a token from the other end
    array([0, 0, 0, 1, 1, 2], dtype=int32)
    """
    regions = np.zeros((), np.int32)
    for n, k, s in zip(grid, window, shift, strict=True):
        place = np.arange(n + -n % k)
        token = np.roll(place, -s)
        cut = np.where(place < len(place) - k, 0, np.where(place < len(place) - s, 1, 2)) if s else 0 * place
        part = np.where(token >= n, 2, token < s) if mask else cut
        regions = 3 * regions[..., None] + part.astype(np.int32)
    return regions

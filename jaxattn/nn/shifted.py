"""Swin's module: windows that part the grid, shifted in every other layer."""

from collections.abc import Sequence
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Real

from jaxattn.checked import checked
from jaxattn.nn.attention import Attention
from jaxattn.nn.layer import Init, small_init
from jaxattn.sizes import Size
from jaxattn.window import Window
from jaxattn.zoo.shifted import Turn, cyclic_axes, shifts_below


class ShiftedWindowAttention(Attention):
    """The grid parted into windows, shifted or not: `jaxattn.zoo.shifted_window_attention` with its parameters.

    It is `Attention` on the grid padded to whole windows and rolled by the shift, whose output is rolled back.
    (Liu et al. 2021, Swin, arXiv 2103.14030.)

    Args:
      num_heads, in_features, qkv_features, out_features: as in `Attention`.
      window: tokens along each side of a window, an int, or one for each axis.
      shift: from 0 to window - 1, an int, or one for each axis; the paper's layers alternate between 0 and window // 2.
      shift_whole: whether to shift along an axis that one window covers too; the published networks do not.
      boundary: "mask", or "wrap" for a cyclic axis, whose tokens the window divides; one, or one for each axis.
      relative_bias, kernel_init: as in `Attention`.
      rngs: `nnx.Rngs`; `params` is used, and `dropout` if there is any.
      **settings: any other of `Attention`'s.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> ShiftedWindowAttention(4, 32, window=(7, 7), shift=3, rngs=nnx.Rngs(0))(jnp.ones((2, 14, 14, 32))).shape
    (2, 14, 14, 32)
    """

    @checked
    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        rank: int | None = None,
        window: Size,
        shift: Annotated[Size, 0] = 0,
        shift_whole: bool = False,
        boundary: str | Sequence[str] = "mask",
        relative_bias: bool = True,
        kernel_init: Init = small_init,
        rngs: nnx.Rngs,
        **settings: Any,
    ):
        sizes = self.sized("window", window, rank)
        said = self.rank_is_said
        super().__init__(
            num_heads, in_features, qkv_features, out_features, window=Window(sizes, block=sizes),
            relative_bias=relative_bias, kernel_init=kernel_init, rngs=rngs, **settings,
        )  # fmt: skip
        self.rank_is_said = said
        self.shift, self.shift_whole = shifts_below("ShiftedWindowAttention", shift, sizes), shift_whole
        cyclic_axes("ShiftedWindowAttention", boundary, self.rank)
        self.boundary = boundary if isinstance(boundary, str) else tuple(boundary)

    @property
    def keys_axis_name(self) -> None:
        """No window reaches beyond a shard."""

    @checked
    def __call__(
        self,
        inputs_q: Real[ArrayLike, "*batch_and_grid in_features"],
        inputs_k: Real[ArrayLike, "*batch_and_key_grid in_kv_features"] | None = None,
        inputs_v: Real[ArrayLike, "*batch_and_value_grid in_value_features"] | None = None,
        **options: Any,
    ) -> Float[Array, "*batch_and_grid out_features"]:
        """Attends, as `Attention`: with its options, of which mask, bias and segment_ids are of the grid as it comes.
        Numbers of segments are to be below 2^31 / 3^rank."""
        turn, inputs, options = self._turned((inputs_q, inputs_k, inputs_v), options)
        return turn.back(super().__call__(*inputs, **options), 1)

    @checked
    def weights(
        self,
        inputs_q: Real[ArrayLike, "*batch_and_grid in_features"],
        inputs_k: Real[ArrayLike, "*batch_and_key_grid in_kv_features"] | None = None,
        **options: Any,
    ) -> Float[Array, "*batch_and_grid num_heads slots"]:
        """The weights of each token, `[*batch, *grid, num_heads, slots]`, on the slots of its window in order."""
        turn, inputs, options = self._turned((inputs_q, inputs_k), options)
        return turn.back(super().weights(*inputs, **options), 2)

    def _turned(self, inputs, options) -> tuple[Turn, list[Any], dict[str, Any]]:
        """What rolls the grid and back, and all that the call is given on the rolled grid."""
        self.check_input("inputs_q", inputs[0], self.in_features)
        where, shape = "ShiftedWindowAttention", np.shape(inputs[0])[:-1]
        for name, x in zip(("inputs_q", "inputs_k", "inputs_v"), inputs, strict=False):
            if x is not None and np.shape(x)[:-1] != shape:
                raise ValueError(f"{where}: {name} (={list(np.shape(x))}) must have the batch and the grid of inputs_q")
        if options.get("grid_sizes") is not None:
            raise ValueError(f"{where}: grid_sizes must be None, for the grid is rolled; a mask leaves out the padding")
        window: Any = self.window
        slots = 1 + self.rank  # heads and slots: the axes of a bias after the grid's
        turn = Turn.of(where, inputs[0], window.sizes, self.shift, self.shift_whole, self.boundary, self.axis_name)

        def there(x, after):
            return turn.there(jnp.reshape(x, (1,) * (self.rank + after - np.ndim(x)) + np.shape(x)), after)

        def masks(mask):
            if isinstance(mask, tuple) and len(mask) == 2:
                return tuple(m if m is None else there(m, after) for m, after in zip(mask, (0, slots), strict=True))
            of_keys = np.ndim(mask) in (self.rank, len(shape)) and np.shape(mask)[-self.rank :] == turn.grid
            return there(mask, 0 if of_keys else slots)

        def segments(ids):
            regions = turn.regions()
            if ids is None and regions is None:
                return None
            if isinstance(ids, tuple | list):
                return tuple(map(segments, ids))
            if ids is None:
                return regions
            turned = there(ids, 0)
            wide = turned.astype(jnp.promote_types(turned.dtype, jnp.int32))
            return wide if regions is None else regions.astype(wide.dtype) + 3**self.rank * wide

        moved = {"mask": masks, "bias": lambda x: there(x, slots)}
        options |= {name: move(options[name]) for name, move in moved.items() if options.get(name) is not None}
        options["segment_ids"] = segments(options.get("segment_ids"))
        return turn, [None if x is None else there(x, 1) for x in inputs], options

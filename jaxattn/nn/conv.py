"""Convolution as a Flax module: `nnx.Conv`'s parameters and arguments, `jaxattn.zoo.conv`'s arithmetic."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax
from jax.sharding import PartitionSpec, Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Num, Real

from jaxattn import zoo
from jaxattn.checked import checked
from jaxattn.einsum import einsum
from jaxattn.nn.grid import GridModule
from jaxattn.nn.layer import Init, default_bias_init, default_kernel_init
from jaxattn.sizes import Size
from jaxattn.zoo.equations import Padding, pads, read_padding, same, with_neighbours
from jaxattn.zoo.parameters import biased

PADDINGS = ("SAME", "SAME_LOWER", "VALID", "CAUSAL", "CIRCULAR", "REFLECT")


class Conv(GridModule):
    """Convolution (cross-correlation) in any number of dimensions; in two,

        y[..., i, j, o] = bias[o] + Σ_{r,s,c} x[..., s₁·i + d₁·r - low₁, s₂·j + d₂·s - low₂, c] · kernel[r, s, c, o]

    which is `zoo.conv`, one `einsum`. A drop-in for `flax.nnx.Conv`: the same constructor arguments, the same
    parameters (names, shapes, and initial values from the same `rngs`), the same results from the same parameters.

    Args:
      in_features: size of the input's last axis.
      out_features: size of the output's last axis.
      kernel_size: an int for each spatial axis; one int is of one axis, as in `nnx.Conv`, or of all `rank` axes.
      strides: an int, or one per spatial axis; None means 1.
      padding: "SAME", "SAME_LOWER", "VALID", "CAUSAL" (one dimension: nothing is seen before its time),
        "CIRCULAR" (the grid is a torus), "REFLECT" (mirrored, the edge not repeated), an int, or an int or a
        (low, high) pair per spatial axis.
      input_dilation: puts d - 1 zeros between the inputs, `einsum("... i c -> ... d*i c", x)`, and the padding around
        the result; with it the padding is "VALID" or in numbers, as only these have one meaning there.
      kernel_dilation: the step between the taps, an int or one per spatial axis.
      feature_group_count: groups; input and output features are split among them.
      use_bias: whether a bias is added.
      mask: multiplies the kernel; of its shape.
      dtype: of the computation. None promotes the input's and the parameters' dtypes, integers to floats.
      param_dtype: of the parameters.
      precision: `lax.Precision` or its name.
      kernel_init: initialiser of `kernel`, `[*kernel_size, in_features / groups, out_features]`.
      bias_init: initialiser of `bias`, `[out_features]`.
      conv_general_dilated: what convolves; another than its default is called as `nnx.Conv` calls it, and then
        `implementation` and `axis_name` are None.
      promote_dtype: maps `(input, kernel, bias)` and the keyword `dtype` to arrays of one dtype.
      preferred_element_type: the dtype to accumulate in and return.
      rngs: `nnx.Rngs`; `params` is used.
      kernel_metadata: metadata of the `kernel` parameter, such as its sharding.
      bias_metadata: metadata of the `bias` parameter.
      implementation: `einsum`'s.
      axis_name: the mesh axis, inside `jax.shard_map`, over which the first spatial axis is split; None where it is
        whole. The result is a shard of what the whole input gives, exactly, its neighbours' tokens being exchanged.
      rank: how many spatial axes there are; None: as many as `kernel_size` has, and one where it is an int.

    Raises:
      ValueError: an argument out of its range, or an input whose shape does not fit, by name.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> layer = Conv(3, 8, (3, 3), strides=2, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 32, 32, 3))).shape
    (2, 16, 16, 8)

    The same layer for a Linen model (`nnx.bridge.to_linen`):

    >>> import jax
    >>> linen = nnx.bridge.to_linen(Conv, 3, 8, (3, 3))
    >>> variables = linen.init(jax.random.key(0), jnp.ones((2, 32, 32, 3)))
    >>> linen.apply(variables, jnp.ones((2, 32, 32, 3))).shape
    (2, 32, 32, 8)
    """

    @checked
    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Size,
        strides: Size | None = 1,
        *,
        padding: Padding = "SAME",
        input_dilation: Size | None = 1,
        kernel_dilation: Size | None = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        mask: Real[ArrayLike, "*kernel_shape"] | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Init = default_kernel_init,
        bias_init: Init = default_bias_init,
        conv_general_dilated: Callable[..., Any] = lax.conv_general_dilated,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        preferred_element_type: DTypeLike | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        implementation: str | None = None,
        axis_name: str | None = None,
        rank: int | None = None,
    ):
        self.axis_name = axis_name
        self.kernel_size = self.sized("kernel_size", kernel_size, rank)
        self.rank_is_said = True  # an int is of one axis in nnx.Conv too, with any batch axes
        groups = feature_group_count
        self.in_features, self.out_features, self.feature_group_count = in_features, out_features, groups
        given = {"strides": strides, "input_dilation": input_dilation, "kernel_dilation": kernel_dilation}
        self.strides, self.input_dilation, self.kernel_dilation = (
            self.each(name, 1 if value is None else value) for name, value in given.items()
        )
        self.padding = read_padding("Conv", padding, self.rank, PADDINGS)
        if self.padding == "CAUSAL" and self.rank != 1:
            raise ValueError(
                f"Conv: padding (={padding!r}) must be another where kernel_size has {self.rank} axes, not 1"
            )
        self.use_bias, self.implementation = use_bias, implementation
        self.conv_general_dilated = conv_general_dilated
        self.dtype, self.param_dtype, self.promote_dtype = dtype, param_dtype, promote_dtype
        self.precision, self.preferred_element_type = precision, preferred_element_type
        if isinstance(self.padding, str) and self.padding != "VALID" and any(d != 1 for d in self.input_dilation):
            raise ValueError(
                f"Conv: padding (={padding!r}) must be 'VALID', an int, or ints or pairs where input_dilation is given "
                f"(={input_dilation})"
            )
        _check_groups(groups, in_features=in_features, out_features=out_features)
        self.kernel_shape = (*self.kernel_size, in_features // groups, out_features)
        self.mask = kernel_mask("Conv", mask, self.kernel_shape)
        if conv_general_dilated is not lax.conv_general_dilated and (implementation, axis_name) != (None, None):
            raise ValueError(
                f"Conv: conv_general_dilated (={conv_general_dilated!r}) must be left at its default where "
                f"implementation (={implementation!r}) or axis_name (={axis_name!r}) is given, which are jaxattn's own"
            )
        self.kernel = nnx.Param(kernel_init(rngs.params(), self.kernel_shape, param_dtype), **kernel_metadata)
        self.bias = nnx.data(None)
        if use_bias:
            self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype), **bias_metadata)

    @checked
    def __call__(
        self,
        inputs: Num[ArrayLike, "*batch_and_spatial in_features"],
        out_sharding: PartitionSpec | Sharding | None = None,
    ) -> Float[Array, "*batch_and_new_spatial out_features"]:
        """Convolves `inputs`.

        Args:
          inputs: `[*batch, *spatial, in_features]`, with any number of batch axes, or none.
          out_sharding: the output's sharding, under a mesh with explicit axes.

        Returns:
          `[*batch, *new_spatial, out_features]`.
        """
        rank, _ = self.rank, self.check_input("inputs", inputs, self.in_features)
        kernel = self.kernel[...] if self.mask is None else self.kernel[...] * self.mask
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = self.promote_dtype((inputs, kernel, bias), dtype=self.dtype)
        if self.conv_general_dilated is not lax.conv_general_dilated:
            y = self._by_the_given(x, kernel, out_sharding)
            return y if bias is None else biased(y, {"bias": bias})
        if any(d != 1 for d in self.input_dilation):
            if self.axis_name is not None:
                raise ValueError(
                    f"Conv: input_dilation (={self.input_dilation}) must be 1 where axis_name (={self.axis_name!r}) is "
                    "given"
                )
            axes = [f"i{n}" for n in range(rank)]
            dilated = [f"{d}*{axis}" for d, axis in zip(self.input_dilation, axes, strict=True)]
            x = einsum(f"... {' '.join(axes)} c -> ... {' '.join(dilated)} c", x)
        (padding, boundary), geometry = self._around(), (self.kernel_size, self.strides, self.kernel_dilation)
        x, padding = with_neighbours(x, self.axis_name, padding, *geometry, boundary)
        padding = pads(padding, x.shape[-1 - rank : -1], *geometry)
        y = zoo.conv(
            x,
            kernel,
            strides=self.strides,
            padding=padding,
            dilation=self.kernel_dilation,
            groups=self.feature_group_count,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
            boundary=boundary,
            implementation=self.implementation,
        )
        y = y if bias is None else biased(y, {"bias": bias})
        return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)

    def _by_the_given(self, x: Array, kernel: Array, out_sharding) -> Array:
        """What the caller's `conv_general_dilated` gives, called as `nnx.Conv` calls it: with one batch axis."""
        batch, spatial = x.shape[: -1 - self.rank], x.shape[-1 - self.rank :]
        x = x.reshape(-1, *spatial)
        padding: Any = self.padding
        if padding in ("CIRCULAR", "REFLECT", "CAUSAL"):
            around, boundary = self._around()
            x = jnp.pad(x, [(0, 0), *around, (0, 0)], mode={"zero": "constant"}.get(boundary, boundary))
            padding = "VALID"
        last = x.ndim - 1
        lhs = (0, last, *range(1, last))
        preferred = (
            {} if self.preferred_element_type is None else {"preferred_element_type": self.preferred_element_type}
        )
        y = self.conv_general_dilated(
            x,
            kernel,
            self.strides,
            padding,
            lhs_dilation=self.input_dilation,
            rhs_dilation=self.kernel_dilation,
            dimension_numbers=lax.ConvDimensionNumbers(lhs, (last, last - 1, *range(last - 1)), lhs),
            feature_group_count=self.feature_group_count,
            precision=self.precision,
            out_sharding=out_sharding,
            **preferred,
        )
        return y.reshape(*batch, *y.shape[1:])

    def _around(self) -> tuple[Any, str]:
        """The (low, high) pads of each axis, or the word for them, and what they are filled with."""
        if self.padding not in ("CAUSAL", "CIRCULAR", "REFLECT"):
            return self.padding, "zero"
        causal = self.padding == "CAUSAL"
        boundary = "zero" if causal else "wrap" if self.padding == "CIRCULAR" else "reflect"
        return same(self.kernel_size, self.kernel_dilation, causal), boundary


def kernel_mask(where: str, mask: Any, shape: tuple[int, ...]) -> Any:
    """The mask, which has the kernel's shape."""
    if mask is not None and jnp.shape(mask) != shape:
        raise ValueError(f"{where}: mask (of shape {jnp.shape(mask)}) must have the kernel's, {shape}")
    return mask


def _check_groups(groups: int, **features: int):
    for name, size in features.items():
        if size % groups:
            raise ValueError(f"Conv: feature_group_count (={groups}) must divide {name} (={size})")

"""The base of the zoo's modules: a function with its parameters."""

import functools
import inspect
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, final

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn import dtypes
from jaxtyping import Array, ArrayLike, Float, Num

from jaxattn.zoo.equations import divided
from jaxattn.zoo.parameters import before_and_after, spelled
from jaxattn.zoo.registry import ROWS

default_kernel_init = nnx.initializers.lecun_normal()
default_bias_init = nnx.initializers.zeros_init()
glorot_init = nnx.initializers.xavier_uniform()
small_init = nnx.initializers.truncated_normal(0.02)


class Layer(nnx.Module):
    """A function of the zoo with its parameters.

    A layer is a docstring, its `function` and a constructor. That keeps what the function takes by keyword under the
    keyword's name, and draws the parameters by the shapes in the function's line of the registry. What can be computed
    on a grid that is split over a mesh has an `axis_name`, the mesh axis, as a function has that takes one; what can't
    says why in `needs_whole_grid`.
    """

    function: ClassVar[Callable[..., Array]]
    dtype: Any
    precision: Any

    @final
    def __call__(
        self, inputs: Num[ArrayLike, "*batch_and_grid in_features"]
    ) -> Float[Array, "*batch_and_positions out_features"]:
        """`[*batch, *positions, out_features]` of `[*batch, *grid, in_features]`, as the function's."""
        own = {name: value[...] for name, value in vars(self).items() if isinstance(value, nnx.Param)}
        x, *arrays = dtypes.promote_dtype((inputs, *own.values()), dtype=self.dtype)
        keywords = {name: getattr(self, name, default) for name, default in _keywords(type(self).function).items()}
        return type(self).function(x, dict(zip(own, arrays, strict=True)), **keywords)

    @final
    def draw(
        self,
        sizes: Mapping[str, int | tuple[int, ...]],
        *,
        rngs: nnx.Rngs,
        dtype: Any,
        kernel_init: Callable[..., Any] = default_kernel_init,
        use_bias: bool = False,
        biased: Collection[str] = (),
        without: Collection[str] = (),
        **inits: Callable[..., Any],
    ) -> None:
        """Give the layer the function's parameters.

        Args:
          sizes: of the axes in their shapes; a tuple is of all axes of a grid or a window.
          rngs, dtype: of the parameters.
          kernel_init: of linear maps, each drawn as the matrix that it is, so that an initialiser sees its true fans.
          use_bias: whether they have biases, which begin at zero.
          biased: those that have one in any case.
          without: parameters that this layer does not have.
          **inits: of the others by name; "embedding" serves "embedding_0" and so on.
        """
        rank = max([len(size) for size in sizes.values() if isinstance(size, tuple)], default=0)
        shapes = spelled(ROWS[type(self).function.__name__].shapes, rank)
        for name, axes in shapes.items():
            owner = name.removesuffix("_bias")
            owner = owner if owner in shapes else name
            if owner in without:
                continue
            before, arrow, after = axes.lstrip("?").partition(" -> ")
            shape = _shape(before, sizes) + _shape(after, sizes)
            if arrow:
                summed = math.prod(_shape(before, sizes))
                matrix = kernel_init(rngs.params(), (summed, math.prod(shape) // summed), dtype)
                setattr(self, name, nnx.Param(matrix.reshape(shape)))
            elif owner == name:
                init = inits[name.rstrip("_0123456789")]
                setattr(self, name, nnx.Param(init(rngs.params(), shape, dtype)))
            elif use_bias or owner in biased:
                setattr(self, name, nnx.Param(jnp.zeros(shape, dtype)))


@functools.cache
def _keywords(function: Callable[..., Any]) -> dict[str, Any]:
    """What a function takes by keyword, and the defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY}


def _shape(axes: str, sizes: Mapping[str, int | tuple[int, ...]]) -> tuple[int, ...]:
    """The sizes of some axes, in order: "*window" is all of "window", "window_1" its second."""
    shape = []
    for axis in before_and_after(axes):
        group, _, number = axis.rpartition("_")
        size: Any = sizes[group][int(number)] if number.isdecimal() else sizes[axis.lstrip("*")]  # pyright: ignore
        shape += size if isinstance(size, tuple) else [size]
    return tuple(shape)


def of_kernel(function: Callable[..., Array]) -> Callable[..., Array]:
    """A function of x and a kernel as one of x and parameters, of which a "bias" is added."""

    @functools.wraps(function)
    def of_parameters(x, params: Mapping[str, Array], **keywords: Any) -> Array:
        y = function(x, params["kernel"], **keywords)
        return y + params["bias"] if "bias" in params else y

    return of_parameters


def of_window(init: Callable[..., Any]) -> Callable[..., Any]:
    """Draws `[*window, features]` as a convolution's kernel of one input, so that its fan is the window."""
    return lambda key, shape, dtype: init(key, (*shape[:-1], 1, shape[-1]), dtype)[..., 0, :]


def head_sizes(
    layer: nnx.Module,
    num_heads: int,
    in_features: int,
    qkv_features: int | None,
    out_features: int | None,
    out_projection: bool = True,
) -> dict[str, Any]:
    """The sizes that attention layers share. None for `qkv_features` and `out_features` is `in_features`."""
    name, qkv_features = type(layer).__name__, in_features if qkv_features is None else qkv_features
    head_dim = divided(name, "num_heads", num_heads, qkv_features, "qkv_features")
    if not out_projection and out_features not in (None, qkv_features):
        raise ValueError(
            f"{name}: without an output projection, out_features (={out_features}) must be qkv_features "
            f"(={qkv_features})"
        )
    return {
        "features": in_features,
        "heads": num_heads,
        "head_dim": head_dim,
        "value_dim": head_dim,
        "out_features": in_features if out_features is None else out_features,
    }


def frozen(value: Any) -> Any:
    """Lists and arrays as tuples: what a module keeps beside its arrays is in its graph, which `jax.jit` hashes."""
    value = value.tolist() if isinstance(value, np.ndarray) else value
    return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value

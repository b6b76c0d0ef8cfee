"""The base of the zoo's modules: a function with its parameters."""

import functools
import inspect
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, Literal, final

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jaxtyping import Array, ArrayLike, Float, Real

from jaxattn.checked import checked
from jaxattn.nn.grid import GridModule
from jaxattn.zoo.equations import divided
from jaxattn.zoo.parameters import before_and_after, biased, spelled
from jaxattn.zoo.registry import ROWS

default_kernel_init = nnx.initializers.lecun_normal()
default_bias_init = nnx.initializers.zeros_init()
glorot_init = nnx.initializers.xavier_uniform()
Normalize = Literal["softmax", "relu", "sigmoid", "sparsemax", "none"] | Callable[..., Array]  # `attention`'s
small_init = nnx.initializers.truncated_normal(0.02)
Init = Callable[..., Any]  # an initialiser, called positionally: (key, shape, dtype)


class Layer(GridModule):
    """A function of the zoo with its parameters.

    A layer is a docstring, its `function` and a constructor. That keeps what the function takes by keyword under the
    keyword's name, and hands its own arguments to `draw`, which makes the parameters by the shapes in the function's
    line of the registry and keeps `dtype` and `precision`. What can be computed
    on a grid that is split over a mesh has an `axis_name`, the mesh axis, as a function has that takes one; what can't
    says why in `needs_whole_grid`.
    """

    function: ClassVar[Callable[..., Array]]
    dtype: Any
    precision: Any

    @final
    @checked
    def __call__(
        self, inputs: Real[ArrayLike, "*batch_and_grid in_features"]
    ) -> Float[Array, "*batch_and_positions out_features"]:
        """`[*batch, *positions, out_features]` of `[*batch, *grid, in_features]`, as the function's."""
        self.check_input("inputs", inputs, self.in_features)
        own = {name: value[...] for name, value in vars(self).items() if isinstance(value, nnx.Param)}
        x, *arrays = dtypes.promote_dtype((inputs, *own.values()), dtype=self.dtype)
        keywords = {name: getattr(self, name, default) for name, default in _keywords(type(self).function).items()}
        return type(self).function(x, dict(zip(own, arrays, strict=True)), **keywords)

    @final
    def draw(
        self,
        given: Mapping[str, Any],
        sizes: Mapping[str, int | tuple[int, ...]],
        *,
        biased: Collection[str] = (),
        without: Collection[str] = (),
        **inits: Init,
    ) -> None:
        """Give the layer the function's parameters.

        Args:
          given: the constructor's arguments by name: `kernel_init` is of linear maps, each drawn as the matrix that it
            is, so that an initialiser sees its true fans; `use_bias`, whether these have biases, which begin at zero;
            `position_init` is of "position", and so on; `dtype`, `param_dtype`, `precision`, `rngs`.
          sizes: of "features" and of the axes in their shapes; a tuple is of all axes of a grid or a window.
          biased: linear maps that have a bias in any case.
          without: parameters that this layer does not have.
          **inits: initialisers in place of those given; "embedding" serves "embedding_0" and so on.
        """
        self.dtype, self.precision = given["dtype"], given["precision"]
        rngs, dtype, kernel_init = given["rngs"], given["param_dtype"], given["kernel_init"]
        (self.in_features,) = _shape("features", sizes)
        shapes = spelled(ROWS[type(self).function.__name__].shapes, self.rank)
        for name, axes in shapes.items():
            owner = name.removesuffix("_bias")
            owner = owner if owner in shapes else name
            if owner in without:
                continue
            before, arrow, after = axes.lstrip("?").partition(" -> ")
            shape = _shape(before, sizes) + _shape(after, sizes)
            if arrow:
                summed = math.prod(_shape(before, sizes))
                init = drawn_as(kernel_init, lambda shape, summed=summed: (summed, math.prod(shape) // summed))
                setattr(self, name, nnx.Param(init(rngs.params(), shape, dtype)))
            elif owner == name:
                group = name.rstrip("_0123456789")
                init = inits[group] if group in inits else given[f"{group}_init"]
                setattr(self, name, nnx.Param(init(rngs.params(), shape, dtype)))
            elif owner in biased or given.get("use_bias", False):
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
        return biased(function(x, params["kernel"], **keywords), params)

    return of_parameters


def drawn_as(init: Init, shape_of: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Callable[..., Any]:
    """Draws a parameter in another shape, whose fans are its own; the names of its axes, if any, are of its own."""

    def drawn(key: Array, shape: tuple[int, ...], dtype: Any) -> Any:
        made = init(key, shape_of(shape), dtype)
        if isinstance(made, nnx.VariableMetadata):  # an annotated initialiser's, as `nnx.with_partitioning` makes it
            made.raw_value = jnp.reshape(made.raw_value, shape)
            return made
        return jnp.reshape(made, shape)

    return drawn


def of_window(init: Init) -> Callable[..., Any]:
    """Draws `[*window, features]` as a convolution's kernel of one input, so that its fan is the window."""
    return drawn_as(init, lambda shape: (*shape[:-1], 1, shape[-1]))


def head_sizes(layer: nnx.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes that attention layers share, by their constructors' arguments. None for `qkv_features` and
    `out_features` is `in_features`."""
    name, in_features, out_features = type(layer).__name__, given["in_features"], given["out_features"]
    qkv_features = in_features if given.get("qkv_features") is None else given["qkv_features"]
    head_dim = divided(name, "num_heads", given["num_heads"], qkv_features, "qkv_features")
    if not given.get("out_projection", True) and out_features not in (None, qkv_features):
        raise ValueError(
            f"{name}: without an output projection, out_features (={out_features}) must be qkv_features "
            f"(={qkv_features})"
        )
    return {
        "features": in_features,
        "heads": given["num_heads"],
        "head_dim": head_dim,
        "value_dim": head_dim,
        "out_features": in_features if out_features is None else out_features,
    }

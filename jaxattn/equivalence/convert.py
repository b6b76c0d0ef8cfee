"""A network's convolutions as attention, and back."""

from typing import Any, Literal

from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax

from jaxattn.checked import Extended, checked
from jaxattn.equivalence.theorem import attention_to_conv, conv_to_attention
from jaxattn.nn.conv import Conv
from jaxattn.nn.depthwise import DepthwiseConv
from jaxattn.nn.quadratic import QuadraticAttention
from jaxattn.nn.transposed import ConvTranspose
from jaxattn.sizes import per_axis
from jaxattn.zoo.slide import Slide

KNOWN = (Conv, nnx.Conv, DepthwiseConv)
TRANSPOSED = (ConvTranspose, nnx.ConvTranspose)
WRAPPED = {"CIRCULAR": "wrap", "REFLECT": "reflect"}


@checked
def convert(
    model: nnx.Module,
    to: Literal["attention", "conv"] = "attention",
    *,
    alpha: Extended | None = None,
    rtol: float | None = None,
) -> Any:
    """A copy of a model whose convolutions are quadratic attention, or whose quadratic attentions are convolutions.

    Every `nn.Conv`, `nnx.Conv` and `nn.DepthwiseConv`, wherever it is in the model, becomes an `nn.QuadraticAttention`
    of one head to a tap, with its strides, dilation, groups, padding, bias, mask and dtypes; with `to="conv"`, every
    `nn.QuadraticAttention` becomes an `nn.Conv`. A layer that stands in two places does so afterwards. A transposed
    convolution is refused; all else is copied as it is. There and back gives the kernels bit by bit in the hard limit,
    and W' = Σ_h A_h W_h else.

    The outputs stay. In the hard limit, the default, they differ as two orders of the same sums do: by rounding, some
    units in the last place at each layer. With a finite alpha, or rtol, each layer keeps the bound of
    `conv_to_attention`, relative to the largest number in its own input. The way back is exact for every alpha.

    Args:
      model: an nnx module; a convolution alone will do.
      to: "attention" or "conv".
      alpha, rtol: as in `conv_to_attention`; not with `to="conv"`.

    Raises:
      ValueError: there is nothing to convert, or a layer that can't be, with its path and what would work.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> model = nnx.Sequential(nnx.Conv(3, 8, (3, 3), strides=2, rngs=nnx.Rngs(0)), nnx.relu)
    >>> attends, x = convert(model), jnp.ones((2, 9, 9, 3))
    >>> type(attends.layers[0]).__name__, jnp.allclose(attends(x), model(x), atol=1e-5).item()
    ('QuadraticAttention', True)
    >>> type(convert(attends, to="conv").layers[0]).__name__
    'Conv'
    """
    if to == "conv" and (alpha is not None or rtol is not None):
        raise ValueError(
            f"convert: alpha (={alpha}) and rtol (={rtol}) must be None with to='conv': the way back is exact"
        )
    converted = []

    def replace(path, layer):
        known = (*KNOWN, *TRANSPOSED) if to == "attention" else QuadraticAttention
        if not isinstance(layer, known):
            return layer
        where = "/".join(map(str, path)) or "the model"
        converted.append(where)
        return _to_attention(where, layer, alpha, rtol) if to == "attention" else _to_conv(where, layer)

    # the copy comes first: recursive_map would share the variables with the model
    made = nnx.recursive_map(replace, nnx.clone(model))
    if not converted:
        what = "nn.Conv, nnx.Conv or nn.DepthwiseConv" if to == "attention" else "nn.QuadraticAttention"
        raise ValueError(f"convert: model (={type(model).__name__}) must hold a layer to convert: {what}")
    return made


def _to_attention(where: str, layer: Any, alpha: float | None, rtol: float | None) -> QuadraticAttention:
    _check_kind(where, layer)
    layer = _grouped(layer) if isinstance(layer, DepthwiseConv) else layer
    _check_options(where, layer)
    rank = len(layer.kernel_size)
    dilation = _each(layer, "kernel_dilation", rank)
    padding, boundary = _pads(layer, dilation)
    kernel = layer.kernel[...] if layer.mask is None else layer.kernel[...] * layer.mask
    params, _ = conv_to_attention(
        kernel,
        alpha=alpha,
        rtol=rtol,
        strides=_each(layer, "strides", rank),
        padding=padding,
        dilation=dilation,
        groups=layer.feature_group_count,
        boundary=boundary,
    )
    made = QuadraticAttention(
        len(params["centre"]),
        layer.in_features,
        layer.out_features,
        rank=rank,
        window=params.pop("window"),
        groups=layer.feature_group_count,
        use_bias=layer.bias is not None,
        dtype=layer.dtype,
        param_dtype=kernel.dtype,
        precision=layer.precision,
        kernel_init=nnx.initializers.zeros,
        rngs=nnx.Rngs(0),
    )
    _fill(made, params, layer.bias)
    return made


def _grouped(layer: DepthwiseConv) -> Conv:
    """The convolution with as many groups as features."""
    kernel = layer.kernel[...][..., None, :]
    return _conv(layer, kernel, layer.bias, layer.strides, layer.padding, layer.dilation, layer.in_features)


def _to_conv(where: str, layer: Any) -> Conv:
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    try:
        kernel, options = attention_to_conv({**params, "window": layer.window}, groups=layer.groups)
        padding = _word(layer.window)
    except ValueError as error:
        raise ValueError(f"convert: {where}: {error}") from error
    return _conv(layer, kernel, params.get("bias"), options["strides"], padding, options["dilation"], layer.groups)


def _conv(layer: Any, kernel: Any, bias: Any, strides: Any, padding: Any, dilation: Any, groups: int) -> Conv:
    """An `nn.Conv` in the layer's place, of this kernel and bias."""
    made = Conv(
        layer.in_features,
        layer.out_features,
        kernel.shape[:-2],
        strides,
        padding=padding,
        kernel_dilation=dilation,
        feature_group_count=groups,
        use_bias=bias is not None,
        dtype=layer.dtype,
        param_dtype=kernel.dtype,
        precision=layer.precision,
        kernel_init=nnx.initializers.zeros,
        rngs=nnx.Rngs(0),
    )
    _fill(made, {"kernel": kernel}, bias)
    return made


def _fill(layer: Any, params: dict[str, Any], bias: Any) -> None:
    """Put arrays into the layer's parameters of the same names."""
    for name, array in {**params, **({} if bias is None else {"bias": bias[...]})}.items():
        getattr(layer, name)[...] = array


def _pads(layer: Any, dilation: tuple[int, ...]) -> tuple[Any, str]:
    """A convolution layer's padding as `Slide`'s padding and boundary."""
    padding = layer.padding.upper() if isinstance(layer.padding, str) else layer.padding
    spans = [(k - 1) * d for k, d in zip(layer.kernel_size, dilation, strict=True)]
    if padding == "CAUSAL":
        return [(span, 0) for span in spans], "zero"
    if isinstance(padding, str) and padding in WRAPPED:
        return [(span // 2, span - span // 2) for span in spans], WRAPPED[padding]
    return padding, "zero"


def _word(slide: Slide) -> Any:
    """The padding of the `nn.Conv` that slides as `slide` does."""
    if slide.boundary == "zero":
        return slide.padding
    spans = [(axis.size - 1) * axis.dilation for axis in slide.window.along]
    for word, boundary in WRAPPED.items():
        if slide.boundary == boundary and slide.padding == tuple((span // 2, span - span // 2) for span in spans):
            return word
    raise ValueError(
        f"padding (={slide.padding}) and boundary (={slide.boundary!r}) must be nn.Conv's: boundary 'zero' with any "
        "padding, or 'wrap' and 'reflect' with (span // 2, span - span // 2), span = (size - 1)·dilation. "
        "attention_to_conv gives the kernel and options for zoo.conv"
    )


def _check_kind(where: str, layer: Any) -> None:
    """Refuse a layer that computes something else than a convolution that slides."""
    name, known = type(layer).__name__, "an nn.Conv, nnx.Conv or nn.DepthwiseConv"
    if isinstance(layer, TRANSPOSED):
        raise ValueError(
            f"convert: {where} (={name}) must be {known}, and its output is finer than its input. "
            "A transposed convolution of strides 1 can be written as one of them, with the kernel flipped"
        )
    if type(layer).__call__ not in [kind.__call__ for kind in KNOWN]:
        raise ValueError(f"convert: {where} (={name}) must be {known}, and it calls something of its own")


def _check_options(where: str, layer: Any) -> None:
    """Refuse arguments that an attention has no place for."""
    if any(d != 1 for d in _each(layer, "input_dilation", len(layer.kernel_size))):
        raise ValueError(
            f"convert: {where}: input_dilation (={layer.input_dilation}) must be 1: put the zeros between the inputs "
            "in a layer before it"
        )
    if getattr(layer, "axis_name", None) is not None:
        raise ValueError(
            f"convert: {where}: axis_name (={layer.axis_name!r}) must be None: nn.QuadraticAttention slides over a "
            "whole grid"
        )
    defaults = {
        "preferred_element_type": None,
        "conv_general_dilated": lax.conv_general_dilated,
        "promote_dtype": dtypes.promote_dtype,
    }
    for argument, default in defaults.items():
        if (given := getattr(layer, argument, default)) is not default:
            raise ValueError(f"convert: {where}: {argument} (={given}) must be the default")


def _each(layer: Any, name: str, rank: int) -> tuple[int, ...]:
    value = getattr(layer, name)
    return per_axis(f"convert: {type(layer).__name__}", name, 1 if value is None else value, rank)

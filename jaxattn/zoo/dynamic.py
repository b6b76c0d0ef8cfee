"""Convolutions whose weights are made from the data: from the centre of the window, or from the whole image."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import ArrayLike, Real

from jaxattn.checked import MeshAxis
from jaxattn.einsum import einsum
from jaxattn.sizes import Size, per_axis
from jaxattn.zoo.equations import axes, divided, same, slid
from jaxattn.zoo.parameters import affine, parameters
from jaxattn.zoo.pool import mean_pool
from jaxattn.zoo.registry import row
from jaxattn.zoo.softmax import softmax


@row(
    "DynamicConv", weights="(W x_i)_{h,j-i}", source="centre", shared="head / no", normalizer="softmax",
    paper="Wu et al. 2019 (1901.10430)", shapes={"kernel": "features -> *window heads"},
)  # fmt: skip
def dynamic_conv(
    x: Real[ArrayLike, "*batch_and_grid features"],
    kernel: Real[ArrayLike, "features *window heads"],
    *,
    dilation: Size = 1,
    causal: bool = False,
    precision: lax.PrecisionLike = None,
    axis_name: MeshAxis | None = None,
) -> jax.Array:
    """`light_conv` whose kernel each position makes of its own features,

        y[n, i, (h c)] = Σ_r softmax_r(Σ_e x[n, i, e] · kernel[e, r, h]) x[n, i + r, (h c)]

        einsum("... i0+r0 (h c), ... i0 r0 h -> ... i0 (h c)", x, softmax(scores)),
        scores = einsum("... e, e r0 h -> ... r0 h", x, kernel)

    the "dynamic convolution" of Wu et al. 2019 (arXiv 1901.10430). Outside the grid stand zeros, which take their
    weight.

    Args:
      x: `[*batch, *grid, features]`, with any number of batch axes.
      kernel: `[features, *window, heads]`; its rank less two is the grid's. Heads divide features.
      dilation: an int, or one for each axis of the grid.
      causal: position i sees what comes before it, and itself last, along every axis; otherwise it is in the middle.

    Returns:
      `[*batch, *grid, features]`, in the promoted dtype of x and kernel. The softmax is in float32 at least.

    Raises:
      ValueError: an argument has the wrong length or sign, or the shapes don't fit.

    >>> import jax.numpy as jnp
    >>> dynamic_conv(jnp.ones((2, 9, 9, 4)), jnp.ones((4, 3, 3, 2))).shape
    (2, 9, 9, 4)
    """
    p, x, grid = parameters("dynamic_conv", x, {"kernel": kernel})
    rank, _, *size, heads = len(grid), *p["kernel"].shape
    divided("dynamic_conv", "heads of kernel", heads, x.shape[-1])
    dilation, r = per_axis("dynamic_conv", "dilation", dilation, rank), axes("r", rank)
    scores = einsum(f"... e, e {r} h -> ... {r} h", x, p["kernel"], precision=precision)
    return slid(
        "... {sums} (h c), ... {i} {r} h -> ... {i} (h c)", x, softmax(scores, tuple(range(-1 - rank, -1))), size,
        dilation=dilation, padding=same(size, dilation, causal), axis_name=axis_name, precision=precision,
    )  # fmt: skip


@row(
    "involution", weights="(W1 φ(W0 x_i))_{g,j-i}, V=x", source="centre", shared="group / no", normalizer="none",
    paper="Li et al. 2021 (2103.06255)",
    shapes={"reduce": "features -> reduced", "span": "reduced -> *window groups"},
)  # fmt: skip
def involution(
    x: Real[ArrayLike, "*batch_and_grid features"],
    params: Mapping[str, Any],
    *,
    strides: Size = 1,
    dilation: Size = 1,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
    precision: lax.PrecisionLike = None,
    axis_name: MeshAxis | None = None,
) -> jax.Array:
    """Weights from the centre, through a bottleneck, shared by the channels of a group,

        y[n, i, (g c)] = Σ_r w[n, i, r, g] · x[n, s·i + r, (g c)],    w[n, i] = span · φ(reduce · x̄[n, i])

        einsum("... s*i0+r0 (g c), ... i0 r0 g -> ... i0 (g c)", x, w)

    where x̄ is x, or with strides s the mean of the s × s that begin at s·i (Li et al. 2021, arXiv 2103.06255). Outside
    the grid stand zeros. The paper's batch normalisation before φ can be part of `activation`.

    Args:
      x: `[*batch, *grid, features]`, with any number of batch axes.
      params: "reduce" `[features, reduced]`, "span" `[reduced, *window, groups]`, and optionally "reduce_bias"
        `[reduced]` and "span_bias" `[*window, groups]`. The window's rank is the grid's; groups divide features.
      strides, dilation: ints, or one for each axis of the grid.
      activation: φ.

    Returns:
      `[*batch, *positions, features]`, ceil(n / stride) positions to an axis of n, in the dtype of x and params.

    Raises:
      ValueError: a parameter is missing or unknown, or a shape or an argument doesn't fit, by name.

    >>> import jax.numpy as jnp
    >>> params = {"reduce": jnp.ones((8, 2)), "span": jnp.ones((2, 3, 3, 4))}
    >>> involution(jnp.ones((2, 9, 9, 8)), params).shape
    (2, 9, 9, 8)
    """
    params, x, grid = parameters("involution", x, params)
    _, *size, groups = params["span"].shape
    divided("involution", "groups of params['span']", groups, x.shape[-1])
    strides = per_axis("involution", "strides", strides, len(grid))
    dilation = per_axis("involution", "dilation", dilation, len(grid))
    weights = _weights(mean_pool(x, strides), params, len(grid), activation, precision)
    equation = "... {sums} (g c), ... {i} {r} g -> ... {i} (g c)"
    return slid(equation, x, weights, size, strides, dilation, axis_name=axis_name, precision=precision)


@row(
    "dynamic depthwise (Han et al. 2022)", weights="f(mean x)_{c,j-i}", source="image", shared="no / yes",
    normalizer="none", paper="Han et al. 2022 (2106.04263)",
    shapes={"reduce": "features -> reduced", "span": "reduced -> *window features"},
)  # fmt: skip
def dynamic_depthwise_conv(
    x: Real[ArrayLike, "*batch_and_grid features"],
    params: Mapping[str, Any],
    *,
    dilation: Size = 1,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
    precision: lax.PrecisionLike = None,
    axis_name: MeshAxis | None = None,
) -> jax.Array:
    """A depthwise convolution whose kernel is made of the mean over the image,

        y[n, i, c] = Σ_r w[n, r, c] · x[n, i + r, c],    w[n] = span · φ(reduce · mean_i x[n, i])

        einsum("... i0+r0 c, ... r0 c -> ... i0 c", x, w)

    which Han et al. 2022 (arXiv 2106.04263) put in the place of local attention. Outside the grid stand zeros. The
    paper's batch normalisation before φ can be part of `activation`.

    Args:
      x: `[*batch, *grid, features]`, with any number of batch axes.
      params: "reduce" `[features, reduced]`, "span" `[reduced, *window, features]`, and optionally "reduce_bias"
        `[reduced]` and "span_bias" `[*window, features]`. The window's rank is the grid's.
      dilation: an int, or one for each axis of the grid.
      activation: φ.

    Returns:
      `[*batch, *grid, features]`, in the dtype of x and params.

    Raises:
      ValueError: a parameter is missing or unknown, or a shape or an argument doesn't fit, by name.

    >>> import jax.numpy as jnp
    >>> params = {"reduce": jnp.ones((8, 2)), "span": jnp.ones((2, 3, 3, 8))}
    >>> dynamic_depthwise_conv(jnp.ones((2, 9, 9, 8)), params).shape
    (2, 9, 9, 8)
    """
    params, x, grid = parameters("dynamic_depthwise_conv", x, params)
    rank, size = len(grid), params["span"].shape[1:-1]
    dilation = per_axis("dynamic_depthwise_conv", "dilation", dilation, rank)
    mean = jnp.mean(x, axis=tuple(range(-1 - rank, -1)))
    mean = mean if axis_name is None else lax.pmean(mean, axis_name)
    weights = _weights(mean, params, rank, activation, precision)
    equation = "... {sums} c, ... {r} c -> ... {i} c"
    return slid(equation, x, weights, size, dilation=dilation, axis_name=axis_name, precision=precision)


def _weights(x: jax.Array, params: dict[str, jax.Array], rank: int, activation, precision) -> jax.Array:
    """span · φ(reduce · x)."""
    r = axes("r", rank)
    reduced = activation(affine("... c, c m -> ... m", x, params, "reduce", precision))
    return affine(f"... m, m {r} g -> ... {r} g", reduced, params, "span", precision)

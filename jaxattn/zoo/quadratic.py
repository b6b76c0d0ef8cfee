"""Quadratic attention: each head looks at one offset, by a Gaussian about its own centre."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import ArrayLike, Real

from jaxattn.attention import attention
from jaxattn.einsum import einsum
from jaxattn.kernels.operands import statistics_dtype
from jaxattn.sizes import Size
from jaxattn.window import Window
from jaxattn.zoo.parameters import biased, parameters
from jaxattn.zoo.registry import row
from jaxattn.zoo.slide import Slide


@row(
    "quadratic (Cordonnier)", weights="-α‖δ-Δ_h‖² (isotropic), -½‖Σ^{-1/2}(δ-Δ_h)‖² (full)", source="learned",
    shared="head / yes", normalizer="softmax", paper="Cordonnier, Loukas & Jaggi 2020 (1911.03584)",
    shapes={"centre": "heads axes", "alpha": "?heads", "inverse_root": "?heads axes axes",
    "value": "features/groups heads groups·head_dim", "out": "?heads groups·head_dim out_features/groups",
    "bias": "?out_features"},
)  # fmt: skip
def quadratic_attention(
    x: Real[ArrayLike, "*batch_and_grid features"],
    params: Mapping[str, Any],
    *,
    window: Slide | Window | Size | None = None,
    precision: lax.PrecisionLike = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention by position alone: head h looks at the offset Δ_h,

        y_i = bias + Σ_h Σ_δ A_h(δ) x_{i+δ} V_h O_h,        A_h = softmax_δ(-α_h ‖δ - Δ_h‖²)

    with δ = key - query (Cordonnier, Loukas & Jaggi 2020, arXiv 1911.03584, equation 9: there -α(‖δ-Δ‖² - ‖Δ‖²), the
    same weights), or the full form, A_h = softmax_δ(-½ ‖Σ_h^{-1/2} (δ - Δ_h)‖²). As α grows, head h sees the one token
    at i + Δ_h, and K² heads are a K × K convolution: see `jaxattn.equivalence.conv_to_attention`.

    Args:
      x: `[*batch, *grid, features]`, floating point, with any number of batch axes.
      params: arrays by name, and perhaps a window.
        "centre": Δ, `[heads, rank]`; `rank` is the grid's. In steps of the window's dilation. Under a `Slide`, counted
        from the slot (size-1)//2, which is where the query stands under padding "SAME" and strides 1.
        "alpha": α, `[heads]`; or, for the full form, "inverse_root": Σ^{-1/2}, `[heads, rank, rank]`.
        "value": V, `[features / groups, heads, groups · head_dim]`; the groups follow from its first axis.
        "out": O, `[heads, groups · head_dim, out_features / groups]`; without it, head_dim is out_features / groups.
        "bias": `[out_features]`; may be left out.
        "window": stands in for `window`.
      window: the tokens that take part. None: those of params, or else the whole grid. A `Slide` slides as a
        convolution does. A `Window`, or its size, is as in `jaxattn.attention`.
      precision, implementation: as in `jaxattn.attention`.

    Returns:
      `[*batch, *queries, out_features]`, in the promoted dtype of x and the parameters.

    Raises:
      ValueError: a parameter is missing or has the wrong shape, or the window doesn't fit the grid, by name.

    >>> import jax.numpy as jnp
    >>> right = {"centre": jnp.array([[1.0]]), "alpha": jnp.array([50.0]), "value": jnp.ones((1, 1, 1))}
    >>> quadratic_attention(jnp.arange(4.0)[:, None], right)[:, 0]  # each token's right neighbour, the last one itself
    Array([1., 2., 3., 3.], dtype=float32)
    """
    given = params.get("window") if window is None else window
    arrays = {name: p for name, p in params.items() if name != "window"}
    rank = np.shape(params["centre"])[1] if np.ndim(params.get("centre", ())) == 2 else 1
    arrays, x, _ = parameters("quadratic_attention", x, arrays, rank, axes=rank)
    groups = _groups(arrays, x.shape[-1])
    dtype = jnp.result_type(x, *arrays.values())
    x, arrays = x.astype(dtype), {name: p.astype(dtype) for name, p in arrays.items()}
    heads = len(arrays["centre"])
    x, inside, window, origin = _placed(x, rank, given)
    if given is None and "alpha" in arrays and rank > 1 and implementation is None:
        mixed = _by_axis(x, arrays["centre"], arrays["alpha"], precision)
    else:
        batch, grid = x.shape[: -1 - rank], x.shape[-1 - rank : -1]
        offsets = [np.arange(1 - k, k) - o for k, o in zip(window.sizes, origin, strict=True)]
        mixed = attention(  # no content: queries and keys of zeros; every head mixes the same tokens
            jnp.zeros((*batch, *window.query_grid(grid), heads, 1), dtype),
            jnp.zeros((*batch, *grid, 1, 1), dtype),
            x[..., None, :],
            window=window,
            mask=(inside, None),
            relative_bias=quadratic_scores(arrays, offsets),
            precision=precision,
            implementation=implementation,
        )
    return biased(_project(mixed, arrays, groups, precision), arrays)


def quadratic_scores(params: Mapping[str, Any], offsets: Sequence[np.ndarray]) -> jax.Array:
    """-α‖δ - Δ_h‖², or -½‖Σ_h^{-1/2}(δ - Δ_h)‖², at every δ of the grid that `offsets` (one array per axis) span.

    `[heads, *offsets]`, from "centre" and "alpha" or "inverse_root".

    >>> import jax.numpy as jnp, numpy as np
    >>> quadratic_scores({"centre": jnp.array([[1.0]]), "alpha": jnp.array([2.0])}, [np.arange(-1, 3)])
    Array([[-8., -2., -0., -2.]], dtype=float32)
    """
    centre = params["centre"]
    spread = (slice(None), *(None,) * len(offsets))
    delta = jnp.asarray(np.stack(np.meshgrid(*offsets, indexing="ij"), axis=-1), centre.dtype)
    away = delta[None] - centre[spread]  # [heads, *offsets, rank]
    if "alpha" in params:
        return -params["alpha"][spread] * jnp.square(away).sum(-1)
    return -jnp.square(jnp.einsum("hij,h...j->h...i", params["inverse_root"], away)).sum(-1) / 2


def _by_axis(x: jax.Array, centre: jax.Array, alpha: jax.Array, precision) -> jax.Array:
    """Σ_j A_h(i, j) x_j over the whole grid, `[*batch, *grid, heads, features]`.

    exp(-α‖δ-Δ‖²) is a product of one Gaussian for each axis, and over the whole grid so is what divides it: the axes
    are mixed one after the other, each token of n with n others, and not with all n^rank.
    """
    grid, dtype = x.shape[-1 - centre.shape[1] : -1], statistics_dtype(x.dtype)
    names = "abcdefgijk"[: len(grid)]
    for axis, (name, n) in enumerate(zip(names, grid, strict=True)):
        delta = jnp.asarray(np.arange(n) - np.arange(n)[:, None], dtype)
        away = delta[None] - centre[:, axis, None, None].astype(dtype)  # [heads, query, key]
        weights = jax.nn.softmax(-alpha[:, None, None].astype(dtype) * jnp.square(away)).astype(x.dtype)
        equation = f"...{'h' if axis else ''}{names}z,hq{name}->...h{names.replace(name, 'q')}z"
        x = jnp.einsum(equation, x, weights, precision=precision, preferred_element_type=dtype).astype(x.dtype)
    return jnp.moveaxis(x, -len(grid) - 2, -2)


def _placed(x: jax.Array, rank: int, window) -> tuple[jax.Array, np.ndarray | None, Window, tuple[int, ...]]:
    """The tokens, which of them take part, the window over them, and its slot from which centres are counted."""
    if isinstance(window, Slide):
        x, inside, over = window.placed(x)
        origin = tuple((k - 1) // 2 for k in over.sizes)
    else:
        given = Window(x.shape[-1 - rank : -1]) if window is None else window
        over = given if isinstance(given, Window) else Window(given)
        inside, origin = None, (0,) * over.rank
    if over.rank != rank:
        raise ValueError(
            f"quadratic_attention: window (={over.sizes}) must have as many axes as params['centre'] [heads, {rank}]"
        )
    return x, inside, over, origin


def _project(mixed: jax.Array, params: Mapping[str, jax.Array], groups: int, precision) -> jax.Array:
    """Σ_h (A_h x) V_h O_h, from the tokens as each head mixed them, `[..., heads, features]`."""
    if "out" not in params:
        return einsum("... h (g c), c h (g o) -> ... (g o)", mixed, params["value"], g=groups, precision=precision)
    values = einsum("... h (g c), c h (g d) -> ... h (g d)", mixed, params["value"], g=groups, precision=precision)
    return einsum("... h (g d), h (g d) o -> ... (g o)", values, params["out"], g=groups, precision=precision)


def _groups(p: Mapping[str, jax.Array], features: int) -> int:
    """How many groups the features are split into, once the sizes of the value and what follows from it fit."""
    if ("alpha" in p) == ("inverse_root" in p):
        raise ValueError(
            f"quadratic_attention: params (={sorted(p)}) must have one of 'alpha' and 'inverse_root', and not both"
        )
    part, _, columns = p["value"].shape
    groups = features // max(part, 1)
    if part < 1 or features % part or columns % groups:
        raise ValueError(
            f"quadratic_attention: params['value'] (={list(p['value'].shape)}) must be [features / groups, heads, "
            f"groups · head_dim] with x's features (={features})"
        )
    out_features = groups * p["out"].shape[2] if "out" in p else columns
    if "bias" in p and p["bias"].shape != (out_features,):
        raise ValueError(
            f"quadratic_attention: params['bias'] (={list(p['bias'].shape)}) must be [out_features] = [{out_features}]"
        )
    return groups

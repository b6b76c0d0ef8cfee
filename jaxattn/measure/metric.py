"""What a head compares: the bilinear form between a query's token and a key's."""

from typing import NamedTuple

import numpy as np
from jax import Array
from jaxtyping import Float

from jaxattn.checked import checked

Kernel = Float[Array | np.ndarray, "features heads head_dim"]
KeyKernel = Float[Array | np.ndarray, "key_features key_heads key_head_dim"]  # a wrong size is a ValueError


class QueryKeyMetric(NamedTuple):
    """The metric of each head, and what its symmetric part says of it: see `query_key_metric`."""

    metric: Float[np.ndarray, "heads features features"]
    spectrum: Float[np.ndarray, "heads features"]
    symmetry: Float[np.ndarray, " heads"]
    definiteness: Float[np.ndarray, " heads"]


@checked
def query_key_metric(query_kernel: Kernel, key_kernel: KeyKernel) -> QueryKeyMetric:
    """M_h = W_Q W_Kᵀ: before the scale and without biases, token i scores token j by x_iᵀ M_h x_j.

    Its symmetric part S = (M + Mᵀ) / 2 alone decides a token's score for itself, x_iᵀ S x_i; the antisymmetric rest is
    what changes sign when the tokens change places. Where S is mostly positive, tokens look for tokens like themselves,
    as in trained vision transformers, whose M is about noise and a multiple of I (Trockman & Kolter 2023,
    arXiv 2305.09828).

    Args:
      query_kernel: W_Q, `[features, heads, head_dim]`, as `nn.Attention` and `zoo` have it.
      key_kernel: W_K, `[features, key_heads, head_dim]`; query head h uses key head h // (heads / key_heads).

    Returns:
      A `QueryKeyMetric` in float64:
        metric: M, `[heads, features, features]`.
        spectrum: the eigenvalues of S, ascending, `[heads, features]`.
        symmetry: ‖S‖² / ‖M‖², `[heads]`: 1 where M is symmetric, 0 where antisymmetric, about ½ for random kernels.
        definiteness: Σλ / Σ|λ| over the spectrum, `[heads]`: 1 where S is positive semidefinite, -1 where negative.
      The last two are NaN for a head whose M, or S, is zero.

    Raises:
      ValueError: a kernel's shape, by name.

    >>> kernel = np.array([[1.0], [2.0]])[:, None]  # [features, heads, head_dim]
    >>> query_key_metric(kernel, -kernel)
    QueryKeyMetric(metric=array([[[-1., -2.],
            [-2., -4.]]]), spectrum=array([[-5.,  0.]]), symmetry=array([1.]), definiteness=array([-1.]))
    """
    query, key = (np.asarray(kernel, np.float64) for kernel in (query_kernel, key_kernel))
    features, heads, head_dim = query.shape
    fits = (key.shape[0], key.shape[2]) == (features, head_dim)
    if not fits or key.shape[1] < 1 or heads % key.shape[1]:
        raise ValueError(
            f"query_key_metric: key_kernel (={list(key.shape)}) must be [{features}, key_heads, {head_dim}], where "
            f"key_heads divides {heads}, for a query_kernel of {list(query.shape)}"
        )
    key = np.repeat(key, heads // key.shape[1], axis=1)
    metric = np.einsum("fhd,ghd->hfg", query, key, optimize=True)
    symmetric = (metric + metric.swapaxes(1, 2)) / 2
    spectrum = np.linalg.eigvalsh(symmetric)
    return QueryKeyMetric(
        metric,
        spectrum,
        _ratio(np.square(symmetric).sum((1, 2)), np.square(metric).sum((1, 2))),
        _ratio(spectrum.sum(1), np.abs(spectrum).sum(1)),
    )


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, where=whole > 0, out=np.full_like(whole, np.nan))

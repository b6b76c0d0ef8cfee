"""Convolutions of pixels as attention of patches, against `jax.lax`, with as many heads as the theorem says."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_equivalence import TOLERANCE, attend, lax_conv, normal

from jaxattn import zoo
from jaxattn.equivalence import attention_to_conv, conv_to_attention, patch_kernel

# grid in patches, window, patch
CASES = [
    ((4,), (1,), (3,)),
    ((4,), (3,), (1,)),
    ((3,), (3,), (2,)),
    ((5,), (4,), (2,)),
    ((4,), (2,), (3,)),
    ((1,), (7,), (2,)),
    ((4,), (7,), (2,)),
    ((3,), (7,), (3,)),
    ((3, 2), (3, 3), (4, 4)),
    ((2, 4), (5, 4), (2, 3)),
    ((5, 3), (6, 1), (2, 2)),
    ((2, 3, 2), (3, 2, 5), (2, 1, 2)),
]
case = pytest.mark.parametrize(("grid", "window", "patch"), CASES)


def split(x, patch):
    """Patches `[*grid, (pixels features)]` of an image, by NumPy."""
    rank = len(patch)
    sizes = [size for n, p in zip(x.shape, patch, strict=False) for size in (n // p, p)]
    order = [*range(0, 2 * rank, 2), *range(1, 2 * rank, 2), 2 * rank]
    parts = x.reshape(*sizes, x.shape[-1]).transpose(order)
    return parts.reshape(*parts.shape[:rank], -1)


def join(x, patch):
    """The image of patches."""
    rank, grid = len(patch), x.shape[:-1]
    order = [axis for k in range(rank) for axis in (k, rank + k)] + [2 * rank]
    parts = x.reshape(*grid, *patch, -1).transpose(order)
    return parts.reshape(*(n * p for n, p in zip(grid, patch, strict=True)), -1)


def make(grid, window, patch, features=2, out=3):
    image = [n * p for n, p in zip(grid, patch, strict=True)]
    return normal(0, *image, features), normal(1, *window, features, out)


@pytest.mark.core(4)
@case
def test_the_patches_attend_as_the_pixels_are_convolved(grid, window, patch):
    x, kernel = make(grid, window, patch)
    params, bound = conv_to_attention(patch_kernel(kernel, patch))
    assert bound == 0
    heads = math.prod(2 * math.ceil(k // 2 / p) + 1 for k, p in zip(window, patch, strict=True))
    assert len(params["centre"]) == heads
    y = join(attend(split(x, patch), params), patch)
    np.testing.assert_allclose(y, lax_conv(x, kernel), atol=TOLERANCE)


@pytest.mark.parametrize(("window", "patch"), [((3,), (2,)), ((6,), (2,)), ((5, 2), (2, 3))])
def test_the_formula(window, patch):
    """M_Δ[(a, c), (b, o)] = W_{PΔ + a - b}[c, o], an entry at a time."""
    kernel = np.asarray(normal(2, *window, 2, 3))
    found = np.asarray(patch_kernel(kernel, patch))
    seen = found.shape[: len(window)]
    found = found.reshape(*seen, *patch, 2, *patch, 3)
    pixels = list(itertools.product(*map(range, patch)))
    for u, a, b in itertools.product(np.ndindex(seen), pixels, pixels):
        sides = zip(u, a, b, patch, seen, window, strict=True)
        tap = tuple(p * (u - n // 2) + a - b + (k - 1) // 2 for u, a, b, p, n, k in sides)
        inside = all(0 <= t < k for t, k in zip(tap, window, strict=True))
        expected = kernel[tap] if inside else np.zeros((2, 3))
        np.testing.assert_array_equal(found[(*u, *a, slice(None), *b)], expected)


def test_a_patch_at_least_as_large_as_the_kernel_takes_nine_heads():
    for patch in (1, 2, 4, 16):
        matrices = patch_kernel(normal(3, 3, 3, 1, 1), patch)
        assert matrices.shape == (3, 3, patch**2, patch**2)
        assert (jnp.abs(matrices).max((2, 3)) > 0).all()  # and none could be left out


@pytest.mark.core(1)
@pytest.mark.parametrize("boundary", ["zero", "wrap", "edge"])
def test_boundaries(boundary):
    """Zeros and a ring are the same to patches as to pixels; the last patch repeated is not the last pixel."""
    (x, kernel), patch = make((3, 2), (3, 3), (2, 4)), (2, 4)
    params, _ = conv_to_attention(patch_kernel(kernel, patch), boundary=boundary)
    y = join(attend(split(x, patch), params), patch)
    mode = "constant" if boundary == "zero" else boundary
    expected = lax_conv(jnp.pad(x, [(1, 1), (1, 1), (0, 0)], mode=mode), kernel, padding="VALID")
    np.testing.assert_allclose(y[2:-2, 1:-1], expected[2:-2, 1:-1], atol=TOLERANCE)
    assert (jnp.abs(y - expected).max() < TOLERANCE) == (boundary != "edge")


def test_weights_over_the_patches_inside_repeat_the_last_patch():
    """Normalised over the whole grid, as a vision transformer's are, hard heads see the border's patch beyond it."""
    (x, kernel), patch = make((3, 4), (3, 3), (2, 2)), (2, 2)
    params, _ = conv_to_attention(patch_kernel(kernel, patch))
    y = join(attend(split(x, patch), {**params, "window": None}), patch)
    tokens = jnp.pad(split(x, patch), [(1, 1), (1, 1), (0, 0)], mode="edge")
    repeated = lax_conv(join(tokens, patch), kernel)[2:-2, 2:-2]
    np.testing.assert_allclose(y, repeated, atol=TOLERANCE)


def test_head_dim_is_at_least_the_rank():
    """Of all the matrices; that of the patch itself has full rank here, those of the corners rank 1."""
    x, kernel = make((3, 3), (3, 3), (2, 2), 1, 1)
    matrices = patch_kernel(kernel, 2)
    ranks = np.linalg.matrix_rank(matrices)
    rank = int(ranks.max())
    assert rank == 4
    assert ranks[0, 0] == 1
    params, _ = conv_to_attention(matrices, head_dim=rank)
    assert params["value"].shape == (4, 9, rank)
    y = join(attend(split(x, (2, 2)), params), (2, 2))
    np.testing.assert_allclose(y, lax_conv(x, kernel), atol=TOLERANCE)
    with pytest.raises(ValueError, match=rf"head_dim \(={rank - 1}\) must be at least {rank}, the rank"):
        conv_to_attention(matrices, head_dim=rank - 1)
    shift = jnp.zeros((3, 3, 1, 1)).at[0, 0].set(1.0)  # looks at a corner: most pairs of patches share one pixel
    np.testing.assert_array_equal(np.linalg.matrix_rank(patch_kernel(shift, 2)), [[1, 1, 0], [1, 1, 0], [0, 0, 0]])


@pytest.mark.parametrize("alpha", [0.5, 3.0])
def test_a_finite_alpha_is_within_its_bound(alpha):
    (x, kernel), patch = make((4, 3), (5, 3), (2, 2)), (2, 2)
    params, bound = conv_to_attention(patch_kernel(kernel, patch), alpha=alpha)
    error = jnp.abs(join(attend(split(x, patch), params), patch) - lax_conv(x, kernel)).max()
    assert bound / 100 < error <= bound * jnp.abs(x).max()
    back, _ = attention_to_conv(params)
    np.testing.assert_allclose(zoo.conv(split(x, patch), back), attend(split(x, patch), params), atol=TOLERANCE)


@pytest.mark.core(1)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_gradients_and_dtypes(dtype):
    """The gradients of the pixels and of the kernel are those of the convolution."""
    (x, kernel), patch = make((2, 3), (3, 4), (2, 3)), (2, 3)

    @jax.jit
    def by_patches(x, kernel):
        params, _ = conv_to_attention(patch_kernel(kernel, patch))
        return join(zoo.quadratic_attention(split(x, patch), params), patch)

    expected, pull = jax.vjp(lax_conv, x, kernel)
    cotangent = normal(4, *expected.shape)
    with jax.numpy_dtype_promotion("strict"):
        y, other = jax.vjp(by_patches, x.astype(dtype), kernel.astype(dtype))
        found = (y, *other(cotangent.astype(dtype)))
    tolerance = {"float64": TOLERANCE, "float32": 1e-5, "bfloat16": 2e-2}[dtype]
    for a, b in zip(found, (expected, *pull(cotangent)), strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(np.asarray(a, float), b, atol=tolerance * float(jnp.abs(b).max()))
    both = jax.vmap(lambda kernel: patch_kernel(kernel, patch))(jnp.stack([kernel, -kernel]))
    np.testing.assert_array_equal(both[1], -patch_kernel(kernel, patch))


@pytest.mark.parametrize(
    ("shape", "patch", "message"),
    [
        ((2, 2), 2, r"kernel \(=\[2, 2\]\) must be \[\*window, features, out_features\]"),
        ((3, 0, 2), 2, r"kernel \(=\[3, 0, 2\]\)"),
        ((3, 3, 2, 2), 0, r"patch \(=0\) must be an int >= 1, or one for each"),
        ((3, 3, 2, 2), (2, 2, 2), r"patch \(=\(2, 2, 2\)\) must be"),
    ],
)
def test_bad_arguments(shape, patch, message):
    with pytest.raises(ValueError, match=f"patch_kernel: {message}"):
        patch_kernel(np.ones(shape), patch)

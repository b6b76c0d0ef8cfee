"""Augmentation against what the papers say it does, found again in NumPy from what came out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.train.augment import augment, normalize


@dataclasses.dataclass(frozen=True)
class Settings:
    shift: int = 0
    flip: bool = False
    cutout: int = 0
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0


EVERYTHING = Settings(2, True, 3, 0.5, 0.4, 1.0)


def make(count=400, shape=(7, 6, 2), classes=5, dtype=np.float32):
    """Images in which every pixel has a value of its own and none is 0, and one-hot targets."""
    images = np.random.default_rng(0).permutation(count * np.prod(shape)).reshape(count, *shape) + 1.0
    return images.astype(dtype), np.eye(classes, dtype=dtype)[np.arange(count) % classes]


compiled = jax.jit(augment, static_argnums=3)


def run(settings, images, targets, seed=0):
    out = compiled(jax.random.key(seed), images, targets, settings)
    return np.asarray(out[0]), np.asarray(out[1])


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_normalize(dtype):
    rng = np.random.default_rng(0)
    levels, mean, std = rng.integers(0, 256, (3, 4, 5, 2)), rng.random(2), rng.random(2) + 0.1
    images = levels.astype(np.uint8) if dtype == np.uint8 else (levels / 255).astype(np.float32)
    # as a data set gives them: NumPy's
    found = jax.jit(lambda x: normalize(x, mean.astype(np.float32), std.astype(np.float32)))(images)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, (levels / 255 - mean) / std, rtol=2e-5, atol=2e-6)


def test_nothing_on_changes_nothing():
    images, targets = make()
    for found, given in zip(run(Settings(), images, targets), (images, targets), strict=True):
        np.testing.assert_array_equal(found, given)


@pytest.mark.core(1)
@pytest.mark.parametrize("shape", [(7, 6, 2), (1, 1, 1)])
def test_shifted_images_are_windows_of_the_image_padded_by_its_edge(shape):
    images, targets = make(shape=shape)
    moved, same = run(Settings(shift=2), images, targets)
    np.testing.assert_array_equal(same, targets)
    counts = np.zeros((5, 5))
    for x, image in zip(moved, images, strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, shape[:2], (0, 1))  # [5, 5, c, h, w]
        counts += (np.moveaxis(windows, 2, -1) == x).all((2, 3, 4))
    if shape[0] > 1:  # each found once, and each of the 25 windows about 16 times of 400
        assert counts.sum() == 400
        assert counts.min() > 4
        assert counts.max() < 35


def test_half_of_the_images_are_flipped_left_to_right():
    images, targets = make()
    found, _ = run(Settings(flip=True), images, targets)
    flipped = (found == images[:, :, ::-1]).all((1, 2, 3))
    kept = (found == images).all((1, 2, 3))
    assert (flipped ^ kept).all()
    assert abs(flipped.mean() - 0.5) < 0.1  # four standard deviations


def rectangle(mask):
    """(top, left, height, width) of the True pixels of `[height, width]`, which must fill a rectangle."""
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    top, left, bottom, right = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
    assert mask[top:bottom, left:right].all()
    return top, left, bottom - top, right - left


@pytest.mark.core(1)
@pytest.mark.parametrize("side", [2, 3, 20])
def test_cutout_is_a_square_of_zeros_about_a_pixel_of_the_image(side):
    images, targets = make(shape=(7, 6, 2))
    found, _ = run(Settings(cutout=side), images, targets)
    squares = set()
    for x, image in zip(found, images, strict=True):
        changed = (x != image).any(-1)
        assert (x[changed] == 0).all()
        squares.add(tuple(map(int, rectangle(changed))))
    expected = set()
    for row in range(7):
        for column in range(6):
            top, left = row - side // 2, column - side // 2
            bottom, right = min(top + side, 7), min(left + side, 6)
            top, left = max(top, 0), max(left, 0)
            expected.add((top, left, bottom - top, right - left))
    assert squares <= expected
    assert len(squares) > 0.9 * len(expected)


def test_erasing_puts_noise_in_a_rectangle_within_the_image():
    images, targets = make(shape=(20, 16, 2))
    found, _ = run(Settings(erasing=0.3), images, targets)
    changed = (found != images).any(-1)
    erased = changed.any((1, 2))
    assert abs(erased.mean() - 0.3) < 0.1
    sides = np.array([rectangle(mask)[2:] for mask in changed[erased]])
    share = sides.prod(1) / 320
    assert share.min() > 0.005
    assert share.max() < 0.45
    assert len(np.unique(sides, axis=0)) > 20
    noise = found[changed]
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05


@pytest.mark.core(1)
@pytest.mark.parametrize("alpha", [0.2, 5.0])
def test_mixup_is_a_convex_combination_with_the_next_image(alpha):
    images, targets = make()
    found, weights = run(Settings(mixup=alpha), images, targets)
    share = weights[np.arange(400), targets.argmax(1)]  # the next image is of another class
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    own, other = images.astype(float), np.roll(images, -1, 0).astype(float)
    lam = share.astype(float)[:, None, None, None]
    np.testing.assert_allclose(found, lam * own + (1 - lam) * other, rtol=1e-4, atol=0.05)
    # the moments of Beta(alpha, alpha)
    assert abs(share.mean() - 0.5) < 0.1
    assert abs(share.var() - 1 / (4 * (2 * alpha + 1))) < 0.03


def test_cutmix_weights_the_targets_by_area():
    images, targets = make(shape=(9, 8, 2))
    found, weights = run(Settings(cutmix=1.0), images, targets)
    other = np.roll(images, -1, 0)
    taken = (found == other).all(-1)
    kept = (found == images).all(-1)
    assert (taken ^ kept).all()
    np.testing.assert_allclose(weights[np.arange(400), targets.argmax(1)], kept.mean((1, 2)), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    for mask in taken[taken.any((1, 2))]:
        rectangle(mask)
    assert taken.any((0,)).all()  # every pixel is taken at times


def test_mixup_and_cutmix_have_one_half_of_the_images_each():
    images, targets = make()
    found, _ = run(Settings(mixup=1.0, cutmix=1.0), images, targets)
    cut = ((found == images) | (found == np.roll(images, -1, 0))).all((1, 2, 3))
    assert abs(cut.mean() - 0.5) < 0.1


def test_a_key_decides_everything_and_each_image_has_its_own():
    images, targets = make(40)
    alike = np.broadcast_to(images[:1], images.shape)
    one, again, other = (run(EVERYTHING, alike, targets, seed) for seed in (1, 1, 2))
    for a, b in zip(one, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (one[0] != other[0]).any()
    assert len(np.unique(one[0].reshape(40, -1), axis=0)) > 30


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_stay(dtype):
    images, targets = make(4)
    x, y = jnp.asarray(images, dtype), jnp.asarray(targets)
    found = jax.eval_shape(lambda x, y: augment(jax.random.key(0), x, y, EVERYTHING), x, y)
    assert [(a.shape, a.dtype) for a in found] == [(x.shape, dtype), (y.shape, jnp.float32)]


@pytest.mark.full
def test_one_setting_does_not_change_what_another_draws():
    images, targets = make()
    shifted, _ = run(Settings(shift=1), images, targets)
    both, _ = run(Settings(shift=1, cutout=2), images, targets)
    assert ((both == shifted) | (both == 0)).all()


@pytest.mark.full
def test_augmenting_batches_by_vmap():
    images, targets = make(12)
    keys = jax.random.split(jax.random.key(0), 3)
    x, y = jnp.asarray(images).reshape(3, 4, *images.shape[1:]), jnp.asarray(targets).reshape(3, 4, -1)
    settings = Settings(1, True, 2)
    together = jax.jit(jax.vmap(lambda key, x, y: augment(key, x, y, settings)))(keys, x, y)
    for i in range(3):
        for found, expected in zip(together, compiled(keys[i], x[i], y[i], settings), strict=True):
            np.testing.assert_allclose(found[i], expected, rtol=1e-5)

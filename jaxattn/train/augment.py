"""What happens to a batch inside the training step: normalisation, and changes that leave the answer known.

Everything is a pure function of a key, so that a run that is resumed sees the same changes again.
"""

import functools
from types import ModuleType
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, Num, Real

from jaxattn.errors import needs_extra


@runtime_checkable
class Augmentation(Protocol):
    """The settings that `augment` reads; a zero turns each off."""

    @property
    def shift(self) -> int: ...  # pixels
    @property
    def flip(self) -> bool: ...
    @property
    def cutout(self) -> int: ...  # pixels
    @property
    def erasing(self) -> float: ...  # probability
    @property
    def mixup(self) -> float: ...  # alpha
    @property
    def cutmix(self) -> float: ...  # alpha


def normalize(
    images: Num[Array | np.ndarray, "batch *grid channels"],
    mean: Real[Array | np.ndarray, "channels"],
    std: Real[Array | np.ndarray, "channels"],
) -> Float[Array, "batch *grid channels"]:
    """(images - mean) / std in float32, where uint8 images count in 255ths.

    >>> normalize(jnp.full((1, 1, 1, 1), 255, jnp.uint8), jnp.array([0.5]), jnp.array([0.25])).item()
    2.0
    """
    images = jnp.asarray(images)
    unit = images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images.astype(jnp.float32)
    return (unit - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def augment(
    key: Key[Array, ""],
    images: Float[Array, "batch *grid channels"],
    targets: Float[Array, "batch classes"],
    config: Augmentation,
) -> tuple[Float[Array, "batch *grid channels"], Float[Array, "batch classes"]]:
    """Changes every image of a batch by keys of its own, in this order, and the targets with them.

    Args:
      key: decides everything that is drawn.
      images: normalised, so that 0 is the mean colour.
      targets: each row the weights of the classes, which sum to 1.
      config: of each of these, how much:
        - `shift`: moved by up to so many pixels along each axis, its edge pixels repeated behind it.
        - `flip`: mirrored left to right, half of the time.
        - `cutout`: a square of this side about a random pixel, as far as it is in the image, is 0
          (DeVries and Taylor 2017, arXiv 1708.04552).
        - `erasing`: with this probability a rectangle of 2 to 40 % of the area becomes noise (Zhong et al. 2017,
          arXiv 1708.04896).
        - `mixup`: λ · image + (1 - λ) · the next image of the batch, λ ~ Beta(α, α); the targets likewise (Zhang et
          al. 2017, arXiv 1710.09412).
        - `cutmix`: a rectangle is the next image's; the targets are weighted by area (Yun et al. 2019, arXiv
          1905.04899). With `mixup` as well, each image has one of the two, with equal chances.

    Returns:
      Images and targets of the same shapes and dtypes.

    >>> from types import SimpleNamespace
    >>> config = SimpleNamespace(shift=1, flip=True, cutout=2, erasing=0.25, mixup=0.2, cutmix=1.0)
    >>> images, targets = jnp.ones((4, 8, 8, 3), jnp.float32), jnp.eye(4, 10, dtype=jnp.float32)
    >>> images, targets = jax.jit(lambda key: augment(key, images, targets, config))(jax.random.key(0))
    >>> images.shape, targets.sum(1).round(3).tolist()
    ((4, 8, 8, 3), [1.0, 1.0, 1.0, 1.0])
    """
    keys = jax.random.split(key, (5, len(images)))  # five for each image, so that one setting does not change another
    if config.shift:
        images = jax.vmap(shifted, (0, 0, None))(keys[0], images, config.shift)
    if config.flip:
        images = jnp.asarray(jax.vmap(pix().random_flip_left_right)(keys[1], images))
    if config.cutout:
        images = jax.vmap(cutout, (0, 0, None))(keys[2], images, config.cutout)
    if config.erasing:
        images = jax.vmap(erased, (0, 0, None))(keys[3], images, config.erasing)
    if config.mixup or config.cutmix:
        others = jnp.roll(images, -1, 0), jnp.roll(targets, -1, 0)  # the batch is in random order already
        mix = functools.partial(mixed, mixup_alpha=config.mixup, cutmix_alpha=config.cutmix)
        images, targets = jax.vmap(mix)(keys[4], images, targets, *others)
    return images, targets


def pix() -> ModuleType:
    """dm-pix, which only training needs."""
    with needs_extra("train"):
        import dm_pix
    return dm_pix


def shifted(key: Key[Array, ""], image: Float[Array, "height width channels"], shift: int) -> Array:
    """One of the (2 shift + 1)² windows of the image padded by its edge."""
    height, width, _ = image.shape
    padded = pix().pad_to_size(image, height + 2 * shift, width + 2 * shift, mode="edge")
    return jnp.asarray(pix().random_crop(key, padded, image.shape))


def cutout(key: Key[Array, ""], image: Float[Array, "height width channels"], side: int) -> Array:
    """The image with a square of zeros about a pixel of it."""
    height, width, _ = image.shape
    centre = jax.random.randint(key, (2,), 0, jnp.array([height, width]))
    return jnp.where(inside(image, centre - side // 2, jnp.array([side, side])), 0, image)


def erased(key: Key[Array, ""], image: Float[Array, "height width channels"], probability: float) -> Array:
    """The image, or with this probability the image with a rectangle of standard normal noise that lies within it."""
    chance, area_key, aspect_key, place, noise = jax.random.split(key, 5)
    grid = jnp.array(image.shape[:2])
    area = grid.prod() * jax.random.uniform(area_key, (), jnp.float32, 0.02, 0.4)
    aspect = jnp.exp(jax.random.uniform(aspect_key, (), jnp.float32, jnp.log(0.3), -jnp.log(0.3)))
    sides = jnp.round(jnp.sqrt(area * jnp.stack([aspect, 1 / aspect]))).astype(int).clip(1, grid)
    start = jax.random.randint(place, (2,), 0, grid - sides + 1)
    chosen = inside(image, start, sides) & jax.random.bernoulli(chance, probability)
    return jnp.where(chosen, jax.random.normal(noise, image.shape, image.dtype), image)


def mixed(
    key: Key[Array, ""],
    image: Float[Array, "*grid channels"],
    target: Float[Array, "classes"],
    other: Float[Array, "*grid channels"],
    other_target: Float[Array, "classes"],
    mixup_alpha: float,
    cutmix_alpha: float,
) -> tuple[Array, Array]:
    """Mixup, or cutmix, or one of the two by the toss of a coin: what has an alpha of 0 is off."""
    coin, draw, place = jax.random.split(key, 3)
    blend = jax.random.bernoulli(coin, 0.5 if mixup_alpha and cutmix_alpha else float(mixup_alpha > 0))
    alpha = jnp.where(blend, jnp.float32(mixup_alpha), jnp.float32(cutmix_alpha))
    share = jax.random.beta(draw, alpha, alpha, dtype=jnp.float32)  # λ, of the image itself
    blended = (share * image + (1 - share) * other).astype(image.dtype)
    pasted, left = cutmix(place, image, other, share)
    share = jnp.where(blend, share, left).astype(target.dtype)
    return jnp.where(blend, blended, pasted), share * target + (1 - share) * other_target


def cutmix(
    key: Key[Array, ""],
    image: Float[Array, "height width channels"],
    other: Float[Array, "height width channels"],
    share: Float[Array, ""],
) -> tuple[Array, Array]:
    """The image with a rectangle of the other, of 1 - share of the area until the border cuts it; the share left."""
    grid = jnp.array(image.shape[:2])
    sides = jnp.round(grid * jnp.sqrt(1 - share)).astype(int)
    chosen = inside(image, jax.random.randint(key, (2,), 0, grid) - sides // 2, sides)
    return jnp.where(chosen, other, image), 1 - chosen.mean(dtype=jnp.float32)


def inside(image: Array, start: Array, sides: Array) -> Array:
    """Which pixels `[height, width, 1]` are in the rectangle that starts at a pixel, within the image or not."""
    place = jnp.stack(jnp.meshgrid(*map(jnp.arange, image.shape[:2]), indexing="ij"), -1)  # [height, width, 2]
    return ((place >= start) & (place < start + sides)).all(-1, keepdims=True)

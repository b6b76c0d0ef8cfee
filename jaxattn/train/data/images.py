"""Image files, decoded once into one array."""

import collections
import io
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from jaxattn.errors import InputError, needs_extra
from jaxattn.train.data.split import Examples

with needs_extra("train"):
    from PIL import Image, ImageOps

BROKEN = (OSError, EOFError, SyntaxError, ValueError, IndexError, Image.DecompressionBombError)  # says Pillow
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "YCbCr", "CMYK")  # 16 bits would be cut off at 255


class Encoded(NamedTuple):
    """A file's bytes, read when they are asked for, its class, and where it lies."""

    read: Callable[[], bytes]
    label: int
    origin: str


def decode_all(files: Sequence[Encoded], size: int | None, skip_bad: bool, skipped: list[str]) -> Examples:
    """Decodes JPEG and PNG files into one uint8 array in memory: grey if all of them are, else red, green and blue.

    Args:
      files: what to decode.
      size: makes every image size×size, its middle cut out if it is not square. Without it, all must be of one size.
      skip_bad: leaves out what is no such image, is truncated, or has another size than most; else that is refused.
      skipped: is told of those that are left out.
    """
    with ThreadPoolExecutor() as threads:  # Pillow decodes outside the lock
        headers = list(threads.map(_header, files))
        found = [header for header in headers if not isinstance(header, str)]
        grey = all(is_grey for _, is_grey in found)
        common = collections.Counter(shape for shape, _ in found).most_common(1)
        shape = (size, size) if size else common[0][0] if common else (0, 0)
        wrong = [_wrong(header, None if size else shape) for header in headers]
        images = np.empty(_fits(len(files), *shape, 1 if grey else 3), np.uint8)
        decode = lambda i: wrong[i] or _decode_into(images[i], files[i], size)
        messages = list(threads.map(decode, range(len(files))))
    good = np.array([message is None for message in messages], bool)
    for file, message in zip(files, messages, strict=True):
        if message is not None:
            if not skip_bad:
                raise InputError(f"{file.origin}: {message}")
            skipped.append(f"{file.origin}: {message}")
    kept = [file for file, is_good in zip(files, good, strict=True) if is_good]
    labels = np.array([file.label for file in kept], np.int64)
    return Examples(images if good.all() else images[good], labels, lambda i: kept[i].origin)


def _open(file: Encoded) -> Image.Image:
    return Image.open(io.BytesIO(file.read()), formats=("JPEG", "PNG"))


def _header(file: Encoded) -> tuple[tuple[int, int], bool] | str:
    """((height, width), is it grey?) without decoding, or what is wrong."""
    try:
        with _open(file) as image:
            if image.mode not in MODES:
                return f"has pixels of mode {image.mode}, expected 8 bits a channel"
            return (image.height, image.width), image.mode in ("1", "L", "LA")
    except BROKEN as error:
        return _message(error)


def _wrong(header: tuple[tuple[int, int], bool] | str, expected: tuple[int, int] | None) -> str | None:
    if isinstance(header, str):
        return header
    (height, width), _ = header
    if expected and (height, width) != expected:
        return (
            f"is {height}×{width} (height×width), where most are {expected[0]}×{expected[1]}; "
            "append ?size=N to the data's name to make all N×N"
        )
    return None


def _decode_into(out: UInt8[np.ndarray, "height width channels"], file: Encoded, size: int | None) -> str | None:
    """Decodes one image, or returns what is wrong."""
    try:
        with _open(file) as image:
            converted = image.convert("L" if out.shape[-1] == 1 else "RGB")  # decodes all of it
            fitted = ImageOps.fit(converted, (size, size), Image.Resampling.BICUBIC) if size else converted
            out[...] = np.asarray(fitted).reshape(out.shape)
    except BROKEN as error:
        return _message(error)
    return None


def _message(error: BaseException) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "no JPEG or PNG image"
    return f"cannot be decoded: {error}"


def _fits(*shape: int) -> tuple[int, ...]:
    """The shape, if an array of so many bytes fits into this machine's memory."""
    if sys.platform == "win32":  # which has no sysconf
        return shape
    needed, memory = int(np.prod(shape, dtype=object)), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > 0.8 * memory:
        raise InputError(
            f"the images decoded are {needed / 2**30:.1f} GiB, and this machine has {memory / 2**30:.1f}: "
            "append ?size=N to the data's name to make all N×N"
        )
    return shape

"""Image files, decoded once into one array."""

import collections
import contextlib
import os
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from jaxattn.errors import InputError, needs_extra
from jaxattn.files import memory, reason
from jaxattn.train.data.split import Examples

with needs_extra("train"):
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "YCbCr", "CMYK")  # 16 bits would be cut off at 255
GREY = ("1", "L", "LA")
ORIENTATION = 0x0112  # in EXIF: how the camera was held
TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PNG = b"\x89PNG\r\n\x1a\n"
MOST_EXIF = 1 << 16  # bytes: what a JPEG file has room for
LARGE = 1 << 25  # pixels; of larger images one at a time is decoded
ONE_LARGE = threading.Lock()


class Encoded(NamedTuple):
    """A file, opened when it is asked for, its class, and where it lies; `fault` says what else is wrong with it."""

    open: Callable[[], Any]  # a binary stream
    label: int
    origin: str
    fault: str | None = None


class Header(NamedTuple):
    """What an image says of itself."""

    height: int
    width: int
    grey: bool


def decode_parts(
    parts: Mapping[str, Sequence[Encoded]], size: int | None, skip_bad: bool, skipped: list[str]
) -> dict[str, Examples]:
    """Decodes the image files of each part into one uint8 array in memory: grey if all of them are, else red, green and
    blue. An image that its camera marked as turned (EXIF) is turned.

    Args:
      parts: what to decode.
      size: makes every image size×size, its middle cut out if it is not square. Without it, all must be of one size.
      skip_bad: leaves out what is no such image, is truncated, or has another size than most; else that is refused.
      skipped: is told of those that are left out.
    """
    files = [file for part in parts.values() for file in part]
    with ThreadPoolExecutor() as threads:  # Pillow decodes outside the lock
        headers = list(threads.map(_header, files))
        found = [header for header in headers if isinstance(header, Header)]
        grey = all(header.grey for header in found)
        common = collections.Counter((header.height, header.width) for header in found).most_common(1)
        shape = (size, size) if size else common[0][0] if common else (0, 0)
        wrong = [_wrong(header, None if size else shape) for header in headers]
        images = np.empty(_fits(len(files), *shape, 1 if grey else 3), np.uint8)
        decode = lambda i: wrong[i] or _decode_into(images[i], files[i], size)
        messages = list(threads.map(decode, range(len(files))))
    decoded, start = {}, 0
    for part, inner in parts.items():
        stop = start + len(inner)
        decoded[part] = _good(images[start:stop], inner, messages[start:stop], skip_bad, skipped)
        start = stop
    return decoded


def _good(
    images: np.ndarray, files: Sequence[Encoded], messages: Sequence[str | None], skip_bad: bool, skipped: list[str]
) -> Examples:
    """The examples in which nothing is wrong."""
    for file, message in zip(files, messages, strict=True):
        if message is not None:
            if not skip_bad:
                raise InputError(f"{file.origin}: {message}")
            skipped.append(f"{file.origin}: {message}")
    good = np.array([message is None for message in messages], bool)
    kept = [file for file, is_good in zip(files, good, strict=True) if is_good]
    labels = np.array([file.label for file in kept], np.int64)
    return Examples(images if good.all() else images[good], labels, lambda i: kept[i].origin)


def _header(file: Encoded) -> Header | str:
    """What the image says of itself, without decoding it, or what is wrong."""
    if file.fault is not None:
        return file.fault
    try:
        with file.open() as stream, Image.open(stream, formats=FORMATS) as image:
            if image.mode not in MODES:
                return f"has pixels of mode {image.mode}, expected 8 bits a channel"
            if image.format in ("TIFF", "WEBP") and getattr(image, "n_frames", 1) > 1:
                return f"has {getattr(image, 'n_frames', 1)} pages or frames, expected one"
            height, width = (image.height, image.width) if _orientation(image) < 5 else (image.width, image.height)
            return Header(height, width, image.mode in GREY)
    except Exception as error:  # of Pillow's decoders, which meet whatever bytes there are
        return _message(error)


def _orientation(image: Image.Image) -> int:
    """From 1, upright, to 8. EXIF that cannot be read says nothing."""
    if image.format == "TIFF":  # Pillow turns it
        return 1
    with contextlib.suppress(Exception):
        if image.format == "PNG" and "exif" not in image.info:
            exif = Image.Exif()
            exif.load(_behind_the_pixels(getattr(image, "fp")))  # noqa: B009  it has one while it is open
        else:
            exif = image.getexif()
        found = exif.get(ORIENTATION, 1)
        return found if found in TURN else 1
    return 1


def _behind_the_pixels(stream: Any) -> bytes:
    """The EXIF of a PNG file that has it after its pixels, where Pillow finds it when it has decoded them: here the
    parts of the file are skipped by their lengths."""
    here = stream.tell()
    try:
        stream.seek(len(PNG))
        while len(head := stream.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"eXIf":
                return stream.read(min(length, MOST_EXIF))
            stream.seek(length + 4, os.SEEK_CUR)  # and a check sum
        return b""
    finally:
        stream.seek(here)


def _wrong(header: Header | str, expected: tuple[int, int] | None) -> str | None:
    if isinstance(header, str):
        return header
    if expected and (header.height, header.width) != expected:
        return (
            f"is {header.height}×{header.width} (height×width), where most are {expected[0]}×{expected[1]}; "
            "append ?size=N to the data's name to make all N×N"
        )
    return None


def decode(file: Encoded, shape: tuple[int, int, int], crop: float, interpolation: str) -> np.ndarray | str:
    """The middle of one image in that shape, height, width and channels, as uint8; or what is wrong with it.

    Args:
      file: the image.
      shape: it is grey with one channel, and else red, green and blue.
      crop: the share of the largest such rectangle in it, along each axis, that is taken.
      interpolation: bicubic or bilinear.
    """
    header = _header(file)
    if isinstance(header, str):
        return header
    sides = shape[1], shape[0]
    try:
        return _decoded(file, shape, max(sides), lambda image: fitted(image, sides, crop, interpolation))
    except Exception as error:  # as above
        return _message(error)


def fitted(
    image: Image.Image, sides: tuple[int, int], crop: float = 1.0, interpolation: str = "bicubic"
) -> Image.Image:
    """The middle of an image as `decode` takes it; `sides` are width and height.

    >>> fitted(Image.new("L", (300, 200)), (64, 32), 0.5).size
    (64, 32)
    """
    scale = crop * min(image.width / sides[0], image.height / sides[1])
    half = [scale * side / 2 for side in sides]
    box = (image.width / 2 - half[0], image.height / 2 - half[1], image.width / 2 + half[0], image.height / 2 + half[1])
    return image.resize(sides, Image.Resampling[interpolation.upper()], box)


def _decoded(
    file: Encoded, shape: tuple[int, ...], size: int | None, fit: Callable[[Image.Image], Image.Image]
) -> np.ndarray:
    """An image, upright, in the colours of that shape, through `fit`; `size` is about the longer side of the result."""
    with file.open() as stream, Image.open(stream, formats=FORMATS) as image:
        turned = TURN.get(_orientation(image))
        if size:  # a JPEG file may be decoded at half, a quarter or an eighth, in as much less time
            image.draft(None, (2 * size, 2 * size))
        with ONE_LARGE if image.width * image.height > LARGE else contextlib.nullcontext():
            converted = image.convert("L" if shape[-1] == 1 else "RGB")  # decodes all of it
            upright = converted if turned is None else converted.transpose(turned)
            return np.asarray(fit(upright)).reshape(shape)


def _decode_into(out: UInt8[np.ndarray, "height width channels"], file: Encoded, size: int | None) -> str | None:
    """Decodes one image, or returns what is wrong."""
    try:
        out[...] = _decoded(file, out.shape, size, lambda image: image if size is None else fitted(image, (size, size)))
    except Exception as error:  # as above
        return _message(error)
    return None


def _message(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return f"no image of {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
    return f"cannot be decoded: {reason(error)}"


def _fits(*shape: int) -> tuple[int, ...]:
    """The shape, if an array of so many bytes fits into this machine's memory."""
    needed, there = int(np.prod(shape, dtype=object)), memory()
    if needed > 0.8 * there:
        raise InputError(
            f"the images decoded are {needed / 2**30:.1f} GiB, and this machine has {there / 2**30:.1f}: "
            "append ?size=N to the data's name to make all N×N"
        )
    return shape

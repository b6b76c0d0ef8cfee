"""Files from outside: only regular ones are opened, none unfolds beyond a limit, and what goes wrong names the file.

Three things stand here once for all readers:

- `open_file` opens a regular file, so that no pipe and no device is waited for;
- `Room` is what one file may unfold to: a few hundred bytes may claim, or truly hold, more than a machine has;
- `reading` turns whatever a reader raises, ours or another package's, into an error that names the file.
"""

import contextlib
import io
import json
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from jaxattn.errors import InputError

LIMIT = 1 << 30  # bytes that any file may unfold to
UNFOLDING = 16  # times its size that a file may unfold to; images and weights do not reach it
SMALL = 64 << 20  # bytes of a file of settings or results

# How files begin that are often there in another's place.
OTHERS = {
    b"version https://git-lfs": "a Git LFS pointer in place of the file: `git lfs pull` fetches it",
    b"<!doctype": "a web page in place of the file",
    b"<html": "a web page in place of the file",
    b"\x1f\x8b": "a gzip file",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ": "an xz file",
    b"\x28\xb5\x2f\xfd": "a Zstandard file",
    b"PK\x03\x04": "a zip archive",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"PAR1": "a parquet file",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"%PDF": "a PDF document",
}


def open_file(path: str | os.PathLike[str]) -> io.BufferedReader:
    """The file, open for reading, if it is a regular one.

    Raises:
      OSError: there is none, it may not be read, or it is a folder, a pipe or a device; each names the file.
    """
    # a pipe that nobody writes to would keep us waiting; Windows has no such flag, and no such pipes in folders
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        error = IsADirectoryError if stat.S_ISDIR(mode) else OSError
        raise error(f"{os.fspath(path)} is {kind}, not a regular file")
    return os.fdopen(handle, "rb")


def path_of(text: str | os.PathLike[str]) -> Path:
    """The path that a user typed, with `~` as the home folder.

    Raises:
      InputError: no file can be called so.
    """
    with reading(cut(os.fspath(text))):
        path = Path(text).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            path.stat()  # a NUL in it, or too long a name
        return path


@contextlib.contextmanager
def reading(path: object, what: str = "{}: cannot be read: ", form: tuple[bytes, ...] = ()) -> Iterator[None]:
    """Whatever is raised inside becomes an `InputError` that begins with `what`, which names the file. By default one
    that is already one begins with the file, too, and not with the function that reads it.

    It also says what the file is instead, where it begins like something else than `form`.

    A file that was made to do harm reaches every corner of the package that reads it: there is no list of what those
    raise (`zlib.error`, `struct.error`, `NotImplementedError`, `RecursionError`, ...). So all is turned, and the cause
    is kept. Only what reads bytes from outside should stand inside.
    """
    try:
        yield
    except InputError as error:
        function, named, rest = str(error).partition(f": {path}: ")
        if what.startswith("{}") and named and function.isidentifier():
            raise InputError(f"{path}: {rest}") from error
        raise
    except Exception as error:
        raise InputError(f"{what.format(path)}{reason(error)}{_begins(path, form)}") from error


def reason(error: BaseException) -> str:
    """What an exception says, on one short line; its type where it says nothing."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f': {cut(str(error.filename))}' if error.filename else ''}"
    return cut(" ".join(str(error).split()), 300) or type(error).__name__


def _begins(path: object, form: tuple[bytes, ...]) -> str:
    """What a file is instead, where its first bytes tell."""
    with contextlib.suppress(Exception), open_file(str(path)) as file:
        head = file.read(64)
        begins = lambda start: head.lstrip().lower().startswith(start.lower())
        found = next((what for start, what in OTHERS.items() if begins(start)), None)
        if (found or not head) and not any(map(begins, form)):
            return f" (it is {found or 'empty'})"
    return ""


class Room:
    """The bytes that one file may unfold to, taken bit by bit.

    Args:
      name: of the file.
      size: of the file, in bytes.
      limit: the most that it may unfold to; None for 1 GiB or 16 times its size, whichever is more, within this
        machine's memory.

    >>> room = Room("x.npz", 100, limit=1000)
    >>> room.take(600, "train_images")
    >>> room.take(600, "test_images")
    Traceback (most recent call last):
    ...
    jaxattn.errors.InputError: x.npz: test_images would unfold a file of 100 bytes to 1,200 bytes; allowed: 1,000
    """

    def __init__(self, name: object, size: int, limit: int | None = None):
        self.name, self.size, self.taken = name, size, 0
        self.limit = min(max(LIMIT, UNFOLDING * size), int(0.8 * memory())) if limit is None else limit

    @property
    def left(self) -> int:
        """What may still be taken."""
        return self.limit - self.taken

    def take(self, count: int, what: str):
        """Counts bytes that are about to be read."""
        if count > self.left:
            raise InputError(
                f"{self.name}: {what} would unfold a file of {self.size:,} bytes to {self.taken + count:,} bytes; "
                f"allowed: {self.limit:,}"
            )
        self.taken += count


PIECE = 1 << 20  # bytes that are asked for at once: a stream makes room for all of them before it knows what it has


class Unfolded(io.RawIOBase):
    """A stream, decompressed or not, that takes all it gives from a `Room`."""

    def __init__(self, stream: IO[bytes], room: Room, what: str):
        self.stream, self.room, self.what = stream, room, what

    def readable(self) -> bool:
        """It is."""
        return True

    def read(self, size: int = -1) -> bytes:
        """As of any stream, but never much more than there is room for."""
        most = self.room.left + 1
        wanted, pieces, length = most if size is None or size < 0 else min(size, most), [], 0
        while length < wanted and (piece := self.stream.read(min(wanted - length, PIECE))):
            pieces.append(piece)
            length += len(piece)
        self.room.take(length, self.what)
        return b"".join(pieces)


class Clipped:
    """What an unpickler takes of a file: it asks for as many bytes as the file says, and here gets what there is."""

    def __init__(self, file: IO[bytes]):
        self.file, self.readline, self.tell = file, file.readline, file.tell

    def read(self, size: int) -> bytes:
        """As of the file."""
        return self.file.read(min(size, size_of(self.file) - self.tell()))


def size_of(file: IO[bytes]) -> int:
    """The size of an open file."""
    return os.fstat(file.fileno()).st_size


def memory() -> int:
    """The bytes of memory that this machine has; a great many where it does not say."""
    if sys.platform == "win32":  # which has no sysconf
        return 1 << 62
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def read_small(path: str | os.PathLike[str]) -> bytes:
    """The content of a file of settings or results, which is a small one."""
    with open_file(path) as file:
        if size_of(file) > SMALL:
            raise ValueError(f"{size_of(file):,} bytes, more than the {SMALL:,} of such a file")
        return file.read()


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a small file.

    Raises:
      InputError: there is none, with the file's name.
    """
    with reading(path):
        found = json.loads(read_small(path).decode("utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"holds a {type(found).__name__}; allowed: an object with names")
        return found


def cut(text: str, most: int = 120) -> str:
    """A text, its middle left out where it is long.

    >>> cut("a" * 500, 20)
    'aaaaaaaaa…aaaaaaaaa'
    """
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[1 - most // 2 :]}"


def shown(value: object) -> str:
    """A value from a file as an error may print it: short, and made without looking into what is nested.

    >>> shown("momentum"), shown((1, "two", [3])), shown({"a": 1}), shown("x" * 500)[:9]
    ("'momentum'", "(1, 'two', a list)", 'a dict', "'xxxxxxxx")
    """
    if isinstance(value, str | bytes):
        return cut(repr(value[:500]), 60)
    if value is None or isinstance(value, bool | float) or (isinstance(value, int) and value.bit_length() < 256):
        return repr(value)
    if type(value) is tuple and len(value) <= 8 and not any(isinstance(part, tuple) for part in value):
        return f"({', '.join(map(shown, value))}{',' * (len(value) == 1)})"
    return f"a {type(value).__name__}"

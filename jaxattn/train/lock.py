"""One process a folder: a lock that the system lets go of when its holder ends, however that comes about."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from jaxattn.errors import InputError

try:
    import fcntl
except ImportError:  # Windows has no such locks: nobody is kept out there
    fcntl = None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The block has the folder to itself. The lock is the file `.NAME.lock` beside it, gone when the block ends,
    and so are the folders that were made for it, if they are empty then.

    A process that was killed leaves the file, and the system forgets the lock: whoever comes next takes it.

    Raises:
      InputError: another process has the folder, which it names; or the file cannot be made.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp(), "run")
    >>> with locked(folder), locked(folder):
    ...     pass
    Traceback (most recent call last):
    ...
    jaxattn.errors.InputError: out (=.../run) is in use by process ... on ...: wait for its end, or choose another --out
    """
    if fcntl is None:
        yield
        return
    folder = folder.resolve()
    path = folder.with_name(f".{folder.name}.lock")
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            _take(fcntl, handle, folder)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(path)):
                    break
            os.close(handle)  # its last holder removed the file just when this process took its lock
    except OSError as error:
        raise InputError(f"out (={folder}) cannot be written to: {error.strerror}") from error
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        with contextlib.suppress(OSError):  # the folder around it may be gone
            path.unlink()
        os.close(handle)
        with contextlib.suppress(OSError):  # not empty, or gone
            for parent in made:
                parent.rmdir()


def _take(fcntl, handle: int, folder: Path):
    """Takes the lock, or says who has it. A file system without locks keeps nobody out."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(handle, 200).decode("utf-8", "replace") or "another process"
        os.close(handle)
        raise InputError(f"out (={folder}) is in use by {holder}: wait for its end, or choose another --out") from None
    except OSError:
        pass

"""Opening regular files, and nothing else.

Where a file of a run is expected there may be a FIFO, which blocks whoever opens it, a device,
which never ends, or a link, through which a write changes a file that somebody else owns.
"""

from __future__ import annotations

import errno
import os
import stat

_WRITING = os.O_WRONLY | os.O_RDWR


def open_regular(path: str | os.PathLike[str], flags: int, mode: int = 0o666) -> int:
    """Returns a descriptor of a regular file; raises OSError for anything else, without waiting.

    A link is followed to be read, never to be written. Folders above the file may be links.
    """
    # O_NONBLOCK: opening a FIFO would wait for its other end. It does nothing to a regular file.
    flags |= os.O_CLOEXEC | os.O_NONBLOCK
    if flags & _WRITING:
        flags |= os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags, mode)
    except OSError as error:
        if error.errno == errno.ELOOP and os.path.islink(path):
            raise OSError(errno.ELOOP, "is a symbolic link", os.fspath(path)) from None
        if error.errno == errno.ENXIO:  # a FIFO that nobody reads, a socket
            raise _not_a_file(path) from None
        raise
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISREG(kind):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    raise _not_a_file(path)


def read_regular(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """Returns the content of a regular file; raises OSError for another kind or a larger one."""
    with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        text = f"is larger than {max_bytes / 1e6:g} MB"
        raise OSError(errno.EFBIG, text, os.fspath(path))
    return content


def _not_a_file(path: str | os.PathLike[str]) -> OSError:
    return OSError(errno.EINVAL, "is not a regular file", os.fspath(path))

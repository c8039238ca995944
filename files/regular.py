"""Files that are opened only if they are files.

A FIFO blocks whoever opens it, a device never ends, and writing through a link changes what
somebody else owns. Each of them may stand where a file of a run is expected.
"""

from __future__ import annotations

import errno
import os
import stat

_WRITING = os.O_WRONLY | os.O_RDWR


def open_regular(path: str | os.PathLike[str], flags: int, mode: int = 0o666) -> int:
    """Return a descriptor of a regular file; OSError for anything else, without waiting for it.

    A link is followed to be read, never to be written. Folders above the file may be links.
    """
    flags |= os.O_CLOEXEC | os.O_NONBLOCK  # a regular file takes no notice of the second
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
    """Return the content of a regular file; OSError where it is none, or larger than that."""
    with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        text = f"is larger than {max_bytes / 1e6:g} MB"
        raise OSError(errno.EFBIG, text, os.fspath(path))
    return content


def _not_a_file(path: str | os.PathLike[str]) -> OSError:
    return OSError(errno.EINVAL, "is not a regular file", os.fspath(path))

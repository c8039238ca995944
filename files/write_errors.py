"""Disk errors as messages: what could not be written, why, how much space there is, what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from settings.errors import WriteError
from settings.formatting import format_bytes

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_OTHER_DISK = "Free space there or point training.checkpoint_dir to another disk."
_REMEDIES = {
    errno.ENOSPC: _OTHER_DISK,
    errno.EDQUOT: _OTHER_DISK,
    errno.EFBIG: "Raise the file size limit (ulimit -f).",
    errno.EACCES: "Check the owner and the permissions.",
    errno.EPERM: "Check the owner and the permissions.",
    errno.EROFS: "The file system is read-only: point training.checkpoint_dir to another one.",
    errno.ENOTDIR: "Part of that path is a file: point training.checkpoint_dir elsewhere.",
    errno.ENAMETOOLONG: "Shorten training.checkpoint_dir.",
    errno.ELOOP: "Put the file itself in its place.",
    errno.EINVAL: "Remove what stands in its place.",
    errno.EISDIR: "Remove what stands in its place.",
    errno.EIO: "The disk reports an error: point training.checkpoint_dir to another one.",
}


@contextlib.contextmanager
def as_write_error(
    action: str, folder: Path, needed_bytes: int | None = None, kept: str = ""
) -> Iterator[None]:
    """Turns an OSError inside the block into a WriteError with cause, numbers and remedy.

    Args:
        action: completes "cannot ...".
        folder: the folder of the file system whose free space is reported.
        needed_bytes: the size of a checkpoint that did not fit.
        kept: the name of an earlier file that is still good.
    """
    try:
        yield
    except OSError as error:
        code = error.errno or 0
        reason = error.strerror or str(error)
        name = os.path.basename(error.filename) if isinstance(error.filename, str) else ""
        if name and name not in action:
            reason = f"{name}: {reason}"
        text = f"cannot {action}: {reason}"
        if code in _NO_SPACE:
            free = _free_space(folder)
            text = f"{text}, {free} free on {folder}"
            if needed_bytes is not None:
                text = f"checkpoint needs {format_bytes(needed_bytes)}, {free} free on {folder}"
        ending = f"; kept {kept}" if kept else ""
        raise WriteError(f"{text}{ending}. {_REMEDIES.get(code, '')}".rstrip()) from error


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raises OSError (ENOSPC) unless `needed_bytes` and 5 % are free."""
    if shutil.disk_usage(folder).free < needed_bytes * 1.05:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def check_writable(folder: Path) -> None:
    """Raises WriteError unless `folder` is writable or can be created; creates nothing."""
    nearest = folder.absolute()
    with as_write_error(f"write in {folder}", nearest):
        while not nearest.exists() and nearest != nearest.parent:
            nearest = nearest.parent
        if not nearest.is_dir():
            raise OSError(errno.ENOTDIR, f"{nearest} is a file")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, f"no permission to write in {nearest}, or it is read-only")


def _free_space(folder: Path) -> str:
    try:
        return format_bytes(shutil.disk_usage(folder).free)
    except OSError:
        return "unknown space"

"""Files that are either whole or absent, also after a crash, a full disk or a power loss.

The one idea: write a temporary file beside the target, fsync it, rename it over the target, fsync
the folder. A reader sees the old file or the new one, never half of one. Every system call goes
through `os`, so that a test can make each of them fail in turn.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from files.regular import open_regular
from settings.errors import WriteError
from settings.formatting import format_bytes

TEMPORARY = ".tmp-"
_CHUNK = 1 << 23
_SYNC_EVERY = 1 << 25
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


@dataclass(frozen=True)
class Written:
    """What reached the disk."""

    size: int
    sha256: str


class HashedFile:
    """The file object given to `torch.save`; its bytes are hashed while they are written.

    Two threads help: one hashes each chunk while it is copied to the page cache (torch's memory is
    valid only during `write`), one sends what has piled up to the disk, so that the final fsync
    finds little left. `error` keeps the first error: torch.save hides it in a RuntimeError.
    """

    def __init__(self, descriptor: int) -> None:
        self.size = 0
        self.error: BaseException | None = None
        self._descriptor = descriptor
        self._sha256 = hashlib.sha256()
        self._unsynced = 0
        self._syncs: list[Future[None]] = []
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-sha256")
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-sync")

    def write(self, data: bytes | memoryview) -> int:
        """Writes all of `data`."""
        view = memoryview(data).cast("B")
        try:
            for start in range(0, view.nbytes, _CHUNK):
                self._write_chunk(view[start : start + _CHUNK])
        except BaseException as error:
            self.error = self.error or error
            raise
        return view.nbytes

    def flush(self) -> None:
        """Nothing is buffered; `torch.save` wants the method."""

    def finish(self) -> Written:
        """Size and hash, once everything is on the disk."""
        self.close()
        for sync in self._syncs:
            sync.result()  # the system reports a write error once: the last fsync may not see it
        os.fsync(self._descriptor)
        return Written(self.size, self._sha256.hexdigest())

    def close(self) -> None:
        """Stops the threads; must come before the descriptor is closed."""
        self._hasher.shutdown(wait=True)
        self._syncer.shutdown(wait=True)

    def _write_chunk(self, chunk: memoryview) -> None:
        hashed = self._hasher.submit(self._sha256.update, chunk)
        try:
            write_all(self._descriptor, chunk)
        finally:
            hashed.result()  # the chunk's memory is only ours until we return
        self.size += chunk.nbytes
        self._unsynced += chunk.nbytes
        if self._unsynced >= _SYNC_EVERY:
            self._unsynced = 0
            self._syncs.append(self._syncer.submit(os.fsync, self._descriptor))


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """`os.write` until everything is written: near a limit the system writes only a part."""
    view = memoryview(data)
    while view.nbytes:
        view = view[os.write(descriptor, view) :]


def atomic_write(path: Path, fill: Callable[[HashedFile], object]) -> Written:
    """Creates or replaces `path` with what `fill` writes; on any error nothing has changed.

    Raises the OSError, also where `fill` turned it into something else; see `as_write_error`.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        written = _write_synced(temporary, fill)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)
    return written


def atomic_write_text(path: Path, text: str) -> Written:
    """`atomic_write` for a small text, as UTF-8; names of files keep bytes that are none."""
    return atomic_write(path, lambda out: out.write(text.encode(errors="surrogateescape")))


def _write_synced(path: Path, fill: Callable[[HashedFile], object]) -> Written:
    # The folder is locked, so a file of this name is a dead process's and may be overwritten.
    descriptor = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    out = HashedFile(descriptor)
    try:
        try:
            fill(out)
        except Exception:
            if out.error is not None:
                raise out.error from None
            raise
        return out.finish()
    finally:
        out.close()
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Makes renames and removals inside `folder` durable, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Removes a file, durably; it may be absent."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
        sync_folder(path.parent)


def remove_temporaries(folder: Path) -> None:
    """Removes what interrupted writes left; the caller holds the folder's lock."""
    for path in sorted(folder.glob(f"{TEMPORARY}*")):
        remove(path)


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


@contextlib.contextmanager
def as_write_error(
    action: str, folder: Path, needed_bytes: int | None = None, kept: str = ""
) -> Iterator[None]:
    """Turns an OSError inside into a WriteError: what, where, numbers, remedy.

    `action` completes "cannot ..."; `kept` names what is still good.
    """
    try:
        yield
    except OSError as error:
        ending = f"; kept {kept}" if kept else ""
        code = error.errno or 0
        remedy = _REMEDIES.get(code, "")
        reason = error.strerror or str(error)
        name = os.path.basename(error.filename) if isinstance(error.filename, str) else ""
        if name and name not in action:
            reason = f"{name}: {reason}"
        if code in _NO_SPACE:
            free = _free_text(folder)
            if needed_bytes is not None:
                text = f"checkpoint needs {format_bytes(needed_bytes)}, {free} free on {folder}"
            else:
                text = f"cannot {action}: {reason}, {free} free on {folder}"
        else:
            text = f"cannot {action}: {reason}"
        raise WriteError(f"{text}{ending}. {remedy}".rstrip()) from error


def _free_text(folder: Path) -> str:
    try:
        return format_bytes(shutil.disk_usage(folder).free)
    except OSError:
        return "unknown space"

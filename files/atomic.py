"""Files that are complete or absent, also after a crash, a full disk or a power loss.

A temporary file is written beside the target, fsynced, and renamed over the target; then the folder
is fsynced. A reader sees the old file or the new one, never half of one. Every system call goes
through `os`, so that a test can make each of them fail in turn.

The functions raise OSError; `files.write_errors.as_write_error` turns it into a message.
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

TEMPORARY = ".tmp-"
"""How names of temporary files and folders begin; the process id and the target's name follow."""
_CHUNK_BYTES = 1 << 23
SYNC_EVERY_BYTES = 1 << 25


@dataclass(frozen=True)
class FileDigest:
    """What reached the disk."""

    size: int
    sha256: str


class HashedFile:
    """The file object given to `torch.save`; its bytes are hashed while they are written.

    `error` keeps the first error of a write: torch.save hides it in a RuntimeError.
    """

    # Two threads, because hashing, copying to the page cache and writing to the disk take about as
    # long as each other: without one of them, or both, a save took 1.3 to 2.4 times as long
    # (bench/checkpoint.py on 2 busy cores).
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
            for start in range(0, view.nbytes, _CHUNK_BYTES):
                self._write_chunk(view[start : start + _CHUNK_BYTES])
        except BaseException as error:
            self.error = self.error or error
            raise
        return view.nbytes

    def flush(self) -> None:
        """Does nothing, since nothing is buffered; `torch.save` requires the method."""

    def finish(self) -> FileDigest:
        """Returns size and hash, once everything is on the disk."""
        self.close()
        for sync in self._syncs:
            # The kernel reports a failed write-back once, to the first fsync after it: without
            # this an error seen by an early fsync would be lost, and the file taken for good.
            sync.result()
        os.fsync(self._descriptor)
        return FileDigest(self.size, self._sha256.hexdigest())

    def close(self) -> None:
        """Stops the threads; must come before the descriptor is closed."""
        self._hasher.shutdown(wait=True)
        self._syncer.shutdown(wait=True)

    def _write_chunk(self, chunk: memoryview) -> None:
        hashed = self._hasher.submit(self._sha256.update, chunk)
        try:
            write_all(self._descriptor, chunk)
        finally:
            # torch reuses the memory as soon as `write` returns, so the hash must have read it.
            hashed.result()
        self.size += chunk.nbytes
        self._unsynced += chunk.nbytes
        if self._unsynced >= SYNC_EVERY_BYTES:
            self._unsynced = 0
            self._syncs.append(self._syncer.submit(os.fsync, self._descriptor))


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Writes all of `data`; `os.write` alone writes only a part near a file size limit."""
    view = memoryview(data)
    while view.nbytes:
        view = view[os.write(descriptor, view) :]


def temporary_beside(path: Path) -> Path:
    """Returns a name of this process for what is to be renamed to `path`."""
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")


def atomic_write(
    path: Path,
    fill: Callable[[HashedFile], object],
    before_rename: Callable[[], object] = lambda: None,
) -> FileDigest:
    """Creates or replaces the file `path`; on any error the old file stays as it was.

    Args:
        path: a file in a folder that exists.
        fill: writes the content to the file object it is given.
        before_rename: is called once the content is on the disk, while `path` is still the old one.

    Returns its size and sha256 once it is durable. Raises the OSError of a failed write, also if
    `fill` turned it into another exception.
    """
    temporary = temporary_beside(path)
    try:
        digest = _write_synced(temporary, fill)
        before_rename()
        # The data must be on the disk before the name: renamed first, a power loss could leave the
        # target with the right name and no bytes.
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    # Without this a power loss may undo the rename, although the caller was told that it happened.
    sync_folder(path.parent)
    return digest


def atomic_write_text(path: Path, text: str) -> FileDigest:
    """Creates or replaces a small text file in UTF-8; see `atomic_write`."""
    # surrogateescape: names of files that are not UTF-8 keep their bytes.
    return atomic_write(path, lambda out: out.write(text.encode(errors="surrogateescape")))


def durable_rename(source: Path, target: Path) -> None:
    """Renames a file that was written elsewhere over `target`, once its content is on the disk."""
    descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(source, target)
    sync_folder(target.parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields an empty temporary folder that becomes `path` at the end of the block.

    On any error the temporary folder is removed and `path` is not made. The caller makes the files
    in it durable (`atomic_write`). Parents are created. Raises FileExistsError if `path` exists.
    """
    temporary = temporary_beside(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)  # of a dead process with our id
    temporary.mkdir()
    try:
        yield temporary
        if os.path.lexists(path):  # a rename would replace an empty folder silently
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(path))
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(path.parent)


def _write_synced(path: Path, fill: Callable[[HashedFile], object]) -> FileDigest:
    # A file of this name is left from a dead process with our id, so it may be overwritten.
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
    """Makes renames and removals inside `folder` durable, if its file system supports that."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def durable_remove(path: Path) -> None:
    """Removes a file, if it exists, and waits until the removal is on the disk."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
        sync_folder(path.parent)


def remove_temporaries(folder: Path) -> None:
    """Removes what interrupted writes left in `folder`; the caller holds the folder's lock."""
    for path in sorted(folder.glob(f"{TEMPORARY}*")):
        durable_remove(path)

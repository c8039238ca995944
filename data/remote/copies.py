"""Whole files brought to this machine: for text that is not read in ranges."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from config import DataError, WriteError
from data.remote.access import RemoteFile
from data.remote.listing import Listing
from data.remote.store import RemoteStore
from data.remote.threads import map_ahead
from data.sources.cache import cache_folder
from files.atomic import durable_rename
from files.regular import open_regular
from settings.formatting import format_bytes

log = logging.getLogger(__name__)

PIECE_BYTES = 8 << 20
_AT_ONCE = 4  # pieces; one connection to a bucket gives some 50 MB/s
_LINE_EVERY_S = 10.0
_in_use: dict[Path, int] = {}
"""Copies that this process reads, and the locks that keep them."""


def copy_file(
    store: RemoteStore,
    url: str,
    tag: str,
    size: int,
    target: Path,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Copies a remote file, or the rest of it after an interruption.

    Bytes go to a hidden file beside `target`, which takes its name when all are there. Raises
    RemoteError as `RemoteStore.read` does, WriteError if the disk does not take them.

    Args:
        progress: is called with the bytes done so far.
    """
    # Another version of the file has another tag: its beginning is not continued.
    version = hashlib.blake2b(f"{url} {tag} {size}".encode(), digest_size=8).hexdigest()
    part = target.with_name(f".{target.name}.{version}.part")

    def read(start: int) -> bytes:
        return store.read(url, tag, start, min(size, start + PIECE_BYTES))

    try:
        with os.fdopen(open_regular(part, os.O_RDWR | os.O_CREAT), "r+b") as out:
            # Each piece is synced before the next: only the last may be damaged by a power loss.
            done = max(0, out.seek(0, os.SEEK_END) - 1) // PIECE_BYTES * PIECE_BYTES
            out.seek(done)
            out.truncate()
            for piece in map_ahead(read, range(done, size, PIECE_BYTES), _AT_ONCE):
                out.write(piece)
                out.flush()
                os.fsync(out.fileno())
                progress(out.tell())
        durable_rename(part, target)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise WriteError(f"{target}: cannot be written: {reason}") from None


def local_copies(store: RemoteStore, listing: Listing, limit_bytes: int) -> Path:
    """Returns a folder of this machine with all files of a listing, copied once.

    One process copies and the others wait for it. Copies that no process reads make room for new
    ones, the least recently used first. Raises DataError if there is no room below `limit_bytes`.
    """
    parts = (listing.root, *(str(tuple(file)) for file in listing.files))
    digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=12).hexdigest()
    copies = cache_folder() / "copies"
    folder = copies / digest
    if folder in _in_use:
        return folder
    try:
        copies.mkdir(parents=True, exist_ok=True)
        _in_use[folder] = _locked_copies(store, listing, folder, limit_bytes)
    except OSError as error:
        raise WriteError(f"{folder}: cannot be written: {error.strerror}") from None
    return folder


def _locked_copies(store: RemoteStore, listing: Listing, folder: Path, limit_bytes: int) -> int:
    """Copies what is missing in a folder; returns a lock that keeps it from being deleted."""

    def missing() -> list[RemoteFile]:
        return [file for file in listing.files if not (folder / file.path).exists()]

    lock = _lock_of(folder)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH)
        if missing():
            fcntl.flock(lock, fcntl.LOCK_EX)  # gives the other up first, so two do not wait forever
            if to_copy := missing():
                _make_room(folder, lock, listing, limit_bytes)
                size = format_bytes(sum(file.size for file in to_copy))
                log.warning("Copying %s to %s, once: %s", listing.address, folder, size)
            for file in to_copy:
                url, target = listing.url(file), folder / file.path
                said = partial(_say_progress, url, file.size, [time.monotonic()])
                copy_file(store, url, file.tag, file.size, target, said)
            fcntl.flock(lock, fcntl.LOCK_SH)
        os.utime(folder)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _lock_of(folder: Path) -> int:
    # Beside the folder: a lock inside would be deleted with it, and locked by two.
    return open_regular(folder.with_name(f"{folder.name}.lock"), os.O_RDWR | os.O_CREAT)


def _say_progress(url: str, size: int, said_at: list[float], done: int) -> None:
    if time.monotonic() - said_at[0] > _LINE_EVERY_S:
        said_at[0] = time.monotonic()
        log.warning("Copying %s: %d %% of %s", url, done * 100 // size, format_bytes(size))


def _make_room(folder: Path, lock: int, listing: Listing, limit_bytes: int) -> None:
    """Makes `folder` and notes in its lock file the bytes that it is to hold. Copies that are not
    in use are deleted until all fit; raises DataError if they do not."""
    needed = sum(file.size for file in listing.files)
    copies = folder.parent
    guard = open_regular(copies / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(guard, fcntl.LOCK_EX)  # or two processes would fill the same room
        others = [path for path in copies.iterdir() if path.is_dir() and path != folder]
        sizes = {path: _promised_bytes(path) for path in others}
        total = sum(sizes.values())
        for path in sorted(others, key=lambda path: path.stat().st_mtime_ns):
            if total + needed <= limit_bytes or needed > limit_bytes:
                break
            if _delete_unused(path):
                total -= sizes[path]
        if total + needed > limit_bytes:
            used = f", and other copies in use take {format_bytes(total)}" if total else ""
            raise DataError(
                f"{listing.address}: token files are copied to this machine whole: "
                f"{format_bytes(needed)}{used}, but dataset.cache_bytes is {limit_bytes}. Set it "
                f"to {total + needed} or more."
            )
        os.pwrite(lock, b"%20d" % needed, 0)
        folder.mkdir(exist_ok=True)
    finally:
        os.close(guard)


def _promised_bytes(folder: Path) -> int:
    lock = _lock_of(folder)
    try:
        return int(os.pread(lock, 20, 0).strip() or 0)
    finally:
        os.close(lock)


def _delete_unused(folder: Path) -> bool:
    lock = _lock_of(folder)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True

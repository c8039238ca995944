"""Whole files brought to this machine: for text that is not read in ranges."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from config import DataError, WriteError
from data.remote.access import RemoteFile
from data.remote.listing import Listing
from data.remote.store import RemoteStore
from data.sources.cache import cache_folder
from files.atomic import durable_rename
from files.regular import open_regular

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
    try:
        with os.fdopen(open_regular(part, os.O_RDWR | os.O_CREAT), "r+b") as out:
            # Each piece is synced before the next: only the last may be damaged by a power loss.
            done = max(0, out.seek(0, os.SEEK_END) - 1) // PIECE_BYTES * PIECE_BYTES
            out.seek(done)
            out.truncate()
            for piece in _pieces(store, url, tag, done, size):
                out.write(piece)
                out.flush()
                os.fsync(out.fileno())
                progress(out.tell())
        durable_rename(part, target)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise WriteError(f"{target}: cannot be written: {reason}") from None


def _pieces(store: RemoteStore, url: str, tag: str, start: int, size: int) -> Iterator[bytes]:
    """Yields the bytes from `start` on in order, a few pieces asked for at a time."""
    read = partial(store.read, url, tag)
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="copy") as pool:
        waiting = deque[Future[bytes]]()
        try:
            for begin in range(start, size, PIECE_BYTES):
                waiting.append(pool.submit(read, begin, min(size, begin + PIECE_BYTES)))
                if len(waiting) > _AT_ONCE:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


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
            folder.mkdir(exist_ok=True)
            needed = sum(file.size for file in listing.files)
            if to_copy := missing():
                _make_room(folder, needed, limit_bytes, listing.root)
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
        log.warning("Copying %s, once: %d %% of %.1f GB", url, done * 100 // size, size / 1e9)


def _make_room(folder: Path, needed: int, limit_bytes: int, source: str) -> None:
    """Deletes copies that are not in use until `needed` bytes fit beside them; raises DataError if
    they do not. Of `folder`, those bytes are a part."""
    sizes = {
        path: sum(file.stat().st_size for file in path.iterdir())
        for path in folder.parent.iterdir()
        if path.is_dir() and path != folder
    }
    total = sum(sizes.values())
    for path in sorted(sizes, key=lambda path: path.stat().st_mtime_ns):
        if total + needed <= limit_bytes or needed > limit_bytes:
            break
        lock = _lock_of(path)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path)
            total -= sizes[path]
        os.close(lock)
    if total + needed > limit_bytes:
        used = f" and {total / 1e9:.2f} GB of other copies are in use" if total else ""
        raise DataError(
            f"{source}: token files are copied to this machine whole, {needed / 1e9:.2f} GB, but "
            f"dataset.cache_bytes is {limit_bytes / 1e9:.2f} GB{used}. Raise it."
        )

"""Ranges of remote files on the disk of this machine, shared by all its processes and runs.

A range is named by address, tag and bounds. A file that changes has another tag, so what is kept
never goes out of date; what was not used for longest goes first.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data.sources.cache import cache_folder
from files.atomic import temporary_beside
from files.regular import open_regular

log = logging.getLogger(__name__)

_CRC_BYTES = 4
_KEPT = 7 / 8  # of the bound, once it is reached: a folder is not listed for every range


class Range(NamedTuple):
    """Bytes [start, stop) of a remote file with this tag."""

    url: str
    tag: str
    start: int
    stop: int


class RangeCache:
    """At most `limit_bytes` of ranges on disk; 0 keeps nothing. Used by any thread and process.

    A disk that is full, slow or broken only means that ranges are read from the server again.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self._folder = limit_bytes, cache_folder() / "ranges"
        self._warned = False

    def load(self, key: Range) -> bytes | None:
        """Returns the bytes of a range as they were saved; None if they are not there."""
        if not self._limit:
            return None
        path = self._path(key)
        try:
            with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
                crc, data = file.read(_CRC_BYTES), file.read()
            # Without the checksum, a file that a power loss left half written would be other text.
            if len(data) != key.stop - key.start or crc != _checksum(path, data):
                self.remove(key)
                return None
            os.utime(path)  # the time of the last use, by which `_make_room` chooses
        except OSError:
            return None
        return data

    def save(self, key: Range, data: bytes) -> None:
        """Keeps the bytes of a range; does nothing if that is not possible."""
        size = _CRC_BYTES + len(data)
        if size > self._limit * _KEPT:
            return
        path = self._path(key)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # One process writes at a time, so the sum holds over all of them, and a temporary file
            # that `_make_room` finds is from a dead one.
            with self._locked() as descriptor:
                if path.exists():  # another process was faster
                    return
                total = _read_total(descriptor) + size
                if total > self._limit:
                    total = self._make_room(int(self._limit * _KEPT) - size) + size
                _write(path, _checksum(path, data), data)
                os.pwrite(descriptor, b"%20d" % total, 0)
        except OSError as error:
            if not self._warned:
                self._warned = True
                reason = error.strerror or type(error).__name__
                log.warning("No copies of remote text in %s: %s", self._folder, reason)

    def remove(self, key: Range) -> None:
        """Forgets a range, whose bytes turned out to be damaged."""
        with contextlib.suppress(OSError):
            self._path(key).unlink()

    def _path(self, key: Range) -> Path:
        return self._folder / hashlib.blake2b(repr(key).encode(), digest_size=16).hexdigest()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """Yields the descriptor of the lock file, which also holds the sum of all sizes."""
        descriptor = open_regular(self._folder / ".lock", os.O_RDWR | os.O_CREAT)
        try:
            # A flock belongs to this opening of the file, so it excludes other threads too.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def _make_room(self, target: int) -> int:
        """Removes the least recently used ranges above `target` bytes; returns what is left."""
        found = []
        for entry in os.scandir(self._folder):
            with contextlib.suppress(FileNotFoundError):  # `remove` takes no lock
                if entry.name != ".lock":
                    stat = entry.stat(follow_symlinks=False)
                    found.append((stat.st_mtime_ns, entry.path, stat.st_size))
        left = sum(size for _, _, size in found)
        for _, path, size in sorted(found):
            if left <= target:
                break
            os.unlink(path)
            left -= size
        return left


def _checksum(path: Path, data: bytes) -> bytes:
    """Returns the CRC-32 of name and content: a file under another's name is noticed too."""
    return zlib.crc32(data, zlib.crc32(path.name.encode())).to_bytes(_CRC_BYTES, "little")


def _read_total(descriptor: int) -> int:
    text = os.pread(descriptor, 20, 0).strip()
    return int(text) if text.isdigit() else 0


def _write(path: Path, checksum: bytes, data: bytes) -> None:
    """Writes a file that is there whole or not at all.

    It is not synced, unlike other files: what a power loss damages is read again.
    """
    temporary = temporary_beside(path)
    try:
        with os.fdopen(open_regular(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as out:
            out.write(checksum)
            out.write(data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise

"""The lock of a run directory: one process at a time writes it. Imports no torch."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from datetime import datetime
from pathlib import Path

from config import CheckpointError
from engine.run_directory.manifest import LOCK
from files.regular import open_regular


class DirectoryLock:
    """Holds the lock of a folder until `release` or the death of this process.

    Raises CheckpointError, which names the holder, while another process holds it. `warning` is
    not empty on a file system without locks.
    """

    # A POSIX lock, not a flock: a forked data worker does not inherit it, so one that outlives a
    # killed run for a moment does not block the resume. Its price: closing any other descriptor of
    # the file in this process gives up the lock, so nothing else may open it here.
    def __init__(self, folder: Path) -> None:
        self.warning = ""
        self._descriptor: int | None = open_regular(folder / LOCK, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = os.pread(self._descriptor, 200, 0).decode(errors="replace").strip()
                self.release()
                raise CheckpointError(
                    f"{folder.name} is in use by {holder or 'another process'}. Stop that process, "
                    "or start a new run."
                ) from None
            self.warning = (
                f"{folder} cannot be locked ({error.strerror}): make sure that no other "
                "process continues this run"
            )
            return
        now = datetime.now()
        owner = f"host {socket.gethostname()} pid {os.getpid()} since {now:%H:%M} ({now:%Y-%m-%d})"
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{owner}\n".encode(), 0)

    def release(self) -> None:
        """Gives up the lock."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

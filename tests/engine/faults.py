"""Fails or counts the system calls that write: the n-th one raises, or kills the process."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CALLS = ("open", "write", "fsync", "replace", "unlink", "mkdir")
OPEN = os.open


class Faults:
    """Counts calls; the one numbered `at` (from 1) runs `action` instead."""

    def __init__(self, at: int, action: Callable[[], None]) -> None:
        self.at, self.action, self.count = at, action, 0

    @property
    def reached(self) -> bool:
        return self.count >= self.at

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if call is OPEN and not args[1] & (os.O_WRONLY | os.O_RDWR):
                return call(*args, **kwargs)
            self.count += 1
            if self.count == self.at:
                self.action()
            return call(*args, **kwargs)

        return counted


def raise_error(code: int) -> Callable[[], None]:
    def action() -> None:
        raise OSError(code, os.strerror(code))

    return action


def die() -> None:
    os._exit(9)


@contextmanager
def failing(at: int, action: Callable[[], None] | None = None) -> Iterator[Faults]:
    """Inside, the `at`-th of CALLS fails with EIO, or runs `action`."""
    faults = Faults(at, action or raise_error(errno.EIO))
    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, faults.wrap(getattr(os, name)))
        yield faults


def stand_in(place: Path, kind: str) -> None:
    """Puts something else where a file is expected."""
    place.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to(kind)

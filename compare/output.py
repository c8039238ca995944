"""Writes pictures and pages: completely, or nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from config import WriteError
from files.atomic import HashedFile, atomic_write


def check_folder(output: Path) -> None:
    """Raises WriteError if the file cannot be written, before the work for it is done."""
    # Reading and drawing many runs takes seconds: a typo in the path is reported before that.
    if output.is_dir():
        raise WriteError(f"cannot write {output}: it is a folder. Name a file in it.")
    if not output.parent.is_dir():
        raise WriteError(f"cannot write {output}: there is no folder {output.parent}. Create it.")
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise WriteError(f"cannot write in {output.parent}: no permission, or it is read-only.")


def write(output: Path, data: bytes) -> None:
    """Creates or replaces a file; raises WriteError, and then the old file is unchanged."""
    write_by(output, lambda out: out.write(data))


def write_by(output: Path, fill: Callable[[HashedFile], object]) -> None:
    """Does so with what `fill` writes into the file that it is given."""
    try:
        atomic_write(output, fill)
    except OSError as error:
        raise WriteError(f"cannot write {output}: {error.strerror}.") from error

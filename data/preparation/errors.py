"""Disk errors of sources and outputs as messages for the user."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from config import DataError, WriteError
from data.sources.parquet.text_column import OPTION


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError inside the block into a WriteError that names `path`."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path}: cannot be written: {error.strerror or error}") from None


@contextlib.contextmanager
def naming_own_options() -> Iterator[None]:
    """Lets a DataError of code that runs share name the option of prepare.py."""
    try:
        yield
    except DataError as error:
        error.args = (str(error).replace(OPTION, "--text-column NAME"),)
        raise


def read_error(path: str | os.PathLike[str], error: OSError) -> DataError:
    """Returns the error to raise for a file that cannot be read."""
    return DataError(f"{os.fspath(path)}: cannot be read: {error.strerror or error}")

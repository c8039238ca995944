"""The corpus that every machine already has: the sources of Python's standard library."""

from __future__ import annotations

import os
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from config import DataError
from data.preparation.errors import read_error
from data.preparation.parquet_writer import Document, WrittenFolder, write_folder

NAME = "python-stdlib"
_N_FILES = 6
# Tests repeat themselves; the other two are tables of characters and of help text, not code.
_SKIPPED = {"test", "tests", "idle_test", "encodings", "pydoc_data"}
_NOT_LIBRARY = {"__pycache__", "site-packages", "dist-packages"}


def is_embedded(path: str | os.PathLike[str]) -> bool:
    """Returns whether a folder of this name is this corpus, which is built if it is missing."""
    return Path(path).name == NAME


def build(out: str | os.PathLike[str], overwrite: bool = False) -> WrittenFolder:
    """Writes the running interpreter's standard library to the folder `out`.

    The same interpreter gives the same bytes. Several processes may build at once: the first to
    finish wins. Raises DataError if there are no sources, WriteError if `out` cannot be written.
    """
    start = time.perf_counter()
    documents = list(_library_sources())
    size = sum(len(text.encode()) for text, _ in documents)
    written = write_folder(documents, Path(out), -(-size // _N_FILES), overwrite)
    return replace(written, seconds=time.perf_counter() - start)


def _library_sources() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED | _NOT_LIBRARY]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    if not found:
        raise DataError(f"{root}: no Python sources; prepare other text: python prepare.py --help")
    # Sorted by path below the root: os.walk's order differs between file systems.
    for path in sorted(found, key=lambda path: path.relative_to(root).as_posix()):
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:  # a few modules are in other encodings on purpose
            continue
        except OSError as error:
            raise read_error(path, error) from None
        if text.strip():
            yield text, path.relative_to(root).as_posix()

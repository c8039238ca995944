"""Folders of parquet files, and the corpus that every machine already has: Python's own library.

The one idea: a folder is written beside its place and renamed, so it is there complete or not at
all. Files carry page checksums and row groups of about 1 MB, which `data.parquet` reads best.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq

from config import DataError, WriteError

NAME = "python-stdlib"
GROUP_BYTES = 1 << 20
_FILES = 6
# Tests repeat themselves; the other two are tables of characters and of help text, not code.
_LEFT_OUT = {"test", "tests", "idle_test", "encodings", "pydoc_data"}
_NOT_LIBRARY = {"__pycache__", "site-packages", "dist-packages"}
_SCHEMA = pa.schema([("text", pa.string()), ("path", pa.string())])

Document = tuple[str, str]
"""(text, path)"""


@dataclass(frozen=True, slots=True)
class Written:
    """What a folder holds."""

    path: Path
    files: int
    documents: int
    bytes: int
    seconds: float


def is_embedded(path: str | os.PathLike[str]) -> bool:
    """Whether a folder of this name is the embedded corpus, which may be built where missing."""
    return Path(path).name == NAME


def build(out: str | os.PathLike[str], overwrite: bool = False) -> Written:
    """Write the sources of the running interpreter's standard library to the folder `out`.

    The same interpreter gives the same bytes. Several processes may build at once: the first to
    finish wins. Raises DataError where there are no sources, WriteError where `out` cannot be
    written.
    """
    began = time.perf_counter()
    documents = list(_library_sources())
    size = sum(len(text.encode()) for text, _ in documents)
    written = write_folder(documents, Path(out), -(-size // _FILES), overwrite)
    return replace(written, seconds=time.perf_counter() - began)


def _library_sources() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT | _NOT_LIBRARY]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    if not found:
        raise DataError(f"{root}: no Python sources; prepare other text: python prepare.py --help")
    for path in sorted(found, key=lambda path: path.relative_to(root).as_posix()):
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:  # a few modules are in other encodings on purpose
            continue
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        if text.strip():
            yield text, path.relative_to(root).as_posix()


def write_folder(
    documents: Iterable[Document], out: Path, file_bytes: int, overwrite: bool = False
) -> Written:
    """Write documents, in order, to parquet files of about `file_bytes` of text in a new folder.

    Raises WriteError where the folder cannot be written, and DataError where there is no text; an
    OSError of `documents` itself would read as one of writing. A folder that another process put
    there meanwhile is kept and described.
    """
    start = time.monotonic()
    out = Path(os.path.abspath(out))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        prefix = f"{_scratch_prefix(out)}{os.getpid()}."
        with tempfile.TemporaryDirectory(prefix=prefix, dir=out.parent) as scratch:
            folder = Path(scratch, "new")
            folder.mkdir()
            with _Writer(folder, file_bytes) as writer:
                for document in documents:
                    writer.add(*document)
            if not writer.documents:
                raise DataError("no text found in the source: nothing was written")
            _put_in_place(folder, out, Path(scratch, "old") if overwrite else None)
            seconds = time.monotonic() - start
            return Written(out, writer.files, writer.documents, writer.bytes, seconds)
    except OSError as error:
        raise WriteError(f"{out}: cannot be written: {error.strerror or error}") from None


def _scratch_prefix(out: Path) -> str:
    """How the names of temporary folders begin; the process and a random word follow."""
    return f".{out.name}.{socket.gethostname()}."


def _sweep(out: Path) -> None:
    """Delete what builds of this folder left behind that were killed on this machine."""
    if os.name != "posix":  # elsewhere os.kill ends the process it should look for
        return
    for path in out.parent.iterdir():
        process = re.fullmatch(re.escape(_scratch_prefix(out)) + r"(\d{1,9})\.\w+", path.name)
        if process:
            try:
                os.kill(int(process[1]), 0)
            except ProcessLookupError:
                shutil.rmtree(path, ignore_errors=True)
            except PermissionError:  # alive, and another user's
                pass


def _put_in_place(folder: Path, out: Path, old: Path | None) -> None:
    if old is not None and out.exists():
        out.rename(old)
    try:
        folder.rename(out)
    except OSError:
        if old is not None and old.exists():
            old.rename(out)
            raise
        if not any(out.glob("*.parquet")):
            raise
        shutil.rmtree(folder)


class _Writer:
    """Appends documents to part_000.parquet, part_001.parquet, ..."""

    def __init__(self, folder: Path, file_bytes: int) -> None:
        self._folder, self._file_bytes = folder, file_bytes
        self._writer: pq.ParquetWriter | None = None
        self._rows: list[Document] = []
        self._group_bytes = self._written_bytes = 0
        self.files = self.documents = self.bytes = 0

    def add(self, text: str, path: str) -> None:
        """Append one document."""
        size = len(text.encode())
        if size >= GROUP_BYTES:  # alone in its row group, which is then read whole
            self._flush()
        self._rows.append((text, path))
        self._group_bytes += size
        self.documents, self.bytes = self.documents + 1, self.bytes + size
        full = self._written_bytes + self._group_bytes >= self._file_bytes
        if full or self._group_bytes >= GROUP_BYTES:
            self._flush()
        if full:
            self._finish()

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._folder / f"part_{self.files:03d}.parquet",
                _SCHEMA,
                compression="zstd",
                use_dictionary=False,  # so that sizes in the footer are sizes of text
                write_statistics=False,  # they would hold whole documents
                write_page_checksum=True,
            )
            self.files += 1
        texts, paths = zip(*self._rows, strict=True)
        self._writer.write_table(
            pa.table([pa.array(texts, pa.string()), pa.array(paths, pa.string())], schema=_SCHEMA)
        )
        self._written_bytes += self._group_bytes
        self._rows, self._group_bytes = [], 0

    def _finish(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer, self._written_bytes = None, 0

    def __enter__(self) -> _Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._flush()
        self._finish()

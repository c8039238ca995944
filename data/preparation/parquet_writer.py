"""Writes a folder of parquet files with page checksums and row groups of about 1 MB.

The files are written to a temporary folder that is renamed at the end, so the folder is complete
or absent.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from config import DataError
from data.preparation.errors import writing

GROUP_BYTES = 1 << 20
_SCHEMA = pa.schema([("text", pa.string()), ("path", pa.string())])

Document = tuple[str, str]
"""(text, path)"""


@dataclass(frozen=True, slots=True)
class WrittenFolder:
    """A folder that was written, with the number of its files and documents."""

    path: Path
    files: int
    documents: int
    bytes: int
    seconds: float


def write_folder(
    documents: Iterable[Document], out: Path, file_bytes: int, overwrite: bool = False
) -> WrittenFolder:
    """Writes documents, in order, to parquet files of about `file_bytes` of text in a new folder.

    If another process has made the folder meanwhile, that one is kept. Raises WriteError if the
    folder cannot be written, also for an OSError of `documents`, and DataError if there is no text.
    """
    start = time.monotonic()
    out = Path(os.path.abspath(out))
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        # Not `files.atomic.atomic_folder`: runs on several machines may build the same corpus on a
        # shared disk, where equal process ids would make them delete each other's work.
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
            folder = Path(temporary, "new")
            folder.mkdir()
            with contextlib.closing(_FolderWriter(folder, file_bytes)) as writer:
                for document in documents:
                    writer.add(*document)
                writer.write_group()
            if not writer.documents:
                raise DataError("no text found in the source: nothing was written")
            _put_in_place(folder, out, Path(temporary, "old") if overwrite else None)
    seconds = time.monotonic() - start
    return WrittenFolder(out, writer.files, writer.documents, writer.bytes, seconds)


def _put_in_place(folder: Path, out: Path, old: Path | None) -> None:
    """Renames `folder` to `out`; the folder there is moved to `old` first, if that is given."""
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


class _FolderWriter:
    """Appends documents to part_000.parquet, part_001.parquet, ..."""

    def __init__(self, folder: Path, file_bytes: int) -> None:
        self._folder, self._file_bytes = folder, file_bytes
        self._writer: pq.ParquetWriter | None = None
        self._group: list[Document] = []
        self._group_bytes = self._written_bytes = 0
        self.files = self.documents = self.bytes = 0

    def add(self, text: str, path: str) -> None:
        """Appends one document."""
        size = len(text.encode())
        if size >= GROUP_BYTES:
            # A long document gets a row group of its own: a reader decodes whole row groups, and
            # its short neighbours would each time be read with it.
            self.write_group()
        self._group.append((text, path))
        self._group_bytes += size
        self.documents, self.bytes = self.documents + 1, self.bytes + size
        is_full = self._written_bytes + self._group_bytes >= self._file_bytes
        if is_full or self._group_bytes >= GROUP_BYTES:
            self.write_group()
        if is_full:
            self.close()

    def write_group(self) -> None:
        """Writes the documents added since the last call as a row group."""
        if not self._group:
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
        texts, paths = zip(*self._group, strict=True)
        self._writer.write_table(
            pa.table([pa.array(texts, pa.string()), pa.array(paths, pa.string())], schema=_SCHEMA)
        )
        self._written_bytes += self._group_bytes
        self._group, self._group_bytes = [], 0

    def close(self) -> None:
        """Closes the file that is open; the next document begins another."""
        if self._writer is not None:
            self._writer.close()
        self._writer, self._written_bytes = None, 0

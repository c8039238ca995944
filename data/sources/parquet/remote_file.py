"""Remote parquet files as pyarrow reads them: a seekable file made of a few whole ranges.

Arrow reads pages in pieces of 64 KB. Here a piece is cut from the range that holds it: all of the
row group's text if that is short, so that one request brings it, or a part of RANGE_BYTES.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from config import DatasetConfig
from data.remote.range_cache import Range, RangeCache
from data.remote.read_ahead import RangeReader
from data.remote.store import RemoteStore
from data.sources.parquet.index import Index

RANGE_BYTES = 2 << 20  # with one that is read and one ahead, 16 lanes fill READ_AHEAD_BYTES
_OTHER_BYTES = 1 << 10


class FileRanges:
    """The ranges that one file is read in: its footer, and the text of each row group."""

    def __init__(self, index: Index, file: int, first_group: int) -> None:
        groups = index.groups[first_group : first_group + int(index.group_counts[file])]
        self._starts: list[int] = groups[:, 4].tolist()
        self._stops: list[int] = (groups[:, 4] + groups[:, 1]).tolist()
        self._url, self._tag = index.path(file), index.tags[file]
        size, footer_bytes = int(index.sizes[file]), int(index.footer_bytes[file])
        self.footer = Range(self._url, self._tag, size - footer_bytes, size)

    def at(self, offset: int) -> Range:
        """Returns the range that holds a byte of the file."""
        number = bisect_right(self._starts, offset) - 1
        begin, end = (self._starts[number], self._stops[number]) if number >= 0 else (0, 0)
        if offset >= end:  # no text: of files by some old writers Arrow reads 100 bytes more
            begin, end = offset, min(offset + _OTHER_BYTES, self.footer.stop)
        start = begin + (offset - begin) // RANGE_BYTES * RANGE_BYTES
        return Range(self._url, self._tag, start, min(start + RANGE_BYTES, end))

    def text(self, number: int, offset: int = 0) -> Iterator[Range]:
        """Yields the ranges with the text of a row group, from a byte of the file on."""
        offset = max(offset, self._starts[number])
        while offset < self._stops[number]:
            part = self.at(offset)
            yield part
            offset = part.stop


class RangedFile(io.RawIOBase):
    """A remote file; reading raises DataError if the server stays away or the file changed."""

    def __init__(self, ranges: RangeReader, layout: FileRanges) -> None:
        self._ranges, self._layout, self._offset = ranges, layout, 0

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def tell(self) -> int:
        """Returns the offset of the next byte."""
        return self._offset

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves to an offset from the start, the current byte or the end; returns the new one."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._offset, io.SEEK_END: self._layout.footer.stop}
        self._offset = base[whence] + offset
        return self._offset

    def read(self, size: int = -1) -> bytes:
        """Returns the next `size` bytes, fewer only at the end."""
        end = self._layout.footer.stop
        stop = end if size < 0 else min(self._offset + size, end)
        parts = []
        while self._offset < stop:
            part = self._layout.at(self._offset)
            data = memoryview(self._ranges.read(part))
            parts.append(data[self._offset - part.start : stop - part.start])
            self._offset = min(stop, part.stop)
        return b"".join(parts)


class RemoteParquet:
    """The files of an index on a server; used by one thread of the process that made it."""

    def __init__(self, index: Index, config: DatasetConfig) -> None:
        self._index = index
        self._first_groups = np.cumsum(index.group_counts) - index.group_counts
        self._layouts: dict[int, FileRanges] = {}
        self.ranges = RangeReader(RemoteStore(config.retry_seconds), RangeCache(config.cache_bytes))

    def open(self, file: int) -> RangedFile:
        """Returns a file for pyarrow."""
        return RangedFile(self.ranges, self.layout(file))

    def metadata(self, file: int) -> Any:
        """Returns what the footer of a file states."""
        # Of the footer alone: of a file, Arrow would first read 64 KB. A footer tells where it
        # begins by its own length, so it need not be in its file.
        footer = self.ranges.read(self.layout(file).footer)
        return pq.read_metadata(pa.BufferReader(b"PAR1" + footer))

    def forget(self, file: int, number: int) -> None:
        """Makes the next start read a damaged row group from the server, not from copies."""
        layout = self.layout(file)
        for damaged in (layout.footer, *layout.text(number)):
            self.ranges.forget(damaged)

    def layout(self, file: int) -> FileRanges:
        """Returns the ranges that a file is read in."""
        if file not in self._layouts:
            first = int(self._first_groups[file])
            self._layouts[file] = FileRanges(self._index, file, first)
        return self._layouts[file]

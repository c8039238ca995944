"""From row groups to tokens, one segment at a time.

A segment, successive rows of one row group, is the smallest thing that is read, shuffled and held.
If tokens are bytes, its documents are permuted and joined by Arrow kernels: the tokens are a view
of one Arrow buffer, and no Python object per document exists. Other tokenizers get strings. Page
checksums are verified if a file has them; without them a flipped bit mostly reads as other text.
"""

from __future__ import annotations

import logging
import re
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from itertools import islice, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from config import DataError, DatasetConfig
from data.loading.order import Integers, Tokens, document_order
from data.remote.range_cache import Range
from data.sources.dataset import Passage, Stored
from data.sources.parquet.index import REMEDY, Index, first_line
from data.sources.parquet.remote_file import RangedFile, RemoteParquet
from data.sources.parquet.segments import SegmentTable
from data.tokenizers.base import Tokenizer, storage_dtype
from data.tokenizers.simple import SEPARATOR, SPACE, ByteTokenizer

log = logging.getLogger(__name__)

# Row groups up to this size are decoded whole and kept while parts of them are read; larger ones,
# which would not fit into memory once per lane, are decoded from the front, part by part.
WHOLE_GROUP_BYTES = 8 << 20
WHOLE_GROUP_ROWS = 1 << 16
KEPT_BYTES = 16 << 20
_REMOTE_REMEDY = (
    "Resume, which reads it again; if it is damaged on the server too, replace it there, or set "
    "dataset.on_bad_shard: skip."
)
_READ_BUFFER_BYTES = 1 << 16
# Of remote text: ranges that a lane asks for in advance, and those of them of one row group.
_LANE_RANGES, _GROUP_RANGES = 16, 4
_LANE_SEGMENTS = 64  # in which they are looked for
_OFFSET_LIMIT_BYTES = 1 << 30

Bytes = npt.NDArray[np.uint8]


class RowGroupReader:
    """Reads rows of row groups and keeps at most a stated number of files open; for one thread.

    Besides the rows it returns it holds at most KEPT_BYTES of decoded small row groups, and for
    each larger row group that is being read about three times the rows asked for; of remote files
    also what is read ahead (data/remote/read_ahead.py).
    """

    def __init__(self, index: Index, config: DatasetConfig) -> None:
        self._index, self._max_files = index, config.max_cached_files
        self._remote = RemoteParquet(index, config) if index.tags else None
        self._group_file, self._group_number = index.group_file, index.group_number
        # All three in the order of their last use.
        self._files: OrderedDict[int, Any] = OrderedDict()
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._partial: dict[int, _PartialGroup] = {}

    def read(self, group: int, first: int, count: int) -> Any:
        """Returns rows [first, first + count) of a row group's text as one Arrow array of strings.

        Raises OSError or pyarrow.ArrowException if pages cannot be read, and DataError if the file
        is gone or is not the one that was indexed.
        """
        rows, _, size, *_ = self._index.groups[group]
        if group in self._kept:
            self._kept.move_to_end(group)
            return self._kept[group].slice(first, count)
        # A segment that is its whole row group is read once per epoch: nothing to keep.
        if count == rows:
            return self._read_whole(group)
        if size > WHOLE_GROUP_BYTES or rows > WHOLE_GROUP_ROWS:
            return self._read_part(group, first, count)
        self._kept[group] = array = self._read_whole(group)
        while sum(kept.nbytes for kept in self._kept.values()) > KEPT_BYTES:
            self._kept.popitem(last=False)
        return array.slice(first, count)

    def prefetch(self, lane: int, groups: Iterable[int]) -> None:
        """States which row groups a lane reads next; those of remote files are asked for."""
        if self._remote is None:
            return
        # Also of a row group that is decoded and kept: it may be dropped before its next segment
        # is read, and its text is held until then.
        ranges: dict[Range, None] = {}  # a set in the order of need
        for group in groups:
            file, partial = int(self._group_file[group]), self._partial.get(group)
            layout = self._remote.layout(file)
            if file not in self._files:
                ranges[layout.footer] = None
            offset = partial.source.tell() if partial and partial.source else 0
            text = layout.text(int(self._group_number[group]), offset)
            ranges |= dict.fromkeys(islice(text, _GROUP_RANGES))
            if len(ranges) >= _LANE_RANGES:
                break
        self._remote.ranges.expect(lane, list(ranges))

    def forget(self, group: int) -> None:
        """Makes the next start read a damaged row group from the server, not from copies."""
        if self._remote is not None:
            self._remote.forget(int(self._group_file[group]), int(self._group_number[group]))

    def _read_whole(self, group: int) -> Any:
        number = int(self._group_number[group])
        file = self._open(int(self._group_file[group]))
        # Without threads of Arrow's: they would compete with the training step for cores.
        table = file.read_row_group(number, columns=[self._index.column], use_threads=False)
        return _one_array(table.column(0).chunks)

    def _read_part(self, group: int, first: int, count: int) -> Any:
        number = int(self._group_file[group])
        file, source = self._open(number), None
        partial = self._partial.pop(group, None)  # put back only if nothing goes wrong
        if partial is None or partial.row > first:  # pages can only be decoded forwards
            if self._remote is not None:
                # A view of its own, whose offset tells what of this row group is needed next.
                source = self._remote.open(number)
                file = _parquet_file(source, file.metadata)
            batches = file.iter_batches(
                batch_size=count,
                row_groups=[int(self._group_number[group])],
                columns=[self._index.column],
                use_threads=False,
            )
            partial = _PartialGroup(batches, source)
        array = partial.read(first, count)
        if partial.row < self._index.groups[group, 0]:
            self._partial[group] = partial
        return array

    def _open(self, file: int) -> Any:
        if file in self._files:
            self._files.move_to_end(file)
            return self._files[file]
        while len(self._files) >= self._max_files:
            self._close(next(iter(self._files)))
        if self._remote is not None:
            # Without a look at the server: every request checks the tag.
            opened = _parquet_file(self._remote.open(file), self._remote.metadata(file))
        else:
            # At every opening: a file that changed since the index was read has other rows.
            self._index.check_file(file)
            opened = _parquet_file(self._index.path(file))
        self._files[file] = opened
        return opened

    def _close(self, file: int) -> None:
        opened = self._files.pop(file)
        for group in [group for group in self._partial if self._group_file[group] == file]:
            del self._partial[group]
        opened.close(force=True)

    def close(self) -> None:
        """Closes all files."""
        for file in list(self._files):
            self._close(file)
        self._kept.clear()
        if self._remote is not None:
            self._remote.ranges.close()


def _parquet_file(source: str | RangedFile, metadata: Any = None) -> Any:
    return pq.ParquetFile(
        source,
        metadata=metadata,
        page_checksum_verification=True,
        pre_buffer=False,
        buffer_size=_READ_BUFFER_BYTES,
    )


class _PartialGroup:
    """A row group that is decoded from the front; `row` is the next row."""

    def __init__(self, batches: Iterator[Any], source: RangedFile | None) -> None:
        self._batches, self._rest = batches, pa.array([], pa.string())
        self.source = source
        self.row = 0

    def read(self, first: int, count: int) -> Any:
        """Returns rows [first, first + count); rows before them are decoded and dropped."""
        for _ in self._take(first - self.row):
            pass
        return _one_array(list(self._take(count)))

    def _take(self, count: int) -> Iterator[Any]:
        """Yields the next `count` rows in one or more arrays."""
        while count:
            if not len(self._rest):
                batch = next(self._batches, None)
                if batch is None:
                    raise pa.ArrowInvalid("fewer rows than the footer says")
                self._rest = batch.column(0)
                continue
            part = self._rest.slice(0, count)
            self._rest = self._rest.slice(len(part))
            self.row += len(part)
            count -= len(part)
            yield part


def _one_array(parts: list[Any]) -> Any:
    """Returns one array of string or large_string, however the file stores strings."""
    plain = []
    for part in parts:
        if not (pa.types.is_string(part.type) or pa.types.is_large_string(part.type)):
            part = part.cast(pa.large_string())
        plain.append(part)
    return plain[0] if len(plain) == 1 else pa.concat_arrays(plain)


class DocumentReader:
    """Reads the documents of segments, and counts those that it skips."""

    def __init__(self, index: Index, table: SegmentTable, config: DatasetConfig) -> None:
        self._index, self._table = index, table
        self._skip_bad = config.on_bad_shard == "skip"
        _use_compact_memory()
        self._groups = RowGroupReader(index, config)
        self.unreadable: set[int] = set()
        """The segments that could not be read and were skipped."""
        self.skipped_counts = Counter[str]()

    def read(self, segment: int, seed: int, epoch: int, shuffle: bool) -> tuple[Any, Integers]:
        """Returns a segment's documents in reading order, and the row of each in its row group.

        Null and empty rows are skipped. A segment that cannot be read, or is not UTF-8, raises
        DataError or, with `on_bad_shard: skip`, has no documents and is named in a warning.
        """
        array = self._read(segment)
        rows = self._used_rows(array)
        # The order of documents is by the segment's own key: it does not depend on lane or worker.
        rows = rows[document_order(int(self._table.key[segment]), seed, epoch, len(rows), shuffle)]
        # Not pa.array(rows), which imports numpy.ma (50 ms) in search of masked arrays.
        chosen = pa.Array.from_buffers(pa.int64(), len(rows), [None, pa.py_buffer(rows)])
        return array.take(chosen), rows + int(self._table.first[segment])

    def prefetch(self, lane: int, segments: Iterable[int]) -> None:
        """States which segments a lane reads next, in order."""
        groups = (int(self._table.group[each]) for each in islice(segments, _LANE_SEGMENTS))
        self._groups.prefetch(lane, groups)

    def measure(self, segment: int) -> tuple[int, int]:
        """Returns how many documents a segment has, and the bytes of their text."""
        array = self._read(segment)
        return len(self._used_rows(array)), len(text_bytes(array)) if len(array) else 0

    def _read(self, segment: int) -> Any:
        """Returns all rows of a segment; none if it cannot be read and is to be skipped."""
        first, count = int(self._table.first[segment]), int(self._table.rows[segment])
        group = int(self._table.group[segment])
        try:
            array = self._groups.read(group, first, count)
            # Arrow does not check UTF-8 on its own, and a tokenizer would fail far from the cause.
            array.validate(full=True)
            if len(array) != count:  # page headers are not under the checksum
                raise pa.ArrowInvalid(f"{len(array)} rows, the footer says {count}")
        # Not DataError, which a server that stays away raises: nothing is wrong with its text.
        except (OSError, pa.ArrowException) as error:
            remedy = _REMOTE_REMEDY if self._index.tags else REMEDY
            message = f"{self.name(segment)}: {_reason(error, first)}. {remedy}"
            if not self._skip_bad:
                self._groups.forget(group)
                raise DataError(message) from None
            if segment not in self.unreadable:
                self.unreadable.add(segment)
                log.warning("skipped: %s", message)
            return pa.array([], pa.string())
        return array

    def _used_rows(self, array: Any) -> Integers:
        """Returns the rows that hold text."""
        used: npt.NDArray[np.bool_] = np.diff(offsets(array)) > 0
        if array.null_count:
            used &= array.is_valid().to_numpy(zero_copy_only=False)
        rows = np.flatnonzero(used)
        if len(rows) < len(array):
            self.skipped_counts["null documents"] += array.null_count
            self.skipped_counts["empty documents"] += len(array) - len(rows) - array.null_count
        return rows

    def name(self, segment: int) -> str:
        """Returns file and row group of a segment, for messages."""
        return self._index.group_name(int(self._table.group[segment]))

    def close(self) -> None:
        """Closes all files."""
        self._groups.close()


class ParquetReader:
    """Reads segments of documents as tokens."""

    def __init__(self, documents: DocumentReader, tokenizer: Tokenizer) -> None:
        self._documents = documents
        self._tokenizer = tokenizer
        self.skipped_counts = documents.skipped_counts

    def prefetch(self, lane: int, segments: Iterable[int]) -> None:
        """States which segments a lane reads next, in order."""
        self._documents.prefetch(lane, segments)

    def tokens(self, segment: int, seed: int, epoch: int, shuffle: bool) -> Tokens:
        """Returns the documents of a segment in reading order, each followed by the separator."""
        documents, rows = self._documents.read(segment, seed, epoch, shuffle)
        if not len(rows):
            return np.zeros(0, dtype=np.uint8)
        if isinstance(self._tokenizer, ByteTokenizer):
            return self._join(documents)
        tokens = self._tokenizer.encode_documents(documents.to_pylist())
        return tokens.astype(storage_dtype(self._tokenizer.vocab_size), copy=False)

    def _join(self, documents: Any) -> Bytes:
        """Returns the bytes of all documents as tokens.

        Byte 0 is the separator, so NUL bytes in the text become spaces.
        """
        has_nul = not text_bytes(documents).all()
        # 32-bit offsets end at 2 GB; separators and casts need some room below that.
        large = documents.nbytes > _OFFSET_LIMIT_BYTES or pa.types.is_large_string(documents.type)
        kind = pa.large_binary() if large else pa.binary()
        empty, end = (pa.scalar(value, kind) for value in (b"", bytes([SEPARATOR])))
        joined = pc.binary_join_element_wise(documents.cast(kind), empty, end)
        tokens = text_bytes(joined)
        return self._replace_nul(tokens, joined) if has_nul else tokens

    def _replace_nul(self, tokens: Bytes, joined: Any) -> Bytes:
        tokens = tokens.copy()
        zeros = tokens == SEPARATOR
        self.skipped_counts["NUL bytes replaced"] += int(zeros.sum()) - len(joined)
        tokens[zeros] = SPACE
        tokens[offsets(joined)[1:] - 1] = SEPARATOR
        return tokens

    def locate(
        self, segment: int, seed: int, epoch: int, shuffle: bool, tokens: range
    ) -> list[Stored]:
        """Returns the row group and row of each document that these tokens belong to."""
        documents, rows = self._documents.read(segment, seed, epoch, shuffle)
        ends = np.cumsum(self._sizes(documents))
        first, last = np.searchsorted(ends, (tokens.start, tokens.stop - 1), side="right").tolist()
        edges = [tokens.start, *ends[first:last].tolist(), tokens.stop]
        parts = zip(pairwise(edges), rows[first : last + 1].tolist(), strict=True)
        place = f"{self._documents.name(segment)} rows"
        return [Stored(range(a, b), place, range(row, row + 1)) for (a, b), row in parts]

    def find(
        self, segment: int, seed: int, epoch: int, shuffle: bool, passage: Passage
    ) -> list[Stored]:
        """Returns the documents that hold a text, and its tokens: of tokens that are not bytes to
        within one or two, since they may run across its ends."""
        documents, rows = self._documents.read(segment, seed, epoch, shuffle)
        if not len(rows):
            return []
        matches = pc.match_substring(documents, passage.text).to_numpy(zero_copy_only=False)
        if not matches.any():
            return []
        ends = np.cumsum(self._sizes(documents))
        place = f"{self._documents.name(segment)} rows"
        found = list[Stored]()
        for i in np.flatnonzero(matches).tolist():
            begin = int(ends[i - 1]) if i else 0
            before, *rest = documents[i].as_py().split(passage.text)
            for after in rest:
                begin += len(self._tokenizer.encode(before))
                end = min(begin + len(passage.ids), int(ends[i]))
                row = int(rows[i])
                found.append(Stored(range(min(begin, end - 1), end), place, range(row, row + 1)))
                begin, before = end, after
        return found

    def _sizes(self, documents: Any) -> Integers:
        """Returns the tokens of each document, with its separator."""
        if isinstance(self._tokenizer, ByteTokenizer):
            return np.diff(offsets(documents)).astype(np.int64) + 1
        each = ([text.as_py()] for text in documents)
        return np.array([len(self._tokenizer.encode_documents(text)) for text in each])

    def close(self) -> None:
        """Closes all files."""
        self._documents.close()


def offsets(array: Any) -> npt.NDArray[Any]:
    """Returns where each value of a string or binary array begins in its buffer, and the end."""
    large = pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type)
    everything = np.frombuffer(array.buffers()[1], dtype=np.int64 if large else np.int32)
    return everything[array.offset : array.offset + len(array) + 1]


def text_bytes(array: Any) -> Bytes:
    """Returns the bytes of all values of a string or binary array, as a view of its buffer."""
    bounds = offsets(array)
    return np.frombuffer(array.buffers()[2], dtype=np.uint8)[bounds[0] : bounds[-1]]


def _use_compact_memory() -> None:
    """Selects the Arrow pool that keeps the least freed memory, if this build has it."""
    if "jemalloc" in pa.supported_memory_backends():
        pa.set_memory_pool(pa.jemalloc_memory_pool())


def _reason(error: Exception, first: int) -> str:
    """Returns what an Arrow error means; `first` is the row it counts from."""
    text = first_line(error)
    if "CRC" in text:
        return "page checksum mismatch, the file is damaged"
    not_utf8 = re.search(r"UTF-?8.*index (\d+)", text)
    if not_utf8:
        return f"the text of row {first + int(not_utf8[1])} is not UTF-8"
    return f"cannot be decoded, the file is damaged ({text})"

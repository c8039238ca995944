"""From row groups to tokens, one unit at a time.

The one idea: a unit, a run of rows of one row group, is the smallest piece that is read, shuffled
and held: about UNIT_BYTES, more only where one document or a few long ones are. Where tokens are
bytes, its documents are permuted and joined by Arrow kernels, so the tokens are a view of one Arrow
buffer and no Python object per document exists; other tokenizers get strings. Page checksums are
verified where a file has them; without them a flipped bit in a page mostly reads as other text.
"""

from __future__ import annotations

import collections
import logging
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from config import DataError, DatasetConfig
from data.loading.order import Integers, Tokens, document_order
from data.sources.parquet_index import REMEDY, Index, Units, first_line
from data.tokenizers.base import Tokenizer, storage_dtype
from data.tokenizers.simple import SEPARATOR, SPACE, ByteTokenizer

log = logging.getLogger(__name__)

# Row groups up to this size are decoded whole and kept while slices of them are in demand; larger
# ones are decoded from the front, slice by slice.
WHOLE_GROUP_BYTES = 8 << 20
WHOLE_GROUP_ROWS = 1 << 16
KEPT_BYTES = 16 << 20
_READ_BUFFER_BYTES = 1 << 16
_OFFSET_LIMIT_BYTES = 1 << 30

Bytes = npt.NDArray[np.uint8]


class GroupReader:
    """Reads rows of row groups and holds at most `max_files` files open.

    Besides the rows it returns it holds at most KEPT_BYTES of decoded small row groups, and for
    each larger row group that is being read about three times the slice. Not for several threads.
    """

    def __init__(self, index: Index, max_files: int) -> None:
        self._index = index
        self._max_files = max_files
        self._group_file = index.group_file
        self._group_number = index.group_number
        self._files: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._kept: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._slices: dict[int, _Slices] = {}

    def read(self, group: int, first: int, count: int) -> Any:
        """Rows [first, first + count) of the text of a row group, as one Arrow array of strings.

        Raises OSError or pyarrow.ArrowException where pages cannot be read, and DataError where
        the file is gone or is not the one that was indexed.
        """
        rows, _, size, _ = self._index.groups[group]
        if group in self._kept:
            self._kept.move_to_end(group)
            return self._kept[group].slice(first, count)
        if count == rows:
            return self._read_whole(group)
        if size > WHOLE_GROUP_BYTES or rows > WHOLE_GROUP_ROWS:
            return self._read_slice(group, first, count)
        self._kept[group] = array = self._read_whole(group)
        while sum(kept.nbytes for kept in self._kept.values()) > KEPT_BYTES:
            self._kept.popitem(last=False)
        return array.slice(first, count)

    def _read_whole(self, group: int) -> Any:
        number = int(self._group_number[group])
        source = self._open(int(self._group_file[group]))
        table = source.read_row_group(number, columns=[self._index.column], use_threads=False)
        return _one_array(table.column(0).chunks)

    def _read_slice(self, group: int, first: int, count: int) -> Any:
        source = self._open(int(self._group_file[group]))
        slices = self._slices.pop(group, None)  # put back only if nothing goes wrong
        if slices is None or slices.row > first:
            batches = source.iter_batches(
                batch_size=count,
                row_groups=[int(self._group_number[group])],
                columns=[self._index.column],
                use_threads=False,
            )
            slices = _Slices(batches)
        array = slices.read(first, count)
        if slices.row < self._index.groups[group, 0]:
            self._slices[group] = slices
        return array

    def _open(self, file: int) -> Any:
        if file in self._files:
            self._files.move_to_end(file)
            return self._files[file]
        while len(self._files) >= self._max_files:
            self._evict(next(iter(self._files)))
        self._index.check_file(file)
        self._files[file] = pq.ParquetFile(
            self._index.path(file),
            page_checksum_verification=True,
            pre_buffer=False,
            buffer_size=_READ_BUFFER_BYTES,
        )
        return self._files[file]

    def _evict(self, file: int) -> None:
        source = self._files.pop(file)
        for group in [group for group in self._slices if self._group_file[group] == file]:
            del self._slices[group]
        source.close(force=True)

    def close(self) -> None:
        """Close all files."""
        for file in list(self._files):
            self._evict(file)
        self._kept.clear()


class _Slices:
    """A row group decoded from the front; `row` is the next one."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches
        self._array: Any = None
        self.row = 0

    def read(self, first: int, count: int) -> Any:
        """Rows [first, first + count); rows before them are decoded and dropped."""
        parts = []
        while count:
            if self._array is None or not len(self._array):
                self._array = next(self._batches).column(0)
            skipped = min(first - self.row, len(self._array))
            part = self._array.slice(skipped, count) if self.row + skipped == first else None
            used = skipped + (0 if part is None else len(part))
            self._array = self._array.slice(used)
            self.row += used
            if part is not None and len(part):
                parts.append(part)
                first, count = first + len(part), count - len(part)
        return _one_array(parts)


def _one_array(parts: list[Any]) -> Any:
    """One array of string or large_string, whatever way the file stores strings."""
    plain = []
    for part in parts:
        if not (pa.types.is_string(part.type) or pa.types.is_large_string(part.type)):
            part = part.cast(pa.large_string())
        plain.append(part)
    return plain[0] if len(plain) == 1 else pa.concat_arrays(plain)


class DocumentReader:
    """Reads the documents of units; counts what it leaves out."""

    def __init__(self, index: Index, units: Units, config: DatasetConfig) -> None:
        self._index = index
        self._units = units
        self._skip_bad = config.on_bad_shard == "skip"
        _use_compact_memory()
        self._groups = GroupReader(index, config.max_cached_files)
        self.skipped: set[int] = set()
        """The units that could not be read."""
        self.counts: collections.Counter[str] = collections.Counter()

    def read(self, unit: int, seed: int, epoch: int, shuffle: bool) -> tuple[Any, Integers]:
        """The documents of a unit in reading order, and the row of each in its row group.

        Null and empty rows are left out. A unit that cannot be read, or is not UTF-8, raises
        DataError or, with `on_bad_shard: skip`, has no documents and is named in a warning.
        """
        array = self._read(unit)
        rows = self._used_rows(array)
        rows = rows[document_order(int(self._units.key[unit]), seed, epoch, len(rows), shuffle)]
        # Not pa.array(rows), which imports numpy.ma (50 ms) in search of masked arrays.
        chosen = pa.Array.from_buffers(pa.int64(), len(rows), [None, pa.py_buffer(rows)])
        return array.take(chosen), rows + int(self._units.first[unit])

    def measure(self, unit: int) -> tuple[int, int]:
        """How many documents a unit has, and the bytes of their text."""
        array = self._read(unit)
        return len(self._used_rows(array)), len(text_bytes(array)) if len(array) else 0

    def _read(self, unit: int) -> Any:
        """All rows of a unit; none of one that cannot be read and is to be skipped."""
        first, count = int(self._units.first[unit]), int(self._units.rows[unit])
        try:
            array = self._groups.read(int(self._units.group[unit]), first, count)
            array.validate(full=True)
            if len(array) != count:  # page headers are not under the checksum
                raise pa.ArrowInvalid(f"{len(array)} rows, the footer says {count}")
        except (OSError, pa.ArrowException, StopIteration) as error:
            message = f"{self.name(unit)}: {_reason(error, first)}. {REMEDY}"
            if not self._skip_bad:
                raise DataError(message) from None
            if unit not in self.skipped:
                self.skipped.add(unit)
                log.warning("skipped: %s", message)
            return pa.array([], pa.string())
        return array

    def _used_rows(self, array: Any) -> Integers:
        """The rows that hold text."""
        used: npt.NDArray[np.bool_] = np.diff(offsets(array)) > 0
        if array.null_count:
            used &= array.is_valid().to_numpy(zero_copy_only=False)
        rows = np.flatnonzero(used)
        if len(rows) < len(array):
            self.counts["null documents"] += array.null_count
            self.counts["empty documents"] += len(array) - len(rows) - array.null_count
        return rows

    def name(self, unit: int) -> str:
        """File and row group of a unit, for messages."""
        return self._index.group_name(int(self._units.group[unit]))

    def close(self) -> None:
        """Close all files."""
        self._groups.close()


class UnitReader:
    """Turns units into tokens."""

    def __init__(self, documents: DocumentReader, tokenizer: Tokenizer) -> None:
        self._documents = documents
        self._tokenizer = tokenizer
        self.counts = documents.counts

    def tokens(self, unit: int, seed: int, epoch: int, shuffle: bool) -> Tokens:
        """The tokens of a unit: its documents in reading order, each followed by the separator."""
        documents, rows = self._documents.read(unit, seed, epoch, shuffle)
        if not len(rows):
            return np.zeros(0, dtype=np.uint8)
        if isinstance(self._tokenizer, ByteTokenizer):
            return self._join(documents)
        tokens = self._tokenizer.encode_documents(documents.to_pylist())
        return tokens.astype(storage_dtype(self._tokenizer.vocab_size), copy=False)

    def _join(self, documents: Any) -> Bytes:
        """The bytes of all documents as tokens.

        NUL bytes in the text become spaces, as byte 0 is the separator.
        """
        has_nul = not text_bytes(documents).all()
        large = documents.nbytes > _OFFSET_LIMIT_BYTES or pa.types.is_large_string(documents.type)
        kind = pa.large_binary() if large else pa.binary()
        empty, end = (pa.scalar(value, kind) for value in (b"", bytes([SEPARATOR])))
        joined = pc.binary_join_element_wise(documents.cast(kind), empty, end)
        tokens = text_bytes(joined)
        return self._replace_nul(tokens, joined) if has_nul else tokens

    def _replace_nul(self, tokens: Bytes, joined: Any) -> Bytes:
        tokens = tokens.copy()
        zeros = tokens == SEPARATOR
        self.counts["NUL bytes replaced"] += int(zeros.sum()) - len(joined)
        tokens[zeros] = SPACE
        tokens[offsets(joined)[1:] - 1] = SEPARATOR
        return tokens

    def places(
        self, unit: int, seed: int, epoch: int, shuffle: bool, tokens: range
    ) -> tuple[str, list[range]]:
        """Row group and rows of the documents that these tokens of the unit belong to."""
        documents, rows = self._documents.read(unit, seed, epoch, shuffle)
        if isinstance(self._tokenizer, ByteTokenizer):
            sizes = np.diff(offsets(documents)) + 1
        else:
            each = ([text.as_py()] for text in documents)
            sizes = np.array([len(self._tokenizer.encode_documents(text)) for text in each])
        ends = np.cumsum(sizes)
        first, last = np.searchsorted(ends, (tokens.start, tokens.stop - 1), side="right")
        numbers = sorted(rows[first : last + 1].tolist())
        return f"{self._documents.name(unit)} rows", [range(row, row + 1) for row in numbers]

    def close(self) -> None:
        """Close all files."""
        self._documents.close()


def offsets(array: Any) -> npt.NDArray[Any]:
    """Where each value of a string or binary array begins in its buffer; then the last end."""
    large = pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type)
    everything = np.frombuffer(array.buffers()[1], dtype=np.int64 if large else np.int32)
    return everything[array.offset : array.offset + len(array) + 1]


def text_bytes(array: Any) -> Bytes:
    """The bytes of all values of a string or binary array, as a view of its buffer."""
    bounds = offsets(array)
    return np.frombuffer(array.buffers()[2], dtype=np.uint8)[bounds[0] : bounds[-1]]


def _use_compact_memory() -> None:
    """Arrow's pool that keeps least of what it has freed, where this build has it."""
    if "jemalloc" in pa.supported_memory_backends():
        pa.set_memory_pool(pa.jemalloc_memory_pool())


def _reason(error: Exception, first: int) -> str:
    """What an Arrow error means; `first` is the row it counts from."""
    text = first_line(error)
    if "CRC" in text:
        return "page checksum mismatch, the file is damaged"
    not_utf8 = re.search(r"UTF-?8.*index (\d+)", text)
    if not_utf8:
        return f"the text of row {first + int(not_utf8[1])} is not UTF-8"
    return f"cannot be decoded, the file is damaged ({text})"

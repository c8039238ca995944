"""A folder of parquet files as the text of a run: segments, split, size and identity.

All but the number of tokens follows from footers, config and tokenizer. So at resume the
fingerprint in a checkpoint tells whether the data is the same before any text is read.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from config import DataError, DatasetConfig
from data.loading.order import (
    MIN_SEGMENTS,
    PLAN_VERSION,
    Booleans,
    Integers,
    Keys,
    choose_held_out,
)
from data.sources.cache import cache_path, load_arrays, save_arrays
from data.sources.dataset import Dataset, DatasetStats, remote_details, tokens_of_splits
from data.sources.parquet.counting import TokenCounts, count_tokens
from data.sources.parquet.index import Index
from data.sources.parquet.reader import DocumentReader, ParquetReader, text_bytes
from data.sources.parquet.segments import (
    ENCODED_SEGMENT_BYTES,
    SEGMENT_BYTES,
    SEGMENT_ROWS,
    SegmentTable,
    cut_segments,
)
from data.tokenizers.base import Tokenizer
from data.tokenizers.simple import ByteTokenizer
from settings.formatting import format_count, format_plural

log = logging.getLogger(__name__)

_FORMAT_VERSION = 1
_LISTED_FILES = 1000
_NULL_LIMIT = 0.5
LARGE_GROUP_BYTES = 32 << 20
_LENGTH_PREFIX_BYTES = 4  # parquet stores each string with its length
_SAMPLE_SEGMENTS, _SAMPLE_BYTES = 16, 1 << 16  # of each segment


@dataclass(frozen=True, eq=False)
class ParquetSegments:
    """Successive documents of row groups, encoded as they are read."""

    index: Index
    table: SegmentTable
    tokenizer: Tokenizer
    config: DatasetConfig
    whole_rows = False

    @property
    def shuffle_keys(self) -> Keys:
        """The keys of row groups or, of large ones, of their parts."""
        return self.table.shuffle_key

    @cached_property
    def held_out(self) -> Booleans:
        """Which segments are for testing; the same for all tokenizers with such segments."""
        return choose_held_out(self.table.shuffle_key, self.table.bytes, self.config.test_fraction)

    @cached_property
    def sizes(self) -> Integers:
        """About how many tokens each segment has, or somewhat more."""
        is_bytes = isinstance(self.tokenizer, ByteTokenizer)
        return self.table.bytes if is_bytes else self._estimates

    @cached_property
    def counts(self) -> TokenCounts:
        """How many tokens each segment has; reads the text, once."""
        return count_tokens(self.index, self.table, self.tokenizer, self.config)

    @property
    def tokens(self) -> Integers:
        """The tokens of each segment, as counted."""
        return self.counts.tokens

    def epoch_tokens(self, version: int) -> int:
        """Returns the tokens to train on; version 1 estimated them from the footers."""
        # The length of a run in epochs was planned with these; it must not change at a resume.
        tokens = self.tokens if version == PLAN_VERSION else self._estimates
        return int(tokens[~self.held_out].sum())

    @cached_property
    def _estimates(self) -> Integers:
        """Tokens by the sizes in the footers; exact only for bytes in pages without encoding."""
        text = np.maximum(self.table.bytes - _LENGTH_PREFIX_BYTES * self.table.rows, 0)
        if not isinstance(self.tokenizer, ByteTokenizer):
            text = np.ceil(text * self._tokens_per_byte()).astype(np.int64)
        separators = 0 if self.tokenizer.separator is None else 1
        tokens: Integers = text + separators * self.table.rows
        return tokens

    def _tokens_per_byte(self) -> float:
        """Returns the tokens per byte of a sample of documents, without their separators."""
        # The first segment of a row group is cheaper to read than one deep inside.
        starts = np.flatnonzero(self.table.first == 0)
        among = starts if len(starts) >= _SAMPLE_SEGMENTS else np.arange(len(self.table))
        documents = self.open_documents()
        tokens = size = 0
        chosen = among[np.linspace(0, len(among) - 1, _SAMPLE_SEGMENTS).astype(np.int64)]
        documents.prefetch(0, map(int, chosen))
        for i in chosen:
            texts, _ = documents.read(int(i), 0, 0, False)
            enough = size + _SAMPLE_BYTES
            for text in texts:
                if size >= enough:
                    break
                sample = text.as_py()[:_SAMPLE_BYTES]
                size += len(sample.encode())
                tokens += len(self.tokenizer.encode(sample))
        documents.close()
        return tokens / max(1, size)

    def open_documents(self) -> DocumentReader:
        """Returns a new reader of the text."""
        return DocumentReader(self.index, self.table, self.config)

    def open_reader(self) -> ParquetReader:
        """Returns a new reader of the tokens."""
        return ParquetReader(self.open_documents(), self.tokenizer)


@dataclass(frozen=True, eq=False)
class ParquetDataset(Dataset):
    """The documents of a folder of parquet files."""

    index: Index
    tokenizer: Tokenizer
    config: DatasetConfig

    @cached_property
    def _segments(self) -> ParquetSegments:
        table = cut_segments(self.index, _segment_bytes(self.tokenizer))
        return ParquetSegments(self.index, table, self.tokenizer, self.config)

    def segments(self, block_size: int) -> ParquetSegments:
        """Returns the segments, which do not depend on the length of rows: documents are packed."""
        del block_size
        return self._segments

    @cached_property
    def stats(self) -> DatasetStats:
        """The numbers of files, rows and tokens; reads the text, once."""
        counts, index = self._segments.counts, self.index
        return DatasetStats(
            files=len(index.paths),
            file_bytes=int(index.sizes.sum()),
            rows=index.rows,
            error=counts.error,
            **tokens_of_splits(counts.tokens, self._segments.held_out),
        )

    @cached_property
    def fingerprint(self) -> str:
        """Identifies paths, sizes, row groups, column, tokenizer, split and rules."""
        index = self.index
        # Whatever changes the order of tokens must be in here, or a resume continues other text.
        rules = (_FORMAT_VERSION, _segment_bytes(self.tokenizer), SEGMENT_ROWS, MIN_SEGMENTS)
        name, fraction = self.tokenizer.fingerprint, self.config.test_fraction
        digest = hashlib.blake2b(repr((rules, index.column, name, fraction)).encode())
        digest.update(os.fsencode("\0".join(index.paths)))
        for table in (index.sizes, index.group_counts, index.groups[:, :3]):
            digest.update(np.ascontiguousarray(table, dtype="<i8").tobytes())
        return digest.hexdigest()[:32]

    def split_setting(self, split: str) -> str:
        """Returns the option that decides how much text is held out."""
        return f"dataset.test_fraction {self.config.test_fraction}"

    def lines(self) -> list[str]:
        """Returns a line on files, rows and tokens, and one on missing checksums."""
        stats = self.stats
        about, within = "", ""
        if stats.error:
            about, within = "about ", f" (estimated, to within {stats.error:.1%})"
        return [
            f"Data: {self.index.root}: {format_plural(stats.files, 'file')}, "
            f"{format_plural(stats.rows, 'row')}, {about}"
            f"{format_count(stats.tokens)} tokens{within}: {format_count(stats.train_tokens)} to "
            f"train on, {format_count(stats.test_tokens)} held out",
            *_unprotected_lines(self.index),
        ]

    def details(self) -> dict[str, Any]:
        """Returns plain values that describe the folder."""
        index = self.index
        sizes = dict(zip(index.paths, index.sizes.tolist(), strict=True))
        return {
            "parquet_dir": index.root,
            "text_column": index.column,
            "tokenizer": self.tokenizer.fingerprint,
            "test_fraction": self.config.test_fraction,
            "files": len(index.paths),
            "file_bytes": int(index.sizes.sum()),
            "rows": index.rows,
            "sizes": sizes if len(sizes) <= _LISTED_FILES else None,
            **remote_details([index.listing] if index.listing else []),
        }

    def difference(self, saved: dict[str, Any]) -> str:
        """Returns the first difference from the details of another folder."""
        now = self.details()
        for key in ("text_column", "tokenizer", "test_fraction"):
            if saved[key] != now[key]:
                return f"{key} was {saved[key]}, is {now[key]}"
        then_sizes, sizes = saved["sizes"], now["sizes"]
        if then_sizes is not None and sizes is not None:
            for path in sorted(then_sizes.keys() | sizes.keys()):
                was, size = then_sizes.get(path), sizes.get(path)
                if size is None:
                    return f"{os.path.join(self.index.root, path)} is gone"
                if was is None:
                    return f"{os.path.join(self.index.root, path)} is new"
                if was != size:
                    return f"{os.path.join(self.index.root, path)} had {was} bytes, has {size}"
        for key in ("files", "file_bytes", "rows"):
            if saved[key] != now[key]:
                return f"{key} was {saved[key]}, is {now[key]}"
        return "same file names and sizes, but other row groups"


def open_parquet(index: Index, config: DatasetConfig, tokenizer: Tokenizer) -> ParquetDataset:
    """Opens the text of an index; raises DataError if it cannot be split."""
    dataset = ParquetDataset(index, tokenizer, config)
    if config.test_fraction > 0 and not dataset.segments(0).held_out.any():
        raise DataError(
            f"dataset.parquet_dir '{index.root}': {index.rows} row cannot be split "
            "into training and test text. Add documents (python prepare.py cuts long texts), "
            "or set dataset.test_fraction: 0"
        )
    return dataset


def _segment_bytes(tokenizer: Tokenizer) -> int:
    return SEGMENT_BYTES if isinstance(tokenizer, ByteTokenizer) else ENCODED_SEGMENT_BYTES


def check_rows(index: Index) -> None:
    """Raises DataError if the column holds hardly any text, and warns of null rows."""
    rows, nulls = index.rows, np.maximum(index.groups[:, 3], 0).sum()
    if rows == 0:
        raise DataError(
            f"dataset.parquet_dir '{index.root}': {len(index.paths)} parquet files hold no rows. "
            "Make them again: python prepare.py SOURCE OUT"
        )
    if nulls > _NULL_LIMIT * rows:
        raise DataError(
            f"dataset.parquet_dir '{index.root}': column '{index.column}' is null in {nulls} of "
            f"{rows} rows. Set dataset.text_column to the column that holds the text."
        )
    if nulls:
        log.warning("%d of %d rows are null and left out", nulls, rows)


def check_row_groups(index: Index) -> None:
    """Warns of row groups so large that each part of one is decoded together with much else."""
    rows, sizes = index.groups[:, 0], index.groups[:, 2]
    sizes = np.where(rows > 1, sizes, 0)  # one row cannot be cut
    large = int((sizes > LARGE_GROUP_BYTES).sum())
    if large:
        largest = int(sizes.argmax())
        log.warning(
            "%d of %d row groups hold more than %d MB, the largest %.0f MB (%s): reading is slow, "
            "as parts of them are decoded again and again. Rewrite the data in small row groups: "
            "%s",
            large,
            len(sizes),
            LARGE_GROUP_BYTES >> 20,
            sizes[largest] / (1 << 20),
            index.group_name(largest),
            _rewrite_command(index),
        )


def _unprotected_lines(index: Index) -> list[str]:
    """Returns a line on files without page checksums, if there are any."""
    count = int(index.unprotected.sum())
    if not count:
        return []
    first = index.path(int(index.unprotected.argmax()))
    return [
        f"Page checksums: none in {count:,} of {len(index.paths):,} files ({first}): damage to "
        f"their text may go unnoticed. To add them: {_rewrite_command(index)}"
    ]


def _rewrite_command(index: Index) -> str:
    """Returns the command that writes the folder in small row groups with page checksums."""
    option = [] if index.column == "text" else ["--text-column", index.column]
    return shlex.join(["python", "prepare.py", index.root, "OUT", *option])


def characters(index: Index, config: DatasetConfig) -> list[str]:
    """Returns every character of the text, in the order of code points; reads the text once, later
    takes them from the cache."""
    root = index.place
    cache = cache_path("characters", root, index.column, index.digest())
    known = load_arrays(cache)
    if known is None:
        known = {"points": _code_points(index, config)}
        save_arrays(cache, known)
    return [chr(point) for point in known["points"]]


def _code_points(index: Index, config: DatasetConfig) -> npt.NDArray[np.uint32]:
    table = cut_segments(index, SEGMENT_BYTES)
    documents = DocumentReader(index, table, config)
    seen = np.zeros(0x110000, dtype=np.bool_)
    for segment in range(len(table)):
        documents.prefetch(0, range(segment, len(table)))
        text, _ = documents.read(segment, 0, 0, False)
        if len(text):
            # UTF-32 has one number per character, so numpy finds them without a loop.
            points = text_bytes(text).tobytes().decode().encode("utf-32-le")
            seen[np.frombuffer(points, dtype="<u4")] = True
    documents.close()
    return np.flatnonzero(seen).astype(np.uint32)

"""Token files as the text of a run: rows, split, size and identity.

A row is T + 1 successive tokens of one file. Rows are shuffled one by one, and each epoch cuts them
at another offset. A row is named by its number, so moving or renaming files changes nothing.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from config import DataError, DatasetConfig, token_paths
from data.loading.order import (
    Booleans,
    Integers,
    Keys,
    Tokens,
    numbered_keys,
    path_keys,
    row_offset_hash,
)
from data.remote.listing import Listing
from data.sources.dataset import (
    Dataset,
    DatasetStats,
    Passage,
    Stored,
    remote_details,
    tokens_of_splits,
)
from data.sources.tokens.file import TokenFile, TokenMaps
from data.tokenizers.base import Tokenizer, storage_dtype

MAX_SEGMENTS = 1 << 21  # with more rows a segment has several, so that a plan takes megabytes
_FORMAT_VERSION = 2
_LISTED_FILES = 1000


class TokenSpan(NamedTuple):
    """Successive tokens of one file that belong to one split."""

    file: int
    first: int
    length: int
    held_out: bool


@dataclass(frozen=True, eq=False)
class TokenDataset(Dataset):
    """Token files to train on and, possibly, others that are held out."""

    train_files: tuple[TokenFile, ...]
    val_files: tuple[TokenFile, ...]
    """Without any, the end of each training file is held out."""
    tokenizer: Tokenizer
    config: DatasetConfig
    notes: tuple[str, ...] = ()
    """Lines about what the files were found to be."""
    remote: tuple[Listing, ...] = ()
    """The files on servers that these are copies of."""

    @property
    def paths(self) -> tuple[str, str | None]:
        """The paths to train on and held out, as the config gives them."""
        paths = token_paths(self.config)
        assert paths is not None
        return paths

    @property
    def files(self) -> tuple[TokenFile, ...]:
        """The files of both splits."""
        return self.train_files + self.val_files

    @cached_property
    def spans(self) -> tuple[TokenSpan, ...]:
        """The tokens to train on, then those held out: the second files, or the end of each file.

        As in nanoGPT, the first int(n * (1 - test_fraction)) of n tokens are trained on.
        """
        files = list(enumerate(self.files))
        if self.val_files:
            first_val = len(self.train_files)
            return tuple(TokenSpan(i, 0, file.count, i >= first_val) for i, file in files)
        kept = [int(file.count * (1 - self.config.test_fraction)) for _, file in files]
        train = [TokenSpan(i, 0, kept[i], False) for i, _ in files]
        ends = [TokenSpan(i, kept[i], file.count - kept[i], True) for i, file in files]
        return (*train, *ends)

    def segments(self, block_size: int) -> TokenSegments:
        """Returns the rows of block_size + 1 tokens."""
        return TokenSegments(self.files, self.spans, block_size, self.vocab_size)

    @cached_property
    def stats(self) -> DatasetStats:
        """The numbers of files and tokens."""
        lengths = np.array([span.length for span in self.spans])
        held_out = np.array([span.held_out for span in self.spans])
        return DatasetStats(
            files=len(self.files),
            file_bytes=sum(file.size for file in self.files),
            rows=0,
            **tokens_of_splits(lengths, held_out),
        )

    @property
    def _test_fraction(self) -> float | None:
        """None if it has no effect."""
        return None if self.val_files else self.config.test_fraction

    @cached_property
    def fingerprint(self) -> str:
        """Identifies sizes, dtypes and samples of the files, tokenizer, split and rules."""
        # Samples of the content, no names: moving files changes nothing, other tokens do.
        rules = (_FORMAT_VERSION, MAX_SEGMENTS)
        what = (rules, self.tokenizer.fingerprint, self._test_fraction, len(self.train_files))
        files = [(file.size, file.start, str(file.dtype), file.digest) for file in self.files]
        return hashlib.blake2b(repr((what, files)).encode()).hexdigest()[:32]

    def split_setting(self, split: str) -> str:
        """Returns the path of a split and, if it is a part of the files, the option for that."""
        is_val = bool(self.val_files) and split == "test"
        path, files = self.paths[is_val], self.val_files if is_val else self.train_files
        among = f": {len(files):,} files, each taken alone" if len(files) > 1 else ""
        rest = "" if self.val_files else f", dataset.test_fraction {self._test_fraction}"
        return f"{path}{among}{rest}"

    def lines(self) -> list[str]:
        """Returns lines on the numbers of tokens, and what was found out about the files."""
        return [
            "Loading data with memory mapping...",
            f"Train data size: {self.stats.train_tokens:,} tokens",
            f"Validation data size: {self.stats.test_tokens:,} tokens",
            *self.notes,
        ]

    def details(self) -> dict[str, Any]:
        """Returns plain values that describe the files."""
        is_listed = len(self.files) <= _LISTED_FILES
        return {
            "train_data_path": self.paths[0],
            "val_data_path": self.paths[1],
            "tokenizer": self.tokenizer.fingerprint,
            "test_fraction": self._test_fraction,
            "files": len(self.files),
            "file_bytes": self.stats.file_bytes,
            "tokens": self.stats.tokens,
            "train": _listed(self.train_files) if is_listed else None,
            "val": _listed(self.val_files) if is_listed else None,
            **remote_details(self.remote),
        }

    def difference(self, saved: dict[str, Any]) -> str:
        """Returns the first difference from the details of other token files."""
        now = self.details()
        for role, files in (("train", self.train_files), ("val", self.val_files)):
            then = saved[role]
            if then is None or now[role] is None:
                continue
            if len(then) != len(files):
                return f"{role} had {len(then)} files, has {len(files)}"
            for (_, size, dtype, digest), file in zip(then, files, strict=True):
                if size != file.size:
                    return f"{file.path} had {size} bytes, has {file.size}"
                if dtype != str(file.dtype):
                    return f"{file.path} was read as {dtype}, is read as {file.dtype}"
                if digest != file.digest:
                    return f"{file.path} has the size it had, but other tokens"
        for key in ("tokenizer", "test_fraction", "files", "file_bytes", "tokens"):
            if saved[key] != now[key]:
                return f"{key} was {saved[key]}, is {now[key]}"
        return "same sizes, but other tokens"


def check_split(dataset: TokenDataset) -> None:
    """Raises DataError if nothing can be held out, or if a file is in both splits."""
    train, val = (
        {os.path.realpath(file.path) for file in files}
        for files in (dataset.train_files, dataset.val_files)
    )
    if train & val:
        raise DataError(
            f"{min(train & val)}: both trained on and held out. Name other files in "
            "dataset.val_data_path, or leave it out to hold out dataset.test_fraction."
        )
    stats, splits = dataset.stats, not dataset.val_files and dataset.config.test_fraction > 0
    if splits and min(stats.train_tokens, stats.test_tokens) < 2:
        raise DataError(
            f"{dataset.paths[0]}: {stats.tokens:,} tokens are too few to hold out "
            f"dataset.test_fraction {dataset.config.test_fraction} of them. Add text, name a "
            "dataset.val_data_path, or set dataset.test_fraction: 0"
        )


def _listed(files: Sequence[TokenFile]) -> list[list[Any]]:
    """Returns name, size, dtype and digest of each file."""
    return [[os.path.basename(f.path), f.size, str(f.dtype), f.digest] for f in files]


@dataclass(frozen=True, eq=False)
class TokenSegments:
    """Rows of block_size + 1 tokens; a segment is one row or, of large data, a few successive ones.

    With T = block_size, a span of n tokens has (n - T) // T rows in every epoch, at least one if it
    holds T + 1 tokens. They lie side by side from an offset on that changes with the epoch:

        span      . . . | T | T | T | T | . .      up to 2 T - 2 tokens at its ends are left out,
                  offset                           other ones in each epoch

    Without shuffling, and for evaluation, the offset is 0. No row crosses the end of a span.
    """

    files: tuple[TokenFile, ...]
    spans: tuple[TokenSpan, ...]
    """Those to train on first."""
    block_size: int
    vocab_size: int
    whole_rows = True

    @cached_property
    def rows(self) -> list[int]:
        """The number of rows of each span."""
        return [count_rows(span.length, self.block_size) for span in self.spans]

    @cached_property
    def segment_rows(self) -> int:
        """The successive rows of a segment; the last one of a span may have fewer."""
        return max(1, -(-sum(self.rows) // MAX_SEGMENTS))

    @cached_property
    def bounds(self) -> list[int]:
        """The number of segments before each span, and that of all."""
        segments = (-(-rows // self.segment_rows) for rows in self.rows)
        return list(accumulate(segments, initial=0))

    @property
    def _train_segments(self) -> int:
        held_out = sum(span.held_out for span in self.spans)
        return self.bounds[len(self.spans) - held_out]

    @property
    def shuffle_keys(self) -> Keys:
        """The key of each segment, from split and number: names of files do not matter."""
        train, segments = self._train_segments, self.bounds[-1]
        splits = np.repeat(path_keys(("train", "val")), (train, segments - train))
        numbers = np.concatenate((np.arange(train), np.arange(segments - train)))
        return numbered_keys(splits, numbers)

    @property
    def held_out(self) -> Booleans:
        """The segments of the spans held out."""
        return np.arange(self.bounds[-1]) >= self._train_segments

    @property
    def tokens(self) -> None:
        """None: segments are equal, so lanes need no balancing."""

    def epoch_tokens(self, version: int) -> int:
        """Returns the tokens of all rows to train on, as inputs; targets add one per segment."""
        del version
        return int((self.sizes[~self.held_out] - 1).sum())

    @property
    def sizes(self) -> Integers:
        """The exact number of tokens in each segment."""
        rows = np.full(self.bounds[-1], self.segment_rows)
        for end, count in zip(self.bounds[1:], self.rows, strict=True):
            if count:
                rows[end - 1] = (count - 1) % self.segment_rows + 1
        return rows * self.block_size + 1

    def span_of(self, segment: int, seed: int, epoch: int, shuffle: bool) -> tuple[int, int, int]:
        """Returns the file, the first token and the number of tokens of a segment in an epoch."""
        number, block_size = bisect_right(self.bounds, segment) - 1, self.block_size
        file, first, length, _ = self.spans[number]
        rows, rows_before = self.rows[number], (segment - self.bounds[number]) * self.segment_rows
        # The same hash for all spans of an epoch; spans differ in what is left over.
        offset = row_offset_hash(seed, epoch, shuffle) % (length - rows * block_size)
        count = min(self.segment_rows, rows - rows_before) * block_size + 1
        return file, first + offset + rows_before * block_size, count

    def open_reader(self) -> TokenReader:
        """Returns a new reader."""
        return TokenReader(self)


def count_rows(tokens: int, block_size: int) -> int:
    """Returns the rows that a span has at every offset."""
    return max((tokens - block_size) // block_size, int(tokens > block_size))


class TokenReader:
    """Reads rows of token files."""

    def __init__(self, segments: TokenSegments) -> None:
        self._segments, self._maps = segments, TokenMaps(segments.files, segments.vocab_size)
        self._dtype = storage_dtype(segments.vocab_size)
        self.skipped_counts = Counter[str]()

    def tokens(self, segment: int, seed: int, epoch: int, shuffle: bool) -> Tokens:
        """Returns the tokens of a segment; raises DataError as TokenMaps.read does."""
        tokens = self._maps.read(*self._segments.span_of(segment, seed, epoch, shuffle))
        return tokens.astype(self._dtype)  # a copy, as the map may be closed

    def prefetch(self, lane: int, segments: Iterable[int]) -> None:
        """Does nothing: token files are on this machine."""

    def locate(
        self, segment: int, seed: int, epoch: int, shuffle: bool, tokens: range
    ) -> list[Stored]:
        """Returns the file and the numbers of these tokens of a segment."""
        file, first, _ = self._segments.span_of(segment, seed, epoch, shuffle)
        place = f"{self._segments.files[file].path} tokens"
        return [Stored(tokens, place, range(first + tokens.start, first + tokens.stop))]

    def find(
        self, segment: int, seed: int, epoch: int, shuffle: bool, passage: Passage
    ) -> list[Stored]:
        """Returns where the tokens of a text follow each other in a segment. A text that crosses
        its end, or was encoded together with its neighbours, is not found."""
        tokens, count = self.tokens(segment, seed, epoch, shuffle), len(passage.ids)
        begins = np.flatnonzero(tokens[: len(tokens) - count + 1] == passage.ids[0])
        found = list[Stored]()
        for begin in begins.tolist():
            if np.array_equal(tokens[begin : begin + count], passage.ids):
                own = range(begin, begin + count)
                found += self.locate(segment, seed, epoch, shuffle, own)
        return found

    def close(self) -> None:
        """Closes all files."""
        self._maps.close()

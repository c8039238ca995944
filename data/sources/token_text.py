"""Token files as the text of a run: their rows, split, size and identity.

The one idea: a row is T + 1 successive tokens of one file, rows are shuffled one by one, and in
every epoch they are cut at other places. The name of a row is its number, so the data is the same
wherever its files lie and whatever they are called.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from config import DataError, DatasetConfig, token_paths
from data.loading.order import Integers, Keys, Tokens, combine, cut_hash, path_keys
from data.sources.base import DatasetStats, Reader, token_counts
from data.sources.token_file import TokenFile, TokenMaps
from data.tokenizers.base import Tokenizer, storage_dtype

MAX_UNITS = 1 << 21  # more rows than these share units, so that a plan takes megabytes
_FORMAT_VERSION = 2
_LISTED_FILES = 1000


class Stretch(NamedTuple):
    """Successive tokens of one file that are of one split."""

    file: int
    first: int
    length: int
    held_out: bool


@dataclass(frozen=True, eq=False)
class TokenText:
    """Token files of training and, perhaps, of held-out text."""

    train_files: tuple[TokenFile, ...]
    val_files: tuple[TokenFile, ...]
    """None: part of the others is held out."""
    tokenizer: Tokenizer
    config: DatasetConfig
    notes: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, str | None]:
        """Of training and held-out text, as the config gives them."""
        paths = token_paths(self.config)
        assert paths is not None
        return paths

    @property
    def files(self) -> tuple[TokenFile, ...]:
        """The files of both."""
        return self.train_files + self.val_files

    @cached_property
    def stretches(self) -> tuple[Stretch, ...]:
        """Those to train on, then those held out: the second files, or the end of each file.

        The end is what remains of n tokens behind the first int(n * (1 - test_fraction)).
        """
        files = list(enumerate(self.files))
        if self.val_files:
            between = len(self.train_files)
            return tuple(Stretch(i, 0, file.count, i >= between) for i, file in files)
        kept = [int(file.count * (1 - self.config.test_fraction)) for _, file in files]
        train = [Stretch(i, 0, kept[i], False) for i, _ in files]
        ends = [Stretch(i, kept[i], file.count - kept[i], True) for i, file in files]
        return (*train, *ends)

    def units(self, block_size: int) -> RowUnits:
        """The rows of block_size + 1 tokens."""
        return RowUnits(self.files, self.stretches, block_size, self.tokenizer.vocab_size)

    @cached_property
    def stats(self) -> DatasetStats:
        """What it amounts to."""
        lengths = np.array([stretch.length for stretch in self.stretches])
        held_out = np.array([stretch.held_out for stretch in self.stretches])
        return DatasetStats(
            files=len(self.files),
            file_bytes=sum(file.size for file in self.files),
            rows=0,
            skipped_files=(),
            **token_counts(lengths, held_out),
        )

    @property
    def _test_fraction(self) -> float | None:
        """None where it says nothing."""
        return None if self.val_files else self.config.test_fraction

    @cached_property
    def fingerprint(self) -> str:
        """Sizes, dtypes and samples in the order of the files, tokenizer, split, and rules."""
        rules = (_FORMAT_VERSION, MAX_UNITS)
        what = (rules, self.tokenizer.fingerprint, self._test_fraction, len(self.train_files))
        files = [(file.size, file.start, str(file.dtype), file.digest) for file in self.files]
        return hashlib.blake2b(repr((what, files)).encode()).hexdigest()[:32]

    def origin(self, split: str) -> str:
        """What decides how long the text of a split is."""
        second = self.val_files and split == "test"
        path, files = self.paths[bool(second)], self.val_files if second else self.train_files
        among = f": {len(files):,} files, each taken alone" if len(files) > 1 else ""
        rest = "" if self.val_files else f", dataset.test_fraction {self._test_fraction}"
        return f"{path}{among}{rest}"

    def lines(self) -> list[str]:
        """How many tokens, and what was found out about them."""
        return [
            "Loading data with memory mapping...",
            f"Train data size: {self.stats.train_tokens:,} tokens",
            f"Validation data size: {self.stats.test_tokens:,} tokens",
            *self.notes,
        ]

    def summary(self) -> dict[str, Any]:
        """Plain values that describe it."""
        listed = len(self.files) <= _LISTED_FILES
        return {
            "train_data_path": self.paths[0],
            "val_data_path": self.paths[1],
            "tokenizer": self.tokenizer.fingerprint,
            "test_fraction": self._test_fraction,
            "files": len(self.files),
            "file_bytes": self.stats.file_bytes,
            "tokens": self.stats.tokens,
            "train": _described(self.train_files) if listed else None,
            "val": _described(self.val_files) if listed else None,
        }

    def difference(self, saved: dict[str, Any]) -> str:
        """The first difference from the summary of other token files."""
        now = self.summary()
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


def check_split(text: TokenText) -> None:
    """Raises DataError where nothing can be held out, or what is trained on would be."""
    both = {os.path.realpath(file.path) for file in text.train_files} & {
        os.path.realpath(file.path) for file in text.val_files
    }
    if both:
        raise DataError(
            f"{sorted(both)[0]}: both trained on and held out. Name other files in "
            "dataset.val_data_path, or leave it out to hold out dataset.test_fraction."
        )
    stats, splits = text.stats, not text.val_files and text.config.test_fraction > 0
    if splits and min(stats.train_tokens, stats.test_tokens) < 2:
        raise DataError(
            f"{text.paths[0]}: {stats.tokens:,} tokens are too few to hold out "
            f"dataset.test_fraction {text.config.test_fraction} of them. Add text, name a "
            "dataset.val_data_path, or set dataset.test_fraction: 0"
        )


def _described(files: Sequence[TokenFile]) -> list[list[Any]]:
    """Name, size, dtype and digest of each."""
    return [[os.path.basename(f.path), f.size, str(f.dtype), f.digest] for f in files]


@dataclass(frozen=True, eq=False)
class RowUnits:
    """Rows of block_size + 1 tokens, none of which joins two stretches; a unit is one or some.

    T being block_size, a stretch of n tokens gives (n - T) // T rows in every epoch, at least one
    where it holds T + 1 tokens. They lie side by side from a cut on that moves with the epoch, so
    up to 2 T - 2 tokens before and behind them are left out, others in each epoch, and each token
    is read in some. Without shuffling, and for evaluation, the cut is the begin of the stretch.
    """

    files: tuple[TokenFile, ...]
    stretches: tuple[Stretch, ...]
    """Those to train on first."""
    block_size: int
    vocab_size: int
    whole_rows = True

    @cached_property
    def rows(self) -> list[int]:
        """How many rows each stretch gives."""
        return [count_rows(stretch.length, self.block_size) for stretch in self.stretches]

    @cached_property
    def unit_rows(self) -> int:
        """How many successive rows a unit is; the last one of a stretch may be fewer."""
        return max(1, -(-sum(self.rows) // MAX_UNITS))

    @cached_property
    def bounds(self) -> list[int]:
        """The number of units before each stretch, and that of all."""
        units = (-(-rows // self.unit_rows) for rows in self.rows)
        return list(accumulate(units, initial=0))

    @property
    def _train_units(self) -> int:
        held_out = sum(stretch.held_out for stretch in self.stretches)
        return self.bounds[len(self.stretches) - held_out]

    @property
    def block(self) -> Keys:
        """Every unit is a block; keys are of role and number, so names do not matter."""
        train, units = self._train_units, self.bounds[-1]
        names = np.repeat(path_keys(("train", "val")), (train, units - train))
        return combine(names, np.concatenate((np.arange(train), np.arange(units - train))))

    @property
    def held_out(self) -> npt.NDArray[np.bool_]:
        """The units of the stretches held out."""
        return np.arange(self.bounds[-1]) >= self._train_units

    @property
    def tokens(self) -> None:
        """Rows are equal."""

    def epoch_tokens(self, version: int) -> int:
        """The tokens of all rows to train on; one more lies behind each unit."""
        del version
        return int((self.sizes[~self.held_out] - 1).sum())

    @property
    def sizes(self) -> Integers:
        """How many tokens each unit holds."""
        rows = np.full(self.bounds[-1], self.unit_rows)
        for end, count in zip(self.bounds[1:], self.rows, strict=True):
            if count:
                rows[end - 1] = (count - 1) % self.unit_rows + 1
        return rows * self.block_size + 1

    def reader(self) -> Reader:
        """A new reader."""
        return TokenReader(self)


def count_rows(tokens: int, block_size: int) -> int:
    """The rows that a stretch gives wherever its first one is cut."""
    return max((tokens - block_size) // block_size, int(tokens > block_size))


class TokenReader:
    """Reads rows of token files."""

    def __init__(self, units: RowUnits) -> None:
        self._units, self._maps = units, TokenMaps(units.files, units.vocab_size)
        self._dtype = storage_dtype(units.vocab_size)
        self.counts: Counter[str] = Counter()

    def _place(self, unit: int, seed: int, epoch: int, shuffle: bool) -> tuple[int, int, int]:
        """File, first token and number of tokens of a unit."""
        units = self._units
        number, block_size = bisect_right(units.bounds, unit) - 1, units.block_size
        file, first, length, _ = units.stretches[number]
        rows, before = units.rows[number], (unit - units.bounds[number]) * units.unit_rows
        first += cut_hash(seed, epoch, shuffle) % (length - rows * block_size) + before * block_size
        return file, first, min(units.unit_rows, rows - before) * block_size + 1

    def tokens(self, unit: int, seed: int, epoch: int, shuffle: bool) -> Tokens:
        """The tokens of a unit as they lie in the file; raises DataError as TokenMaps.read does."""
        tokens = self._maps.read(*self._place(unit, seed, epoch, shuffle))
        return tokens.astype(self._dtype)  # a copy, as the map may go

    def places(
        self, unit: int, seed: int, epoch: int, shuffle: bool, tokens: range
    ) -> tuple[str, list[range]]:
        """File and number of these tokens of the unit."""
        file, first, _ = self._place(unit, seed, epoch, shuffle)
        path = self._units.files[file].path
        return f"{path} tokens", [range(first + tokens.start, first + tokens.stop)]

    def close(self) -> None:
        """Close all files."""
        self._maps.close()

"""Token files as the text of a run: their units, split, size and identity.

The one idea: the name of a unit is its number, so the data is the same wherever its files lie and
whatever they are called. Every unit is held against the vocabulary when it is read, because files
without a header cannot say what they hold.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from config import DataError, DatasetConfig, token_paths
from data.dataset import Ledger, Reader, unit_counts
from data.memmap import TokenFile
from data.order import MIN_UNITS, Integers, Keys, Tokens, combine, path_keys, split_units
from data.tokenizer import Tokenizer, storage_dtype

UNIT_TOKENS, LEAST_UNIT_TOKENS = 1 << 16, 1 << 10
_FORMAT_VERSION = 1
_LISTED_FILES = 1000


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
    def _units(self) -> tuple[Integers, Integers, Integers, Keys]:
        """The file, first token, number of tokens and key of each unit."""
        roles = [_cut(files, role) for role, files in enumerate((self.train_files, self.val_files))]
        file, first, count, key = (np.concatenate(each) for each in zip(*roles, strict=True))
        file[len(roles[0][0]) :] += len(self.train_files)
        return file, first, count, key

    @property
    def block(self) -> Keys:
        """Every unit is a block."""
        return self._units[3]

    @property
    def sizes(self) -> Integers:
        """How many tokens each unit holds."""
        return self._units[2]

    @cached_property
    def held_out(self) -> npt.NDArray[np.bool_]:
        """The units of the second text, or a share of the first."""
        if self.val_files:
            return self._units[0] >= len(self.train_files)
        return split_units(self.block, self.sizes, self.config.test_fraction)

    @cached_property
    def ledger(self) -> Ledger:
        """What it amounts to."""
        return Ledger(
            files=len(self.files),
            file_bytes=sum(file.size for file in self.files),
            rows=0,
            skipped_files=(),
            exact=True,
            **unit_counts(self.sizes, self.held_out),
        )

    @property
    def _test_fraction(self) -> float | None:
        """None where it says nothing."""
        return None if self.val_files else self.config.test_fraction

    @cached_property
    def fingerprint(self) -> str:
        """Sizes, dtypes and samples in the order of the files, tokenizer, split, and the units."""
        rules = (_FORMAT_VERSION, UNIT_TOKENS, LEAST_UNIT_TOKENS, MIN_UNITS)
        what = (rules, self.tokenizer.fingerprint, self._test_fraction, len(self.train_files))
        files = [(file.size, file.start, str(file.dtype), file.digest) for file in self.files]
        return hashlib.blake2b(repr((what, files)).encode()).hexdigest()[:32]

    def reader(self) -> Reader:
        """A new reader."""
        file, first, count, _ = self._units
        return TokenReader(self.files, np.stack((file, first, count)), self.tokenizer.vocab_size)

    def origin(self, split: str) -> str:
        """What decides how long the text of a split is."""
        if not self.val_files:
            return f"{self.paths[0]}, dataset.test_fraction {self._test_fraction}"
        return {"train": self.paths[0], "test": str(self.paths[1])}[split]

    def lines(self) -> list[str]:
        """How many tokens, and what was found out about them."""
        return [
            "Loading data with memory mapping...",
            f"Train data size: {self.ledger.train_tokens:,} tokens",
            f"Validation data size: {self.ledger.test_tokens:,} tokens",
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
            "file_bytes": self.ledger.file_bytes,
            "tokens": self.ledger.tokens,
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
    if text.config.test_fraction > 0 and not text.held_out.any():
        raise DataError(
            f"{text.paths[0]}: {text.ledger.tokens:,} tokens are too few to hold out "
            f"dataset.test_fraction {text.config.test_fraction} of them. Add text, name a "
            "dataset.val_data_path, or set dataset.test_fraction: 0"
        )


def _described(files: Sequence[TokenFile]) -> list[list[Any]]:
    """Name, size, dtype and digest of each."""
    return [[os.path.basename(f.path), f.size, str(f.dtype), f.digest] for f in files]


def _cut(files: Sequence[TokenFile], role: int) -> tuple[Integers, Integers, Integers, Keys]:
    """Equal units of about UNIT_TOKENS, of less where the text is short; none joins two files.

    The keys are of the role and the number of the unit, so names and folders do not matter.
    """
    counts = np.array([file.count for file in files], dtype=np.int64)
    height = min(max(int(counts.sum()) // MIN_UNITS, LEAST_UNIT_TOKENS), UNIT_TOKENS)
    parts = -(-counts // height)
    file = np.repeat(np.arange(len(files)), parts)
    number = np.arange(len(file)) - np.repeat(np.cumsum(parts) - parts, parts)
    each = -(-counts // parts)
    first = number * each[file]
    count = np.minimum(each[file], counts[file] - first)
    names = path_keys([("train", "val")[role]])
    return file, first, count, combine(np.repeat(names, len(file)), np.arange(len(file)))


class TokenReader:
    """Reads units of token files, rows of (file, first token, number of tokens)."""

    def __init__(
        self, files: Sequence[TokenFile], units: npt.NDArray[np.int64], vocab_size: int
    ) -> None:
        self._files, self._units, self._vocab_size = files, units, vocab_size
        self._dtype = storage_dtype(vocab_size)
        self.counts: Counter[str] = Counter()

    def tokens(self, unit: int, seed: int, epoch: int, shuffle: bool) -> Tokens:
        """The tokens of a unit as they lie in the file, in every epoch.

        Raises DataError naming file, place and value of a token that the vocabulary does not have.
        """
        number, first, count = self._units[:, unit].tolist()
        tokens = self._files[number].read(first, count)
        self._check(tokens, self._files[number], first)
        return np.asarray(tokens, dtype=self._dtype)

    def _check(self, tokens: Tokens, file: TokenFile, first: int) -> None:
        below = tokens.dtype.kind == "i" and int(tokens.min()) < 0
        if int(tokens.max()) < self._vocab_size and not below:
            return
        place = int(np.flatnonzero((tokens < 0) | (tokens >= self._vocab_size))[0])
        value, number = int(tokens[place]), first + place
        fault = "is below 0" if value < 0 else f"is not below the vocabulary's {self._vocab_size}"
        raise DataError(
            f"{file.path}: token {value} at offset {file.start + number * file.dtype.itemsize} "
            f"(token number {number}) {fault}. Wrong token_dtype ({file.dtype}) or "
            "model.vocab_size?"
        )

    def places(
        self, unit: int, seed: int, epoch: int, shuffle: bool, tokens: range
    ) -> tuple[str, list[range]]:
        """File and number of these tokens of the unit."""
        number, first, _ = self._units[:, unit].tolist()
        path = self._files[number].path
        return f"{path} tokens", [range(first + tokens.start, first + tokens.stop)]

    def close(self) -> None:
        """Nothing is kept open."""

"""The text of a run: which units train, which test, and what identifies them.

The one idea: everything here follows from the footers and the config alone. The split does not
depend on the training seed, so runs with different seeds are comparable, and the fingerprint in a
checkpoint tells at resume, before any text is read, whether the data is still the same.
"""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from config import DataError, DatasetConfig, TokenizerConfig
from data.index import (
    MIN_UNITS,
    UNIT_BYTES,
    UNIT_ROWS,
    Index,
    Integers,
    Units,
    build_index,
    cut_units,
)
from data.order import count_blocks, epoch_order, lane_of, split_units
from data.tokenizer import build_tokenizer

log = logging.getLogger(__name__)

_FORMAT_VERSION = 1
_LISTED_FILES = 1000
_NULL_LIMIT = 0.5
_LARGE_GROUP_BYTES = 32 << 20
_LENGTH_PREFIX_BYTES = 4  # parquet stores each string with its length; a document ends with 1 token


@dataclass(frozen=True, slots=True)
class Ledger:
    """What the data amounts to; tokens are estimates from the footers (exact for plain pages)."""

    files: int
    file_bytes: int
    row_groups: int
    rows: int
    null_rows: int
    tokens: int
    units: int
    train_units: int
    train_tokens: int
    test_units: int
    test_tokens: int
    skipped_files: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Dataset:
    """An indexed and split directory of parquet files; immutable and shared by all readers."""

    index: Index
    units: Units
    train: Integers
    test: Integers
    ledger: Ledger
    config: DatasetConfig
    tokenizer: str
    fingerprint: str

    def split(self, name: str) -> Integers:
        """The units of "train" or "test"."""
        return {"train": self.train, "test": self.test}[name]

    def summary(self) -> dict[str, Any]:
        """Plain values that identify the data, for a checkpoint."""
        sizes = dict(zip(self.index.paths, self.index.sizes.tolist(), strict=True))
        return {
            "fingerprint": self.fingerprint,
            "parquet_dir": self.index.root,
            "text_column": self.index.column,
            "tokenizer": self.tokenizer,
            "test_fraction": self.config.test_fraction,
            "files": self.ledger.files,
            "file_bytes": self.ledger.file_bytes,
            "rows": self.ledger.rows,
            "sizes": sizes if len(sizes) <= _LISTED_FILES else None,
        }

    def check_unchanged(self, saved: dict[str, Any]) -> None:
        """Raises DataError naming the first difference from the `summary` of a checkpoint."""
        if saved["fingerprint"] == self.fingerprint:
            return
        raise DataError(
            f"The data is not what the checkpoint was trained on: {self._difference(saved)}. "
            "Restore it, or start a new run without resume_from_checkpoint."
        )

    def _difference(self, saved: dict[str, Any]) -> str:
        now = self.summary()
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


class Plan:
    """The order of a split's units over `lanes` lanes; pure, computed epoch by epoch."""

    def __init__(
        self, units: Units, chosen: Integers, lanes: int, seed: int, shuffle: bool
    ) -> None:
        self.lanes, self.seed, self.shuffle = lanes, seed, shuffle
        self._chosen = chosen
        self._blocks = units.block[chosen]
        self._epochs: dict[int, list[Integers]] = {}

    def lane_units(self, epoch: int, lane: int) -> Integers:
        """The units of a lane in one epoch, in reading order."""
        if epoch not in self._epochs:
            while len(self._epochs) >= 2:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = self._order(epoch)
        return self._epochs[epoch][lane]

    def _order(self, epoch: int) -> list[Integers]:
        order = epoch_order(self._blocks, self.seed, epoch, self.shuffle)
        lane = lane_of(self._blocks[order], self.lanes)
        return [self._chosen[order[lane == v]] for v in range(self.lanes)]


def open_dataset(dataset: DatasetConfig, tokenizer: TokenizerConfig) -> Dataset:
    """Index and split the parquet files of the config; reads footers only.

    Raises DataError for data that cannot be used, naming the file, what was found and the remedy.
    """
    index = build_index(dataset.parquet_dir, dataset.text_column, dataset.on_bad_shard == "skip")
    _check_rows(index)
    _check_row_groups(index)
    units = cut_units(index)
    held_out = split_units(units.block, units.bytes, dataset.test_fraction)
    if dataset.test_fraction > 0 and not held_out.any():
        raise DataError(
            f"dataset.parquet_dir '{index.root}': {index.groups[:, 0].sum()} row cannot be split "
            "into training and test text. Add documents (python prepare.py cuts long texts), "
            "or set dataset.test_fraction: 0"
        )
    train, test = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    token_name = build_tokenizer(tokenizer).fingerprint
    return Dataset(
        index=index,
        units=units,
        train=train,
        test=test,
        ledger=_count(index, units, train, test),
        config=dataset,
        tokenizer=token_name,
        fingerprint=_fingerprint(index, dataset, token_name),
    )


def _check_rows(index: Index) -> None:
    rows, nulls = index.groups[:, 0].sum(), np.maximum(index.groups[:, 3], 0).sum()
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


def _check_row_groups(index: Index) -> None:
    """A warning where reaching a part of a row group means decoding much of the rest again."""
    rows, sizes = index.groups[:, 0], index.groups[:, 2]
    sizes = np.where(rows > 1, sizes, 0)  # one row is read whole
    large = int((sizes > _LARGE_GROUP_BYTES).sum())
    if large:
        largest = int(sizes.argmax())
        option = "" if index.column == "text" else f" --text-column {index.column}"
        log.warning(
            "%d of %d row groups hold more than %d MB, the largest %.0f MB (%s): reading is slow, "
            "as parts of them are decoded again and again. Rewrite the data in small row groups: "
            "python prepare.py %s OUT%s",
            large,
            len(sizes),
            _LARGE_GROUP_BYTES >> 20,
            sizes[largest] / (1 << 20),
            index.group_name(largest),
            index.root,
            option,
        )


def _count(index: Index, units: Units, train: Integers, test: Integers) -> Ledger:
    tokens = np.maximum(units.bytes - (_LENGTH_PREFIX_BYTES - 1) * units.rows, 0)
    return Ledger(
        files=len(index.paths),
        file_bytes=int(index.sizes.sum()),
        row_groups=len(index.groups),
        rows=int(index.groups[:, 0].sum()),
        null_rows=int(np.maximum(index.groups[:, 3], 0).sum()),
        tokens=int(tokens.sum()),
        units=len(units),
        train_units=len(train),
        train_tokens=int(tokens[train].sum()),
        test_units=len(test),
        test_tokens=int(tokens[test].sum()),
        skipped_files=index.skipped,
    )


def _fingerprint(index: Index, config: DatasetConfig, tokenizer: str) -> str:
    """Paths, sizes, row groups, column, tokenizer, split and the rule that cuts units."""
    rules = (_FORMAT_VERSION, UNIT_BYTES, UNIT_ROWS, MIN_UNITS)
    digest = hashlib.blake2b(repr((rules, index.column, tokenizer, config.test_fraction)).encode())
    digest.update(os.fsencode("\0".join(index.paths)))
    for table in (index.sizes, index.group_counts, index.groups[:, :3]):
        digest.update(np.ascontiguousarray(table, dtype="<i8").tobytes())
    return digest.hexdigest()[:32]


def training_blocks(dataset: Dataset) -> int:
    """How many pieces of training text can be read side by side."""
    return count_blocks(dataset.units.block[dataset.train])

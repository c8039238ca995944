"""A folder of parquet files as the text of a run: its units, split, size and identity.

The one idea: everything here but the number of tokens follows from the footers, the config and the
tokenizer. The fingerprint in a checkpoint tells at resume, before any text is read, whether the
data is the same.
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
from data.loading.order import MIN_UNITS, Integers, Keys, split_units
from data.sources.base import PLAN_VERSION, DatasetStats, Reader, token_counts
from data.sources.counting import TokenCounts, count_tokens
from data.sources.parquet_index import (
    ENCODED_UNIT_BYTES,
    UNIT_BYTES,
    UNIT_ROWS,
    Index,
    Units,
    cache_path,
    cut_units,
    index_digest,
    load_arrays,
    save_arrays,
)
from data.sources.parquet_reader import DocumentReader, UnitReader, text_bytes
from data.tokenizers.base import Tokenizer
from data.tokenizers.simple import ByteTokenizer
from settings.formatting import format_count

log = logging.getLogger(__name__)

_FORMAT_VERSION = 1
_LISTED_FILES = 1000
_NULL_LIMIT = 0.5
_LARGE_GROUP_BYTES = 32 << 20
_LENGTH_PREFIX_BYTES = 4  # parquet stores each string with its length
_SAMPLE_UNITS, _SAMPLE_BYTES = 16, 1 << 16  # of each unit


@dataclass(frozen=True, eq=False)
class ParquetText:
    """The documents of a folder, encoded as they are read."""

    index: Index
    slices: Units
    tokenizer: Tokenizer
    config: DatasetConfig
    whole_rows = False

    def units(self, block_size: int) -> ParquetText:
        """Itself: documents are not cut into rows before they are read."""
        del block_size
        return self

    @property
    def block(self) -> Keys:
        """The key of each unit's block."""
        return self.slices.block

    @cached_property
    def held_out(self) -> npt.NDArray[np.bool_]:
        """Which units are for testing; the same for every tokenizer that takes such units."""
        return split_units(self.slices.block, self.slices.bytes, self.config.test_fraction)

    @cached_property
    def sizes(self) -> Integers:
        """About how many tokens each unit gives, or somewhat more."""
        return self.slices.bytes if self._tokens_are_bytes else self._estimates

    @cached_property
    def counts(self) -> TokenCounts:
        """How many tokens each unit gives; the text is read for it, once."""
        return count_tokens(self.index, self.slices, self.tokenizer, self.config)

    @property
    def tokens(self) -> Integers:
        """The tokens of each unit, as counted."""
        return self.counts.tokens

    def epoch_tokens(self, version: int) -> int:
        """The tokens to train on; plans of version 1 took them from the footers."""
        tokens = self.tokens if version == PLAN_VERSION else self._estimates
        return int(tokens[~self.held_out].sum())

    @property
    def _tokens_are_bytes(self) -> bool:
        return isinstance(self.tokenizer, ByteTokenizer)

    @cached_property
    def _estimates(self) -> Integers:
        """Tokens by the sizes in the footers, which are exact for bytes in plain pages only."""
        text = np.maximum(self.slices.bytes - _LENGTH_PREFIX_BYTES * self.slices.rows, 0)
        if not self._tokens_are_bytes:
            text = np.ceil(text * self._tokens_per_byte()).astype(np.int64)
        ends = 0 if self.tokenizer.separator is None else 1
        tokens: Integers = text + ends * self.slices.rows
        return tokens

    def _tokens_per_byte(self) -> float:
        """Of some documents here and there, without their separators."""
        starts = np.flatnonzero(
            self.slices.first == 0
        )  # cheaper than what lies deep in a row group
        among = starts if len(starts) >= _SAMPLE_UNITS else np.arange(len(self.slices))
        documents = self.documents()
        tokens = size = 0
        for place in np.linspace(0, len(among) - 1, _SAMPLE_UNITS).astype(np.int64):
            texts, _ = documents.read(int(among[place]), 0, 0, False)
            enough = size + _SAMPLE_BYTES
            for text in texts:
                if size >= enough:
                    break
                sample = text.as_py()[:_SAMPLE_BYTES]
                size += len(sample.encode())
                tokens += len(self.tokenizer.encode(sample))
        documents.close()
        return tokens / max(1, size)

    @cached_property
    def stats(self) -> DatasetStats:
        """What it amounts to."""
        index = self.index
        return DatasetStats(
            files=len(index.paths),
            file_bytes=int(index.sizes.sum()),
            rows=int(index.groups[:, 0].sum()),
            null_rows=int(np.maximum(index.groups[:, 3], 0).sum()),
            skipped_files=index.skipped,
            error=self.counts.error,
            **token_counts(self.tokens, self.held_out),
        )

    @cached_property
    def fingerprint(self) -> str:
        """Paths, sizes, row groups, column, tokenizer, split and the rule that cuts units."""
        index = self.index
        rules = (_FORMAT_VERSION, _unit_bytes(self.tokenizer), UNIT_ROWS, MIN_UNITS)
        name, fraction = self.tokenizer.fingerprint, self.config.test_fraction
        digest = hashlib.blake2b(repr((rules, index.column, name, fraction)).encode())
        digest.update(os.fsencode("\0".join(index.paths)))
        for table in (index.sizes, index.group_counts, index.groups[:, :3]):
            digest.update(np.ascontiguousarray(table, dtype="<i8").tobytes())
        return digest.hexdigest()[:32]

    def documents(self) -> DocumentReader:
        """A new reader of the text."""
        return DocumentReader(self.index, self.slices, self.config)

    def reader(self) -> Reader:
        """A new reader of the tokens."""
        return UnitReader(self.documents(), self.tokenizer)

    def origin(self, split: str) -> str:
        """What decides how long the text of a split is."""
        return f"dataset.test_fraction {self.config.test_fraction}"

    def lines(self) -> list[str]:
        """Files, rows and tokens."""
        stats = self.stats
        about, within = "", ""
        if stats.error:
            about, within = "about ", f" (estimated, to within {stats.error:.1%})"
        return [
            f"Data: {self.index.root}: {stats.files:,} files, {stats.rows:,} rows, {about}"
            f"{format_count(stats.tokens)} tokens{within}: "
            f"{format_count(stats.train_tokens)} to train on, "
            f"{format_count(stats.test_tokens)} held out",
            *unprotected_lines(self.index),
        ]

    def summary(self) -> dict[str, Any]:
        """Plain values that describe it."""
        index = self.index
        sizes = dict(zip(index.paths, index.sizes.tolist(), strict=True))
        return {
            "parquet_dir": index.root,
            "text_column": index.column,
            "tokenizer": self.tokenizer.fingerprint,
            "test_fraction": self.config.test_fraction,
            "files": len(index.paths),
            "file_bytes": int(index.sizes.sum()),
            "rows": int(index.groups[:, 0].sum()),
            "sizes": sizes if len(sizes) <= _LISTED_FILES else None,
        }

    def difference(self, saved: dict[str, Any]) -> str:
        """The first difference from the summary of another folder."""
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


def open_folder(index: Index, config: DatasetConfig, tokenizer: Tokenizer) -> ParquetText:
    """Cut and split the text of an index; DataError where it cannot be split."""
    units = cut_units(index, _unit_bytes(tokenizer))
    text = ParquetText(index, units, tokenizer, config)
    if config.test_fraction > 0 and not text.held_out.any():
        raise DataError(
            f"dataset.parquet_dir '{index.root}': {index.groups[:, 0].sum()} row cannot be split "
            "into training and test text. Add documents (python prepare.py cuts long texts), "
            "or set dataset.test_fraction: 0"
        )
    return text


def _unit_bytes(tokenizer: Tokenizer) -> int:
    return UNIT_BYTES if isinstance(tokenizer, ByteTokenizer) else ENCODED_UNIT_BYTES


def check_rows(index: Index) -> None:
    """Raises DataError where the column holds hardly any text, and warns of nulls."""
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


def check_row_groups(index: Index) -> None:
    """Warns where reaching a part of a row group means decoding much of the rest again."""
    rows, sizes = index.groups[:, 0], index.groups[:, 2]
    sizes = np.where(rows > 1, sizes, 0)  # one row is read whole
    large = int((sizes > _LARGE_GROUP_BYTES).sum())
    if large:
        largest = int(sizes.argmax())
        log.warning(
            "%d of %d row groups hold more than %d MB, the largest %.0f MB (%s): reading is slow, "
            "as parts of them are decoded again and again. Rewrite the data in small row groups: "
            "%s",
            large,
            len(sizes),
            _LARGE_GROUP_BYTES >> 20,
            sizes[largest] / (1 << 20),
            index.group_name(largest),
            _rewrite_command(index),
        )


def unprotected_lines(index: Index) -> list[str]:
    """A line on files without page checksums, if there are any."""
    count = int(index.unprotected.sum())
    if not count:
        return []
    first = index.path(int(index.unprotected.argmax()))
    return [
        f"Page checksums: none in {count:,} of {len(index.paths):,} files ({first}): damage to "
        f"their text may go unnoticed. To add them: {_rewrite_command(index)}"
    ]


def _rewrite_command(index: Index) -> str:
    """How the folder is written anew, in small row groups with page checksums."""
    option = [] if index.column == "text" else ["--text-column", index.column]
    return shlex.join(["python", "prepare.py", index.root, "OUT", *option])


def characters(index: Index, config: DatasetConfig) -> list[str]:
    """Every character of the text, in the order of code points; read once, then from the cache."""
    root = os.path.realpath(index.root)
    cache = cache_path("characters", root, index.column, index_digest(index))
    known = load_arrays(cache)
    if known is None:
        known = {"points": _code_points(index, config)}
        save_arrays(cache, known)
    return [chr(point) for point in known["points"]]


def _code_points(index: Index, config: DatasetConfig) -> npt.NDArray[np.uint32]:
    units = cut_units(index, UNIT_BYTES)
    documents = DocumentReader(index, units, config)
    seen = np.zeros(0x110000, dtype=np.bool_)
    for unit in range(len(units)):
        text, _ = documents.read(unit, 0, 0, False)
        if len(text):
            points = text_bytes(text).tobytes().decode().encode("utf-32-le")
            seen[np.frombuffer(points, dtype="<u4")] = True
    documents.close()
    return np.flatnonzero(seen).astype(np.uint32)

"""The text of a run, whatever it is kept in: units of two splits, behind one protocol.

The one idea: a source (a folder of parquet files, or token files) says what its units for rows of
T + 1 tokens are called and how large they are before it reads any. Order, lanes, data states and
resume need no more, so they are the same for every source, and a loader asks only for the tokens of
a unit. The split does not depend on the training seed, so runs with different seeds are comparable.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from config import DataError
from data.loading.order import (
    Integers,
    Keys,
    Tokens,
    balance,
    count_blocks,
    epoch_order,
    lane_of,
    lane_targets,
)
from data.tokenizers.base import Tokenizer

PLAN_VERSION = 2  # in version 1 lanes of documents were not balanced


@dataclass(frozen=True, slots=True)
class DatasetStats:
    """What the data amounts to; tokens may be off by the share `error`, 0 where counted."""

    files: int
    file_bytes: int
    rows: int  # documents; 0 in token files
    tokens: int
    train_tokens: int
    test_tokens: int
    error: float = 0.0
    null_rows: int = 0
    skipped_files: tuple[str, ...] = ()


class Reader(Protocol):
    """Reads the units of a source; of one thread."""

    counts: Counter[str]
    """What was left out or replaced so far, by kind."""

    def tokens(self, unit: int, seed: int, epoch: int, shuffle: bool) -> Tokens:
        """The tokens of a unit in one epoch, perhaps as a view of something larger.

        Raises DataError that names the file where they cannot be read.
        """

    def places(
        self, unit: int, seed: int, epoch: int, shuffle: bool, tokens: range
    ) -> tuple[str, list[range]]:
        """Where these tokens of the unit lie: what is counted, and the numbers of it."""

    def close(self) -> None:
        """Close all files."""


class Units(Protocol):
    """The pieces that a text is read in: fixed, shared by all readers."""

    @property
    def whole_rows(self) -> bool:
        """A unit is whole rows of block_size tokens, and the token after the last of them."""

    @property
    def block(self) -> Keys:
        """The key of each unit's block, for the hashes of `data.order`."""

    @property
    def sizes(self) -> Integers:
        """About how many tokens each unit gives; rows to evaluate are found by them."""

    @property
    def tokens(self) -> Integers | None:
        """How many tokens each unit gives, as well as is known; lanes are balanced by them.

        None where units are equal enough to be dealt out in turn.
        """

    @property
    def held_out(self) -> npt.NDArray[np.bool_]:
        """Which units are for testing."""

    def epoch_tokens(self, version: int) -> int:
        """The tokens of one pass over the training text, as plans of that version count them."""

    def reader(self) -> Reader:
        """A new reader."""


class Source(Protocol):
    """What holds the text: fixed once opened."""

    @property
    def stats(self) -> DatasetStats:
        """What it amounts to."""

    @property
    def fingerprint(self) -> str:
        """Identity of text, tokenizer, split and units: the same order of the same tokens."""

    def units(self, block_size: int) -> Units:
        """What rows of block_size + 1 tokens are read from."""

    def origin(self, split: str) -> str:
        """The option that decides how long the text of a split is, with its value."""

    def lines(self) -> list[str]:
        """What the start of a run says of it."""

    def summary(self) -> dict[str, Any]:
        """Plain values that describe it, for a checkpoint."""

    def difference(self, saved: dict[str, Any]) -> str:
        """The first difference from the `summary` of a source of the same kind."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """A source and what makes text of its tokens."""

    source: Source
    tokenizer: Tokenizer

    @property
    def vocab_size(self) -> int:
        """The rows that a model needs at least."""
        return self.tokenizer.vocab_size

    @property
    def stats(self) -> DatasetStats:
        """What the data amounts to."""
        return self.source.stats

    def epoch_tokens(self, block_size: int, version: int = PLAN_VERSION) -> int:
        """How many tokens one pass over the training text takes, in rows of so many."""
        return self.source.units(block_size).epoch_tokens(version)

    def lines(self) -> list[str]:
        """What the start of a run says of the data."""
        return self.source.lines()

    def summary(self) -> dict[str, Any]:
        """Plain values that identify the data, for a checkpoint."""
        return {"fingerprint": self.source.fingerprint, **self.source.summary()}

    def check_unchanged(self, saved: dict[str, Any]) -> None:
        """Raises DataError naming the first difference from the `summary` of a checkpoint."""
        now = self.summary()
        if saved["fingerprint"] == now["fingerprint"]:
            return
        kinds = [_kind(saved), _kind(now)]
        if kinds[0] != kinds[1]:
            difference = f"it was {kinds[0]}, is {kinds[1]}"
        else:
            try:
                difference = self.source.difference(saved)
            except (LookupError, TypeError, ValueError, AttributeError, RuntimeError):
                difference = "which one it was, the checkpoint does not tell"  # not by this program
        raise DataError(
            f"The data is not what the checkpoint was trained on: {difference}. "
            "Restore it, or start a new run without resume_from_checkpoint."
        )

    def too_short(self, split: str, block_size: int) -> DataError:
        """The error where a split has not one row of successive tokens."""
        stats = self.stats
        tokens = {"train": stats.train_tokens, "test": stats.test_tokens}[split]
        # An estimate may be above what was found to be too short.
        count = "" if stats.error else f"{tokens:,} tokens, "
        return DataError(
            f"the {split} text ({count}{self.source.origin(split)}) is shorter "
            f"than one row of training.block_size + 1 = {block_size + 1} tokens. "
            "Lower block_size, or give it more text."
        )


def _kind(summary: dict[str, Any]) -> str:
    for key, kind in (("parquet_dir", "parquet files of"), ("train_data_path", "token files of")):
        if key in summary:
            return f"{kind} {summary[key]}"
    return "of a kind not known here"


def token_counts(tokens: Integers, held_out: npt.NDArray[np.bool_]) -> dict[str, int]:
    """The counts of a DatasetStats that follow from the tokens of each piece and the split."""
    return {
        "tokens": int(tokens.sum()),
        "train_tokens": int(tokens[~held_out].sum()),
        "test_tokens": int(tokens[held_out].sum()),
    }


def split_of(units: Units, name: str) -> Integers:
    """The units of "train" or "test"."""
    held_out = {"train": False, "test": True}[name]
    return np.flatnonzero(units.held_out == held_out)


@dataclass(frozen=True, slots=True)
class _LanePlan:
    """The units of a lane in one epoch, in reading order.

    `cuts` holds (first, last, of so many) tokens of the units that the lane reads only a part of.
    """

    units: Integers
    cuts: dict[int, tuple[int, int, int]]


class Plan:
    """The order of a split's units over `lanes` lanes; pure, computed epoch by epoch.

    With `tokens`, those of each unit, lanes are balanced: in each epoch they have the same number
    of tokens, but for one.
    """

    def __init__(
        self,
        block: Keys,
        chosen: Integers,
        lanes: int,
        seed: int,
        shuffle: bool,
        tokens: Integers | None = None,
    ) -> None:
        self.lanes, self.seed, self.shuffle = lanes, seed, shuffle
        self._chosen = chosen
        self._block = block[chosen]
        self._tokens = tokens
        self.epoch_tokens = None if tokens is None else int(tokens[chosen].sum())
        """By which the lanes are balanced."""
        self._epochs: dict[int, list[_LanePlan]] = {}

    def lane_units(self, epoch: int, lane: int) -> Integers:
        """The units of a lane in one epoch, in reading order."""
        return self._lane(epoch, lane).units

    def part(self, epoch: int, lane: int, place: int, count: int) -> slice:
        """Which of the `count` tokens of its unit belong to a place.

        Where tokens are estimated, `count` is another number than planned with: the lanes that
        share the unit scale their cuts alike, so that each token still belongs to one of them.
        """
        first, last, planned = self._lane(epoch, lane).cuts.get(place, (0, 1, 1))
        return slice(first * count // planned, last * count // planned)

    def _lane(self, epoch: int, lane: int) -> _LanePlan:
        if epoch not in self._epochs:
            while len(self._epochs) >= 2:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = self._order(epoch)
        return self._epochs[epoch][lane]

    def _order(self, epoch: int) -> list[_LanePlan]:
        order = epoch_order(self._block, self.seed, epoch, self.shuffle)
        lane = lane_of(self._block[order], self.lanes)
        dealt = [self._chosen[order[lane == v]] for v in range(self.lanes)]
        if self._tokens is None or self.epoch_tokens is None:
            return [_LanePlan(units, {}) for units in dealt]
        targets = lane_targets(self.epoch_tokens, self.lanes, epoch)
        result = []
        for pieces in balance(dealt, self._tokens, targets):
            units, first, last = (column.copy() for column in pieces.T)
            planned = self._tokens[units]
            places = np.flatnonzero((first > 0) | (last < planned)).tolist()
            cuts = {i: (int(first[i]), int(last[i]), int(planned[i])) for i in places}
            result.append(_LanePlan(units, cuts))
        return result


def training_blocks(units: Units) -> int:
    """How many pieces of training text can be read side by side."""
    return count_blocks(units.block[split_of(units, "train")])

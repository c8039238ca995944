"""The text of a run: segments of two splits, whatever kind of file holds them.

A dataset states its segments' keys and sizes before it reads any text. Order, lanes and resume need
no more, so they are the same for all kinds of files; the loader asks only for a segment's tokens.
"""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from config import DataError
from data.loading.order import PLAN_VERSION, Booleans, Integers, Keys, Tokens
from data.remote.listing import Listing
from data.tokenizers.base import Tokenizer

_LISTED_TAGS = 1000  # of files; of more, a digest
_OPTION_OF_SOURCE = re.compile(
    r"\bdataset\.(parquet_dir|train_data_path|val_data_path|text_column|token_dtype|test_fraction)\b"
)


@dataclass(frozen=True, slots=True)
class DatasetStats:
    """The size of a dataset; its tokens may be off by the fraction `error`, 0 if counted."""

    files: int
    file_bytes: int
    rows: int
    """Documents; 0 for token files."""
    tokens: int
    train_tokens: int
    test_tokens: int
    error: float = 0.0


class Stored(NamedTuple):
    """Some tokens of a segment and where they are stored: those of one document, or of a file of
    tokens."""

    tokens: range
    """In the segment, or in what the caller counts from."""
    place: str
    """The file, and what `numbers` counts: "a.parquet row group 3 rows"."""
    numbers: range

    def __str__(self) -> str:
        """In words: "a.parquet row group 3 row 17"."""
        first, last = self.numbers.start, self.numbers.stop - 1
        if first == last:
            return f"{self.place.removesuffix('s')} {first:,}"
        return f"{self.place} {first:,}-{last:,}"

    def place_values(self) -> dict[str, Any]:
        """Returns the same as plain values."""
        return {"place": self.place, "first": self.numbers.start, "last": self.numbers.stop - 1}


class Passage(NamedTuple):
    """A text that is looked for, and its tokens."""

    text: str
    ids: Tokens


class Reader(Protocol):
    """Reads segments; used by one thread."""

    skipped_counts: Counter[str]
    """What was skipped or replaced since the counts were last taken, by kind."""

    def tokens(self, segment: int, seed: int, epoch: int, shuffle: bool) -> Tokens:
        """Returns the tokens of a segment in one epoch, possibly as a view of something larger.

        Raises DataError, which names the file, if they cannot be read.
        """

    def prefetch(self, lane: int, segments: Iterable[int]) -> None:
        """States which segments a lane reads next, so that remote ones are read in advance.

        Replaces what was stated for the lane before. Only as many are taken as are of use.
        """

    def locate(
        self, segment: int, seed: int, epoch: int, shuffle: bool, tokens: range
    ) -> list[Stored]:
        """Returns where these tokens of the segment are stored, document by document."""

    def find(
        self, segment: int, seed: int, epoch: int, shuffle: bool, passage: Passage
    ) -> list[Stored]:
        """Returns where a text stands in the segment, each time that it does."""

    def close(self) -> None:
        """Closes all files."""


class Segments(Protocol):
    """The segments of a dataset as arrays with one entry each, shared by all readers."""

    @property
    def whole_rows(self) -> bool:
        """Whether a segment is a number of rows of T tokens and the token after the last of them.

        If not, segments hold documents, and rows run across segments.
        """

    @property
    def shuffle_keys(self) -> Keys:
        """The keys that segments are shuffled by; equal keys stay together."""

    @property
    def sizes(self) -> Integers:
        """About how many tokens each segment has, or somewhat more; cheap to know."""

    @property
    def tokens(self) -> Integers | None:
        """How many tokens each segment has, as well as is known; lanes are balanced by them.

        None if segments are equal enough to be dealt in turn. May read the whole text, once.
        """

    @property
    def held_out(self) -> Booleans:
        """Which segments are for testing; independent of the training seed."""

    def epoch_tokens(self, version: int) -> int:
        """Returns the tokens of one pass over the training text, for plans of that version."""

    def open_reader(self) -> Reader:
        """Returns a new reader."""


def segments_of_split(segments: Segments, split: str) -> Integers:
    """Returns the numbers of the segments of "train" or "test"."""
    return np.flatnonzero(segments.held_out == {"train": False, "test": True}[split])


def tokens_of_splits(tokens: Integers, held_out: Booleans) -> dict[str, int]:
    """Returns the fields of DatasetStats that follow from the tokens of each part."""
    return {
        "tokens": int(tokens.sum()),
        "train_tokens": int(tokens[~held_out].sum()),
        "test_tokens": int(tokens[held_out].sum()),
    }


@dataclass(frozen=True, eq=False, slots=True)
class Source:
    """One of the datasets that a run reads rows from."""

    name: str
    """As in `dataset.mixture`; empty without a mixture."""
    weight: float
    """Its share of the rows is this over the sum of all weights; 0 or more."""
    dataset: Dataset


@contextmanager
def errors_of_source(name: str) -> Iterator[None]:
    """Lets a DataError say which source of a mixture it is about, and name the options of that
    source. An empty name, that of a run without a mixture, changes nothing."""
    try:
        yield
    except DataError as error:
        if name:
            text = _OPTION_OF_SOURCE.sub(rf"mixture.{name}.\1", str(error))
            error.args = (f"source {name}: {text}",)
        raise


class Dataset(ABC):
    """Text and the tokenizer of its tokens; fixed once opened."""

    tokenizer: Tokenizer

    @property
    @abstractmethod
    def stats(self) -> DatasetStats:
        """The numbers of files and tokens; may read the whole text, once."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Identifies text, tokenizer, split and segments: equal means the same order of tokens."""

    @abstractmethod
    def segments(self, block_size: int) -> Segments:
        """Returns the segments that rows of block_size + 1 tokens are read from."""

    @abstractmethod
    def lines(self) -> list[str]:
        """Returns the lines that the start of a run prints about the data."""

    @abstractmethod
    def split_setting(self, split: str) -> str:
        """Returns the option that decides how much text a split has, and its value."""

    @abstractmethod
    def details(self) -> dict[str, Any]:
        """Returns plain values for a checkpoint, from which `difference` explains a change."""

    @abstractmethod
    def difference(self, saved: dict[str, Any]) -> str:
        """Returns the first difference from the `details` of a dataset of the same kind."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """The datasets of a mixture; of any other dataset itself alone, without a name."""
        return (Source("", 1.0, self),)

    @property
    def vocab_size(self) -> int:
        """The smallest vocabulary that a model needs."""
        return self.tokenizer.vocab_size

    def epoch_tokens(self, block_size: int, version: int = PLAN_VERSION) -> int:
        """Returns the tokens of one pass over the training text, in rows of that length."""
        return self.segments(block_size).epoch_tokens(version)

    def summary(self) -> dict[str, Any]:
        """Returns plain values that identify the data, for a checkpoint."""
        return {"fingerprint": self.fingerprint, **self.details()}

    def check_unchanged(self, saved: dict[str, Any]) -> None:
        """Raises DataError, naming the first difference from the `summary` of a checkpoint."""
        change = self.change(saved)
        if change is not None:
            raise changed_data(change)

    def change(self, saved: dict[str, Any]) -> str | None:
        """Returns the first difference from the `summary` of a checkpoint; None without any."""
        # The fingerprint decides; the details only explain.
        if saved["fingerprint"] == self.fingerprint:
            return changed_tags(saved, self.details())
        then, now = _kind_of_files(saved), _kind_of_files(self.details())
        if then != now:
            return f"it was {then}, is {now}"
        try:
            return self.difference(saved)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError):
            # Another program wrote the checkpoint, or another version of this one.
            return "the checkpoint does not say which data it was"

    def too_short(self, split: str, block_size: int) -> DataError:
        """Returns the error for a split without a single row of tokens."""
        stats = self.stats
        tokens = {"train": stats.train_tokens, "test": stats.test_tokens}[split]
        # An estimate may be above one row although the text is shorter.
        count = "" if stats.error else f"{tokens:,} tokens, "
        return DataError(
            f"the {split} text ({count}{self.split_setting(split)}) is shorter "
            f"than one row of training.block_size + 1 = {block_size + 1} tokens. "
            "Lower block_size, or give it more text."
        )


def summary_of_source(saved: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Returns the part of a checkpoint's `summary` that is about one source; {} if it has none."""
    parts = saved.get("sources", [{"name": "", **saved}])
    return next((part for part in parts if part["name"] == name), {})


def changed_data(change: str) -> DataError:
    """Returns the error for data that is not that of the checkpoint."""
    return DataError(
        f"The data is not what the checkpoint was trained on: {change}. "
        "Restore it, or start a new run from step 0."
    )


def remote_details(listings: Sequence[Listing]) -> dict[str, Any]:
    """Returns what identifies remote files, for a checkpoint; nothing without any."""
    if not listings:
        return {}
    tags: dict[str, str] = {}
    for listing in listings:
        own = {listing.url(file): file.tag for file in listing.files}
        if len(own) > _LISTED_TAGS:
            digest = hashlib.blake2b("\0".join(own.values()).encode(), digest_size=16)
            own = {f"{listing.root} ({len(own):,} files)": digest.hexdigest()}
        tags |= own
    pins = {each.address: each.revision for each in listings if each.revision}
    return {"pins": pins, "tags": tags}


def changed_tags(saved: Mapping[str, Any], now: dict[str, Any]) -> str | None:
    """Returns which files at the same addresses have other tags than at the checkpoint, by the
    `details` of then and now; None without any. Files that moved may have any."""
    then = saved.get("tags", {})
    changed = [url for url, tag in now.get("tags", {}).items() if then.get(url, tag) != tag]
    if not changed:
        return None
    more = f" and {len(changed) - 5:,} others" if len(changed) > 5 else ""
    what = f"{', '.join(changed[:5])}{more}"
    return f"{what} changed on the server (size as before, another tag)"


def _kind_of_files(details: dict[str, Any]) -> str:
    for key, kind in (("parquet_dir", "parquet files of"), ("train_data_path", "token files of")):
        if key in details:
            return f"{kind} {details[key]}"
    if "sources" in details:
        return f"a mixture of {', '.join(part['name'] for part in details['sources'])}"
    return "of an unknown kind"


def check_file_unchanged(path: str, size: int, mtime_ns: int) -> None:
    """Raises DataError if a file is gone, or has another size or time than at the start."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise DataError(
            f"{path}: there at the start of the run, now {error.strerror}. "
            "Put it back and resume from the last checkpoint."
        ) from None
    if (stat.st_size, stat.st_mtime_ns) != (size, mtime_ns):
        raise DataError(
            f"{path}: changed during the run ({size} bytes at the start, now "
            f"{stat.st_size}). Restore it and resume from the last checkpoint."
        )

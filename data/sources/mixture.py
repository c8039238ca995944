"""Several datasets as one: each row of a run is of one of them, in the shares of their weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

from data.sources.dataset import Dataset, DatasetStats, Source, errors_of_source
from data.tokenizers.base import Tokenizer


@dataclass(frozen=True, eq=False)
class MixtureDataset(Dataset):
    """The sources of `dataset.mixture`; all have the same tokens."""

    parts: tuple[Source, ...]
    tokenizer: Tokenizer

    @property
    def sources(self) -> tuple[Source, ...]:
        """The datasets, with names and weights, in the order of the config."""
        return self.parts

    @cached_property
    def stats(self) -> DatasetStats:
        """The sums over all sources."""
        each = [source.dataset.stats for source in self.sources]
        tokens = sum(stats.tokens for stats in each)
        return DatasetStats(
            files=sum(stats.files for stats in each),
            file_bytes=sum(stats.file_bytes for stats in each),
            rows=sum(stats.rows for stats in each),
            tokens=tokens,
            train_tokens=sum(stats.train_tokens for stats in each),
            test_tokens=sum(stats.test_tokens for stats in each),
            error=sum(stats.error * stats.tokens for stats in each) / max(1, tokens),
        )

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the sources and their order. Weights are not in it: they may change."""
        what = [(source.name, source.dataset.fingerprint) for source in self.sources]
        return hashlib.blake2b(repr(what).encode()).hexdigest()[:32]

    def segments(self, block_size: int) -> NoReturn:
        """Raises TypeError: each source has its own."""
        raise TypeError("a mixture has no segments; its sources have")

    def split_setting(self, split: str) -> NoReturn:
        """Raises TypeError: each source has its own."""
        raise TypeError("a mixture has no split; its sources have")

    def lines(self) -> list[str]:
        """Returns the lines of each source, with its name."""
        found = list[str]()
        for source in self.sources:
            with errors_of_source(source.name):  # the lines tell of tokens, which are counted now
                found += [f"{source.name}: {line}" for line in source.dataset.lines()]
        return found

    def details(self) -> dict[str, Any]:
        """Returns the name and the summary of each source."""
        each = self.sources
        return {"sources": [{"name": source.name, **source.dataset.summary()} for source in each]}

    def change(self, saved: dict[str, Any]) -> str | None:
        """Returns the first difference from the `summary` of a checkpoint; None without any."""
        # Of the sources also where the fingerprints agree: one may see more than its fingerprint.
        return super().change(saved) or self._changed_source(saved)

    def difference(self, saved: dict[str, Any]) -> str:
        """Returns the first difference from the details of another mixture."""
        return self._changed_source(saved) or "the order of the sources"

    def _changed_source(self, saved: dict[str, Any]) -> str | None:
        for source, then in zip(self.sources, saved["sources"], strict=True):
            change = source.dataset.change(then)
            if change is not None:
                return f"source {source.name}: {change}"
        return None

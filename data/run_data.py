"""All that a run takes from its text: batches, evaluation rows, document numbers, identity.

The one idea: what is read in a run is asked for here, by the run's whole config, so that the loader
and the dataset below need to know one section each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import (
    Config,
    ConfigError,
    accumulation_steps,
    eval_batch,
    sequences_per_step,
    token_paths,
)
from data.loading.loader import (
    BatchSpec,
    StepBatch,
    TrainLoader,
    check_cursor,
    evaluation_rows,
    merge_cursors,
)
from data.loading.packing import document_ids
from data.preparation import corpus
from data.sources.base import Dataset


class Text:
    """A dataset as one run reads it.

    The fixed rows (n, T+1) of the training and of the held-out text are read at once, in batches:
    so text too short for them is not found out in the middle of a run. Raises DataError, and
    ConfigError where documents shall be told apart and the tokens do not tell them.
    """

    def __init__(self, dataset: Dataset, config: Config) -> None:
        self._dataset, self._config = dataset, config
        self.documents = document_reader(dataset, config)
        """Numbers the documents in rows of tokens; None where tokens may see all before them."""
        self.evaluation = _evaluation_batches(dataset, config)
        self.bytes_per_token = self._count_bytes()
        """Of the held-out rows; None where there are none or their tokens stand for no text."""

    def identity(self) -> dict[str, Any]:
        """What a checkpoint keeps of the text, as plain values."""
        tokenizer = self._dataset.tokenizer.to_dict()
        return {"data": self._dataset.summary(), "tokenizer": tokenizer}

    @staticmethod
    def merge_cursors(cursors: list[dict[str, Any]]) -> dict[str, Any]:
        """One cursor of those of all processes."""
        return merge_cursors(cursors)

    def batches(
        self, cursor: dict[str, Any] | None, rank: int, world_size: int, pin: bool
    ) -> TrainLoader:
        """The endless training batches of one process, from `cursor` on; `pin` says: for a GPU."""
        spec = batch_spec(self._config, rank, world_size, pin)
        return TrainLoader(self._dataset, spec, self._config.dataloader, cursor)

    def _count_bytes(self) -> float | None:
        if not self.evaluation:
            return None
        tokens = torch.cat(self.evaluation[1])[:, 1:].reshape(-1)
        count = self._dataset.tokenizer.count_bytes(tokens.numpy())
        return count / len(tokens) if count else None


def batch_spec(config: Config, rank: int, world_size: int, pin: bool = False) -> BatchSpec:
    """The steps of a run, and the part of one process in them."""
    return BatchSpec(
        block_size=config.training.block_size,
        sequences_per_step=sequences_per_step(config, world_size),
        micro_batches=accumulation_steps(config, world_size),
        seed=config.training.seed,
        rank=rank,
        world_size=world_size,
        pin=pin,
    )


def check_place(dataset: Dataset, config: Config, cursor: dict[str, Any], world_size: int) -> None:
    """Raises DataError where a run cannot go on in the text from the cursor of a checkpoint."""
    units = dataset.source.units(config.training.block_size)
    check_cursor(cursor, units, batch_spec(config, 0, world_size), config.dataloader.shuffle)


class Replayed:
    """The first batch of a loader for ever, which leaves the data where it stands."""

    epoch = 0

    def __init__(self, loader: TrainLoader) -> None:
        self.cursor: Callable[[], dict[str, Any]] = loader.start_cursor
        first = next(loader)
        self.micro_batches, self.describe = first.micro_batches, first.describe

    @classmethod
    def for_ever(cls, loader: TrainLoader) -> Iterator[Replayed]:
        return repeat(cls(loader))


def embedded_is_missing(config: Config) -> bool:
    """Whether the text is the embedded corpus and has yet to be built."""
    folder = Path(config.dataset.parquet_dir)
    parquet = token_paths(config.dataset) is None
    return parquet and corpus.is_embedded(folder) and not folder.exists()


def _evaluation_batches(dataset: Dataset, config: Config) -> tuple[tuple[Tensor, ...], ...]:
    training = config.training
    if training.test_freq is None and not training.eval_only:
        return ()
    size = eval_batch(config)
    count = training.eval_iters * size
    rows = (
        evaluation_rows(dataset, name, training.block_size, count) for name in ("train", "test")
    )
    return tuple(torch.split(each, size) for each in rows)


def document_reader(dataset: Dataset, config: Config) -> Callable[[Tensor], Tensor] | None:
    """Numbers the documents in rows of tokens; None where tokens may see all before them. Raises
    ConfigError where no token ends a document."""
    if config.model.mask == "causal":
        return None
    separator = dataset.tokenizer.separator
    if separator is None:
        raise ConfigError(
            f"model.mask={config.model.mask}: no token of tokenizer {dataset.tokenizer.name} ends "
            "a document, so they cannot be told apart. Set model.mask to causal."
        )
    return partial(document_ids, separator=separator)


__all__ = ["Replayed", "StepBatch", "Text", "document_reader", "embedded_is_missing"]

"""What a run takes from its dataset: batches, evaluation rows, document numbers, identity.

Only this module reads the whole config; the loader and the dataset below know one section each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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
from data.loading import load_plan
from data.loading.evaluation_rows import evaluation_rows
from data.loading.load_plan import BatchSpec, DataState
from data.loading.loader import StepBatch, TrainLoader
from data.loading.packing import document_ids
from data.preparation import stdlib_corpus
from data.sources.dataset import Dataset


class RunData:
    """A dataset as one run reads it (Lightning: a DataModule).

    Reads the evaluation rows at once, so text too short for them is an error before training.
    Raises DataError, and ConfigError if documents are to be masked and no token separates them.
    """

    def __init__(self, dataset: Dataset, config: Config) -> None:
        self._dataset, self._config = dataset, config
        self.document_ids = document_id_function(dataset, config)
        """Maps tokens (B, T) to the number of each token's document (B, T). None if tokens may
        attend to all tokens before them."""
        self.evaluation = _evaluation_batches(dataset, config)
        """Rows (n, T + 1) of the training and of the held-out text, in batches; () without any."""
        self.bytes_per_token = self._count_bytes()
        """Of the held-out rows; None without any, and if their tokens stand for no text."""

    def identity(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of data and tokenizer, as plain values."""
        tokenizer = self._dataset.tokenizer.to_dict()
        return {"data": self._dataset.summary(), "tokenizer": tokenizer}

    def batches(
        self, data_state: DataState | None, rank: int, world_size: int, pin: bool
    ) -> TrainLoader:
        """Returns the endless training batches of one process, from a data state on.

        pin: whether batches go to a GPU.
        """
        spec = batch_spec(self._config, rank, world_size, pin)
        return TrainLoader(self._dataset, spec, self._config.dataloader, data_state)

    def _count_bytes(self) -> float | None:
        if not self.evaluation:
            return None
        # Targets only, as the loss counts them.
        tokens = torch.cat(self.evaluation[1])[:, 1:].reshape(-1)
        count = self._dataset.tokenizer.count_bytes(tokens.numpy())
        return count / len(tokens) if count else None


def batch_spec(config: Config, rank: int, world_size: int, pin: bool = False) -> BatchSpec:
    """Returns the batch of a step and the part of one process in it."""
    return BatchSpec(
        block_size=config.training.block_size,
        sequences_per_step=sequences_per_step(config, world_size),
        micro_batches=accumulation_steps(config, world_size),
        seed=config.training.seed,
        rank=rank,
        world_size=world_size,
        pin=pin,
    )


def check_data_continues(
    dataset: Dataset, config: Config, data_state: DataState, world_size: int
) -> None:
    """Raises DataError unless a run can continue from the data state of a checkpoint."""
    segments = dataset.segments(config.training.block_size)
    spec = batch_spec(config, 0, world_size)
    load_plan.check_data_state(data_state, segments, spec, config.dataloader.shuffle)


class RepeatFirstBatch(StepBatch):
    """The first batch of a loader, repeated: the data stays where it starts."""

    epoch = 0

    def __init__(self, loader: TrainLoader) -> None:
        self._first, self._start = next(loader), loader.first_data_state()
        self.micro_batches = self._first.micro_batches

    def data_state(self) -> DataState:
        """Returns the data state before the batch."""
        return self._start

    def describe(self) -> list[str]:
        """Returns the file and the rows or tokens that the batch is made of."""
        return self._first.describe()


def embedded_is_missing(config: Config) -> bool:
    """Returns whether the config's text is the embedded corpus and it has not been built yet."""
    folder = Path(config.dataset.parquet_dir)
    parquet = token_paths(config.dataset) is None
    return parquet and stdlib_corpus.is_embedded(folder) and not folder.exists()


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


def document_id_function(dataset: Dataset, config: Config) -> Callable[[Tensor], Tensor] | None:
    """Returns a function that numbers documents; None if tokens may attend to all before them.

    Raises ConfigError if no token separates documents.
    """
    if config.model.mask == "causal":
        return None
    separator = dataset.tokenizer.separator
    if separator is None:
        raise ConfigError(
            f"model.mask={config.model.mask}: no token of tokenizer {dataset.tokenizer.name} ends "
            "a document, so they cannot be told apart. Set model.mask to causal."
        )
    return partial(document_ids, separator=separator)

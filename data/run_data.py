"""What a run takes from its dataset: batches, evaluation rows, document numbers, identity.

Only this module reads the whole config; the loader and the dataset below know one section each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import (
    Config,
    ConfigError,
    accumulation_steps,
    eval_batch,
    eval_batches,
    sequences_per_step,
    source_datasets,
    token_paths,
)
from data.loading.batch_spec import BatchSpec
from data.loading.data_state import DataState, check_data_state
from data.loading.evaluation_rows import evaluation_rows
from data.loading.loader import RowOrigin, StepBatch, TrainLoader
from data.loading.packing import document_ids
from data.preparation import stdlib_corpus
from data.sources.dataset import Dataset, errors_of_source
from settings.addresses import is_remote


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
        self.evaluation = {split: _batches(dataset, config, split) for split in ("train", "test")}
        """Rows (n, T + 1) of the training and of the held-out text, in batches, by their source;
        empty without evaluations."""
        held_out = self.evaluation["test"]
        self.bytes_per_token = self._count_bytes(chain(*held_out.values()))
        """Of the held-out rows; None without any, and if their tokens stand for no text."""
        self.bytes_per_token_of = {name: self._count_bytes(held_out[name]) for name in held_out}
        """Of those of each source."""

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

    def _count_bytes(self, batches: Iterable[Tensor]) -> float | None:
        # Targets only, as the loss counts them.
        tokens = [rows[:, 1:].reshape(-1) for rows in batches]
        if not tokens:
            return None
        targets = torch.cat(tokens)
        count = self._dataset.tokenizer.count_bytes(targets.numpy())
        return count / len(targets) if count else None


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
    spec = batch_spec(config, 0, world_size)
    check_data_state(data_state, dataset, spec, config.dataloader.shuffle)


class RepeatFirstBatch(StepBatch):
    """The first batch of a loader, repeated: the data stays where it starts."""

    epoch = 0

    def __init__(self, loader: TrainLoader) -> None:
        self._first, self._start = next(loader), loader.first_data_state()
        self.micro_batches = self._first.micro_batches

    def rows_hash(self) -> int:
        """Returns the sum of the hashes of the rows."""
        return self._first.rows_hash()

    def data_state(self) -> DataState:
        """Returns the data state before the batch."""
        return self._start

    def origins(self) -> list[RowOrigin]:
        """Returns what each row is made of."""
        return self._first.origins()

    def describe(self) -> list[str]:
        """Returns the file and the rows or tokens that the batch is made of."""
        return self._first.describe()


def missing_corpus(config: Config) -> Path | None:
    """Returns the folder of the embedded corpus if the run reads it and it has not been built."""
    sources = source_datasets(config.dataset).values()
    folders = [
        Path(source.parquet_dir)
        for source in sources
        if token_paths(source) is None and not is_remote(source.parquet_dir)
    ]
    missing = (path for path in folders if stdlib_corpus.is_embedded(path) and not path.exists())
    return next(missing, None)


def _batches(dataset: Dataset, config: Config, split: str) -> dict[str, tuple[Tensor, ...]]:
    """Returns the rows (n, T + 1) of each source that a split is evaluated on, in batches."""
    training, size = config.training, eval_batch(config)
    if training.test_freq is None and not training.eval_only:
        return {}
    count = eval_batches(config) * size
    found = {}
    for source in dataset.sources:
        with errors_of_source(source.name):
            rows = evaluation_rows(source.dataset, split, training.block_size, count)
        found[source.name] = torch.split(rows, size)
    return found


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

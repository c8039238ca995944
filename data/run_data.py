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
    check_fits,
    evaluation_rows,
    merge_data_states,
)
from data.loading.packing import document_ids
from data.preparation import corpus
from data.sources.base import Dataset


class RunData:
    """A dataset as one run reads it.

    The fixed rows (n, T+1) of the training and of the held-out text are read at once, in batches:
    so text too short for them is not found out in the middle of a run. Raises DataError, and
    ConfigError where documents shall be told apart and the tokens do not tell them.
    """

    def __init__(self, dataset: Dataset, config: Config) -> None:
        self._dataset, self._config = dataset, config
        self.document_ids = document_id_function(dataset, config)
        """Numbers the documents in rows of tokens; None where tokens may see all before them."""
        self.evaluation = _evaluation_batches(dataset, config)
        self.bytes_per_token = self._count_bytes()
        """Of the held-out rows; None where there are none or their tokens stand for no text."""

    def identity(self) -> dict[str, Any]:
        """What a checkpoint keeps of the text, as plain values."""
        tokenizer = self._dataset.tokenizer.to_dict()
        return {"data": self._dataset.summary(), "tokenizer": tokenizer}

    @staticmethod
    def merge_data_states(data_states: list[dict[str, Any]]) -> dict[str, Any]:
        """One data state of those of all processes."""
        return merge_data_states(data_states)

    def batches(
        self, data_state: dict[str, Any] | None, rank: int, world_size: int, pin: bool
    ) -> TrainLoader:
        """The endless training batches of one process, from `data_state` on; `pin`: for a GPU."""
        spec = batch_spec(self._config, rank, world_size, pin)
        return TrainLoader(self._dataset, spec, self._config.dataloader, data_state)

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


def check_data_state(
    dataset: Dataset, config: Config, data_state: dict[str, Any], world_size: int
) -> None:
    """Raises DataError where a run cannot go on in the text from the data state of a checkpoint."""
    units = dataset.source.units(config.training.block_size)
    check_fits(data_state, units, batch_spec(config, 0, world_size), config.dataloader.shuffle)


class RepeatFirstBatch:
    """The first batch of a loader for ever, which leaves the data where it stands."""

    epoch = 0

    def __init__(self, loader: TrainLoader) -> None:
        self.data_state: Callable[[], dict[str, Any]] = loader.first_data_state
        first = next(loader)
        self.micro_batches, self.describe = first.micro_batches, first.describe

    @classmethod
    def for_ever(cls, loader: TrainLoader) -> Iterator[RepeatFirstBatch]:
        return repeat(cls(loader))


Batch = StepBatch | RepeatFirstBatch
"""The data of one optimizer step on one process."""


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


def document_id_function(dataset: Dataset, config: Config) -> Callable[[Tensor], Tensor] | None:
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


__all__ = [
    "RepeatFirstBatch",
    "StepBatch",
    "RunData",
    "document_id_function",
    "embedded_is_missing",
]

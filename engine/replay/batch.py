"""`runs.py batch`: the documents that a step was trained on, and the loss of each sequence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import DataError
from data import Dataset, StepBatch, TrainLoader
from data.loading.batch_hash import hash_step
from data.loading.loader import RowOrigin
from data.run_data import batch_spec
from data.sources.dataset import Stored
from data.tokenizers.base import Tokenizer
from engine.checkpoint.load import load_checkpoint
from engine.evaluation import batch_losses
from engine.loss import count_targets, next_token_loss
from engine.replay.replay import Replay, ReplayStart, TrainingLoop, open_replay
from engine.replay.start import find_start, newest_content, open_text, run_of_step
from engine.signals import StopRequest
from engine.train_state import TrainState

_SHOWN = 100  # characters of a document


class Document(NamedTuple):
    """What a sequence holds of one document."""

    stored: Stored
    text: str

    def to_json(self) -> dict[str, Any]:
        """Returns the same as plain values."""
        tokens = [self.stored.tokens.start, self.stored.tokens.stop - 1]
        return self.stored.place_values() | {"tokens": tokens, "text": self.text}


@dataclass(frozen=True)
class BatchSequence:
    """A row of a batch."""

    sequence: int
    source: str
    documents: list[Document]
    loss: float | None = None
    """Mean in nats per token under the weights before the step, without dropout."""


@dataclass(frozen=True)
class BatchReport:
    """The batch of a step."""

    step: int
    sequences: list[BatchSequence]
    rows: Tensor
    """(sequences, T + 1)."""
    hash: int
    verdict: str
    """Whether it is the batch that the run trained on, as far as its records tell."""

    def worst(self, count: int) -> BatchReport:
        """Returns the report with the sequences of the highest loss, the highest first."""
        ordered = sorted(self.sequences, key=lambda each: -(each.loss or 0.0))
        return replace(self, sequences=ordered[:count])

    def lines(self, full: bool) -> list[str]:
        """Returns the batch in words. full: whole texts."""
        rows, width = self.rows.shape
        lines = [f"Step {self.step}: {rows} sequences of {width - 1} tokens, hash {self.hash:016x}"]
        lines.append(self.verdict)
        for each in self.sequences:
            loss = "" if each.loss is None else f"  loss {each.loss:.4f}"
            name = f"  {each.source}" if each.source else ""
            lines.append(f"sequence {each.sequence}{loss}{name}")
            for stored, text in each.documents:
                lines.append(f"  tokens {stored.tokens.start}-{stored.tokens.stop - 1}  {stored}")
                lines.append(f"    {text if full else _shortened(text)}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Returns the same as plain values, with whole texts."""
        values = {"step": self.step, "batch_hash": f"{self.hash:016x}", "verdict": self.verdict}
        sequences = [
            vars(each) | {"documents": [own.to_json() for own in each.documents]}
            for each in self.sequences
        ]
        return values | {"sequences": sequences}


def _shortened(text: str) -> str:
    """Returns a text in one line, without its middle if it is long."""
    line = " ".join(text.split())
    half = _SHOWN // 2
    return line if len(line) <= _SHOWN else f"{line[:half]} ... {line[-half:]}"


def batch_of(run: Path, step: int, records: Sequence[Mapping[str, Any]]) -> BatchReport:
    """Returns the batch of a step of a run, from the loader alone.

    records: of the run. Raises DataError where the text is not what the run read.
    """
    start = find_start(run, step)
    path = start.checkpoint or start.config.training.fork_from_checkpoint
    saved = {} if path is None else load_checkpoint(Path(path), mmap=True)
    dataset = open_text(start.config, saved or newest_content(run_of_step(run, step)))
    since = TrainState.from_saved(saved["train"]) if saved else TrainState()
    logged = {
        each["step"]: each.get("train/batch_hash") for each in records if "train/loss" in each
    }
    end = min((each for each in logged if each >= step), default=step)
    found: BatchReport | None = None
    for number, batch in enumerate(_batches(start, dataset, saved), start.step + 1):
        own = hash_step(number, [batch.rows_hash()])
        since.add_batch(own)
        if number == step:
            rows = torch.cat(batch.micro_batches)
            sequences = [_sequence(each, rows, dataset.tokenizer) for each in batch.origins()]
            found = BatchReport(step, sequences, rows, own, "")
        if number == end:
            break
        if number in logged:
            since.clear_losses()
    assert found is not None
    return replace(found, verdict=_verdict(since, end, logged))


def _verdict(since: TrainState, end: int, logged: Mapping[int, str | None]) -> str:
    told, own = logged.get(end), since.batch_hash
    if not told or own is None:
        why = "no hash of batches in the next one" if end in logged else "none follows this step"
        return f"Not compared with the run's records: {why}."
    if told == f"{own:016x}":
        return f"It is what the run trained on: the batches up to record {end} have its hash."
    return f"It is NOT what the run trained on: record {end} has another hash of the batches."


def _batches(start: ReplayStart, dataset: Dataset, saved: Mapping[str, Any]) -> Iterator[StepBatch]:
    """Yields the batches of the steps from the start on."""
    config = start.config
    spec, options = batch_spec(config, 0, 1), replace(config.dataloader, num_workers=0)
    with TrainLoader(dataset, spec, options, saved.get("cursor")) as loader:
        yield from repeat(next(loader)) if config.training.use_oracle else loader


def _sequence(row: RowOrigin, rows: Tensor, tokenizer: Tokenizer) -> BatchSequence:
    tokens = rows[row.number].numpy()
    documents = [
        Document(part, tokenizer.decode(tokens[part.tokens.start : part.tokens.stop].tolist()))
        for each in row.parts
        for part in _documents(each, tokens, tokenizer.separator)
    ]
    return BatchSequence(row.number, row.source, documents)


def _documents(part: Stored, tokens: Any, separator: int | None) -> list[Stored]:
    """Returns the documents in a part of a row: of token files one part may hold several."""
    first, stop = part.tokens.start, part.tokens.stop
    inside = np.zeros(0, int) if separator is None else tokens[first:stop] == separator
    edges = sorted({0, *(np.flatnonzero(inside) + 1).tolist(), stop - first})
    found = list[Stored]()
    for begin, end in zip(edges, edges[1:], strict=False):
        numbers = part.numbers
        if len(numbers) == len(part.tokens):  # they count tokens, not a document
            numbers = numbers[begin:end]
        found.append(Stored(range(first + begin, first + end), part.place, numbers))
    return found


def with_losses(report: BatchReport, run: Path, loop: TrainingLoop) -> BatchReport:
    """Returns the report with the loss of each sequence under the weights before the step, by a
    replay; raises DataError where that comes to other rows. loop: `train.train`."""
    with open_replay(find_start(run, report.step), StopRequest(), loop) as replay:
        replay.advance_to(report.step - 1)
        losses = _row_losses(replay, report)
    pairs = zip(report.sequences, losses, strict=True)
    return replace(report, sequences=[replace(each, loss=loss) for each, loss in pairs])


def _row_losses(replay: Replay, report: BatchReport) -> list[float]:
    trainer, step = replay.trainer, replay.next_step()
    if step.batch_hash != report.hash:
        raise DataError(f"step {report.step}: the text has changed while it was read")
    ids, precision = trainer.data.document_ids, trainer.precision

    def loss(rows: Tensor) -> Tensor:
        with precision.autocast():
            return next_token_loss(trainer.model, rows, trainer.world.device, ids)

    rows = torch.split(report.rows, 1)
    # A compiled model would be compiled anew for single rows.
    with precision.training(step.number), torch.compiler.set_stance("force_eager"):
        sums = batch_losses(trainer.model, rows, loss, lambda: False, trainer.world, 1)
    assert sums is not None
    targets = [max(1, count_targets(row, ids)) for row in rows]
    return [total / count for total, count in zip(sums, targets, strict=True)]

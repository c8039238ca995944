"""`runs.py batch`: the documents that a step was trained on, and the loss of each sequence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import DataError
from data import StepBatch, TrainLoader
from data.loading.batch_hash import hash_step
from data.loading.loader import RowOrigin
from data.run_data import batch_spec
from data.sources.dataset import Stored
from data.tokenizers.base import Tokenizer
from engine.checkpoint.load import load_checkpoint
from engine.evaluation import batch_losses
from engine.hardware.distributed import enter_world
from engine.loss import count_targets, next_token_loss
from engine.replay.course import Progress, newest_content, open_text
from engine.replay.replay import Replay, TrainingLoop, open_replay
from engine.replay.start import ReplayStart, find_start
from engine.signals import StopRequest
from engine.train_state import TrainState

_SHOWN = 100  # characters of a document


@dataclass(frozen=True)
class Document:
    """What a sequence holds of one document."""

    stored: Stored
    text: str


@dataclass(frozen=True)
class BatchSequence:
    """A row of a batch."""

    number: int
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

    def with_losses(self, losses: list[float]) -> BatchReport:
        """Returns the report with the loss of each sequence."""
        pairs = zip(self.sequences, losses, strict=True)
        return replace(self, sequences=[replace(each, loss=loss) for each, loss in pairs])

    def worst(self, count: int | None) -> BatchReport:
        """Returns the report with the sequences of the highest loss, the highest first."""
        if count is None:
            return self
        ordered = sorted(self.sequences, key=lambda each: -(each.loss or 0.0))
        return replace(self, sequences=ordered[:count])

    def lines(self, full: bool) -> list[str]:
        """Returns the batch in words. full: whole texts."""
        rows, width = self.rows.shape
        lines = [f"Step {self.step}: {rows} sequences of {width - 1} tokens, hash {self.hash:016x}"]
        lines.append(self.verdict)
        for each in self.sequences:
            loss = "" if each.loss is None else f"  loss {each.loss:.4f}"
            lines.append(f"sequence {each.number}{loss}{f'  {each.source}' if each.source else ''}")
            for document in each.documents:
                first, last = document.stored.tokens.start, document.stored.tokens.stop - 1
                lines.append(f"  tokens {first}-{last}  {document.stored}")
                lines.append(f"    {document.text if full else shortened(document.text)}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Returns the same as plain values, with whole texts."""
        sequences = [
            {
                "sequence": each.number,
                "source": each.source,
                "loss": each.loss,
                "documents": [
                    {
                        "place": document.stored.place,
                        "first": document.stored.numbers.start,
                        "last": document.stored.numbers.stop - 1,
                        "tokens": [document.stored.tokens.start, document.stored.tokens.stop - 1],
                        "text": document.text,
                    }
                    for document in each.documents
                ],
            }
            for each in self.sequences
        ]
        values = {"step": self.step, "batch_hash": f"{self.hash:016x}", "verdict": self.verdict}
        return {**values, "sequences": sequences}


def shortened(text: str) -> str:
    """Returns a text in one line, without its middle if it is long."""
    line = " ".join(text.split())
    half = _SHOWN // 2
    return line if len(line) <= _SHOWN else f"{line[:half]} ... {line[-half:]}"


def batch_of(run: Path, step: int, records: Sequence[Mapping[str, Any]]) -> BatchReport:
    """Returns the batch of a step of a run, from the loader alone.

    records: of the run. Raises DataError where the text is not what the run read.
    """
    start, progress = find_start(run, step), Progress()
    path = start.checkpoint or start.config.training.fork_from_checkpoint
    saved = {} if path is None else load_checkpoint(Path(path), mmap=True)
    dataset = open_text(start.config, saved or newest_content(start.run))
    since = TrainState.from_saved(saved["train"]) if saved else TrainState()
    logged = {
        each["step"]: each.get("train/batch_hash") for each in records if "train/loss" in each
    }
    end = min((each for each in logged if each >= step), default=step)
    found: BatchReport | None = None
    for number, batch in enumerate(_batches(start, dataset, saved), start.step + 1):
        progress("Steps read", number - start.step, end - start.step)
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


def _batches(start: ReplayStart, dataset: Any, saved: Mapping[str, Any]) -> Iterator[StepBatch]:
    """Yields the batches of the steps from the start on."""
    config = start.config
    spec, options = batch_spec(config, 0, 1), replace(config.dataloader, num_workers=0)
    with TrainLoader(dataset, spec, options, saved.get("cursor")) as loader:
        first = next(loader)
        yield first
        while True:
            yield first if config.training.use_oracle else next(loader)


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


def replayed_losses(report: BatchReport, run: Path, loop: TrainingLoop) -> list[float]:
    """Returns the loss of each sequence under the weights before the step, by a replay.

    Raises DataError where the replay comes to other rows.
    """
    start = find_start(run, report.step)
    with ExitStack() as stack:
        config, stop = start.config, StopRequest()
        world = stack.enter_context(enter_world(config.system, config.distributed))
        replay = stack.enter_context(open_replay(config, start.checkpoint, world, stop, loop))
        replay.advance_to(report.step - 1)
        return _row_losses(replay, report)


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

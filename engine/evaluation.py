"""Evaluation: losses on rows that never change, active neurons, and a sample of text."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn

from data.run_data import RunData
from engine.hardware.distributed import World
from engine.hardware.sharding import is_sharded, reshard
from engine.loss import DocumentIds, count_targets, next_token_loss
from engine.precision.precision import Precision
from model import LanguageModel


@dataclass(frozen=True)
class SourceLoss:
    """The mean loss on the held-out rows of one source, in nats per token."""

    val_loss: float
    bits_per_byte: float | None


@dataclass(frozen=True)
class BatchLosses:
    """The summed loss of each batch, and over how many targets."""

    sums: list[float]
    targets: list[int]

    @property
    def mean(self) -> float:
        return sum(self.sums) / max(1, sum(self.targets))

    @property
    def each(self) -> list[float]:
        pairs = zip(self.sums, self.targets, strict=True)
        return [loss / max(1, targets) for loss, targets in pairs]


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation measured; losses are means in nats per token."""

    train_loss: float
    val_loss: float
    val_losses: list[float]
    """Of each held-out batch: two runs are compared in pairs of these."""
    val_loss_quantized: float | None
    """With the weights rounded; None where the run does not train for that."""
    bits_per_byte: float | None
    """None where tokens do not stand for text."""
    sources: dict[str, SourceLoss]
    """Of each source of a mixture; empty without one."""
    active_neurons: dict[str, list[float]]
    """Share of active neurons by kind and layer, on the first held-out batch."""
    sample: str | None
    seconds: float


@dataclass
class Evaluator:
    """Evaluates a model on the fixed rows of a run. It draws from no random generator that training
    uses, so evaluating more or less often does not change the weights."""

    model: LanguageModel
    data: RunData
    precision: Precision
    world: World
    micro_batch: int
    """Rows that the model is given at once."""
    sample: Callable[[], str] | None = None
    """Continues `training.sample_prompt`; None where no prompt is given."""
    rows_digest: str = field(init=False)
    """Equal for two runs if and only if they are evaluated on the same rows."""

    def __post_init__(self) -> None:
        self.rows_digest = digest_rows(self._rows("test"), self.data.document_ids)

    def evaluate(self, stopped: Callable[[], bool]) -> Evaluation | None:
        """Returns the losses of both splits, or None where `stopped()` became true on the way."""
        began = time.monotonic()
        val_batches = self._rows("test")
        train = self._losses(self._rows("train"), stopped)
        val = None if train is None else self._losses(val_batches, stopped)
        if train is None or val is None:
            return None
        rounded = None
        if self.precision.quantized is not None:
            with self.precision.quantized.applied():
                rounded = self._losses(val_batches, stopped)
            if rounded is None:
                return None
        return Evaluation(
            train_loss=train.mean,
            val_loss=val.mean,
            val_losses=val.each,
            val_loss_quantized=None if rounded is None else rounded.mean,
            bits_per_byte=bits_per_byte(val.mean, self.data.bytes_per_token),
            sources=self._source_losses(val),
            active_neurons=self._active_neurons() if self._takes_part else {},
            sample=self.sample() if self.sample and self._takes_part else None,
            seconds=time.monotonic() - began,
        )

    @property
    def _takes_part(self) -> bool:
        """Whether this process computes what only the main one reports: its forward passes gather
        the weights of a sharded model from all processes."""
        return self.world.is_main or is_sharded(self.model)

    @property
    def evaluated_tokens(self) -> int:
        """Tokens of one evaluation, over all processes."""
        held_out = self._rows("test") * (1 if self.precision.quantized is None else 2)
        return sum(rows[:, 1:].numel() for rows in self._rows("train") + held_out)

    def _rows(self, split: str) -> tuple[Tensor, ...]:
        """Returns the batches of all sources, one source after the other."""
        return tuple(chain(*self.data.evaluation[split].values()))

    def _losses(
        self, batches: tuple[Tensor, ...], stopped: Callable[[], bool]
    ) -> BatchLosses | None:
        sums = batch_losses(self.model, batches, self._loss, stopped, self.world, self.micro_batch)
        if sums is None:
            return None
        return BatchLosses(sums, [count_targets(rows, self.data.document_ids) for rows in batches])

    def _source_losses(self, losses: BatchLosses) -> dict[str, SourceLoss]:
        """Returns, by source, the losses of its part of the held-out batches."""
        found, first = dict[str, SourceLoss](), 0
        for name, batches in self.data.evaluation["test"].items():
            own = slice(first, first + len(batches))
            mean = BatchLosses(losses.sums[own], losses.targets[own]).mean
            bits = bits_per_byte(mean, self.data.bytes_per_token_of[name])
            found |= {name: SourceLoss(mean, bits)} if name else {}
            first = own.stop
        return found

    def _loss(self, rows: Tensor) -> Tensor:
        """Returns the summed loss of rows (B, T+1)."""
        with self.precision.autocast():
            return next_token_loss(self.model, rows, self.world.device, self.data.document_ids)

    def _active_neurons(self) -> dict[str, list[float]]:
        rows = self._rows("test")[0].to(self.world.device).long()
        document_ids = self.data.document_ids
        ids = None if document_ids is None else document_ids(rows)[:, :-1]
        with evaluating(self.model), self.precision.autocast():
            return self.model.active_fraction(rows[:, :-1], ids)


# Not in inference mode: weights that a sharded model gathers there could not be trained.
@torch.no_grad()
def batch_losses(
    model: nn.Module,
    batches: tuple[Tensor, ...],
    loss: Callable[[Tensor], Tensor],
    stopped: Callable[[], bool],
    world: World,
    micro_batch: int,
) -> list[float] | None:
    """Returns the `loss` of each of the batches (B, T+1), with dropout off.

    loss: of at most `micro_batch` rows, which fit into memory. The processes share the batches.
    None when `stopped()`, asked by all of them together, became true on the way. Draws nothing from
    any random generator.
    """
    # On the device, so that the next batch is queued while this one is computed.
    losses = torch.zeros(len(batches), device=world.device)
    with evaluating(model):
        for first in range(0, len(batches), world.size):
            if stopped():
                return None
            together = batches[first : first + world.size]
            # All processes compute equally often: a sharded model gathers weights from all of them.
            # What a process without a batch computes, or beyond its last rows, does not count.
            calls = max(math.ceil(len(rows) / micro_batch) for rows in together)
            parts = torch.split(together[min(world.rank, len(together) - 1)], micro_batch)
            found = [loss(parts[min(call, len(parts) - 1)]) for call in range(calls)]
            if world.rank < len(together):
                losses[first + world.rank] = torch.stack(found[: len(parts)]).sum()
    # Each process holds zeros where the others hold losses, so the sum is all of them.
    values: list[float] = world.all_reduce_sum(losses).tolist()
    return values


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switches dropout off, and back to what it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        reshard(model)


def digest_rows(batches: tuple[Tensor, ...], document_ids: DocumentIds | None) -> str:
    """Returns twelve hex digits of the rows and of how their tokens are counted."""
    digest = hashlib.sha256(b"apart" if document_ids else b"whole")
    for rows in batches:
        digest.update(str(tuple(rows.shape)).encode())
        digest.update(rows.long().numpy().tobytes())
    return digest.hexdigest()[:12]


def bits_per_byte(nats_per_token: float, bytes_per_token: float | None) -> float | None:
    """Returns the loss in a unit that does not depend on the tokenizer; None for tokens that stand
    for no text."""
    if bytes_per_token is None:
        return None
    return nats_per_token / (math.log(2) * bytes_per_token)

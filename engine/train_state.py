"""What a run carries from step to step, and must carry over to resume exactly: progress and random
generators."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from config import TrainingConfig
from data.loading.batch_hash import MODULUS

FIRST_STEPS = 50
"""Steps whose losses are kept one by one, so that a run can be repeated and compared."""
ADDED: Mapping[str, bool] = MappingProxyType({"added": True})
"""Metadata of fields that checkpoints of earlier versions do not have."""
_NUMPY_WORDS = 624  # of the Mersenne Twister


@dataclass
class TrainState:
    """Progress of a run; plain values only, saved in every checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens trained on, in all processes."""
    epoch: int = 0
    """Completed passes over the training data; of a mixture, over the source with the fewest."""
    elapsed_s: float = 0.0
    """Wall time of the run, of all its sessions together."""
    loss_sum: float = 0.0
    """Sum of the losses since the last log line, which prints their mean."""
    loss_steps: int = 0
    evaluated_step: int = 0
    train_loss: float | None = None
    """Loss on the fixed training rows at `evaluated_step`."""
    val_loss: float | None = None
    best_val_loss: float | None = None
    best_step: int | None = None
    tracker_run: str | None = None
    """Weights & Biases' id of this run, so that a resumed run continues there."""
    compiled: bool | None = None
    """Whether steps are compiled. They round differently, so a resumed run does the same."""
    batch_hash: int | None = field(default=0, metadata=ADDED)
    """Sum of the hashes of the batches since the last log line; None where an earlier version
    trained on some of them."""
    first_losses: list[float] = field(default_factory=list, metadata=ADDED)
    """Of each of the first `FIRST_STEPS` steps since the last log line."""

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any]) -> TrainState:
        """Returns the state that a checkpoint holds."""
        unknown = {} if not saved["loss_steps"] else {"batch_hash": None}
        return cls(**{**unknown, **saved})

    def add_batch(self, batch_hash: int) -> None:
        """Adds the hash of a step's batch to those since the last log line."""
        if self.batch_hash is not None:
            self.batch_hash = (self.batch_hash + batch_hash) % MODULUS

    def add_loss(self, step: int, loss: float) -> None:
        """Adds the loss of a step to those since the last log line."""
        self.loss_sum += loss
        self.loss_steps += 1
        if step <= FIRST_STEPS:
            self.first_losses.append(loss)

    def take_losses(self) -> dict[str, Any]:
        """Returns what a log record tells of the steps since the last one, and begins anew."""
        batches = None if self.batch_hash is None else f"{self.batch_hash:016x}"
        record: dict[str, Any] = {
            "train/loss": self.loss_sum / self.loss_steps,
            "train/batch_hash": batches,
        }
        if self.first_losses:
            record["train/first_losses"] = self.first_losses
        self.clear_losses()
        return record

    def clear_losses(self) -> None:
        """Forgets the steps since the last log line."""
        self.loss_sum, self.loss_steps, self.batch_hash, self.first_losses = 0.0, 0, 0, []

    def finished(self, training: TrainingConfig) -> bool:
        """Returns whether `max_iters` steps or `epochs` passes over the data are done."""
        seen = training.epochs is not None and self.epoch >= training.epochs
        return seen or self.step >= training.max_iters

    def evaluation_due(self, training: TrainingConfig) -> bool:
        """Returns whether this step, or the end of the run, asks for an evaluation that has not
        been made."""
        every = training.test_freq
        wanted = every is not None and (due(self.step, every) or self.finished(training))
        return wanted and self.evaluated_step < self.step

    def has_work(self, training: TrainingConfig) -> bool:
        """Returns whether there are steps, or the evaluation after the last one, left to do."""
        missing = not self.finished(training) or self.evaluation_due(training)
        return missing and not training.eval_only

    def record_evaluation(self, train_loss: float, val_loss: float) -> bool:
        """Keeps the losses of this step; returns whether the held-out loss is the best so far."""
        self.evaluated_step, self.train_loss, self.val_loss = self.step, train_loss, val_loss
        improved = self.best_val_loss is None or val_loss < self.best_val_loss
        if improved:
            self.best_val_loss, self.best_step = val_loss, self.step
        return improved


def due(step: int, every: int | None) -> bool:
    """Returns whether something that happens every `every` steps happens now; None means never."""
    return every is not None and step > 0 and step % every == 0


def times_due(step: int, end: int, every: int | None) -> int:
    """Returns how often something is due after `step` up to `end`, where it is always due. With
    None it is never due."""
    if every is None or step >= end:
        return 0
    return end // every - step // every + (end % every > 0)


def saves_due(training: TrainingConfig, step: int, end: int, seconds: float) -> int:
    """Returns how many saves a run makes after `step` up to `end`, which is `seconds` away. Where
    only the best are saved, it is the largest number possible."""
    if not training.save_model or step >= end:
        return 0
    if not training.always_save_checkpoint:
        return max(1, times_due(step, end, training.test_freq))
    often = 0 if training.save_every is None else int(seconds // training.save_every)
    return max(1, times_due(step, end, training.checkpoint_freq), often)


def seed_generators(seed: int) -> None:
    """Seeds every random generator that `rng_state` saves."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def seed_apart(seed: int, step: int, rank: int) -> None:
    """Seeds the generators of every process but the main one, which keeps the run's own. Without
    it, all processes would drop the same neurons."""
    if rank:
        digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=7).digest()
        seed_generators(int.from_bytes(digest, "little"))


def rng_state(device: torch.device) -> dict[str, Any]:
    """Returns the states of the generators of torch (CPU and the run's device), Python and NumPy,
    as tensors and plain values: a checkpoint is loaded with weights_only=True."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(internal), gauss],
        "numpy": [
            str(kind),
            [int(key) for key in keys],
            int(position),
            int(has_gauss),
            float(cached),
        ],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def check_rng(state: dict[str, Any]) -> None:
    """Raises ValueError where generators refuse the states."""
    *_, position, _, _ = state["numpy"]
    if position > _NUMPY_WORDS:  # NumPy does not check, and would read beyond its array
        raise ValueError(f"rng: position {position} of {_NUMPY_WORDS} in NumPy's generator")
    version, internal, gauss = state["python"]
    kind, keys, *rest = state["numpy"]
    try:
        torch.Generator().set_state(state["torch"].cpu())
        random.Random().setstate((version, tuple(internal), gauss))
        np.random.RandomState().set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"rng: {error}") from error


def restore_rng(state: dict[str, Any], device: torch.device) -> None:
    """Restores what `rng_state` returned. A GPU keeps its own state where none was saved, as when a
    run moves from a CPU to a GPU."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    if device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])

"""What a run carries from step to step, and must carry over to resume exactly."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from config import TrainingConfig

_NUMPY_WORDS = 624  # of the Mersenne Twister


@dataclass
class TrainState:
    """Progress of a run; plain values only, saved in every checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens trained on, over all processes."""
    epoch: int = 0
    """Times the training data was seen whole."""
    elapsed_s: float = 0.0
    """Wall time of the run over all its sessions."""
    loss_sum: float = 0.0
    """Losses since the last log line, which prints their mean."""
    loss_steps: int = 0
    evaluated_step: int = 0
    train_loss: float | None = None
    """Loss on the fixed training rows at `evaluated_step`."""
    val_loss: float | None = None
    best_val_loss: float | None = None
    best_step: int | None = None
    tracker_run: str | None = None
    """What a tracker calls this run, so that it goes on there when resumed."""
    compiled: bool | None = None
    """Whether steps are compiled: they round differently, so a resumed run does the same."""

    def finished(self, training: TrainingConfig) -> bool:
        """Whether `max_iters` steps or `epochs` passes over the data are done."""
        seen = training.epochs is not None and self.epoch >= training.epochs
        return seen or self.step >= training.max_iters

    def evaluation_missing(self, training: TrainingConfig) -> bool:
        """Whether this step's evaluation is due, as at the end, and has not been made."""
        every = training.test_freq
        wanted = every is not None and (due(self.step, every) or self.finished(training))
        return wanted and self.evaluated_step < self.step

    def has_work(self, training: TrainingConfig) -> bool:
        """Whether there are steps, or the evaluation after the last one, to make."""
        missing = not self.finished(training) or self.evaluation_missing(training)
        return missing and not training.eval_only

    def record_evaluation(self, train_loss: float, val_loss: float) -> bool:
        """Keeps the losses of the present step; tells whether the held-out loss is the best."""
        self.evaluated_step, self.train_loss, self.val_loss = self.step, train_loss, val_loss
        improved = self.best_val_loss is None or val_loss < self.best_val_loss
        if improved:
            self.best_val_loss, self.best_step = val_loss, self.step
        return improved


def due(step: int, every: int | None) -> bool:
    """Whether something that happens every so many steps happens now; None is never."""
    return every is not None and step > 0 and step % every == 0


def times_due(step: int, end: int, every: int | None) -> int:
    """How often something is due after `step` and until `end`, there in any case; None: never."""
    if every is None or step >= end:
        return 0
    return end // every - step // every + (end % every > 0)


def saves_due(training: TrainingConfig, step: int, end: int, seconds: float) -> int:
    """How many saves a run makes after `step` until `end`, `seconds` later; at most, where only the
    best are saved."""
    if not training.save_model or step >= end:
        return 0
    if not training.always_save_checkpoint:
        return max(1, times_due(step, end, training.test_freq))
    often = 0 if training.save_every is None else int(seconds // training.save_every)
    return max(1, times_due(step, end, training.checkpoint_freq), often)


def seed_generators(seed: int) -> None:
    """Seeds every generator that `rng_state` saves."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def seed_apart(seed: int, step: int, rank: int) -> None:
    """Seeds the generators of a process beside the main one, which keeps the run's own: dropout
    must differ between processes."""
    if rank:
        digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=7).digest()
        seed_generators(int.from_bytes(digest, "little"))


def rng_state(device: torch.device) -> dict[str, Any]:
    """Generators of torch (CPU and the run's device), Python and NumPy, as plain values."""
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
    """Raises ValueError where generators cannot take what `rng_state` gave."""
    *_, position, _, _ = state["numpy"]
    if position > _NUMPY_WORDS:  # NumPy would read beyond them
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
    """Puts back what `rng_state` gave; a device that had no state keeps its own."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    if device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])

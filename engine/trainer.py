"""A run in memory: its model, optimizer and data, and what happens around the loop of train.py."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from config import Config, NonFiniteError, UserError
from data import StepBatch, merge_data_states
from data.run_data import RunData
from engine.evaluation import Evaluator
from engine.hardware.distributed import World
from engine.loss import count_targets
from engine.monitor import console
from engine.monitor.console import RULE
from engine.precision.precision import Precision
from engine.reporting import Reporter, RunSize
from engine.run_directory.directory import RunDirectory
from engine.saving import CheckpointSaver
from engine.signals import StopRequest
from engine.train_state import TrainState, rng_state
from model import LanguageModel

OVERFLOWS_IN_A_ROW = 30  # each halves the loss scale of float16, which starts at 2 ** 16


@dataclass
class Trainer:
    """Everything one run consists of (engine/setup/build.py puts it together)."""

    config: Config
    world: World
    precision: Precision
    model: LanguageModel
    ddp_model: nn.Module
    """The model as training calls it: it exchanges gradients with the other processes."""
    optimizer: torch.optim.Optimizer
    data: RunData
    batches: Iterator[StepBatch]
    data_state: Callable[[], dict[str, Any]]
    """Returns where the data stands after the last batch trained on; saved as `cursor`."""
    state: TrainState
    size: RunSize
    directory: RunDirectory
    evaluator: Evaluator
    reporter: Reporter
    saver: CheckpointSaver
    optimizer_step_in_progress: bool = False
    """True while the optimizer runs; if it raises, weights are inconsistent and not saved."""
    stop_after: int | None = None
    """Steps after which the loop ends as if a stop had been requested; None: never."""
    _overflows: int = 0
    _clock_s: float = field(default_factory=time.monotonic)  # when elapsed_s was last updated
    _waited_s: float = 0.0

    def next_batch(self) -> StepBatch:
        """Returns the data of the next step."""
        began = time.monotonic()
        batch = next(self.batches)
        self._waited_s = time.monotonic() - began
        return batch

    def count_targets(self, batch: StepBatch) -> int:
        """Returns the tokens that the loss of a step is the mean over, in all processes."""
        own = sum(count_targets(rows, self.data.document_ids) for rows in batch.micro_batches)
        if self.data.document_ids is None:  # the same number on each process: nothing to exchange
            return max(1, own * self.world.size)
        return max(1, round(self.world.all_reduce_number(own)))

    def should_stop(self, stop: StopRequest) -> bool:
        """Returns whether some process was asked to stop: all of them stop after the same step."""
        # `should_stop` also cuts evaluations short; a finished run still makes its last one.
        ended = self.state.finished(self.config.training)
        if self.stop_after is not None and self.state.step >= self.stop_after and not ended:
            return True
        agreed = self.world.any_rank(bool(stop))
        if agreed:
            stop.follow()
        return agreed  # not `stop`: a signal may have come since they asked each other

    def check_finite(self, batch: StepBatch, loss: float, grad_norm: float) -> None:
        """Raises NonFiniteError before a loss or gradient that is not finite reaches the weights.

        With float16, gradients that overflow are routine: `precision.step` skips the update and
        halves the loss scale. Many in a row are not.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._overflows = 0
            return
        self._overflows += 1
        routine = self.precision.tolerates_overflow and self._overflows < OVERFLOWS_IN_A_ROW
        if math.isfinite(loss) and routine:
            return
        raise NonFiniteError(
            f"Step {self.state.step + 1}: loss {loss}, gradient norm {grad_norm}: not finite. The "
            f"step was not taken; last checkpoint: {self.directory.last_checkpoint or 'none'}. "
            "Lower training.learning_rate, or try low_precision.compute_dtype: float32. "
            "The batch held\n  " + "\n  ".join(batch.describe())
        )

    def optimizer_step(self) -> None:
        """Updates the weights and drops the gradients."""
        self.optimizer_step_in_progress = True
        self.precision.step(self.optimizer, self.world.all_reduce_max)
        self.optimizer_step_in_progress = False
        self.optimizer.zero_grad(set_to_none=True)

    def count_step(self, batch: StepBatch, loss: float, seconds: float) -> None:
        """Counts a step. A step that float16 skipped counts too: its data has been used."""
        state = self.state
        state.step += 1
        state.tokens += self.size.tokens_per_step
        # The lanes of one process may end an epoch a little before those of another.
        state.epoch = self.world.all_reduce_min(batch.epoch)
        state.loss_sum += loss
        state.loss_steps += 1
        self.data_state = batch.data_state
        self.reporter.step(state, loss, seconds, self._waited_s)
        if self.world.is_main:
            elapsed_s = state.elapsed_s + time.monotonic() - self._clock_s
            self.directory.count_step(state.step, state.tokens, elapsed_s)

    def log(self, learning_rate: float, grad_norm: float) -> None:
        """Writes a line and a record of the steps since the last one."""
        self._update_elapsed()
        self.reporter.log(self.state, learning_rate, grad_norm)

    def evaluate(self, stop: StopRequest) -> None:
        """Evaluates on the fixed rows of both splits. A stop cuts it short; a resume makes up for
        it. An error here (memory runs out, say) must not cost the steps done: they are saved first.
        """
        console.info(RULE, f"Evaluating at iteration {self.state.step}...")
        self.reporter.live.tell("evaluating")
        try:
            found = self.evaluator.evaluate(partial(self.should_stop, stop))
        except Exception:
            self.save_on_error()
            raise
        if found is not None:
            self._update_elapsed()
            improved = self.state.record_evaluation(found.train_loss, found.val_loss)
            self.reporter.evaluation(self.state, found, improved, self.evaluator.rows_digest)

    def save(self, final: bool = False) -> None:
        """Saves a checkpoint unless this step has one; see `CheckpointSaver.save` for failures."""
        if not self.saver.needed(self.state):
            return
        self.reporter.live.tell("saving")
        began = time.monotonic()
        if self.saver.save(self.state, self.state_dict, final):
            self.reporter.pace.saves.add(time.monotonic() - began)
            console.info(f"Saved checkpoint to {self.directory.last_checkpoint}")

    def state_dict(self) -> dict[str, Any]:
        """Returns all that resuming needs, on any number of processes: tensors and plain values.

        engine/checkpoint/contents.py has its types. What one process alone knows is gathered: the
        place in the data and the random generators; the rest is equal in all of them.
        """
        self._update_elapsed()
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "precision": self.precision.state_dict(),
            "train": asdict(self.state),
            "cursor": merge_data_states(self.world.gather(self.data_state())),
            "rng": self.world.gather(rng_state(self.world.device)),
            "config": self.config.to_dict(),
            **self.data.identity(),
        }

    def finish(self) -> None:
        """Ends a run that is done: last record, last checkpoint, results and next commands."""
        self._update_elapsed()
        self.reporter.final_record(self.state)
        self.save(final=True)
        self.directory.end("done")
        self.reporter.finished(self.state)

    def finish_interrupted(self, stop: StopRequest) -> None:
        """Ends a run that a signal stopped: saves and says how to go on."""
        if self.state.step == 0:
            console.info("Stopped before the first step; nothing to save.")
            return
        self.save(final=True)
        self.directory.end("stopped", stop.name)
        self.reporter.interrupted(self.state, stop)

    def save_on_error(self) -> None:
        """Saves the steps done when something outside the step fails: data, disk, terminal.

        Single-process only: other ranks would not join the gather, so the last checkpoint remains
        the newest.
        """
        unsaved = self.state.step > self.saver.saved_step
        if self.world.size == 1 and unsaved and not self.optimizer_step_in_progress:
            with contextlib.suppress(UserError, OSError):  # the first error is the one to report
                self.save(final=True)

    def _update_elapsed(self) -> None:
        now = time.monotonic()
        self.state.elapsed_s += now - self._clock_s
        self._clock_s = now

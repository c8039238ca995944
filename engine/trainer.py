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
from torch import Tensor, nn

from config import Config, NonFiniteError, UserError
from data import StepBatch, merge_data_states
from data.loading.batch_hash import hash_step
from data.run_data import RunData
from engine.evaluation import Evaluator
from engine.graphed_step import GraphedStep
from engine.hardware.distributed import World
from engine.loss import count_targets
from engine.monitor import console
from engine.monitor.console import RULE
from engine.precision.precision import Precision
from engine.reporting import Reporter, RunSize
from engine.run_directory.directory import RunDirectory
from engine.saving import CheckpointSaver
from engine.signals import StopRequest
from engine.step import Step
from engine.train_state import TrainState, rng_state
from engine.weights_hash import weights_hash
from model import LanguageModel

OVERFLOWS_IN_A_ROW = 30  # each halves the loss scale of float16, which starts at 2 ** 16


@dataclass
class Trainer:
    """Everything one run consists of (engine/setup/build.py puts it together)."""

    config: Config
    world: World
    precision: Precision
    model: LanguageModel
    parallel_model: nn.Module
    """The model as training calls it: it averages gradients over all processes. `model` itself, or
    DDP around it."""
    graphed_step: GraphedStep | None
    """Forward and backward as a CUDA graph, where the config asks for one."""
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
    found_inf: Tensor | None = None
    """A flag () on the device, set to 1 by the first step whose loss or gradient norm is not
    finite; from then on the optimizer changes nothing. So the host may read both one step late, and
    the device does not wait for it. None: the host reads them before it calls the optimizer."""
    _unread: Step | None = None
    _grad_norm: float = math.nan  # of the last step whose values were counted
    _counted_s: float = 0.0  # time.monotonic() when they were
    _overflows: int = 0
    _clock_s: float = field(default_factory=time.monotonic)  # when elapsed_s was last updated

    @property
    def reads_late(self) -> bool:
        """Whether loss and gradient norm of a step are read when the next one is queued."""
        return self.found_inf is not None

    def next_step(self, stop: StopRequest) -> Step | None:
        """Returns the next step with its data; None where some process was asked to stop.

        The processes exchange here, in one message, all that they have to agree on, so that they
        stop and save after the same step, and learn together that a checkpoint is on the disk.
        """
        if self._reached_stop_after():
            return None
        began_s = time.monotonic()
        batch = None if stop else next(self.batches)
        waited_s = time.monotonic() - began_s
        written = int(self.saver.is_written)
        own = [0, 0, 0, 0, 0, written]  # this process stops
        if batch is not None:
            ids = self.data.document_ids
            own_targets = sum(count_targets(rows, ids) for rows in batch.micro_batches)
            save_time = int(self.saver.time_over)
            own = [1, own_targets, batch.rows_hash(), batch.epoch, save_time, written]
        all_own = self.world.all_gather(own)
        goes_on, targets, hashes, epochs, save_times, writes = zip(*all_own, strict=True)
        if all(writes):
            self.finish_save()
        if batch is None or not all(goes_on):
            stop.follow()
            return None
        number = self.state.step + 1
        return Step(
            number=number,
            batch=batch,
            targets=max(1, sum(targets)),
            batch_hash=hash_step(number, hashes),
            epoch=min(epochs),  # the lanes of one process may end one a little before another's
            save_time_over=any(save_times),
            began_s=began_s,
            waited_s=waited_s,
        )

    def should_stop(self, stop: StopRequest) -> bool:
        """Returns whether to cut an evaluation short because some process was asked to stop."""
        # A finished run still makes its last evaluation.
        if self._reached_stop_after() and not self.state.finished(self.config.training):
            return True
        agreed = self.world.any_rank(bool(stop))
        if agreed:
            stop.follow()
        return agreed  # not `stop`: a signal may have come since they asked each other

    def _reached_stop_after(self) -> bool:
        return self.stop_after is not None and self.state.step >= self.stop_after

    def check_finite(self, step: Step, loss: Tensor, grad_norm: Tensor) -> None:
        """Keeps a step whose loss () or gradient norm () is not finite from reaching the weights.

        Raises NonFiniteError: for this step or, where values are read late, for the one before.
        """
        values = torch.stack((loss, grad_norm))
        step.start_reading(values)
        if self.found_inf is None:
            self._read_values(step)
            return
        # Never set back: the weights stay those of the last finite step until the host stops.
        self.found_inf.masked_fill_(~values.isfinite().all(), 1.0)
        if self._unread is not None:
            self._read_values(self._unread)

    def _read_values(self, step: Step) -> None:
        """Reads loss and gradient norm of a step; raises NonFiniteError where one is not finite.

        With float16, gradients that overflow are routine: `precision.step` skips the update and
        halves the loss scale. Many in a row are not.
        """
        step.read()
        loss, grad_norm = step.loss, step.grad_norm
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._overflows = 0
            return
        self._overflows += 1
        routine = self.precision.tolerates_overflow and self._overflows < OVERFLOWS_IN_A_ROW
        if math.isfinite(loss) and routine:
            return
        raise NonFiniteError(
            f"Step {step.number}: loss {loss}, gradient norm {grad_norm}: not finite. The "
            f"step was not taken; last checkpoint: {self.directory.last_checkpoint or 'none'}. "
            "Lower training.learning_rate, or try low_precision.compute_dtype: float32. "
            "The batch held\n  " + "\n  ".join(step.batch.describe())
        )

    def optimizer_step(self) -> None:
        """Updates the weights and drops the gradients."""
        self.optimizer_step_in_progress = True
        self.precision.step(self.optimizer, self.world.all_reduce_max)
        self.optimizer_step_in_progress = False
        self.optimizer.zero_grad(set_to_none=True)

    def count_step(self, step: Step) -> None:
        """Counts a step. A step that float16 skipped counts too: its data has been used."""
        self.state.step += 1
        self.state.tokens += self.size.tokens_per_step
        self.state.epoch = step.epoch
        self.state.add_batch(step.batch_hash)
        self.data_state = step.batch.data_state
        read, self._unread = (self._unread, step) if self.reads_late else (step, None)
        if read is not None:
            self._count_values(read)

    def read_last_step(self) -> None:
        """Reads loss and gradient norm of the last step if still unread; raises NonFiniteError.

        Called before a log line, an evaluation or a checkpoint, so that these hold every step taken
        and none that the optimizer skipped.
        """
        if self._unread is not None:
            self._read_values(self._unread)
            read, self._unread = self._unread, None
            self._count_values(read)

    def _count_values(self, step: Step) -> None:
        """Adds a step whose values were read to the mean loss, the times and the live line."""
        state, now = self.state, time.monotonic()
        state.add_loss(step.number, step.loss)
        self._grad_norm = step.grad_norm
        # Read late, two steps overlap: the time of the second counts from the end of the first.
        seconds = now - max(step.began_s, self._counted_s)
        self._counted_s = now
        self.reporter.step(state, step.loss, seconds, step.waited_s)
        if self.world.is_main:
            tokens = state.tokens - (state.step - step.number) * self.size.tokens_per_step
            elapsed_s = state.elapsed_s + now - self._clock_s
            self.directory.count_step(step.number, tokens, elapsed_s)

    def log(self, learning_rate: float) -> None:
        """Writes a line and a record of the steps since the last one."""
        self.read_last_step()
        self._update_elapsed()
        weights = weights_hash(self.model.state_dict(), self.world)
        self.reporter.log(self.state, learning_rate, self._grad_norm, weights)

    def evaluate(self, stop: StopRequest) -> None:
        """Evaluates on the fixed rows of both splits. A stop cuts it short; a resume makes up for
        it. An error here (memory runs out, say) must not cost the steps done: they are saved first.
        """
        self.read_last_step()
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
        """Starts to save a checkpoint unless this step has one, once the save before it is done.

        final: waits until the file is on the disk. See `CheckpointSaver.finish` for failures.
        """
        self.read_last_step()
        self.reporter.live.tell("saving")
        began = time.monotonic()
        self.finish_save()
        if self.saver.needed(self.state):
            self.saver.start(self.state, self.state_dict)
            if final:
                self.finish_save(final)
            self.reporter.pace.saves.add(time.monotonic() - began)

    def finish_save(self, final: bool = False) -> None:
        """Waits for a save under way and says where it is."""
        if self.saver.finish(final):
            console.info(f"Saved checkpoint to {self.directory.last_checkpoint}")

    def state_dict(self) -> dict[str, Any]:
        """Returns all that resuming needs, on any number of processes: tensors and plain values.
        Tensors of a sharded model are `DTensor`s, which engine/checkpoint/snapshot.py gathers.

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
        the newest. Raises NonFiniteError where the last step was not taken.
        """
        self.read_last_step()
        unsaved = self.state.step > self.saver.saved_step
        if self.world.size == 1 and unsaved and not self.optimizer_step_in_progress:
            with contextlib.suppress(UserError, OSError):  # the first error is the one to report
                self.save(final=True)

    def _update_elapsed(self) -> None:
        now = time.monotonic()
        self.state.elapsed_s += now - self._clock_s
        self._clock_s = now

"""A run in memory, and what happens to it once in a while: log, evaluate, save, finish.

`train.py` builds a `Session` and holds the loop; the verbs the loop speaks are here.
"""

from __future__ import annotations

import contextlib
import math
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from config import Config, NonFiniteError, UserError, WriteError
from engine.checkpoint import save_checkpoint
from engine.evaluate import DocumentIds, bits_per_byte, count_targets, mean_loss, next_token_loss
from engine.metrics import RULE, Clock, duration, iteration_line, say, short, warn
from engine.plan import tokens_per_step
from engine.precision import Precision
from engine.run import RunDirectory
from engine.signals import StopRequest
from engine.state import TrainState, due, rng_state
from engine.world import World, peak_flops, peak_memory_bytes

SAVE_ATTEMPTS = 3  # failed saves in a row before the run ends; one may be a passing fault
OVERFLOWS_IN_A_ROW = 30  # each halves the loss scale of float16, which starts at 2 ** 16


class Batch(Protocol):
    """The data of one optimizer step."""

    @property
    def micro_batches(self) -> tuple[Tensor, ...]:
        """Rows (B, T+1) of each micro-step."""

    @property
    def epoch(self) -> int:
        """Times the data has been seen whole after this batch."""

    def cursor(self) -> dict[str, Any]:
        """Where the data stands after this batch, as plain values."""

    def describe(self) -> list[str]:
        """The documents of this batch."""


@dataclass
class Session:
    """Everything one run consists of."""

    config: Config
    world: World
    precision: Precision
    model: nn.Module
    flops_per_token: int
    """FLOPs of one training step per token, by the model's own count."""
    optimizer: torch.optim.Optimizer
    batches: Iterator[Batch]
    documents: DocumentIds | None
    """Tells documents apart where tokens may see only their own."""
    activity: Callable[[Tensor, Tensor | None], dict[str, list[float]]]
    """The model's own count of active neurons on tokens (B, T) of documents (B, T)."""
    evaluation: tuple[tuple[Tensor, ...], ...]
    """The fixed rows of the training and of the held-out text, in batches."""
    data: dict[str, Any]
    """What identifies the data, as plain values."""
    directory: RunDirectory
    state: TrainState
    cursor: Callable[[], dict[str, Any]]
    """Where the data stands after the last batch trained on."""
    planned_steps: int
    """Steps this run will make in all: `max_iters`, or fewer where `epochs` ends it."""
    saved_step: int = 0
    failed_saves: int = 0
    overflows: int = 0
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.first_step = self.state.step
        self.started = self.counted = self.saved_at = time.monotonic()
        self.tokens_per_step = tokens_per_step(self.config, self.world.size)

    def loss(self, rows: Tensor) -> Tensor:
        """Summed loss of rows (B, T+1) in the run's precision."""
        with self.precision.autocast():
            return next_token_loss(self.model, rows, self.world.device, self.documents)

    def targets(self, rows: Tensor) -> int:
        """The tokens that `loss` sums over."""
        return count_targets(rows, self.documents)

    @property
    def finished(self) -> bool:
        """Whether `max_iters` steps or `epochs` passes over the data are done."""
        return self.state.finished(self.config.training)

    @property
    def evaluation_missing(self) -> bool:
        """Whether this step's evaluation is due, as at the end, and has not been made."""
        return self.state.evaluation_missing(self.config.training)

    def check_finite(self, batch: Batch, loss: float, grad_norm: float) -> None:
        """Stops before a loss or gradient that is not finite can reach the weights.

        With float16, gradients that overflow are routine, but not many times in a row.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.overflows = 0
            return
        self.overflows += 1
        routine = self.precision.tolerates_overflow and self.overflows < OVERFLOWS_IN_A_ROW
        if math.isfinite(loss) and routine:
            return
        raise NonFiniteError(
            f"Step {self.state.step + 1}: loss {loss}, gradient norm {grad_norm}: not finite. The "
            f"step was not taken; last checkpoint: {self.directory.last_checkpoint or 'none'}. "
            "Lower training.learning_rate, or try low_precision.compute_dtype: float32. "
            "The batch held\n  " + "\n  ".join(batch.describe())
        )

    def advance(self, batch: Batch, loss: float, seconds: float) -> None:
        """Counts a step that was taken."""
        self.state.step += 1
        self.state.tokens += self.tokens_per_step
        self.state.epoch = batch.epoch
        self.state.loss_sum += loss
        self.state.loss_steps += 1
        self.cursor = batch.cursor
        self.clock.add(seconds)

    def stamp(self) -> dict[str, Any]:
        """What every record begins with; brings the elapsed time up to date."""
        now = time.monotonic()
        self.state.elapsed_s += now - self.counted
        self.counted = now
        return {"step": self.state.step, "time": self.state.elapsed_s, "tokens": self.state.tokens}

    def log(self, learning_rate: float, grad_norm: float) -> None:
        """One line, one record: the mean loss since the last one; speed without evaluation."""
        state, world = self.state, self.world
        seconds = self.clock.take()
        speed = self.tokens_per_step / seconds
        record = self.stamp() | {
            "train/loss": state.loss_sum / state.loss_steps,
            "train/learning_rate": learning_rate,
            "train/grad_norm": grad_norm,
            "train/tokens_per_sec": speed,
            "train/iter_time_ms": seconds * 1000,
            "train/mfu": self._flops_utilization(speed),
            "train/memory_bytes": peak_memory_bytes(world.device),
        }
        state.loss_sum, state.loss_steps = 0.0, 0
        self.directory.append_metrics(record)
        pace = (time.monotonic() - self.started) / (state.step - self.first_step)
        say(iteration_line(record, pace * max(0, self.planned_steps - state.step)))

    def _flops_utilization(self, tokens_per_second: float) -> float | None:
        peak = peak_flops(self.world.device)
        if peak is None:
            return None
        return tokens_per_second * self.flops_per_token / (peak * self.world.size)

    def evaluate(self, stop: StopRequest) -> None:
        """Loss on the fixed rows of both splits; a stop cuts it short, to be made up at resume.

        An error here (memory runs out, say) must not cost the steps done: they are saved first.
        """
        say(RULE, f"Evaluating at iteration {self.state.step}...")
        losses = []
        try:
            for batches in self.evaluation:
                loss = mean_loss(self.model, batches, self.loss, self.targets, stop.__bool__)
                if loss is None:
                    return
                losses.append(loss)
            shares = self.active_shares()
        except Exception:
            self.save(last=True)
            raise
        best = self.state.record_evaluation(*losses)
        bits = bits_per_byte(losses[1], bytes_per_token=1.0)
        names = ("eval/train_loss", "eval/val_loss", "eval/bits_per_byte")
        values = dict(zip(names, (*losses, bits), strict=True))
        self.directory.append_metrics(self.stamp() | values | shares)
        mark = " | best so far" if best else ""
        say(
            f"Train loss: {losses[0]:.4f} | Val loss: {losses[1]:.4f} | Bits/byte: {bits:.3f}{mark}"
        )
        if shares:
            means = [f"{key[-1]} {fmean(value):.1%}" for key, value in shares.items()]
            say(f"Active neurons: {', '.join(means)}")
        say(RULE)

    def active_shares(self) -> dict[str, list[float]]:
        """The share of active neurons in each layer, on the first held-out batch."""
        rows = self.evaluation[1][0].to(self.world.device).long()
        ids = None if self.documents is None else self.documents(rows)[:, :-1]
        with self.precision.autocast():
            shares = self.activity(rows[:, :-1], ids)
        return {f"eval/active_{name}": values for name, values in shares.items()}

    @property
    def checkpoint_due(self) -> bool:
        """By steps or by seconds; without `always_save_checkpoint`, after an evaluation that is the
        best so far. The last step is saved by `finish`, with the final record before it.
        """
        training, state = self.config.training, self.state
        if self.finished:
            return False
        if not training.always_save_checkpoint:
            return state.best_step == state.step
        waited = time.monotonic() - self.saved_at
        by_time = training.save_every is not None and waited >= training.save_every
        return by_time or due(state.step, training.checkpoint_freq)

    def save(self, last: bool = False) -> None:
        """Saves a checkpoint unless this step has one.

        A failure is retried when the next one is due; raises WriteError when it is the run's last
        save or the third failure in a row.
        """
        if self.state.step == self.saved_step:
            return
        self.stamp()
        try:
            path = save_checkpoint(
                self.directory, self.state_dict(), self.config.training.keep_last
            )
        except WriteError as error:
            self.failed_saves, self.saved_at = self.failed_saves + 1, time.monotonic()
            if last or self.failed_saves == SAVE_ATTEMPTS:
                raise
            warn(f"{error}\nTraining goes on; the next checkpoint will try again.")
            return
        self.failed_saves, self.saved_step, self.saved_at = 0, self.state.step, time.monotonic()
        say(f"Saved checkpoint to {path}")

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs: tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.state_dict(),
            "train": asdict(self.state),
            "cursor": self.cursor(),
            "rng": rng_state(self.world.device),
            "config": self.config.to_dict(),
            "data": self.data,
        }

    def finish(self) -> None:
        """The end of a whole run: last record, last checkpoint, what to do next."""
        state = self.state
        if state.evaluated_step == state.step:
            losses = {"final/train_loss": state.train_loss, "final/val_loss": state.val_loss}
            self.directory.append_metrics(self.stamp() | losses)
        self.save(last=True)
        took = duration(state.elapsed_s)
        say(f"Finished: {state.step} steps, {short(state.tokens)} tokens in {took}")
        if state.evaluated_step == state.step:
            best = f"best {state.best_val_loss:.4f} at step {state.best_step}"
            say(f"Held-out loss: {state.val_loss:.4f}, {best}")
        say(f"Checkpoint: {self.directory.last_checkpoint}")
        say(f"To write text: python sample.py {quoted(self.directory.path)}")

    def leave(self, stop: StopRequest) -> None:
        """The end of an interrupted run: save and say how to go on."""
        if self.state.step == 0:
            say("Stopped before the first step; nothing to save.")
            return
        self.save(last=True)
        path = quoted(self.directory.path)
        say(
            f"Stopped by {stop.name} at step {self.state.step}. To go on:",
            f"  python train.py --config {path}/config.yaml resume_from_checkpoint={path}",
        )

    def rescue(self) -> None:
        """Saves the steps done when something outside the step fails: data, disk, terminal."""
        if self.state.step > self.saved_step:
            with contextlib.suppress(UserError, OSError):  # the first error is the one to report
                self.save(last=True)


def quoted(path: Path | None) -> str:
    """The path as a shell takes it."""
    return shlex.quote(str(path))

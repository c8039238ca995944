"""A run in memory, and what happens to it once in a while: log, evaluate, save, finish.

`train.py` builds a `Session` and holds the loop; the verbs the loop speaks are here.
"""

from __future__ import annotations

import contextlib
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from textwrap import indent
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from config import (
    Config,
    NonFiniteError,
    UserError,
    WriteError,
    micro_batch,
    started_by_torchrun,
)
from engine.checkpoint.save_load import save_checkpoint
from engine.evaluation import (
    batch_losses,
    bits_per_byte,
    count_targets,
    fingerprint,
    next_token_loss,
)
from engine.hardware.device import peak_flops
from engine.hardware.distributed import World, no_sync_until_last
from engine.hardware.memory import peak_memory_bytes
from engine.interfaces import Batch, Text, Tracker
from engine.monitor import console
from engine.monitor.progress import LiveLine, Pace
from engine.planning.summary import tokens_per_step
from engine.precision.precision import Precision
from engine.run_directory.directory import RunDirectory
from engine.run_directory.manifest import best_step, complete_checkpoints, data_path
from engine.signals import StopRequest
from engine.train_state import TrainState, due, rng_state, saves_due, times_due
from model.interface import LanguageModel
from settings.formatting import format_count, format_duration

SAVE_ATTEMPTS = 3  # failed saves in a row before the run ends; one may be a passing fault
OVERFLOWS_IN_A_ROW = 30  # each halves the loss scale of float16, which starts at 2 ** 16


class Losses(NamedTuple):
    """Of an evaluation, in nats per token."""

    mean: float
    batches: list[float]


@dataclass
class Session:
    """Everything one run consists of."""

    config: Config
    world: World
    precision: Precision
    model: LanguageModel
    trained: nn.Module
    """The model as training calls it: it shares gradients with the other processes."""
    flops_per_token: int
    """FLOPs of one training step per token, by the model's own count."""
    optimizer: torch.optim.Optimizer
    batches: Iterator[Batch]
    text: Text
    activation_sparsity: Callable[[Tensor, Tensor | None], dict[str, list[float]]]
    """The model's own count of active neurons on tokens (B, T) of documents (B, T)."""
    directory: RunDirectory
    state: TrainState
    data_state: Callable[[], dict[str, Any]]
    """Where the data stands after the last batch trained on."""
    planned_steps: int
    """Steps this run will make in all: `max_iters`, or fewer where `epochs` ends it."""
    trackers: Sequence[Tracker] = ()
    sample: Callable[[], str] | None = None
    """What the model writes on from `training.sample_prompt`; None where none is asked for."""
    compile_s: float | None = None
    """What compiling took; None where nothing was compiled."""
    saved_step: int = 0
    saved_evaluation: int = 0
    """The step of the last evaluation that a checkpoint knows of."""
    failed_saves: int = 0
    overflows: int = 0
    torn: bool = False
    """Whether the optimizer was stopped in the middle of a step: weights are of no step."""
    pace: Pace = field(default_factory=Pace)

    def __post_init__(self) -> None:
        self.counted = self.saved_at = time.monotonic()
        self.tokens_per_step = tokens_per_step(self.config, self.world.size)
        self.live = LiveLine(self.world.is_main, self.planned_steps)
        self.waited_s, self.told_compiling = 0.0, False
        rows = sum(len(rows) for batches, _ in self._views() for rows in batches)
        tokens = rows * self.config.training.block_size
        self.forward_steps = tokens / (3 * self.tokens_per_step)  # a third of a training step
        held_out = self.text.evaluation[1] if self.text.evaluation else ()
        self.rows = fingerprint(held_out, self.text.document_ids)

    def next_batch(self) -> Batch:
        """The data of the next step."""
        began = time.monotonic()
        batch = next(self.batches)
        self.waited_s = time.monotonic() - began
        return batch

    def micro_losses(self, batch: Batch) -> Iterator[Tensor]:
        """The share of each micro-step in the step's loss; to be taken backward at once.

        A step's loss is the mean over its tokens in all processes, which exchange gradients in the
        backward pass of the last share.
        """
        targets = sum(self.targets(rows) for rows in batch.micro_batches)
        if self.text.document_ids is not None:  # else all processes have as many
            targets = round(self.world.all_reduce_number(targets))
        else:
            targets *= self.world.size
        last = len(batch.micro_batches) - 1
        for number, rows in enumerate(batch.micro_batches):
            with no_sync_until_last(self.trained, number == last):
                yield self.loss(rows, self.trained) / max(1, targets)

    def loss(self, rows: Tensor, model: nn.Module | None = None) -> Tensor:
        """Summed loss of rows (B, T+1) in the run's precision."""
        used, device = model or self.model, self.world.device
        with self.precision.autocast():
            return next_token_loss(used, rows, device, self.text.document_ids)

    def whole_loss(self, rows: Tensor) -> Tensor:
        """Summed loss of more rows than a micro-batch holds."""
        parts = torch.split(rows, micro_batch(self.config))
        return torch.stack([self.loss(part) for part in parts]).sum()

    def targets(self, rows: Tensor) -> int:
        """The tokens that `loss` sums over."""
        return count_targets(rows, self.text.document_ids)

    def stopping(self, stop: StopRequest) -> bool:
        """Whether some process was asked to stop: all of them then do, after the same step."""
        agreed = self.world.any_rank(bool(stop))
        if agreed:
            stop.join()
        return agreed  # not `stop`: a signal may have come since they asked each other

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

    def step(self) -> None:
        """The optimizer's step; gradients are gone after it."""
        self.torn = True
        self.precision.step(self.optimizer, self.world.all_reduce_max)
        self.torn = False
        self.optimizer.zero_grad(set_to_none=True)

    def advance(self, batch: Batch, loss: float, seconds: float) -> None:
        """Counts a step that was taken."""
        self.state.step += 1
        self.state.tokens += self.tokens_per_step
        # Some processes read shorter lanes.
        self.state.epoch = self.world.all_reduce_min(batch.epoch)
        self.state.loss_sum += loss
        self.state.loss_steps += 1
        self.data_state = batch.data_state
        self.pace.step(seconds, self.waited_s)
        if self.pace.has_become_known():
            left = f"{format_duration(self.left_s)} with evaluations and saves"
            console.info(f"{self.pace.step_s:.3g} s per step: the run takes about {left}")
        if self.world.is_main:
            elapsed_s = self.state.elapsed_s + time.monotonic() - self.counted
            self.directory.count_step(self.state.step, self.state.tokens, elapsed_s)
        if self.live.due:
            self.live.show(self.state.step, loss, self.tokens_per_step / seconds, self.left_s)

    def stamp(self) -> dict[str, Any]:
        """What every record begins with; brings the elapsed time up to date."""
        now = time.monotonic()
        self.state.elapsed_s += now - self.counted
        self.counted = now
        return {"step": self.state.step, "time": self.state.elapsed_s, "tokens": self.state.tokens}

    def record(self, values: dict[str, Any]) -> None:
        """Keeps one record in metrics.jsonl and sends it to the trackers."""
        if self.world.is_main:
            self.directory.append_metrics(values)
            for tracker in self.trackers:
                tracker.log(values)

    def log(self, learning_rate: float, grad_norm: float) -> None:
        """One line, one record: the mean loss since the last one; speed without evaluation."""
        state, world = self.state, self.world
        seconds, waited = self.pace.take()
        speed = self.tokens_per_step / seconds
        record = self.stamp() | {
            "train/loss": state.loss_sum / state.loss_steps,
            "train/learning_rate": learning_rate,
            "train/grad_norm": grad_norm,
            "train/tokens_per_sec": speed,
            "train/iter_time_ms": seconds * 1000,
            "train/mfu": self._flops_utilization(speed),
            "train/data_wait": waited,
            "train/memory_bytes": peak_memory_bytes(world.device),
            **self.precision.metrics(),
        }
        if self.compile_s is not None and not self.told_compiling:
            record["train/compile_s"], self.told_compiling = self.compile_s, True
        state.loss_sum, state.loss_steps = 0.0, 0
        self.record(record)
        console.info(console.iteration_line(record, self.left_s))

    @property
    def left_s(self) -> float:
        """Seconds until the end of the run, with its evaluations and saves."""
        training, done, end = self.config.training, self.state.step, self.planned_steps
        steps = max(0, end - done)
        evaluations = times_due(done, end, training.test_freq) + self.evaluation_missing
        saves = saves_due(training, done, end, steps * self.pace.step_s)
        saves += training.save_model and due(done, training.checkpoint_freq)
        return self.pace.left(steps, evaluations, saves, self.forward_steps)

    def _flops_utilization(self, tokens_per_second: float) -> float | None:
        peak = peak_flops(self.world.device, self.precision.matmul_format)
        if peak is None:
            return None
        return tokens_per_second * self.flops_per_token / (peak * self.world.size)

    def evaluate(self, stop: StopRequest) -> None:
        """Loss on the fixed rows of both splits; a stop cuts it short, to be made up at resume.

        An error here (memory runs out, say) must not cost the steps done: they are saved first.
        """
        console.info(console.RULE, f"Evaluating at iteration {self.state.step}...")
        self.live.tell("evaluating")
        began = time.monotonic()
        measured: list[Losses] = []
        try:
            for batches, view in self._views():
                with view:
                    stopped = partial(self.stopping, stop)
                    sums = batch_losses(self.model, batches, self.whole_loss, stopped, self.world)
                if sums is None:
                    return
                counts = [self.targets(rows) for rows in batches]
                each = [one / max(1, n) for one, n in zip(sums, counts, strict=True)]
                measured.append(Losses(sum(sums) / max(1, sum(counts)), each))
            shares = self.active_shares()
            sample = self.sample() if self.sample and self.world.is_main else None
        except Exception:
            self.rescue()
            raise
        self.pace.evaluations.add(time.monotonic() - began)
        self._tell_evaluation(measured, shares, sample)

    def _tell_evaluation(
        self, measured: list[Losses], shares: dict[str, list[float]], sample: str | None
    ) -> None:
        """Records and prints the losses of each view."""
        losses, state = [each.mean for each in measured], self.state
        best = state.record_evaluation(*losses[:2])
        per_token = self.text.bytes_per_token
        bits = None if per_token is None else bits_per_byte(losses[1], per_token)
        record = self.stamp() | {
            "eval/train_loss": losses[0],
            "eval/val_loss": losses[1],
            **({"eval/val_loss_4bit": losses[2]} if losses[2:] else {}),
            "eval/bits_per_byte": bits,
            "eval/best_loss": state.best_val_loss,
            "eval/best_step": state.best_step,
            "eval/seconds": self.pace.evaluations.last,
            **shares,
            **({} if sample is None else {"eval/sample": sample}),
            "eval/val_losses": measured[1].batches,
            "eval/rows": self.rows,
        }
        self.record(record)
        parts = [f"Train loss: {losses[0]:.4f}", f"Val loss: {losses[1]:.4f}"]
        parts += [f"in 4 bits: {loss:.4f}" for loss in losses[2:]]
        parts += [] if bits is None else [f"Bits/byte: {bits:.3f}"]
        parts.append(f"{self.pace.evaluations.last:.1f}s")
        console.info(" | ".join(parts + ["best so far"] * best))
        if shares:
            means = [f"{key[-1]} {fmean(value):.1%}" for key, value in shares.items()]
            console.info(f"Active neurons: {', '.join(means)}")
        if sample is not None:
            console.info("Sample:", indent(sample, "  "))
        console.info(console.RULE)

    def _views(self) -> Iterator[tuple[tuple[Tensor, ...], AbstractContextManager[None]]]:
        """What is evaluated, and within which context."""
        if not self.text.evaluation:
            return
        train, held_out = self.text.evaluation
        yield train, contextlib.nullcontext()
        yield held_out, contextlib.nullcontext()
        if self.precision.quantized is not None:
            yield held_out, self.precision.quantized.applied()

    def active_shares(self) -> dict[str, list[float]]:
        """The share of active neurons in each layer, on the first held-out batch."""
        if not self.world.is_main:
            return {}
        rows = self.text.evaluation[1][0].to(self.world.device).long()
        ids = None if self.text.document_ids is None else self.text.document_ids(rows)[:, :-1]
        with self.precision.autocast():
            shares = self.activation_sparsity(rows[:, :-1], ids)
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
        if due(state.step, training.checkpoint_freq):
            return True
        waited = time.monotonic() - self.saved_at
        if training.save_every is None:
            return False
        return self.world.any_rank(waited >= training.save_every)

    def save(self, last: bool = False) -> None:
        """Saves a checkpoint unless this step has one.

        A failure is retried when the next one is due; raises WriteError when it is the run's last
        save or the third failure in a row.
        """
        state = self.state
        known = state.step == self.saved_step and state.evaluated_step == self.saved_evaluation
        if known or not self.config.training.save_model:
            return
        self.live.tell("saving")
        began = time.monotonic()
        content, error = self.state_dict(), None
        if self.world.is_main:
            try:
                save_checkpoint(self.directory, content, self.config.training.keep_last)
            except WriteError as failure:
                error = failure
        self.saved_at = time.monotonic()
        box = self.world.broadcast((error, self.directory.last_checkpoint))
        error, self.directory.last_checkpoint = box
        if error is not None:
            self.failed_saves += 1
            if last or self.failed_saves == SAVE_ATTEMPTS:
                raise error
            if self.world.is_main:
                console.warning(f"{error}\nTraining goes on; the next checkpoint will try again.")
            return
        self.failed_saves, self.saved_step = 0, state.step
        self.saved_evaluation = state.evaluated_step
        self.pace.saves.add(time.monotonic() - began)
        console.info(f"Saved checkpoint to {self.directory.last_checkpoint}")

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs, on any number of processes: tensors and plain values."""
        self.stamp()
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "precision": self.precision.state_dict(),
            "train": asdict(self.state),
            "cursor": self.text.merge_data_states(self.world.gather(self.data_state())),
            "rng": self.world.gather(rng_state(self.world.device)),
            "config": self.config.to_dict(),
            **self.text.identity(),
        }

    def finish(self) -> None:
        """The end of a whole run: last record, last checkpoint, what to do next."""
        state, record = self.state, self.stamp()
        if state.evaluated_step == state.step:
            losses = {"final/train_loss": state.train_loss, "final/val_loss": state.val_loss}
            self.record(record | losses)
        self.save(last=True)
        self.directory.end("done")
        took = format_duration(state.elapsed_s)
        console.info(f"Finished: {state.step} steps, {format_count(state.tokens)} tokens in {took}")
        console.info(f"Time of this session: {self.pace.describe(self.compile_s)}")
        if state.evaluated_step == state.step:
            best = f"best {state.best_val_loss:.4f} at step {state.best_step}"
            console.info(f"Held-out loss: {state.val_loss:.4f}, {best}")
        if self.config.training.save_model:
            console.info(f"Checkpoint: {self.directory.last_checkpoint}", *self._best_line())
            path = quoted(self.directory.path)
            console.info(f"To write text: python {script('sample.py')} {path}")
            console.info(f"To see its curves: python {script('runs.py')} report {path}")

    def _best_line(self) -> list[str]:
        """Names the best checkpoint where it is not the last."""
        last = self.directory.last_checkpoint
        complete = complete_checkpoints(last.parent) if last else {}
        best = best_step(complete)
        if last is None or best in (None, self.state.step):
            return []
        means = "the last" if self.config.training.always_save_checkpoint else "this one"
        place = data_path(last.parent, best)
        return [f"Best checkpoint: {place} (to sample.py and export.py the run means {means})"]

    def leave(self, stop: StopRequest) -> None:
        """The end of an interrupted run: save and say how to go on."""
        if self.state.step == 0:
            console.info("Stopped before the first step; nothing to save.")
            return
        self.save(last=True)
        self.directory.end("stopped", stop.name)
        if not self.config.training.save_model:
            console.info(f"Stopped by {stop.name} at step {self.state.step}; save_model is false.")
            return
        path, size = quoted(self.directory.path), self.world.size
        start = f"torchrun --standalone --nproc_per_node={size}" if size > 1 else "python"
        console.info(
            f"Stopped by {stop.name} at step {self.state.step}. To go on:",
            f"  {start} {script('train.py')} --config {path}/config.yaml "
            f"resume_from_checkpoint={path}",
        )
        if started_by_torchrun():
            console.info(
                "torchrun reports the stop as a failure below; the checkpoint is complete."
            )

    def rescue(self) -> None:
        """Saves the steps done when something outside the step fails: data, disk, terminal.

        Of several processes the others know nothing of the failure, and no one can gather what a
        checkpoint needs: the last one stands.
        """
        if self.world.size == 1 and self.state.step > self.saved_step and not self.torn:
            with contextlib.suppress(UserError, OSError):  # the first error is the one to report
                self.save(last=True)


def script(name: str) -> str:
    """A script of this project as the user called train.py: from the same folder."""
    called = Path(sys.argv[0])
    return quoted(called.with_name(name)) if called.name == "train.py" else name


def quoted(path: Path | None) -> str:
    """The path as a shell takes it."""
    return shlex.quote(str(path))

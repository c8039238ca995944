"""What a run tells: records for metrics.jsonl and the trackers, console lines, the time left."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from textwrap import indent
from typing import Any

from config import Config, started_by_launch, started_by_torchrun
from engine.evaluation import Evaluation
from engine.hardware.device import peak_flops
from engine.hardware.distributed import World
from engine.hardware.memory import peak_memory_bytes
from engine.monitor import console
from engine.monitor.console import RULE, iteration_line
from engine.monitor.progress import LiveLine, Pace
from engine.monitor.tracker import Tracker
from engine.precision.precision import Precision
from engine.run_directory.directory import RunDirectory
from engine.run_directory.manifest import best_step, complete_checkpoints, data_path
from engine.signals import StopRequest
from engine.train_state import TrainState, due, saves_due, times_due
from settings.formatting import format_count, format_duration
from settings.slurm import started_by_srun


@dataclass(frozen=True)
class RunSize:
    """How much work a run is."""

    steps: int
    """Optimizer steps of the whole run: `max_iters`, or fewer where `epochs` ends it."""
    tokens_per_step: int
    """Over all processes."""
    flops_per_token: int
    """FLOPs of one training step per token, by the model's own count."""
    evaluated_tokens: int
    """Tokens of one evaluation, over all processes."""

    @property
    def evaluation_in_steps(self) -> float:
        """What an evaluation costs before one was timed: a forward pass is a third of a step."""
        return self.evaluated_tokens / (3 * self.tokens_per_step)


@dataclass
class Reporter:
    """Turns what happens in a run into records and lines. Only the main process writes and prints;
    the others keep the same clocks, since all of them must agree on when to save."""

    config: Config
    world: World
    precision: Precision
    size: RunSize
    directory: RunDirectory
    trackers: Sequence[Tracker] = ()
    compile_s: float | None = None
    """What compiling took; None where nothing was compiled."""
    pace: Pace = field(default_factory=Pace)
    live: LiveLine = field(init=False)
    _compile_reported: bool = False

    def __post_init__(self) -> None:
        self.live = LiveLine(self.world.is_main, self.size.steps)

    def step(self, state: TrainState, loss: float, seconds: float, waited_s: float) -> None:
        """Times a step of which `waited_s` went by until the data was there."""
        self.pace.step(seconds, waited_s)
        if self.pace.has_become_known():
            left = f"{format_duration(self.left_s(state))} with evaluations and saves"
            console.info(f"{self.pace.step_s:.3g} s per step: the run takes about {left}")
        if self.live.due:
            speed = self.size.tokens_per_step / seconds
            self.live.show(state.step, loss, speed, self.left_s(state))

    def log(
        self, state: TrainState, learning_rate: float, grad_norm: float, weights_hash: str
    ) -> None:
        """Writes one line and one record: the mean loss since the last one, and the speed without
        evaluations and saves."""
        seconds, waited = self.pace.take()
        speed = self.size.tokens_per_step / seconds
        record = base_record(state) | {
            **state.take_losses(),
            "train/weights_hash": weights_hash,
            "train/learning_rate": learning_rate,
            "train/grad_norm": grad_norm,
            "train/tokens_per_sec": speed,
            "train/iter_time_ms": seconds * 1000,
            "train/mfu": self._flops_utilization(speed),
            "train/data_wait": waited,
            "train/memory_bytes": peak_memory_bytes(self.world.device),
            **self.precision.metrics(),
        }
        if self.compile_s is not None and not self._compile_reported:
            record["train/compile_s"], self._compile_reported = self.compile_s, True
        self._record(record)
        console.info(iteration_line(record, self.left_s(state)))

    def evaluation(
        self, state: TrainState, found: Evaluation, improved: bool, rows_digest: str
    ) -> None:
        """Writes the record and the lines of an evaluation."""
        self.pace.evaluations.add(found.seconds)
        bits, sample, rounded = found.bits_per_byte, found.sample, self.precision.quantized
        record = base_record(state) | {
            "eval/train_loss": found.train_loss,
            "eval/val_loss": found.val_loss,
            **({f"eval/val_loss_{rounded.metric}": found.val_loss_quantized} if rounded else {}),
            "eval/bits_per_byte": bits,
            **{f"eval/val_loss/{name}": own.val_loss for name, own in found.sources.items()},
            **{
                f"eval/bits_per_byte/{name}": own.bits_per_byte
                for name, own in found.sources.items()
            },
            "eval/best_loss": state.best_val_loss,
            "eval/best_step": state.best_step,
            "eval/seconds": found.seconds,
            **{f"eval/active_{name}": shares for name, shares in found.active_neurons.items()},
            **({} if sample is None else {"eval/sample": sample}),
            "eval/val_losses": found.val_losses,
            "eval/rows": rows_digest,
        }
        self._record(record)
        # Of sources: the best step is chosen by their plain mean, whatever their weights.
        mean = f" (mean of {len(found.sources)} sources)" if found.sources else ""
        parts = [f"Train loss: {found.train_loss:.4f}", f"Val loss: {found.val_loss:.4f}{mean}"]
        parts += [f"{rounded.label}: {found.val_loss_quantized:.4f}"] if rounded else []
        parts += [] if bits is None else [f"Bits/byte: {bits:.3f}"]
        parts.append(f"{found.seconds:.1f}s")
        console.info(" | ".join(parts + ["best so far"] * improved))
        for name, own in found.sources.items():
            per_byte = "" if own.bits_per_byte is None else f" | Bits/byte: {own.bits_per_byte:.3f}"
            console.info(f"  {name}: Val loss: {own.val_loss:.4f}{per_byte}")
        if found.active_neurons:
            means = [f"{name} {fmean(each):.1%}" for name, each in found.active_neurons.items()]
            console.info(f"Active neurons: {', '.join(means)}")
        if sample is not None:
            console.info("Sample:", indent(sample, "  "))
        console.info(RULE)

    def final_record(self, state: TrainState) -> None:
        """Writes the losses that the run ends with."""
        if state.evaluated_step == state.step:
            losses = {"final/train_loss": state.train_loss, "final/val_loss": state.val_loss}
            self._record(base_record(state) | losses)

    def finished(self, state: TrainState) -> None:
        """Prints the results of a whole run and the next commands."""
        took = format_duration(state.elapsed_s)
        console.info(f"Finished: {state.step} steps, {format_count(state.tokens)} tokens in {took}")
        console.info(f"Time of this session: {self.pace.describe(self.compile_s)}")
        if state.evaluated_step == state.step:
            best = f"best {state.best_val_loss:.4f} at step {state.best_step}"
            console.info(f"Held-out loss: {state.val_loss:.4f}, {best}")
        if self.config.training.save_model:
            console.info(f"Checkpoint: {self.directory.last_checkpoint}", *self._best_line(state))
            path = quoted(self.directory.path)
            console.info(f"To write text: python {script('sample.py')} {path}")
            console.info(f"To see its curves: python {script('runs.py')} report {path}")

    def interrupted(self, state: TrainState, stop: StopRequest) -> None:
        """Prints how to continue a run that a signal ended."""
        if not self.config.training.save_model:
            console.info(f"Stopped by {stop.name} at step {state.step}; save_model is false.")
            return
        path = quoted(self.directory.path)
        resume = f"resume_from_checkpoint={path}"
        start = start_of(self.world)
        again = f"{start} {script('train.py')} --config {path}/config.yaml {resume}"
        console.info(
            f"Stopped by {stop.name} at step {state.step}. To go on:",
            f"  {again if start else f'the same command on every node, with {resume}'}",
        )
        if started_by_torchrun() and not started_by_launch():
            console.info(
                "torchrun reports the stop as a failure below; the checkpoint is complete."
            )

    def left_s(self, state: TrainState) -> float:
        """Returns the seconds until the end of the run, with its evaluations and saves."""
        training, done, end = self.config.training, state.step, self.size.steps
        steps = max(0, end - done)
        evaluations = times_due(done, end, training.test_freq) + state.evaluation_due(training)
        saves = saves_due(training, done, end, steps * self.pace.step_s)
        saves += training.save_model and due(done, training.checkpoint_freq)
        return self.pace.left(steps, evaluations, saves, self.size.evaluation_in_steps)

    def _record(self, values: dict[str, Any]) -> None:
        """Keeps one record in metrics.jsonl and sends it to the trackers."""
        if self.world.is_main:
            self.directory.append_metrics(values)
            for tracker in self.trackers:
                tracker.log(values)

    def _flops_utilization(self, tokens_per_second: float) -> float | None:
        peak = peak_flops(self.world.device, self.precision.matmul_format)
        if peak is None:
            return None
        return tokens_per_second * self.size.flops_per_token / (peak * self.world.size)

    def _best_line(self, state: TrainState) -> list[str]:
        """Names the best checkpoint where it is not the last."""
        last = self.directory.last_checkpoint
        complete = complete_checkpoints(last.parent) if last else {}
        best = best_step(complete)
        if last is None or best in (None, state.step):
            return []
        means = "the last" if self.config.training.always_save_checkpoint else "this one"
        place = data_path(last.parent, best)
        return [f"Best checkpoint: {place} (to sample.py and export.py the run means {means})"]


def base_record(state: TrainState) -> dict[str, Any]:
    """Returns what every record begins with."""
    return {"step": state.step, "time": state.elapsed_s, "tokens": state.tokens}


def start_of(world: World) -> str:
    """Returns what stands before train.py to start these processes; empty if each node has its own
    command, whose addresses are not known here."""
    if started_by_srun():
        return "srun python"
    if world.size == 1:
        return "python"
    if world.size > world.local_size:
        return ""
    launcher = f"python {script('launch.py')}" if started_by_launch() else "torchrun"
    return f"{launcher} --standalone --nproc_per_node={world.local_size}"


def script(name: str) -> str:
    """Returns a script of this project as the user called train.py: from the same folder."""
    called = Path(sys.argv[0])
    return quoted(called.with_name(name)) if called.name == "train.py" else name


def quoted(path: Path | None) -> str:
    """Returns the path as a shell takes it."""
    return shlex.quote(str(path))

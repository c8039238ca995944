"""Trains steps of a run again, in memory, from its first step or from a checkpoint on.

On the device, with the versions and the number of threads of the run this gives the same numbers
bit for bit, as far as the device computes the same twice. A run of several processes is replayed on
one, with the same rows in each step: its sums are added in another order, so that results agree
within rounding.

A replay logs each step. What a run logged of several steps at once follows from that: the mean of
losses and the sum of the batches' hashes. It makes no evaluations; these draw from no random
generator that training uses.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from config import Config, DataError, Request, TrainingConfig
from engine.hardware.distributed import enter_world
from engine.monitor import console
from engine.monitor.tracker import Tracker
from engine.setup.build import build
from engine.signals import StopRequest
from engine.step import Step
from engine.train_state import TrainState
from engine.trainer import Trainer

TrainingLoop = Callable[[Trainer, StopRequest], None]
_THREADS_PER_CORE = 4


@dataclass(frozen=True)
class ReplayStart:
    """What a replay begins with."""

    config: Config
    """Of the steps that are replayed, for one process."""
    checkpoint: Path | None
    """None: the run's first step, or where a fork left its parent."""
    step: int
    """Steps done before the replay."""
    threads: int | None = None
    """Of the run; None: unknown."""


class RecordList(Tracker):
    """Keeps records in memory."""

    name = "records"

    def __init__(self) -> None:
        super().__init__()
        self.records: list[dict[str, Any]] = []

    def log(self, record: dict[str, Any]) -> None:
        """Adds one record."""
        self.records.append(record)

    def close(self, exit_code: int = 0) -> None:
        """Nothing is left to send."""


@dataclass
class Replay:
    """A run that is trained again; writes no file and sends nothing to trackers."""

    trainer: Trainer
    loop: TrainingLoop
    stop: StopRequest
    records: list[dict[str, Any]]
    """One of each step that was replayed."""
    begun: TrainState
    """What the checkpoint had of the steps since the run's last log record."""

    def advance_to(self, step: int) -> int:
        """Trains until so many steps are done; returns how many are: fewer where the run ends, or
        was stopped by a signal."""
        with console.redirected(lambda line: None):
            self.trainer.stop_after = step
            self.loop(self.trainer, self.stop)
            self.trainer.read_last_step()
        return self.trainer.state.step

    def next_step(self) -> Step:
        """Returns the next step with its data, which may still be trained; raises DataError where
        the run has ended."""
        trainer = self.trainer
        trainer.stop_after = None
        ended = trainer.state.finished(trainer.config.training)
        step = None if ended else trainer.next_step(self.stop)
        if step is None:
            raise DataError(f"the run ends with step {trainer.state.step}")
        trainer.batches = chain([step.batch], trainer.batches)
        return step

    def logged_after(self, steps: Container[int]) -> list[dict[str, Any]]:
        """Returns the records that a run writes which logs after these steps and the last one."""
        found, since = list[dict[str, Any]](), replace(self.begun)
        since.first_losses = list(since.first_losses)
        for record in self.records:
            since.add_loss(record["step"], record["train/loss"])
            since.add_batch(int(record["train/batch_hash"], 16))
            if record["step"] in steps or record is self.records[-1]:
                kept = {key: v for key, v in record.items() if key != "train/first_losses"}
                found.append(kept | since.take_losses())
        return found


@contextmanager
def open_replay(start: ReplayStart, stop: StopRequest, loop: TrainingLoop) -> Iterator[Replay]:
    """Builds a run again, at its beginning or at a checkpoint, on the device of its config; raises
    what building a run raises.

    loop: `train.train`.
    """
    config = start.config
    training = replace(
        config.training,
        log_freq=1,
        test_freq=None,
        eval_only=False,
        sample_prompt=None,
        sample_tokens=TrainingConfig().sample_tokens,
        save_model=False,
        checkpoint_dir=tempfile.gettempdir(),  # where nothing is written, but could be
        resume_from_checkpoint=None,
    )
    if start.checkpoint is not None:
        # A fork has all of a checkpoint's state and, other than a resume, leaves its run alone.
        training = replace(
            training, fork_from_checkpoint=str(start.checkpoint), init_from="scratch"
        )
    logging = replace(config.logging, wandb_log=False, tensorboard=False)
    config = replace(config, training=training, logging=logging)
    with _threads(start.threads), ExitStack() as stack:
        world = stack.enter_context(enter_world(config.system, config.distributed))
        # It says what it found at its end, not what a run says on its way.
        with console.redirected(lambda line: None):
            trainer = build(Request(config), world, stack)
        records = RecordList()
        trainer.reporter.trackers = [records]
        begun = replace(trainer.state)
        trainer.state.clear_losses()
        yield Replay(trainer, loop, stop, records.records, begun)


@contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    """Has torch compute with the run's number of threads, which decides in which order sums are
    added on a CPU. An unknown number, and one that is far too high for this machine, is not taken.
    """
    before = torch.get_num_threads()
    if wanted is not None and 0 < wanted <= _THREADS_PER_CORE * (os.cpu_count() or 1):
        torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)

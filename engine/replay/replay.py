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

import tempfile
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from config import Config, DataError, Request, TrainingConfig, sequences_per_step
from engine.hardware.distributed import World
from engine.monitor import console
from engine.monitor.tracker import Tracker
from engine.setup.build import build
from engine.signals import StopRequest
from engine.step import Step
from engine.train_state import TrainState
from engine.trainer import Trainer

TrainingLoop = Callable[[Trainer, StopRequest], None]


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

    @property
    def fingerprint(self) -> str:
        """That of the text that is read."""
        return str(self.trainer.data.identity()["data"]["fingerprint"])

    def advance_to(self, step: int) -> int:
        """Trains until so many steps are done; returns how many are: fewer where the run ends, or
        was stopped by a signal."""
        with console.redirected(_to_nowhere):
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
def open_replay(
    config: Config,
    checkpoint: Path | None,
    world: World,
    stop: StopRequest,
    loop: TrainingLoop,
) -> Iterator[Replay]:
    """Builds a run again, at its beginning or at a checkpoint; raises what building a run raises.

    Args:
        config: of the run, for one process; how often it logs, evaluates and saves is left out.
        loop: `train.train`.
    """
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
    if checkpoint is not None:
        # A fork has all of a checkpoint's state and, other than a resume, leaves its run alone.
        training = replace(training, fork_from_checkpoint=str(checkpoint), init_from="scratch")
    logging = replace(config.logging, wandb_log=False, tensorboard=False)
    config = replace(config, training=training, logging=logging)
    with ExitStack() as stack:
        with console.redirected(_to_nowhere):
            trainer = build(_request(config), world, stack)
        records = RecordList()
        trainer.reporter.trackers = [records]
        begun = replace(trainer.state)
        trainer.state.clear_losses()
        yield Replay(trainer, loop, stop, records.records, begun)


def _to_nowhere(line: str) -> None:
    """A replay says what it found at its end, not what a run says on its way."""


def _request(config: Config) -> Request:
    return Request(
        config=config,
        files=(),
        overrides=(),
        dry_run=False,
        show_config=False,
        check_resume=None,
        reproduce=None,
        notes=(),
        given=frozenset(),
    )


def in_one_process(config: Config, processes: int) -> Config:
    """Returns the config with which one process takes the steps that so many took; raises
    ConfigError."""
    before = sequences_per_step(config, processes)
    if before == sequences_per_step(config, 1):
        return config
    training = replace(
        config.training,
        tokens_per_step=before * config.training.block_size,
        gradient_accumulation_steps=1,
    )
    return replace(config, training=training)

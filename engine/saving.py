"""When checkpoints are saved, and what happens when a save fails.

A save stops training for a copy of the state to host memory (engine/checkpoint/snapshot.py). A
thread of every process writes the file from it; rank 0's is the one that reaches the disk. Until it
is there the checkpoint does not exist: a kill costs this save and no other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from config import Config, UserError, WriteError
from engine.checkpoint.save import save_checkpoint
from engine.checkpoint.snapshot import Snapshot, SnapshotTaker
from engine.hardware.distributed import World
from engine.monitor import console
from engine.run_directory.directory import RunDirectory
from engine.train_state import TrainState, due

ATTEMPTS = 3  # failed saves in a row before the run ends; one may be a passing fault


class _Write(threading.Thread):
    """Writes the snapshot of one step; `error` says why it could not."""

    def __init__(self, state: TrainState, work: Callable[[], object]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.step, self.evaluated_step = state.step, state.evaluated_step
        self.error: BaseException | None = None
        self._work = work

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # raised where training looks after it
            self.error = error


@dataclass
class CheckpointSaver:
    """Saves a run's state when it is due. Every process calls every method but `close`."""

    config: Config
    world: World
    directory: RunDirectory
    saved_step: int = 0
    saved_evaluation: int = 0
    """The step of the newest evaluation that a checkpoint holds."""
    _write: _Write | None = None
    """The save under way."""
    _failures: int = 0
    _saved_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._snapshots = SnapshotTaker(self.world)

    @property
    def is_written(self) -> bool:
        """Whether this process has done its part of the save under way, so that `finish` need not
        wait for it."""
        return self._write is not None and not self._write.is_alive()

    @property
    def time_over(self) -> bool:
        """Whether `save_every` seconds have passed since the last save, by this process's clock."""
        every = self.config.training.save_every
        return every is not None and time.monotonic() - self._saved_at >= every

    def due(self, state: TrainState, time_over: bool) -> bool:
        """Returns whether to save after this step: by steps or by seconds, or, without
        `always_save_checkpoint`, after the best evaluation so far.

        time_over: what all processes agreed on. Their clocks differ, so that by their own some
        would wait for the others.
        """
        training = self.config.training
        if state.finished(training):
            return False  # the last step is saved at the end, after the run's final record
        if not training.always_save_checkpoint:
            return state.best_step == state.step
        return due(state.step, training.checkpoint_freq) or time_over

    def needed(self, state: TrainState) -> bool:
        """Returns whether this step or its evaluation is in no checkpoint yet."""
        known = state.step == self.saved_step and state.evaluated_step == self.saved_evaluation
        return self.config.training.save_model and not known

    def start(self, state: TrainState, collect: Callable[[], dict[str, Any]]) -> None:
        """Copies what `collect` returns and starts to write it; `finish` tells how that ended.

        Without memory for the copy it is written before this returns.
        """
        assert self._write is None, "one save at a time"
        snapshot, copied = self._snapshots.take(collect())
        self._write = _Write(state, partial(self._write_snapshot, snapshot))
        if copied:
            self._write.start()
        else:
            self._write.run()
        self._saved_at = time.monotonic()

    def _write_snapshot(self, snapshot: Snapshot) -> None:
        try:
            if self.world.is_main:
                save_checkpoint(self.directory, snapshot.state, self.config.training.keep_last)
        finally:
            snapshot.exchange_rest()

    def finish(self, final: bool = False) -> bool:
        """Waits for the save under way, if there is one; returns whether one is now on the disk.

        A failed save is retried when the next one is due: a full disk may be emptied, and a lost
        checkpoint costs less than a lost run. Raises WriteError where the save is the run's last
        one (`final`) or the third in a row to fail, and NonFiniteError for NaN in the weights.
        """
        if self._write is None:
            return False
        write = self._wait()
        if write.error is not None and not isinstance(write.error, UserError):
            raise write.error
        outcome = self.world.broadcast((write.error, self.directory.last_checkpoint))
        error, self.directory.last_checkpoint = outcome
        if error is None:
            self._failures, self.saved_step = 0, write.step
            self.saved_evaluation = write.evaluated_step
            return True
        self._failures += 1
        if final or self._failures == ATTEMPTS or not isinstance(error, WriteError):
            raise error
        if self.world.is_main:
            console.warning(f"{error}\nTraining goes on; the next checkpoint will try again.")
        return False

    def _wait(self) -> _Write:
        write, self._write = self._write, None
        assert write is not None
        if write.is_alive():
            write.join()
        return write

    def close(self) -> None:
        """Waits for a save that is still under way because an error ended the run, and tells how it
        ended. The other processes may be gone."""
        if self._write is None:
            return
        error = self._wait().error
        if not self.world.is_main:
            return
        if error is None:
            console.info(f"Saved checkpoint to {self.directory.last_checkpoint}")
        else:  # of torch where a process that has gone did not send its shards
            known = isinstance(error, UserError)
            console.warning(str(error) if known else "The save under way could not be finished.")

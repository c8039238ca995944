"""When checkpoints are saved, and what happens when a save fails."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from config import Config, WriteError
from engine.checkpoint.save import save_checkpoint
from engine.hardware.distributed import World
from engine.monitor import console
from engine.run_directory.directory import RunDirectory
from engine.train_state import TrainState, due

ATTEMPTS = 3  # failed saves in a row before the run ends; one may be a passing fault


@dataclass
class CheckpointSaver:
    """Saves a run's state when it is due. Every process calls every method: gathering the state
    takes all of them, the main one writes the file."""

    config: Config
    world: World
    directory: RunDirectory
    saved_step: int = 0
    saved_evaluation: int = 0
    """The step of the newest evaluation that a checkpoint holds."""
    _failures: int = 0
    _saved_at: float = field(default_factory=time.monotonic)

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

    def save(
        self, state: TrainState, collect: Callable[[], dict[str, Any]], final: bool = False
    ) -> bool:
        """Saves what `collect` returns; tells whether it is on the disk.

        A failed save is retried when the next one is due: a full disk may be emptied, and a lost
        checkpoint costs less than a lost run. Raises WriteError where the save is the run's last
        one (`final`) or the third in a row to fail.
        """
        content, error = collect(), None
        if self.world.is_main:
            try:
                save_checkpoint(self.directory, content, self.config.training.keep_last)
            except WriteError as failure:
                error = failure
        self._saved_at = time.monotonic()
        outcome = self.world.broadcast((error, self.directory.last_checkpoint))
        error, self.directory.last_checkpoint = outcome
        if error is not None:
            self._failures += 1
            if final or self._failures == ATTEMPTS:
                raise error
            if self.world.is_main:
                console.warning(f"{error}\nTraining goes on; the next checkpoint will try again.")
            return False
        self._failures, self.saved_step = 0, state.step
        self.saved_evaluation = state.evaluated_step
        return True

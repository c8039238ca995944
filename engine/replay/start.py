"""Where the replay of a step begins: the nearest checkpoint before it, else the first step."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare.reading.json_values import as_count, as_dict
from config import CheckpointError, Config, ConfigError, DataError
from engine.replay.replay import in_one_process
from engine.run_directory.environment_file import read_environment, session_of_step
from engine.run_directory.find_checkpoint import open_checkpoint
from engine.run_directory.fork import PARENT
from engine.run_directory.manifest import data_path, steps_in
from engine.run_directory.saved_config import config_of_step
from settings.entries import flat_options


@dataclass(frozen=True)
class ReplayStart:
    """What a replay begins with."""

    run: Path
    """The directory of the run that trained the step: of a fork, its parent's for early steps."""
    config: Config
    """That the step was trained with, for one process."""
    checkpoint: Path | None
    """None: the run's first step, or where a fork left its parent."""
    step: int
    """Steps done before the replay."""
    session: Mapping[str, Any]
    """What environment.json tells of the session that trained the step; {} if it is not there."""


def find_start(run: Path, step: int) -> ReplayStart:
    """Returns where a replay of a step, counted from 1, begins.

    Raises DataError where the run cannot be read, or changed its options between the checkpoint and
    the step.
    """
    run = run_of_step(run, step)
    config, environment = _config(run, step), environment_of(run)
    checkpoint, done = _checkpoint_before(run, step)
    if checkpoint is None:
        done = parent_step(environment)
    earlier = config if done + 1 == step else _config(run, done + 1)
    then, now = (flat_options(each.to_dict()) for each in (earlier, config))
    changed = sorted(key for key in {*then, *now} if then.get(key) != now.get(key))
    if changed:
        raise DataError(
            f"{run}: between steps {done} and {step} it was resumed with other options "
            f"({', '.join(changed)}), and the checkpoint that it was resumed from is gone."
        )
    session = session_of_step(environment, step)
    return ReplayStart(run, _in_one_process(run, config, session), checkpoint, done, session)


def config_in_one_process(run: Path, step: int) -> Config:
    """Returns the config with which one process takes a step as the run's processes did."""
    session = session_of_step(environment_of(run), step)
    return _in_one_process(run, _config(run, step), session)


def _in_one_process(run: Path, config: Config, session: Mapping[str, Any]) -> Config:
    try:
        return in_one_process(config, as_count(session.get("processes")) or 1)
    except ConfigError as error:
        raise DataError(f"{run}: its steps cannot be taken by one process: {error}") from None


def run_of_step(run: Path, step: int) -> Path:
    """Returns the directory of the run that trained a step: a fork's first steps are those of its
    parent. Raises DataError where that is gone."""
    environment = environment_of(run)
    while step <= parent_step(environment):
        parent = environment[PARENT]
        if not Path(parent["path"]).is_dir():
            raise DataError(
                f"{run}: it is a fork that begins after step {parent['step']}. Step {step} was "
                f"trained by {parent['path']}, which is gone."
            )
        run = Path(parent["path"])
        environment = environment_of(run)
    return run


def parent_step(environment: Mapping[str, Any]) -> int:
    """Returns the steps of the parent that a fork goes on from, 0 for a run that is none."""
    return as_count(as_dict(environment.get(PARENT)).get("step")) or 0


def _checkpoint_before(run: Path, step: int) -> tuple[Path | None, int]:
    """Returns the newest undamaged checkpoint from before a step, and its steps."""
    for done in sorted(steps_in(run), reverse=True):
        if done < step:
            with suppress(CheckpointError):
                return open_checkpoint(data_path(run, done)).path, done
    return None, 0


def _config(run: Path, step: int) -> Config:
    try:
        return config_of_step(run, step)
    except OSError as error:
        raise DataError(f"{run}: its config cannot be read: {error.strerror}.") from error


def environment_of(run: Path) -> dict[str, Any]:
    """Returns environment.json of a run; {} where it cannot be read."""
    try:
        return read_environment(run)
    except (OSError, ValueError):  # of an early version, or damaged: a run in one process, then
        return {}

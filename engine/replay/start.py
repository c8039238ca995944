"""What the replay of a step begins with: config, checkpoint, number of threads, and the text."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from compare.reading.json_values import as_count
from config import CheckpointError, Config, ConfigError, DataError, sequences_per_step
from data import Dataset, index_sources, open_dataset
from data.tokenizers.build import tokenizer_from_dict
from engine.checkpoint.load import load_checkpoint
from engine.checkpoint.resume_rules import differences
from engine.replay.replay import ReplayStart
from engine.replay.session import session_facts
from engine.run_directory.environment_file import read_environment
from engine.run_directory.find_checkpoint import newest_valid, open_checkpoint
from engine.run_directory.fork import PARENT, parent_step
from engine.run_directory.manifest import data_path, steps_in
from engine.run_directory.saved_config import config_of_step


def find_start(run: Path, step: int) -> ReplayStart:
    """Returns what a replay of a step, counted from 1, begins with: the newest undamaged checkpoint
    from before the step, else the first step of the run, or of a fork.

    Raises DataError where the run cannot be read, or changed its options in between.
    """
    run = run_of_step(run, step)
    environment = environment_of(run)
    checkpoint, done = None, parent_step(environment)
    for saved in sorted((each for each in steps_in(run) if each < step), reverse=True):
        with suppress(CheckpointError):
            checkpoint, done = open_checkpoint(data_path(run, saved)).path, saved
            break
    config = config_of_step(run, step)
    if changed := differences(config_of_step(run, done + 1), config):
        raise DataError(
            f"{run}: between steps {done} and {step} it was resumed with other options "
            f"({', '.join(sorted(changed))}), and the checkpoint that it was resumed from is gone."
        )
    return start_with(config, environment, step, checkpoint, done)


def start_with(
    config: Config, environment: Mapping[str, Any], step: int, checkpoint: Path | None, done: int
) -> ReplayStart:
    """Returns a start in one process, whatever number of processes trained the steps.

    Args:
        config: that the step was trained with.
        environment: environment.json of its run.
        done: steps before the replay.
    """
    facts, training = session_facts(environment, step), config.training
    try:
        rows = sequences_per_step(config, as_count(facts.get("processes")) or 1)
        if rows != sequences_per_step(config, 1):
            tokens = rows * training.block_size
            training = replace(training, tokens_per_step=tokens, gradient_accumulation_steps=1)
        alone = replace(config, training=training)
    except ConfigError as error:
        raise DataError(f"Its steps cannot be taken by one process: {error}") from None
    return ReplayStart(alone, checkpoint, done, as_count(facts.get("threads")))


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


def checkpoints_of(run: Path) -> dict[int, Path]:
    """Returns step -> checkpoint, of a fork also the one that it began with."""
    environment, found = environment_of(run), dict[int, Path]()
    if done := parent_step(environment):
        path = data_path(Path(environment[PARENT]["path"]), done)
        found |= {done: path} if path.exists() else {}
    return found | {step: data_path(run, step) for step in steps_in(run)}


def environment_of(run: Path) -> dict[str, Any]:
    """Returns environment.json of a run; {} where it cannot be read."""
    try:
        return read_environment(run)
    except (OSError, ValueError):  # of an early version, or damaged: a run in one process, then
        return {}


def newest_content(run: Path) -> dict[str, Any]:
    """Returns the newest checkpoint of a run; {} without any."""
    newest, _ = newest_valid(run)
    return {} if newest is None else load_checkpoint(newest.path, mmap=True)


def open_text(config: Config, saved: Mapping[str, Any]) -> Dataset:
    """Opens the text of a run; raises DataError where it is not what the run read.

    saved: a checkpoint of it, {} without one.
    """
    known = None
    if saved and config.training.init_from != "scratch":  # it may be that of the weights
        known = tokenizer_from_dict(saved["tokenizer"])
    indexes = index_sources(config.dataset, saved.get("data", {}))
    options = config.dataset, config.tokenizer, config.model.vocab_size, known
    dataset = open_dataset(*options, indexes)
    if saved:
        dataset.check_unchanged(saved["data"])
    return dataset

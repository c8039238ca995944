"""The course of a run: which steps it read from which data state on, with which batches."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from config import CheckpointError, Config
from data import Dataset, index_sources, open_dataset
from data.loading.data_state import DataState
from data.loading.load_plan import LoadPlan, plan_loading
from data.loading.order import PLAN_VERSION
from data.run_data import batch_spec
from data.tokenizers.build import tokenizer_from_dict
from engine.checkpoint.load import load_checkpoint
from engine.replay.start import config_in_one_process, environment_of, parent_step
from engine.run_directory.environment_file import sessions_of
from engine.run_directory.find_checkpoint import newest_valid
from engine.run_directory.fork import PARENT
from engine.run_directory.manifest import data_path, steps_in

_LINE_EVERY_S = 5.0


@dataclass(frozen=True)
class Stretch:
    """Steps whose batches follow from one config and one data state."""

    first: int
    """Steps are counted from 1."""
    last: int
    config: Config
    """For one process."""
    data_state: DataState | None
    """Before the first step; None: the begin of the text."""

    def plan(self, dataset: Dataset) -> LoadPlan:
        """Returns the plan of its batches."""
        spec = batch_spec(self.config, 0, 1)
        return plan_loading(dataset, spec, self.config.dataloader.shuffle, self.data_state)


@dataclass(frozen=True)
class Course:
    """The steps of a run that are known, and what is not."""

    stretches: list[Stretch]
    notes: list[str] = field(default_factory=list)
    """Which steps are not looked at, and why."""


def course_of(run: Path, last: int) -> Course:
    """Returns the steps of a run up to `last`; those of a fork begin with its parent's.

    Steps that were trained again after a resume are there once, as they were trained last.
    """
    environment = environment_of(run)
    forked, found = parent_step(environment), Course([])
    if forked:
        parent = Path(environment[PARENT]["path"])
        if parent.is_dir():
            found = course_of(parent, min(forked, last))
        else:
            found.notes.append(f"Steps 1 to {forked} are of {parent}, which is gone.")
    resumed = {int(session.get("step") or 0) for session in sessions_of(environment)}
    edges = sorted({forked, *(step for step in resumed if forked < step < last)})
    version = newest_content(run).get("cursor", {}).get("version", PLAN_VERSION)
    for done, end in zip(edges, [*edges[1:], last], strict=True):
        config, before = config_in_one_process(run, done + 1), found.stretches[-1:]
        if before and before[0].last == done and _same_batches(before[0].config, config):
            found.stretches[-1] = replace(before[0], last=end)
        elif done < end:
            _add_stretch(found, run, config, range(done, end), version)
    return found


def _same_batches(one: Config, other: Config) -> bool:
    """Returns whether batches of two configs follow each other as if they were of one."""
    specs = [replace(batch_spec(each, 0, 1), micro_batches=1) for each in (one, other)]
    weights = [[(s.name, s.weight) for s in each.dataset.mixture] for each in (one, other)]
    return specs[0] == specs[1] and weights[0] == weights[1]


def _add_stretch(found: Course, run: Path, config: Config, steps: range, version: int) -> None:
    """Adds steps (done, end], from the first of them whose data state is known."""
    done, end = steps.start, steps.stop
    if not done and version == PLAN_VERSION:
        found.stretches.append(Stretch(1, end, config, None))
        return
    own = [(step, data_path(run, step)) for step in steps_in(run) if done <= step < end]
    if done and config.training.fork_from_checkpoint is not None:
        own = [(done, Path(config.training.fork_from_checkpoint)), *own]
    for step, path in own:
        with suppress(CheckpointError):
            state = load_checkpoint(path, mmap=True)["cursor"]
            found.stretches.append(Stretch(step + 1, end, config, state))
            end = step
            break
    if end > done:
        found.notes.append(
            f"Steps {done + 1} to {end} are not looked at: the checkpoint of step {done}, which "
            "says where they began to read, is gone."
        )


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


class Progress:
    """Lines on standard error for what takes long."""

    def __init__(self) -> None:
        self._shown_s = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Prints a line if the last one was some seconds ago."""
        if time.monotonic() - self._shown_s >= _LINE_EVERY_S:
            self._shown_s = time.monotonic()
            print(f"{what}: {done:,} of {total:,}", file=sys.stderr, flush=True)

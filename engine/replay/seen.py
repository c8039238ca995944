"""`runs.py seen`: at which steps a run read a text."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compare.reading.json_values import as_count
from config import CheckpointError, Config, DataError
from data.loading.data_state import DataState
from data.loading.find_readings import Reading, ReadingSearch, find_matches
from data.loading.load_plan import plan_loading
from data.loading.order import PLAN_VERSION
from data.run_data import batch_spec
from data.sources.dataset import Passage, Stored
from engine.checkpoint.load import load_checkpoint
from engine.replay.start import (
    checkpoints_of,
    environment_of,
    newest_content,
    open_text,
    run_of_step,
    start_with,
)
from engine.run_directory.environment_file import sessions_of
from engine.run_directory.fork import PARENT, parent_step
from engine.run_directory.saved_config import config_of_step

_LISTED = 20
_LINE_EVERY_S = 5.0


@dataclass(frozen=True)
class Seen:
    """Where a run read a text."""

    text: str
    readings: list[Reading]
    """By step."""
    held_out: list[Stored]
    """Where the text stands in text that is not trained on."""
    steps: tuple[int, int]
    """The first and the last one that were looked at."""
    notes: list[str]
    """What else is to be said of the answer."""

    def lines(self, full: bool) -> list[str]:
        """Returns what was found, in words. full: all readings, not the first ones."""
        lines = [
            f"step {each.step}, sequence {each.sequence}, epoch {each.epoch}: "
            f"{each.source}{': ' if each.source else ''}{each.stored}"
            for each in (self.readings if full else self.readings[:_LISTED])
        ]
        if more := len(self.readings) - len(lines):
            lines.append(f"... and {more:,} times more (--full shows all)")
        steps, (first, last) = len({each.step for each in self.readings}), self.steps
        found = f"Read {len(self.readings):,} times in {steps:,} steps"
        return [*lines, f"{found} (looked at: {first} to {last}).", *self.notes]

    def to_json(self) -> dict[str, Any]:
        """Returns the same as plain values."""
        readings = [
            each._asdict() | {"stored": each.stored.place_values()} for each in self.readings
        ]
        held_out = [part.place_values() for part in self.held_out]
        return vars(self) | {"readings": readings, "held_out": held_out}


def seen(run: Path, text: str, last: int) -> Seen:
    """Returns where a run read a text in its steps up to `last`.

    Reads the data once, and no step of it again: their order follows from the plan. Raises
    DataError where the data is not what the run read, and for a text without tokens.
    """
    steps = _steps_to_follow(run, last)
    training = steps.config.training
    if training.use_oracle:
        raise DataError(
            f"{run}: with training.use_oracle its steps repeat one batch: runs.py batch {run} 1 "
            "shows it."
        )
    dataset = open_text(steps.config, newest_content(run))
    passage = Passage(text, dataset.tokenizer.encode(text))
    if not len(passage.ids):
        raise DataError(f"{text!r} has no tokens to look for.")
    sources, progress = dataset.sources, _Progress()
    matches = [find_matches(each, training.block_size, passage, progress) for each in sources]
    spec, shuffle = batch_spec(steps.config, 0, 1), steps.config.dataloader.shuffle
    plan = plan_loading(dataset, spec, shuffle, steps.data_state)
    search = ReadingSearch(plan, steps.done + 1, last - steps.done, matches, passage)
    readings = sorted(search.readings(), key=lambda each: (each.step, each.sequence))
    held_out = [part for each in matches for part in each.held_out]
    notes = []
    if steps.done:
        notes.append(
            f"Steps 1 to {steps.done} are not looked at: their batches were of another size, or "
            "the checkpoints or the run that tell of them are gone."
        )
    by_tokens = any(each.dataset.segments(training.block_size).whole_rows for each in sources)
    if held_out:
        notes.append(f"Held out, not trained on: {len(held_out):,} times, first {held_out[0]}.")
    elif not readings and not any(len(each.training) for each in matches):
        notes.append("It is not in the data.")
    elif not readings and not by_tokens:
        notes.append("It is in the training text, and these steps did not come to it.")
    if by_tokens:
        notes.append(
            "In token files the tokens of the text are looked for, row by row: not found is what "
            "crosses the end of a row, or was encoded together with its neighbours."
        )
    return Seen(text, readings, held_out, (steps.done + 1, last), notes)


# ---- which steps follow from one plan


@dataclass(frozen=True)
class _Steps:
    """The last steps of a run, whose batches follow from one config and one data state."""

    done: int
    """Steps before them."""
    config: Config
    """For one process."""
    data_state: DataState | None
    """None: the begin of the text."""


def _steps_to_follow(run: Path, last: int) -> _Steps:
    """Returns the longest row of steps up to `last` that can be followed; those of a fork begin
    with its parent's."""
    config = _config_of(run, last)
    same = _begin_of_same_batches(run, config, last)
    version = newest_content(run).get("cursor", {}).get("version", PLAN_VERSION)
    if not same and version == PLAN_VERSION:
        return _Steps(0, config, None)
    saved = checkpoints_of(run_of_step(run, same + 1)) | checkpoints_of(run)
    for done in sorted(step for step in saved if same <= step < last):
        with suppress(CheckpointError):
            return _Steps(done, config, load_checkpoint(saved[done], mmap=True)["cursor"])
    raise DataError(
        f"{run}: no step of it can be followed: the checkpoint that says where they began to read "
        "is gone."
    )


def _begin_of_same_batches(run: Path, config: Config, last: int) -> int:
    """Returns the steps before the first one of those up to `last` whose batches are cut and mixed
    as this config does it; a resume and a fork may change that."""
    environment = environment_of(run)
    forked = parent_step(environment)
    resumed = {as_count(session.get("step")) or 0 for session in sessions_of(environment)}
    for done in sorted({forked, *(s for s in resumed if forked < s < last)}, reverse=True):
        if not _same_batches(_config_of(run, done + 1), config):
            return last
        last = done
    parent = Path(environment[PARENT]["path"]) if forked else run
    return _begin_of_same_batches(parent, config, last) if forked and parent.is_dir() else last


def _config_of(run: Path, step: int) -> Config:
    return start_with(config_of_step(run, step), environment_of(run), step, None, 0).config


def _same_batches(one: Config, other: Config) -> bool:
    specs = [replace(batch_spec(each, 0, 1), micro_batches=1) for each in (one, other)]
    weights = [[(s.name, s.weight) for s in each.dataset.mixture] for each in (one, other)]
    return specs[0] == specs[1] and weights[0] == weights[1]


class _Progress:
    """Lines on standard error while the data is read."""

    def __init__(self) -> None:
        self._shown_s = time.monotonic()

    def __call__(self, source: str, done: int, total: int) -> None:
        """Prints a line if the last one was some seconds ago."""
        if time.monotonic() - self._shown_s >= _LINE_EVERY_S:
            self._shown_s = time.monotonic()
            print(f"{source}: {done:,} of {total:,}", file=sys.stderr, flush=True)

"""A fork: a new run that goes on from a checkpoint of another, its parent. Imports no torch.

The fork's directory holds copies of the parent's records up to the step where they part, and its
own checkpoints, so that it needs nothing of the parent, which may be trained further or removed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import CheckpointError, schema
from engine.run_directory.environment_file import read_environment
from engine.run_directory.find_checkpoint import Resume
from engine.run_directory.find_runs import find_by_name
from engine.run_directory.manifest import METRICS
from engine.run_directory.rewind import rewind_metrics

OPTION = "training.fork_from_checkpoint"
PARENT = "parent"
"""Key of environment.json: where a fork comes from, and what it changed."""
ANCESTORS = "ancestors"
"""Key of that: `step` and `changed` of the runs that the parent goes on from, the nearest first."""


def parent_step(environment: Mapping[str, Any]) -> int:
    """Returns the steps of its parent that a fork goes on from, by its environment.json; 0 for a
    run that is none."""
    parent = environment.get(PARENT)
    step = parent.get("step") if isinstance(parent, dict) else None
    return step if type(step) is int and step > 0 else 0


@dataclass(frozen=True)
class Fork:
    """What the directory of a fork begins with."""

    parent: Mapping[str, Any]
    """What environment.json keeps under `parent`."""
    records: bytes
    """Lines of metrics.jsonl up to the step of the fork."""
    elapsed_s: float
    """Training time of the parent until then."""
    notes: list[str]
    """What is missing from `records`, for the user."""


def read_fork(checkpoint: Resume, changed: Mapping[str, tuple[Any, Any]], elapsed_s: float) -> Fork:
    """Reads from the parent's directory what a fork at `checkpoint` keeps of it.

    changed: option -> its value in the parent and in the fork. Raises CheckpointError.
    """
    folder, options, environment = checkpoint.run_dir, schema(), dict[str, Any]()
    with suppress(OSError, ValueError):  # missing or damaged
        environment = read_environment(folder)
    started_from = (OPTION, "training.resume_from_checkpoint")
    changed = {key: pair for key, pair in changed.items() if key not in started_from}
    known = {key: options.find(key) for key in changed}
    silent = {key for key, option in known.items() if option and option.effect == "none"}
    parent = {
        "run": os.path.basename(os.path.abspath(folder)),
        "path": os.path.abspath(folder),
        "step": checkpoint.step,
        "sha256": checkpoint.manifest.sha256,
        "changed": {key: list(pair) for key, pair in changed.items() if key not in silent},
        "changed_without_effect": {key: list(changed[key]) for key in sorted(silent)},
        ANCESTORS: _ancestors(environment),
    }
    try:  # as at a resume: no later record, and no evaluation that the fork will make again
        metrics = rewind_metrics(folder, checkpoint.manifest, environment)
    except OSError as error:
        raise CheckpointError(f"{folder / METRICS} cannot be read: {error.strerror}.") from error
    notes = [f"{folder}: {note}" for note in metrics.notes]
    return Fork(parent, metrics.after, elapsed_s, notes)


def _ancestors(environment: Mapping[str, Any]) -> list[dict[str, Any]]:
    try:
        parent = environment[PARENT]
        return [{"step": parent["step"], "changed": parent["changed"]}, *parent.get(ANCESTORS, [])]
    except (KeyError, TypeError):  # the parent is no fork
        return []


def means_parent(word: str | None, saved: str | None, folder: Path) -> bool:
    """Returns whether `training.fork_from_checkpoint: word` can mean the checkpoint `saved`, which
    a fork wrote in its config.

    The newest checkpoint of a run is another one from day to day, and is gone with the run: then a
    run means all of its checkpoints, and a part of a path the checkpoints whose path holds it.
    folder: where names of runs are looked for. Raises DataError if several runs match `word`.
    """
    if word is None or saved is None:
        return word == saved
    path, checkpoint = find_by_name(word, folder), Path(os.path.realpath(saved))
    if not path.exists():
        return word in saved
    return Path(os.path.realpath(path)) in (checkpoint, *list(checkpoint.parents)[:2])

"""Checkpoints of two runs before they part: equal ones, and one that is not what its run logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from compare.parting import WEIGHTS, log_records
from compare.reading.json_values import as_count
from compare.reading.run import Run
from config import CheckpointError
from engine.checkpoint.load import load_checkpoint
from engine.replay.start import checkpoints_of
from engine.run_directory.environment_file import sessions_of
from engine.run_directory.fork import parent_step
from engine.setup.check_resume import state_difference
from engine.weights_hash import weights_hash

STATE = ("model", "optimizer", "precision", "rng")
"""What of a checkpoint decides the steps after it, besides the data."""


@dataclass
class SavedWeights:
    """What the checkpoints of two runs tell, up to the step at which the runs part."""

    equal: list[int] = field(default_factory=list)
    """Steps whose checkpoints have the same weights, optimizer and random generators."""
    lines: list[str] = field(default_factory=list)
    """What differs, or cannot be read."""
    differing: int | None = None
    """The first step whose checkpoints differ."""
    difference: str = ""
    """In which tensor, and by how much."""
    culprit: str = ""
    """The first checkpoint that a run went on from with other weights than it had logged there."""


def compare_saved(runs: Sequence[Run], names: Sequence[str], before: int | None) -> SavedWeights:
    """Compares the checkpoints of two runs with each other and with the weights that each logged.

    before: the step at which the runs part, whose checkpoints differ for that reason; None: they do
    not part.
    """
    found = SavedWeights()
    paths = [checkpoints_of(run.path) for run in runs]
    for step in sorted({*paths[0], *paths[1]}):
        if before is not None and step >= before:
            break
        states, wrong, cause = list[dict[str, Any]](), "", False
        for run, name, own in zip(runs, names, paths, strict=True):
            if step in own:
                try:
                    state = load_checkpoint(own[step], mmap=True)
                except CheckpointError as error:
                    # A run that is training meanwhile removes its older ones.
                    found.lines += [f"{name}: {error}"] if own[step].exists() else []
                    continue
                states.append(state)
                logged = log_records(run.records).get(step, {}).get(WEIGHTS)
                if logged is not None and weights_hash(state["model"]) != logged:
                    wrong = f"{own[step].name} of {name} holds other weights than {name} logged"
                    cause = cause or step in _resumed_at(run)
        difference = _difference(states)
        if wrong:
            wrong += f" at step {step}" + (f": {difference}" if difference else "")
            found.lines.append(wrong)
            found.culprit = found.culprit or (wrong if cause else "")
        elif difference:
            if found.differing is None:
                found.differing, found.difference = step, difference
            found.lines.append(f"checkpoint_{step}.pt differs: {difference}")
        elif len(states) == 2:
            found.equal.append(step)
    return found


def _resumed_at(run: Run) -> set[int]:
    """Returns the steps of the checkpoints that the run went on from."""
    sessions = sessions_of(run.environment)
    return {parent_step(run.environment), *(as_count(each.get("step")) or 0 for each in sessions)}


def _difference(states: Sequence[Mapping[str, Any]]) -> str:
    """Returns the first tensor or value in which two states differ; empty where none does."""
    if len(states) < 2:
        return ""
    return state_difference(states[0], states[1], STATE)[1] or ""

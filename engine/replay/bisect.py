"""`runs.py bisect A B`: where two runs that should agree part, and why.

From the cheapest evidence to the dearest: the log records; the checkpoints before the parting, each
against the weights that its run logged; and both runs replayed step by step from their last common
checkpoint. The replay finds the first row or tensor that differs. Then the first run is replayed
with what differs in the second, one thing at a time: what makes it equal to the second explains it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from compare.differences import MISSING, differing_data, differing_options
from compare.labels import names
from compare.parting import Agreement, compare_records
from compare.reading.run import Run
from config import Config, DataError, UserError
from engine.checkpoint.load import load_checkpoint
from engine.replay.batch import batch_of
from engine.replay.replay import Replay, ReplayStart, TrainingLoop, open_replay
from engine.replay.reproduce import is_close
from engine.replay.saved_weights import SavedWeights, compare_saved
from engine.replay.session import compare_facts, session_facts
from engine.replay.start import start_with
from engine.run_directory.experiment import is_text_path, own_options
from engine.run_directory.fork import OPTION as FORK_FROM
from engine.run_directory.fork import parent_step
from engine.run_directory.manifest import data_path
from engine.run_directory.saved_config import config_of_step
from engine.setup.check_resume import state_difference
from engine.signals import StopRequest
from engine.weights_hash import weights_hash
from settings.entries import flat_options
from settings.values import to_text

THREADS = "number of threads"
MOST_TRIALS = 10
"""Differences that are tried one at a time."""
_AROUND = 20
"""Tokens that are shown on each side of the first one that differs."""


@dataclass(frozen=True)
class Finding:
    """What is known of two runs."""

    cause: str
    """none, option, text, threads, weights or unknown."""
    conclusion: str
    """The closing line."""
    evidence: Sequence[str]
    """One line for each thing that was found on the way."""
    agreement: Agreement
    equal_checkpoints: Sequence[int]
    """Steps."""

    @property
    def agree(self) -> bool:
        """Whether no difference was found."""
        return self.cause == "none"

    def values(self) -> dict[str, Any]:
        """Returns all of it as plain values."""
        parting = self.agreement.parting
        place = {} if parting is None else {"step": parting.step, "record": parting.record}
        return {
            "agree": self.agree,
            "cause": self.cause,
            "conclusion": self.conclusion,
            "evidence": [*self.evidence],
            "equal_records": self.agreement.records,
            "equal_checkpoints": [*self.equal_checkpoints],
            "parting": place | ({"values": dict(parting.values)} if parting else {}),
        }


def _with_difference(start: ReplayStart, key: str, value: Any) -> ReplayStart:
    """Returns a start with another value of one option, or as many threads; raises ConfigError."""
    if key == THREADS:
        return replace(start, threads=value)
    values = flat_options(start.config.to_dict()) | {key: value}
    # Another model does not have all options of this one.
    return replace(start, config=Config.from_flat(own_options(values)))


def bisect(first: Run, second: Run, most_steps: int, loop: TrainingLoop) -> Finding:
    """Compares two runs; raises DataError where they have no record to compare.

    Args:
        most_steps: of each run that are replayed at most.
        loop: `train.train`.
    """
    found, runs = compare_records(first.records, second.records), (first, second)
    labels = names(runs)
    if found.parting is None and not found.records:
        raise DataError(f"{' and '.join(labels)} have no log record of the same step to compare.")
    saved = compare_saved(runs, labels, found.parting.step if found.parting else None)
    search = _Search(runs, labels, found, saved, loop)
    cause, conclusion = search.conclude(most_steps)
    return Finding(cause, conclusion, search.lines, found, saved.equal)


@dataclass
class _Search:
    """Collects evidence, line by line, until the cause is certain."""

    runs: tuple[Run, Run]
    names: Sequence[str]
    found: Agreement
    saved: SavedWeights
    loop: TrainingLoop
    lines: list[str] = field(default_factory=list)
    on_cpu: bool = True

    def conclude(self, most_steps: int) -> tuple[str, str]:
        """Returns the cause in a word, and the closing line."""
        found, saved, both = self.found, self.saved, " and ".join(self.names)
        if found.parting is None:
            self.lines += saved.lines
            if saved.lines:
                return "weights", f"{both} agree in their records; but {saved.lines[0]}."
            compared = f"{found.records} records ({found.evidence})"
            count = len(saved.equal)
            return "none", f"{both} agree in all {compared} and in {count} checkpoints."
        self.lines += [
            f"{found.records} records are equal, the last at step {found.last_equal}"
            if found.records
            else "No record is equal",
            f"They part at {found.parting}",
            f"Equal checkpoints: {', '.join(map(str, saved.equal)) or 'none'}",
            *saved.lines,
        ]
        if saved.culprit:
            return "weights", f"{saved.culprit}."
        options = differing_options(self.runs)
        for key, (one, other) in options.items():
            self.lines.append(f"{key}: {_shown(one)} and {_shown(other)}")
        step = found.parting.step
        facts = compare_facts(*(session_facts(run.environment, step) for run in self.runs))
        self.lines += [f"{f.name}: {f.then} and {f.now}" for f in facts if f.differs]
        differing = [*options, *(f.name for f in facts if f.may_cause)]
        if differing_data(self.runs).get("fingerprint"):
            self.lines.append("The fingerprints of the data differ")
            differing.append("the data")
        try:
            if proven := self._replay(most_steps, options):
                return proven
        except UserError as error:
            self.lines.append(f"Not replayed to the end: {error}")
        if not differing:
            return "unknown", "The cause is unknown: options, machine, versions and data are equal."
        return "unknown", f"Not proven; what differs is {', '.join(differing)}."

    # ---- replays

    def _replay(
        self, most_steps: int, options: Mapping[str, Sequence[Any]]
    ) -> tuple[str, str] | None:
        """Replays both runs and returns what explains the difference; None where nothing does."""
        assert self.found.parting is not None
        end = self.found.parting.record
        begin = max([*self.saved.equal, *(parent_step(run.environment) for run in self.runs)])
        if end - begin > most_steps:
            self.lines.append(
                f"Not replayed: {end - begin:,} steps from step {begin} (see --steps)"
            )
            return None
        first, second = (self._start(run, begin) for run in self.runs)
        steps = [self._steps(start, end) for start in (first, second)]
        found = compare_records(steps[0], steps[1], after=begin)
        if found.parting is None:
            self.lines.append(f"Replayed here from step {begin}, both compute the same")
            return self._wrong_checkpoint(first)
        step, other_rows = found.parting.step, found.parting.batches_differ
        self.lines.append(f"Replayed here from step {begin}, they part at {found.parting}")
        what = self._first_row(step) if other_rows else self._first_tensor(first, second, step)
        self.lines.append(what)
        # Where a fork began decides nothing: both begin with the same state.
        differences = {k: row[1] for k, row in options.items() if MISSING not in row}
        differences.pop(FORK_FROM, None)
        if first.threads != second.threads and second.threads is not None:
            differences[THREADS] = second.threads
        trials = [{key: value} for key, value in list(differences.items())[:MOST_TRIALS]]
        if len(differences) > 1:
            trials.append(differences)  # none is enough alone
        for trial in trials:
            if self._explains(first, trial, steps[1]):
                return self._explained(trial, what, end)
        return ("text", f"Other text: {what}.") if other_rows and not differences else None

    def _wrong_checkpoint(self, start: ReplayStart) -> tuple[str, str] | None:
        """Returns which of two checkpoints that differ is not what a replay makes; for a step
        without a log record, whose hash would tell it at once."""
        step = self.saved.differing
        if step is None:
            return None
        with self._replayed(start, step) as replay:
            right = weights_hash(replay.trainer.model.state_dict())
        for run, name in zip(self.runs, self.names, strict=True):
            path = data_path(run.path, step)
            if weights_hash(load_checkpoint(path, mmap=True)["model"]) != right:
                wrong = f"{path.name} of {name} holds other weights than a replay makes"
                return "weights", f"{wrong}: {self.saved.difference}."
        return None

    def _start(self, run: Run, begin: int) -> ReplayStart:
        """Returns a run from its checkpoint of a step on or, without one, from its own begin."""
        assert self.found.parting is not None
        step, path = self.found.parting.step, data_path(run.path, begin)
        config = config_of_step(run.path, step)
        checkpoint = path if path.exists() else None
        return start_with(config, run.environment, step, checkpoint, begin)

    def _steps(self, start: ReplayStart, end: int) -> list[dict[str, Any]]:
        with self._replayed(start, end) as replay:
            self.on_cpu = replay.trainer.world.on_cpu
            return replay.records

    @contextmanager
    def _replayed(self, start: ReplayStart, end: int) -> Iterator[Replay]:
        with open_replay(start, StopRequest(), self.loop) as replay:
            replay.advance_to(end)
            yield replay

    def _explains(
        self, start: ReplayStart, trial: Mapping[str, Any], wanted: Sequence[Mapping[str, Any]]
    ) -> bool:
        """Returns whether the first run, with these values, computes what the second one does."""
        values = ", ".join(f"{key} {_shown(value)}" for key, value in trial.items())
        try:
            for key, value in trial.items():
                start = _with_difference(start, key, value)
            steps = self._steps(start, wanted[-1]["step"])
        except UserError as error:  # one difference alone may be no valid config
            self.lines.append(f"{values} in {self.names[0]}: {error}")
            return False
        found = compare_records(steps, wanted, after=start.step)
        # A GPU does not compute the same twice.
        same = found.parting is None or (not self.on_cpu and is_close(found))
        one, other = self.names
        self.lines.append(
            f"{one} with {values} computes the same as {other}"
            if found.parting is None or same
            else f"{one} with {values} parts from {other} at step {found.parting.step}"
        )
        return same

    def _explained(self, trial: Mapping[str, Any], what: str, end: int) -> tuple[str, str]:
        one, other = self.names
        if any(map(is_text_path, trial)):
            return "text", f"Other text: {what}."
        explain = "explains" if len(trial) == 1 else "explain"
        values = " and ".join(map(_shown, trial.values()))
        return (
            "threads" if [*trial] == [THREADS] else "option",
            f"{' and '.join(trial)} {explain} it: with {values}, {one} computes the same as "
            f"{other} up to step {end}.",
        )

    # ---- the first thing that differs

    def _first_row(self, step: int) -> str:
        """Returns the first row of a step that differs, with the documents and texts of both."""
        one, other = (batch_of(run.path, step, run.records) for run in self.runs)
        if one.rows.shape != other.rows.shape:
            shapes = " and ".join(str(tuple(each.rows.shape)) for each in (one, other))
            return f"the batches of step {step} have the shapes {shapes}"
        row, token = (one.rows != other.rows).nonzero()[0].tolist()
        texts = []
        for batch in (one, other):
            documents = batch.sequences[row].documents
            document = next(each for each in documents if token in each.stored.tokens)
            # Tokens and characters differ in number: the text is cut where the token stands in it.
            place = (token - document.stored.tokens.start) / len(document.stored.tokens)
            middle = int(place * len(document.text))
            text = document.text[max(0, middle - _AROUND) : middle + _AROUND]
            numbers = document.stored.numbers
            where = f"{numbers.start:,}" if len(numbers) == 1 else f"{numbers.start:,}..."
            texts.append(f"{text!r} in {document.stored.place} {where}")
        return f"step {step}, row {row}, token {token}: {' and '.join(texts)}"

    def _first_tensor(self, first: ReplayStart, second: ReplayStart, step: int) -> str:
        """Returns the first tensor of the weights or the optimizer that differs after a step."""
        states = []
        for start in (first, second):
            with self._replayed(start, step) as replay:
                state = replay.trainer.state_dict()
                states.append(copy.deepcopy({key: state[key] for key in ("model", "optimizer")}))
        try:
            found = state_difference(states[0], states[1], ("model", "optimizer"))[1]
        except RuntimeError as error:
            found = str(error)
        return f"after step {step}, {found or 'weights and optimizer are equal'}"


def _shown(value: Any) -> str:
    return MISSING if value is MISSING else to_text(value)

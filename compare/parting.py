"""Where the log records of two runs that should agree differ first. Imports no torch.

Records are compared exactly: two runs that compute the same write the same numbers. A hash of the
batches and of the weights stands in each record; runs of earlier versions have only their losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from compare.reading.json_values import as_count, as_float

BATCHES, WEIGHTS, RATE = "train/batch_hash", "train/weights_hash", "train/learning_rate"
LOSS, NORM, FIRST_LOSSES = "train/loss", "train/grad_norm", "train/first_losses"
# What causes the next stands before it: batch and learning rate, then what is computed of them.
_OF_STEP = (RATE, NORM, WEIGHTS)
"""Of the step of the record alone."""
_SINCE_LAST = (BATCHES, LOSS)
"""Of all steps since the record before: compared where that is of the same step in both."""
_ORDER = (BATCHES, RATE, LOSS, NORM, WEIGHTS)
_WORDS = {
    BATCHES: "batches",
    RATE: "learning rate",
    LOSS: "loss",
    NORM: "gradient norm",
    WEIGHTS: "weights",
}


@dataclass(frozen=True)
class Parting:
    """The first record at which two runs differ."""

    step: int
    """That of the record or, where it tells single losses, the first step whose loss differs."""
    record: int
    """The step of the record."""
    values: Mapping[str, tuple[Any, Any]]
    """Metric -> its values in both, of those that differ; a cause stands before its effects."""

    @property
    def batches_differ(self) -> bool:
        """Whether the runs are known to have trained on other rows."""
        return BATCHES in self.values

    def __str__(self) -> str:
        shown = []
        for key, pair in self.values.items():
            one, other = (f"{v:.9g}" if isinstance(v, float) else v for v in pair)
            shown.append(f"{_WORDS[key]} {one} and {other}")
        return f"step {self.step}: {', '.join(shown)}"


@dataclass(frozen=True)
class Agreement:
    """How far two runs agree."""

    records: int
    """Log records of the same step that are equal in all that both have."""
    losses: int
    """Losses of single steps and of records that were compared, the parting included."""
    last_equal: int
    """The step of the last equal record before the parting; 0 without any."""
    keys: frozenset[str]
    """Metrics that both runs have."""
    parting: Parting | None
    largest: float
    """The largest relative difference of two losses of the same step or record."""
    largest_step: int

    @property
    def evidence(self) -> str:
        """What was compared, in words."""
        return ", ".join(_WORDS[key] for key in _ORDER if key in self.keys)


@dataclass
class _Differences:
    """Collects the largest relative difference of losses."""

    count: int = 0
    largest: float = 0.0
    step: int = 0
    keys: set[str] = field(default_factory=set)

    def add(self, step: int, one: float, other: float) -> bool:
        """Compares two losses; returns whether they differ."""
        self.count += 1
        apart = abs(one - other) / max(abs(one), abs(other), 1e-300)
        if apart > self.largest:
            self.largest, self.step = apart, step
        return one != other


def log_records(records: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """Returns step -> record of the log lines, in order of steps."""
    found = {record["step"]: record for record in records if LOSS in record}
    return {step: found[step] for step in sorted(step for step in found if as_count(step))}


def step_losses(records: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Returns step -> its loss, of the first steps of a run: a record has those since the last."""
    losses, before = dict[int, float](), 0
    for step, record in log_records(records).items():
        own = record.get(FIRST_LOSSES)
        for number, loss in enumerate(own if isinstance(own, list) else [], before + 1):
            if as_float(loss) is not None:
                losses[number] = loss
        before = step
    return losses


def compare_records(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
) -> Agreement:
    """Returns how far two runs agree, record by record of the same step.

    All of them are compared, for the largest difference; the parting is the first one.
    """
    logs, losses = (log_records(first), log_records(second)), _Differences()
    before, windows = [_steps_before(log) for log in logs], False
    singles = step_losses(first), step_losses(second)
    parting, equal, last_equal, done = None, 0, 0, 0
    for step in [step for step in logs[0] if step in logs[1]]:
        one, other = logs[0][step], logs[1][step]
        windows = before[0][step] == before[1][step]
        keys = [key for key in _ORDER if key in _OF_STEP or (windows and key in _SINCE_LAST)]
        values = {key: (one[key], other[key]) for key in keys if key in one and key in other}
        losses.keys |= values.keys()
        differing = {key: pair for key, pair in values.items() if pair[0] != pair[1]}
        if LOSS in values and None not in values[LOSS]:
            losses.add(step, *values[LOSS])
        both = [each for each in range(done + 1, step + 1) if each in singles[0].keys() & singles[1]]
        apart = [each for each in both if losses.add(each, singles[0][each], singles[1][each])]
        if apart:  # the loss of one step says more than the mean that it is part of
            differing[LOSS] = singles[0][apart[0]], singles[1][apart[0]]
        done = step
        if parting is None and differing:
            ordered = {key: differing[key] for key in _ORDER if key in differing}
            parting = Parting(min([*apart, step]), step, ordered)
        elif parting is None:
            equal, last_equal = equal + 1, step
    return Agreement(
        records=equal,
        losses=losses.count,
        last_equal=last_equal,
        keys=frozenset(losses.keys),
        parting=parting,
        largest=losses.largest,
        largest_step=losses.step,
    )


def _steps_before(log: Mapping[int, Any]) -> dict[int, int]:
    """Returns step of a record -> that of the record before it, 0 for the first."""
    return dict(zip(log, [0, *log], strict=False))

"""Where the log records of two runs that should agree differ first. Imports no torch.

Records are compared exactly: two runs that compute the same write the same numbers. A hash of the
batches and of the weights stands in each record; runs of earlier versions have only their losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compare.reading.json_values import as_count, as_float

BATCHES, WEIGHTS, RATE = "train/batch_hash", "train/weights_hash", "train/learning_rate"
LOSS, NORM, FIRST_LOSSES = "train/loss", "train/grad_norm", "train/first_losses"
_OF_STEP = (RATE, NORM, WEIGHTS)
"""Of the step of the record alone."""
_ORDER = (BATCHES, RATE, LOSS, NORM, WEIGHTS)
"""A cause stands before its effects. Batches and loss are of all steps since the record before:
they are compared where that record is of the same step in both runs."""
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


def log_records(records: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """Returns step -> record of the log lines, in order of steps."""
    found = {record["step"]: record for record in records if LOSS in record}
    return {step: found[step] for step in sorted(step for step in found if as_count(step))}


def step_losses(records: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Returns step -> its loss, of the first steps of a run: a record has those since the last."""
    losses, before = dict[int, float](), 0
    for step, record in log_records(records).items():
        # Without a hash of its batches, a record is of a run that an earlier version began: it has
        # not the losses of all steps since the last one.
        own = record.get(FIRST_LOSSES) if record.get(BATCHES) is not None else None
        for number, loss in enumerate(own if isinstance(own, list) else [], before + 1):
            if as_float(loss) is not None:
                losses[number] = loss
        before = step
    return losses


def compare_records(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], after: int = 0
) -> Agreement:
    """Returns how far two runs agree, by their records of the same steps.

    after: records and losses up to this step are not compared.
    """
    logs = log_records(first), log_records(second)
    before = _steps_before(logs[0]), _steps_before(logs[1])
    keys, parting, equal = set[str](), None, list[int]()
    losses = _pairs(step_losses(first), step_losses(second))
    losses = [(step, one, other) for step, one, other in losses if step > after]
    single = next((step for step, one, other in losses if one != other), None)
    for step in [step for step in logs[0] if step in logs[1] and step > after]:
        one, other = logs[0][step], logs[1][step]
        same_begin = before[0][step] == before[1][step]
        wanted = _ORDER if same_begin else _OF_STEP
        values = {key: (one.get(key), other.get(key)) for key in wanted}
        values = {key: pair for key, pair in values.items() if None not in pair}
        keys |= values.keys()
        if LOSS in values:
            losses += _pairs({step: values[LOSS][0]}, {step: values[LOSS][1]})
        differing = {key: pair for key, pair in values.items() if pair[0] != pair[1]}
        if parting is None and differing:
            parting = Parting(step, step, differing)
        elif parting is None:
            equal.append(step)
    if single is not None and (parting is None or single <= parting.record):
        # The loss of one step says more than the mean that it is part of.
        pair = next((one, other) for step, one, other in losses if step == single)
        values = {**(parting.values if parting else {}), LOSS: pair}
        ordered = {key: values[key] for key in _ORDER if key in values}
        parting = Parting(single, parting.record if parting else single, ordered)
    apart = ((_relative(one, other), step) for step, one, other in losses)
    largest, largest_step = max(apart, default=(0.0, 0))
    return Agreement(
        records=len(equal),
        losses=len(losses),
        last_equal=max((step for step in equal if not parting or step < parting.step), default=0),
        keys=frozenset(keys),
        parting=parting,
        largest=largest,
        largest_step=largest_step,
    )


def _pairs(one: Mapping[int, Any], other: Mapping[int, Any]) -> list[tuple[int, float, float]]:
    """Returns (step, loss, loss) of the steps that both have, where both are numbers."""
    pairs = [(step, as_float(one[step]), as_float(other[step])) for step in one if step in other]
    return [(step, a, b) for step, a, b in pairs if a is not None and b is not None]


def _relative(one: float, other: float) -> float:
    return abs(one - other) / max(abs(one), abs(other), 1e-300)


def _steps_before(log: Mapping[int, Any]) -> dict[int, int]:
    """Returns step of a record -> that of the record before it, 0 for the first."""
    return dict(zip(log, [0, *log], strict=False))

"""The first step at which a group of runs has reached a goal: `eval/val_loss<=1.30` with p < 0.01.

The rule is that of modded-nanogpt's records: a one-sided t-test, over the runs, that their mean is
on the right side. A record's step is fixed beforehand. Here every step is looked at and the first
one is taken, which passes by chance more often than p says; who claims a step should test it with
new seeds.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from compare.groups import RunGroup, Spread, group_labels
from compare.plot.curves import by_step, shared_steps
from compare.reading.run import Run
from compare.statistics.comparison import number_format, p_text
from compare.statistics.seeds import why_no_step
from compare.statistics.student import upper_p
from compare.tables.table import width
from config import ConfigError
from settings.values import one_line

_GOAL = re.compile(r"\s*([^\s=!<>]+)\s*(<=|>=|<|>)\s*([-+.0-9eE]+)\s*")
_MAX_RUNS = 1000  # that a message suggests


@dataclass(frozen=True)
class Goal:
    """A bound that the mean of a metric is to reach."""

    metric: str
    sign: str
    """<, <=, > or >=."""
    bound: float

    @property
    def direction(self) -> int:
        """1 if lower values are wanted, else -1."""
        return 1 if self.sign[0] == "<" else -1

    def __str__(self) -> str:
        return f"{self.metric}{self.sign}{self.bound:g}"


def parse_goal(text: str) -> Goal:
    """Returns the goal that a text such as `eval/val_loss<=1.30` means; raises ConfigError."""
    parts = _GOAL.fullmatch(text)
    try:
        if parts and math.isfinite(bound := float(parts[3])):
            return Goal(parts[1], parts[2], bound)
    except ValueError:
        pass
    raise ConfigError(
        f"--goal {one_line(text)}: expected a metric, one of < <= > >=, and a number, in quotes: "
        "'eval/val_loss<=1.30'."
    )


@dataclass(frozen=True)
class GoalProgress:
    """How near runs came to a goal."""

    passed: bool
    step: int
    """The first that passes; else the one that came nearest to it."""
    spread: Spread
    """Of the metric at this step."""
    p: float
    """The probability of a mean this far on the right side if the true one is the bound."""
    looked_at: int
    """The number of steps at which all runs have the metric."""
    enough: int | None
    """The number of runs with which this mean and deviation would pass; None if none would."""


def progress_to(goal: Goal, runs: Sequence[Run], level: float) -> GoalProgress | str:
    """Returns the first step at which the mean of the runs has reached the goal with p < `level`,
    or the one that came nearest; the reason as text if that cannot be tested."""
    if len(runs) < 2:
        return "one run proves nothing about other seeds: train it with another seed"
    by_run = [by_step(run, goal.metric) for run in runs]
    steps = shared_steps(runs, by_run)
    if reason := why_no_step(runs, goal.metric, by_run, steps):
        return reason
    found = list[GoalProgress]()
    for step in steps:
        spread = Spread.of([known[step] for known in by_run])
        assert spread
        p = _p(goal, spread, spread.count)
        found.append(GoalProgress(p < level, step, spread, p, len(steps), None))
        if p < level:
            return found[-1]
    nearest = min(found, key=lambda each: each.p)
    if nearest.p >= 0.5:  # no mean is on the right side: the best mean, whatever its deviation
        return min(found, key=lambda each: goal.direction * each.spread.mean)
    return replace(nearest, enough=_enough(goal, nearest.spread, level))


def _p(goal: Goal, spread: Spread, count: int) -> float:
    """Returns the one-sided p of this mean and deviation over `count` runs."""
    below = goal.direction * (goal.bound - spread.mean)
    if spread.deviation == 0:  # the limit of ever smaller deviations
        return 0.0 if below > 0 else 0.5 if below == 0 else 1.0
    return upper_p(below / spread.deviation * math.sqrt(count), count - 1)


def _enough(goal: Goal, spread: Spread, level: float) -> int | None:
    counts = range(spread.count, _MAX_RUNS + 1)
    return next((count for count in counts if _p(goal, spread, count) < level), None)


def goal_lines(groups: Sequence[RunGroup], goal: Goal, level: float) -> list[str]:
    """Returns for each group whether and at which step it has reached a goal."""
    lines, labels = list[str](), group_labels(groups)
    for group, label in zip(groups, labels, strict=True):
        found = progress_to(goal, group.runs, level)
        text = (
            f"is not tested: {found}"
            if isinstance(found, str)
            else _progress_text(goal, found, level)
        )
        lines += textwrap.wrap(f"{label} ({group.size}): {goal} {text}.", width())
    return lines


def _progress_text(goal: Goal, found: GoalProgress, level: float) -> str:
    show = number_format(goal.metric)
    at = f"{found.spread.text(show)} (n = {found.spread.count}), {p_text(found.p)}"
    if found.passed:
        return (
            f"is reached at step {found.step:,}: {at}, below {level:g}; the first of "
            f"{found.looked_at} steps that passes, so test it with new seeds before claiming it"
        )
    gap = goal.direction * (found.spread.mean - goal.bound)
    if gap >= 0:
        side = "above" if goal.direction > 0 else "below"
        missed = f"the mean is {show(gap)} {side} at its best, step {found.step:,}"
        return f"is not reached: {missed}: {at}"
    more = (
        f"with this mean and deviation it takes {found.enough} runs"
        if found.enough
        else "no thousand runs with this mean and deviation would do"
    )
    return f"is not shown with p < {level:g}: nearest at step {found.step:,}, {at}; {more}"


def goal_values(groups: Sequence[RunGroup], goal: Goal, level: float) -> list[dict[str, Any]]:
    """Returns the progress of each group as plain values, for JSON."""
    values = []
    for group, label in zip(groups, group_labels(groups), strict=True):
        found = progress_to(goal, group.runs, level)
        own = {"not_tested": found} if isinstance(found, str) else asdict(found)
        if isinstance(found, GoalProgress):
            own |= {"spread": found.spread.values()}
        values.append(
            {"label": label, "runs": [str(run.path) for run in group.runs], "goal": str(goal)} | own
        )
    return values

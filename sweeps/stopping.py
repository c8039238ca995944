"""Early stopping: which runs of a sweep are hopeless, by the losses in their run directories.

Cells that differ in the seed alone are one group, judged by the mean over its seeds of the best
value so far. What is compared is always the same step (median) or the same part of a run (halving).
Nothing is remembered, so a sweep that is started again judges as it would have done.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean, median

from compare.reading.json_values import as_count, as_float
from compare.reading.records import read_records
from engine.run_directory.manifest import METRICS
from sweeps.sweep_file import StopRule


@dataclass(frozen=True)
class BestLosses:
    """The best held-out loss so far, at each step at which it was measured."""

    steps: tuple[int, ...] = ()
    best: tuple[float, ...] = ()

    @property
    def last(self) -> int:
        """The step that it reaches; 0 without a value."""
        return self.steps[-1] if self.steps else 0

    def at(self, step: float) -> float | None:
        """Returns the best value until a step; None where the curve ends or begins beyond it."""
        place = bisect_right(self.steps, step)
        return self.best[place - 1] if place and self.last >= step else None


def read_curve(run: Path) -> BestLosses:
    """Returns the curve of a run directory; a file that did not change is not read again."""
    try:
        status = os.stat(run / METRICS)
    except OSError:
        return BestLosses()
    return _read_curve(run, status.st_size, status.st_mtime_ns)


@lru_cache(1 << 12)
def _read_curve(run: Path, _size: int, _mtime_ns: int) -> BestLosses:
    steps, best = list[int](), list[float]()
    for record in read_records(run)[0]:
        step, value = as_count(record.get("step")), as_float(record.get("eval/val_loss"))
        if step is not None and value is not None:
            steps.append(step)
            best.append(min(value, best[-1]) if best else value)
    return BestLosses(tuple(steps), tuple(best))


@dataclass(frozen=True)
class Member:
    """A run of a group, as far as it is."""

    curve: BestLosses
    planned: int
    """Steps of the whole run."""
    running: bool


def hopeless(rule: StopRule, groups: Mapping[str, Sequence[Member]]) -> dict[str, str]:
    """Returns the groups whose runs are to be stopped, and why."""
    found = dict[str, str]()
    for name, group in groups.items():
        running = [member for member in group if member.running]
        # As far as all running seeds of the group are.
        step = min((member.curve.last for member in running), default=0)
        if running and step >= rule.after * running[0].planned:
            judge = _by_median if rule.rule == "median" else _by_halving
            why = judge(rule, groups, name, step)
            found |= {name: why} if why else {}
    return found


def _by_median(rule: StopRule, groups: Mapping[str, Sequence[Member]], name: str, step: int) -> str:
    means = _means({key: [m.curve.at(step) for m in group] for key, group in groups.items()})
    own, others = means.get(name), [value for key, value in means.items() if key != name]
    if own is None or len(others) < rule.min_cells or own <= (middle := median(others)):
        return ""
    return f"median at step {step}: {own:.4f} above {middle:.4f} of {len(others)} others"


def _by_halving(
    rule: StopRule, groups: Mapping[str, Sequence[Member]], name: str, step: int
) -> str:
    """Judges at the last rung that was reached: `after` of a run, twice that, and so on. Groups
    that get there later may still push it out."""
    planned = groups[name][0].planned
    part = rule.after * 2 ** math.floor(math.log2(step / planned / rule.after) + 1e-9)
    if part >= 1:
        return ""
    at_rung = {key: [m.curve.at(part * m.planned) for m in own] for key, own in groups.items()}
    means = _means(at_rung)
    kept, own = math.ceil(len(means) / 2), means.get(name)
    if own is None or (place := 1 + sum(value < own for value in means.values())) <= kept:
        return ""
    rung = round(part * planned)
    return f"halving at step {rung}: {own:.4f} is place {place} of {len(means)}, {kept} go on"


def _means(values: Mapping[str, Sequence[float | None]]) -> dict[str, float]:
    """Returns the mean of each group that has a value."""
    known = {key: [each for each in own if each is not None] for key, own in values.items()}
    return {key: fmean(own) for key, own in known.items() if own}

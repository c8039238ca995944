"""Runs that repeat one experiment, such as runs that differ in their seed alone, as one group.

A run counts once for each value of the options over which a group is taken: a seed that was trained
twice, on a CPU with equal results, is one observation and not two.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from compare.differences import MISSING, data_fingerprint
from compare.labels import LONGEST, labels, names, short_names
from compare.reading.json_values import as_count, as_dict
from compare.reading.run import Run, find_runs, read_run
from config import ConfigError, schema
from engine.run_directory.experiment import experiment_id
from engine.run_directory.find_runs import runs_in
from engine.run_directory.fork import ANCESTORS
from engine.run_directory.fork import OPTION as FORK_FROM
from settings.names import resolve
from settings.values import RefusedError, to_text

SEED = "training.seed"
_SHOWN = 4  # experiments in a message


@dataclass(frozen=True)
class RunGroup:
    """Runs that are equal in all options that affect results, but for those in `over`."""

    runs: tuple[Run, ...]
    """Each has other values of `over`."""
    over: tuple[str, ...]
    """The options that may differ: `training.seed`."""
    repeats: tuple[Run, ...] = ()
    """Runs with the values of one of `runs`, which got further; they do not count."""

    @property
    def size(self) -> str:
        """How many runs: `3 seeds`."""
        what = "seed" if self.over == (SEED,) else "run"
        return f"{len(self.runs)} {what}{'s' if len(self.runs) > 1 else ''}"

    @property
    def others(self) -> str:
        """For what a comparison of groups speaks: `other seeds`."""
        return f"other {'seeds' if self.over == (SEED,) else f'values of {list_of(self.over)}'}"

    @property
    def values(self) -> list[tuple[Any, ...]]:
        """The values of `over` of each run."""
        return [_values(run, self.over) for run in self.runs]


@dataclass(frozen=True)
class Spread:
    """Values of the runs of a group: how many, mean and standard deviation (of a sample, n - 1)."""

    count: int
    mean: float
    deviation: float
    """NaN for one value."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Returns the spread of one value or more; None without any."""
        if not values:
            return None
        deviation = stdev(values) if len(values) > 1 else math.nan
        return cls(len(values), fmean(values), deviation)

    def text(
        self,
        show: Callable[[float], str] = "{:.4f}".format,
        show_deviation: Callable[[float], str] | None = None,
    ) -> str:
        """Returns `2.5012 \u00b1 0.0034`, or the value alone if there is one."""
        if math.isnan(self.deviation):
            return show(self.mean)
        return f"{show(self.mean)} \u00b1 {(show_deviation or show)(self.deviation)}"

    def values(self) -> dict[str, float]:
        """Returns the spread as plain values, for JSON."""
        return {"n": self.count, "mean": self.mean, "sd": self.deviation}


def option_keys(words: Collection[str]) -> tuple[str, ...]:
    """Returns the options that words such as `seed` or `seed,dropout` mean; raises ConfigError."""
    keys = list[str]()
    for word in (part.strip() for several in words for part in several.split(",")):
        try:
            found = [key for key in resolve(schema(), word).keys if schema().find(key)]
        except RefusedError as error:
            raise ConfigError(f"--over {error}") from None
        if not found:
            raise ConfigError(f"--over {word}: is not an option of a run.")
        keys += found
    return tuple(dict.fromkeys(keys))


def group_runs(runs: Sequence[Run], over: Sequence[str]) -> list[RunGroup]:
    """Returns the runs in groups, in the order of their first runs.

    Runs of one group have read the same text, by its fingerprint, in steps of equal size. A run
    whose config cannot be read is a group of its own.
    """
    groups = dict[tuple[Any, ...], list[Run]]()
    for run in runs:
        alone = (str(run.path),)
        own = (*_experiment(run, over), data_fingerprint(run), run.step_factor)
        key = own if run.config else alone
        groups.setdefault(key, []).append(run)
    return [_without_repeats(members, tuple(over)) for members in groups.values()]


def _experiment(run: Run, over: Sequence[str]) -> list[Any]:
    """Returns what runs of one group have equal: their experiment; of forks, also the step and the
    experiment of each run that they go on from, because each seed has another checkpoint."""
    if not run.parent or FORK_FROM in over:
        return [experiment_id(run.config, over)]
    config = {**run.config, FORK_FROM: None}
    found: list[Any] = [experiment_id(config, over)]
    ancestors = run.parent.get(ANCESTORS)
    for each in (run.parent, *(ancestors if isinstance(ancestors, list) else [])):
        parent = as_dict(each)
        pairs = as_dict(parent.get("changed"))  # option -> value in the parent, value in the fork
        config |= {key: pair[0] for key, pair in pairs.items() if isinstance(pair, list) and pair}
        found += [as_count(parent.get("step")), experiment_id(config, over)]
    return found


def _without_repeats(runs: Sequence[Run], over: tuple[str, ...]) -> RunGroup:
    """Returns a group in which one run counts of those with equal values: that which got furthest,
    a finished one first."""
    chosen = dict[tuple[Any, ...], Run]()
    for run in runs:
        other = chosen.setdefault(_values(run, over), run)
        if (run.state == "done", run.step) > (other.state == "done", other.step):
            chosen[_values(run, over)] = run
    kept = tuple(chosen.values())
    return RunGroup(kept, over, tuple(run for run in runs if run not in kept))


def _values(run: Run, over: Sequence[str]) -> tuple[Any, ...]:
    return tuple(run.config.get(key, MISSING) for key in over)


def group_labels(groups: Sequence[RunGroup], longest: int = LONGEST) -> list[str]:
    """Returns a unique label for each group: the options in which the groups differ, else the name
    of its first run and how many others there are."""
    firsts = [group.runs[0] for group in groups]
    over = {key for group in groups for key in group.over}
    if len(groups) > 1:
        return labels(firsts, longest, over)
    more = len(groups[0].runs) - 1 if groups else 0
    return [name + (f" and {more} more" if more else "") for name in names(firsts)]


def find_group(path: Path, over: Sequence[str]) -> RunGroup:
    """Returns the group that a path means: a run and those beside it, in the same folder, that are
    its repeats over `over`; or all runs of a folder.

    Raises DataError if there is no run, ConfigError for a folder of several experiments.
    """
    found = find_runs([path])
    own = found[0].resolve()
    beside = runs_in(Path(os.path.relpath(own.parent)), depth=1) if len(found) == 1 else []
    paths = {each.resolve(): each for each in (*found, *beside)}
    runs = {path: read_run(paths[path]) for path in sorted(paths)}
    groups = group_runs(list(runs.values()), over)
    if beside:
        return next(each for each in groups if runs[own] in (*each.runs, *each.repeats))
    if len(groups) > 1:
        shown = list(zip(group_labels(groups), groups, strict=True))[:_SHOWN]
        named = "; ".join(f"{label} ({group.runs[0].name})" for label, group in shown)
        more = f"; and {len(groups) - _SHOWN} more" if len(groups) > _SHOWN else ""
        raise ConfigError(
            f"{path} holds {len(groups)} experiments that differ in more than {list_of(over)}: "
            f"{named}{more}. Name a run of the one that is meant."
        )
    return groups[0]


def group_values(group: RunGroup) -> str:
    """Returns what tells the runs of a group apart: `1, 2, 3` over seeds."""
    plain = [[value for value in own if value is not MISSING] for own in group.values]
    if len(group.over) > 1 or not any(plain):
        return ", ".join(short_names(group.runs))
    return ", ".join(to_text(own[0]) if own else MISSING for own in plain)


def list_of(keys: Sequence[str]) -> str:
    """Returns `training.seed and model.dropout`."""
    return " and ".join(filter(None, (", ".join(keys[:-1]), *keys[-1:])))

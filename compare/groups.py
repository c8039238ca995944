"""Runs that repeat one experiment, such as runs that differ in their seed alone, as one group."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from compare.differences import data_fingerprint
from compare.reading.run import Run
from config import ConfigError, schema
from engine.run_directory.experiment import experiment_id
from settings.names import resolve
from settings.values import RefusedError


@dataclass(frozen=True)
class Group:
    """Runs that are equal in all options that affect results, but for those in `over`."""

    runs: tuple[Run, ...]
    over: tuple[str, ...]
    """The options that may differ: `training.seed`."""


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


def option_keys(words: Collection[str]) -> tuple[str, ...]:
    """Returns the options that words such as `seed` mean; raises ConfigError."""
    keys = list[str]()
    for word in words:
        try:
            keys += resolve(schema(), word).keys
        except RefusedError as error:
            raise ConfigError(f"--over {error}") from None
    return tuple(keys)


def group_runs(runs: Sequence[Run], over: Sequence[str]) -> list[Group]:
    """Returns the runs in groups, in the order of their first runs.

    Runs of one group have read the same text, by its fingerprint where both wrote one. A run whose
    config cannot be read is a group of its own.
    """
    groups = dict[tuple[str, ...], list[Run]]()
    for run in runs:
        alone = (str(run.path),)
        key = (experiment_id(run.config, over), data_fingerprint(run)) if run.config else alone
        groups.setdefault(key, []).append(run)
    return [Group(tuple(own), tuple(over)) for own in groups.values()]

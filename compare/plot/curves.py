"""Turns the records of a run into curves that can be drawn.

A long curve is thinned: of each bucket of points the lowest and the highest stay, so that a spike
of one step in ten thousand is still drawn, and so does the first gap (a loss of NaN).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from compare.groups import Spread
from compare.reading.json_values import as_float, as_str
from compare.reading.run import Run
from engine.run_directory.fork import parent_step

COLOURS = ["#0067B8", "#E06A00", "#009E73", "#A3195B", "#3E9BD6", "#6B4A00", "#4B1F8F", "#24282D"]
"""Of runs on white: a contrast of 3:1, and distinct for colour-blind readers too."""
DARK_COLOURS = [
    "#3B93EA",
    "#FF9440",
    "#2FC78E",
    "#D9508F",
    "#93DDF7",
    "#A67C32",
    "#8A5CF0",
    "#F5EFDF",
]
"""Of runs on black, in the same order."""
MAX_POINTS = 1500
"""Points of a curve: few screens have more columns."""
AXES = {"step": "steps", "tokens": "tokens", "time": "time", "flops": "FLOPs"}
"""The x axes: name (see `place_of`) -> title."""
_NO_CURVES = {"step", "tokens", "time", "eval/val_losses", "eval/best_loss", "eval/best_step"}
_NO_CURVES |= {"train/first_losses"}


@dataclass(frozen=True)
class Metric:
    """How a metric is shown: its values times `scale` are in `unit`."""

    title: str
    unit: str = ""
    scale: float = 1.0

    @property
    def label(self) -> str:
        return f"{self.title} ({self.unit})" if self.unit else self.title


METRICS = {
    "train/loss": Metric("Training loss", "nats per token"),
    "eval/val_loss": Metric("Held-out loss", "nats per token"),
    "eval/train_loss": Metric("Loss on fixed training rows", "nats per token"),
    "eval/val_loss_4bit": Metric("Held-out loss, 4-bit weights", "nats per token"),
    "eval/bits_per_byte": Metric("Held-out bits per byte"),
    "train/learning_rate": Metric("Learning rate"),
    "train/grad_norm": Metric("Gradient norm"),
    "train/tokens_per_sec": Metric("Throughput", "tokens/s"),
    "train/iter_time_ms": Metric("Time of a step", "ms"),
    "train/mfu": Metric("Model FLOPs utilisation", "%", 100),
    "train/memory_bytes": Metric("Peak memory", "GB", 1e-9),
    "train/data_wait": Metric("Waiting for data", "% of the step", 100),
    "train/fp8_clipped": Metric("Clipped 8-bit values"),
    "eval/active_s": Metric("Active neurons s, mean of layers", "%", 100),
    "eval/active_z": Metric("Active neurons z, mean of layers", "%", 100),
    "eval/seconds": Metric("Time of an evaluation", "s"),
}
"""The metrics that the trainer writes. Others in a record are shown under their key."""


@dataclass(frozen=True)
class Curve:
    """A metric over a run. A y of None is a gap."""

    rows: list[int]
    """The index in `Run.records` of each point."""
    x: list[float | None]
    y: list[float | None]


def curve(run: Run, metric: str, x: str = "step", limit: int = MAX_POINTS) -> Curve:
    """Returns the metric over `x` (see `place_of`) in at most `limit` points."""
    records = run.records
    rows = [row for row, record in enumerate(records) if metric in record]
    values = [value_of(records[row][metric]) for row in rows]
    kept = thinned(values, limit)
    places = [place_of(run, records[rows[index]], x) for index in kept]
    return Curve([rows[index] for index in kept], places, [values[index] for index in kept])


@dataclass(frozen=True)
class Band:
    """A metric over the runs of a group: at each step at which all of them have a number, its mean
    and standard deviation.

    Where runs have different lengths, or one has no number, a mean would be of other runs than at
    the steps before, and jump: there is none.
    """

    steps: list[int]
    x: list[float | None]
    """The mean of the runs' places: they reach a step at different times."""
    mean: list[float]
    deviation: list[float]
    """Of a sample, n - 1; NaN for one run."""


def band(runs: Sequence[Run], metric: str, x: str = "step", limit: int = MAX_POINTS) -> Band:
    """Returns the mean of the metric over `x` (see `place_of`) in at most `limit` points."""
    by_run = [by_step(run, metric) for run in runs]
    steps = shared_steps(runs, by_run)
    spreads = [spread for step in steps if (spread := Spread.of([known[step] for known in by_run]))]
    kept = thinned([spread.mean for spread in spreads], limit)
    steps, spreads = [steps[index] for index in kept], [spreads[index] for index in kept]
    places = [
        {record["step"]: place_of(run, record, x) for record in run.records if metric in record}
        for run in runs
    ]
    at = [[place for known in places if (place := known[step]) is not None] for step in steps]
    return Band(
        steps,
        [fmean(each) if each else None for each in at],
        [spread.mean for spread in spreads],
        [spread.deviation for spread in spreads],
    )


def by_step(run: Run, metric: str) -> dict[int, float]:
    """Returns the number of each step that has one of the metric."""
    numbers = ((record["step"], value_of(record.get(metric))) for record in run.records)
    return {step: value for step, value in numbers if value is not None}


def place_of(run: Run, record: Mapping[str, Any], x: str) -> float | None:
    """Returns where a record stands on an x axis: its step, tokens, time in s, or training FLOPs
    (of the matmuls; the run wrote how many a token takes)."""
    if x != "flops":
        return as_float(record.get(x))
    tokens, per_token = as_float(record.get("tokens")), as_float(run.size.get("flops_per_token"))
    return None if tokens is None or per_token is None else tokens * per_token


def shared_steps(runs: Sequence[Run], by_run: Sequence[Mapping[int, float]]) -> list[int]:
    """Returns the steps that all runs have and that each has trained by itself, ascending."""
    steps = set.intersection(*(set(known) for known in by_run)) if by_run else set()
    return sorted(step for step in steps if step > forked_at(runs))


def forked_at(runs: Sequence[Run]) -> int:
    """Returns up to which step two of the runs hold copies of one record, as forks of the same
    checkpoint do: these are one observation and not two. 0 without such forks."""
    checkpoints = Counter(as_str(run.parent.get("sha256")) for run in runs if run.parent)
    forks = [run for run in runs if checkpoints[as_str(run.parent.get("sha256"))] > 1]
    return max((parent_step(run.environment) for run in forks), default=0)


def value_of(entry: Any) -> float | None:
    """Returns the number in a record, or the mean if it is a list (of one per layer), else None."""
    if not isinstance(entry, list):
        return as_float(entry)
    known = [value for each in entry if (value := as_float(each)) is not None]
    return math.fsum(known) / len(known) if known else None


def thinned(values: Sequence[float | None], limit: int = MAX_POINTS) -> list[int]:
    """Returns the indices to keep: both ends, and each bucket's lowest, highest and first gap."""
    count = len(values)
    if count <= limit:
        return list(range(count))
    # Two points stay of a bucket, three where there are gaps, besides the two ends.
    width = math.ceil(count / ((limit - 2) // (3 if None in values else 2)))
    kept = {0, count - 1}
    for start in range(0, count, width):
        bucket = range(start, min(start + width, count))
        known = {index: value for index in bucket if (value := values[index]) is not None}
        if known:
            kept |= {min(known, key=known.__getitem__), max(known, key=known.__getitem__)}
        if len(known) < len(bucket):
            kept.add(next(index for index in bucket if index not in known))
    return sorted(kept)


def metrics_of(runs: Sequence[Run]) -> list[str]:
    """Returns the metrics of which a run has a number: in the order of METRICS, then others."""
    # A metric is looked for only until one number of it is found: runs have millions of values.
    waiting = {key for run in runs for record in run.records for key in record} - _NO_CURVES
    found: set[str] = set()
    for run in runs:
        for record in run.records:
            found |= {key for key in record.keys() & waiting if value_of(record[key]) is not None}
            waiting -= found
    order = list(METRICS)

    def place(key: str) -> tuple[int, str]:
        whole = key if key in METRICS else key.rpartition("/")[0]  # that of all sources
        return (order.index(whole) if whole in METRICS else len(order)), key

    return sorted(found, key=place)


def described(metric: str) -> Metric:
    """Returns how a metric is shown: that of one source of a mixture (eval/val_loss/web) as that of
    all; one that this version does not know, by its key."""
    whole, _, source = metric.rpartition("/")
    if metric not in METRICS and whole in METRICS:
        return replace(METRICS[whole], title=f"{METRICS[whole].title}, {source}")
    return METRICS.get(metric, Metric(metric))

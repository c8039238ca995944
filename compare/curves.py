"""From the records of a run to curves that can be drawn.

The one idea: a curve is thinned in buckets of which the lowest and the highest value stay, so that
a spike of one step in ten thousand is still there, and a gap stays a gap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compare.records import number
from compare.run import Run

COLOURS = ["#0067B8", "#E06A00", "#009E73", "#A3195B", "#3E9BD6", "#6B4A00", "#4B1F8F", "#24282D"]
"""On white: 3:1 against it, and apart for the colour-blind too."""
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
"""The same on black."""
LIMIT = 1500
"""Points of a curve: a screen has no more columns."""
AXES = {"step": "steps", "tokens": "tokens", "time": "time"}
"""What a curve may be drawn over: key of a record -> title."""
_NO_CURVES = {"step", "tokens", "time", "eval/val_losses", "eval/best_loss", "eval/best_step"}


@dataclass(frozen=True)
class Metric:
    """How a metric is shown: its values times `scale` have the unit."""

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
"""What the trainer writes; a record may hold others, which are shown by their key."""


@dataclass(frozen=True)
class Curve:
    """A metric over a run; a y of None is a gap."""

    rows: list[int]
    """Which of `Run.records` the points are."""
    x: list[float | None]
    y: list[float | None]


def curve(run: Run, metric: str, x: str = "step", limit: int = LIMIT) -> Curve:
    """The metric over `x` (step, tokens, or time in s), of at most `limit` points."""
    records = run.records()
    rows = [row for row, record in enumerate(records) if metric in record]
    values = [value_of(records[row][metric]) for row in rows]
    kept = thinned(values, limit)
    places = [number(records[rows[index]].get(x)) for index in kept]
    return Curve([rows[index] for index in kept], places, [values[index] for index in kept])


def value_of(entry: Any) -> float | None:
    """The number that an entry of a record is, or the mean of its list of numbers; else None."""
    if not isinstance(entry, list):
        return number(entry)
    known = [value for each in entry if (value := number(each)) is not None]
    return math.fsum(known) / len(known) if known else None


def thinned(values: Sequence[float | None], limit: int = LIMIT) -> list[int]:
    """Indices to keep, ascending: the ends, and a bucket's lowest, highest and first gap."""
    count = len(values)
    if count <= limit:
        return list(range(count))
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
    """Metrics of which some run has a number: those of METRICS in its order, then others."""
    waiting = {key for run in runs for record in run.records() for key in record} - _NO_CURVES
    found: set[str] = set()
    for run in runs:
        for record in run.records():
            found |= {key for key in record.keys() & waiting if value_of(record[key]) is not None}
            waiting -= found
    known = [key for key in METRICS if key in found]
    return known + sorted(found - {*known})


def described(metric: str) -> Metric:
    """How a metric is shown, also one that this version does not know."""
    return METRICS.get(metric, Metric(metric))

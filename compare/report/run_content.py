"""What the page holds of each run and group: curves, samples, settings, and what it takes to repeat
a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from compare.plot.curves import AXES, Band, band, curve, described, metrics_of, place_of
from compare.reading.json_values import as_count, as_path, finite
from compare.reading.run import Run, restart_command
from compare.report.text import progress_text, utf8_text, value_text
from compare.tables.tree import changed_options
from config import ConfigError, DataError
from engine.run_directory.fork import parent_step
from engine.run_directory.saved_config import config_of_step
from settings.entries import flat_options

_LOSSES = ("train/loss", "eval/val_loss")
_FROM_ZERO = {"train/tokens_per_sec", "train/memory_bytes", "train/data_wait", "train/mfu"}
_WITHOUT_PANEL = {  # another panel shows the same, or a run has one number of it
    "train/iter_time_ms",
    "train/compile_s",
    "train/fp8_products",
    "eval/train_loss",
    "eval/seconds",
    "final/train_loss",
    "final/val_loss",
}
_DIGITS = 6  # of a point of a curve
_COMPARED_STEPS = 50  # those that `train.py --reproduce` repeats
_COMPARED = {  # keys of a record that say whether a run went as another one
    "step",
    "tokens",
    "train/loss",
    "train/first_losses",
    "train/learning_rate",
    "train/grad_norm",
    "train/batch_hash",
    "train/weights_hash",
    "eval/val_loss",
}


def panels(runs: Sequence[Run]) -> list[dict[str, Any]]:
    known = [metric for metric in metrics_of(runs) if metric not in _WITHOUT_PANEL]
    losses = tuple(metric for metric in _LOSSES if metric in known)
    others = [(metric,) for metric in known if metric not in losses]
    return [_panel(metrics) for metrics in [losses, *others] if metrics]


def _panel(metrics: tuple[str, ...]) -> dict[str, Any]:
    last = described(metrics[-1])
    title = "Loss" if len(metrics) > 1 else last.title
    return {
        "title": title,
        "label": f"{title} over the run, one curve per run or group",
        "unit": last.unit,
        "scale": last.scale,
        "loss": metrics[-1] in _LOSSES,
        "zero": metrics[0] in _FROM_ZERO,
        # Two bands per group in one panel would hide each other: the held-out loss has it.
        "metrics": [
            {
                "key": key,
                "bold": key.startswith("eval/"),
                "smooth": key == "train/loss",
                "band": key == metrics[-1],
            }
            for key in metrics
        ],
    }


def run_content(run: Run, name: str) -> dict[str, Any]:
    """Returns what the page shows of one run, which it calls `name`.

    Curves share their places on the axes: `at` are indices into the lists of `axes`.
    """
    curves = {key: curve(run, key) for key in metrics_of([run])}
    # The union of the rows that the thinned curves kept: each x value is in the page once, not once
    # per metric.
    rows = sorted({row for each in curves.values() for row in each.rows})
    place = {row: index for index, row in enumerate(rows)}
    problems = dict.fromkeys((*run.problems, *run.record_problems))
    return {
        "name": name,
        "path": utf8_text(str(run.path)),
        "state": run.state,
        "status": ": ".join(filter(None, (progress_text(run), run.end_reason))),
        "problems": [*map(utf8_text, problems)],
        "command": utf8_text(restart_command(run)),
        "settings": [(key, value_text(value)) for key, value in run.config.items()],
        "environment": _environment(run.environment),
        "parent": _parent(run) if run.parent else None,
        "reproduce": _reproduce(run, name),
        "axes": {axis: [place_of(run, run.records[row], axis) for row in rows] for axis in AXES},
        "curves": {
            key: {"at": [place[row] for row in each.rows], "y": [*map(_rounded, each.y)]}
            for key, each in curves.items()
        },
        "samples": [
            (record["step"], utf8_text(record["eval/sample"]))
            for record in run.records
            if isinstance(record.get("eval/sample"), str)
        ],
    }


def group_curves(runs: Sequence[Run]) -> dict[str, Any]:
    """Returns the means of the runs of a group over their shared steps, in the form of a run's
    curves, with the standard deviations as `spread`."""
    bands = {key: band(runs, key) for key in metrics_of(runs)}
    steps = sorted({step for each in bands.values() for step in each.steps})
    place = {step: index for index, step in enumerate(steps)}
    # A log line and an evaluation of one step differ in time by the evaluation: the first counts.
    by_run = [{record["step"]: record for record in reversed(run.records)} for run in runs]

    def mean_place(axis: str, step: int) -> float | None:
        at = [place_of(run, own[step], axis) for run, own in zip(runs, by_run, strict=True)]
        known = [each for each in at if each is not None]
        return fmean(known) if len(known) == len(runs) else None

    def curve_of(each: Band) -> dict[str, Any]:
        return {
            "at": [place[step] for step in each.steps],
            "y": [*map(_rounded, each.mean)],
            "spread": [*map(_rounded, each.deviation)],
        }

    return {
        "axes": {axis: [mean_place(axis, step) for step in steps] for axis in AXES},
        "curves": {key: curve_of(each) for key, each in bands.items()},
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{_DIGITS}g}")


def _environment(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns environment.json as a flat list: `run: parameters` is the name of a nested value."""
    shown = {k: v for k, v in environment.items() if k not in ("config", "resumed", "command")}
    return [
        (key if inner is None else f"{key}: {inner}", value_text(each))
        for key, value in shown.items()
        for inner, each in (value.items() if isinstance(value, dict) else [(None, value)])
    ]


def _parent(run: Run) -> dict[str, Any]:
    """Returns where a fork comes from and what it changed."""
    step, pairs = as_count(run.parent.get("step")) or 0, changed_options(run)
    return {
        "step": step,
        "text": f"Fork of {as_path(run.parent.get('run'))} at step {step:,}"
        + ("; it changed" if pairs else ""),
        "changed": [
            (key, f"{value_text(then)} \u2192 {value_text(now)}")
            for key, (then, now) in pairs.items()
        ],
    }


def _first_config(run: Run) -> Mapping[str, Any]:
    """Returns the config of the run's first steps: a resume may have changed options."""
    if not any(run.path.glob("config.before_*")):
        return run.config
    try:
        first = config_of_step(run.path, parent_step(run.environment) + 1)
        return flat_options(first.to_dict())
    except (DataError, ConfigError):  # of another version
        return run.config


def _reproduce(run: Run, name: str) -> dict[str, Any]:
    """Returns what `train.py --reproduce` reads from the page: exact values, not their texts."""
    environment = {key: value for key, value in run.environment.items() if key != "config"}
    compared = [
        {key: value for key, value in record.items() if key in _COMPARED}
        for record in run.records
        if record["step"] <= _COMPARED_STEPS or "train/first_losses" in record
    ]
    return {
        "name": name,
        "config": finite(dict(_first_config(run))),
        "environment": finite(environment),
        "records": finite(compared),
    }

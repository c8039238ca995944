"""What the page holds of each run: curves, samples, settings, and what it takes to repeat it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compare.curves import AXES, curve, described, metrics_of
from compare.reading.json_values import as_float, finite
from compare.reading.run import Run, restart_command
from compare.report.text import progress_text, utf8_text, value_text

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
        "label": f"{title} over the run, one curve per run",
        "unit": last.unit,
        "scale": last.scale,
        "loss": metrics[-1] in _LOSSES,
        "zero": metrics[0] in _FROM_ZERO,
        "metrics": [
            {"key": key, "bold": key.startswith("eval/"), "smooth": key == "train/loss"}
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
        "path": utf8_text(str(run.path)),
        "state": run.state,
        "status": ": ".join(filter(None, (progress_text(run), run.end_reason))),
        "problems": [*map(utf8_text, problems)],
        "command": utf8_text(restart_command(run)),
        "settings": [(key, value_text(value)) for key, value in run.config.items()],
        "environment": _environment(run.environment),
        "reproduce": _reproduce(run, name),
        "axes": {axis: [as_float(run.records[row].get(axis)) for row in rows] for axis in AXES},
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
        "config": finite(dict(run.config)),
        "environment": finite(environment),
        "records": finite(compared),
    }

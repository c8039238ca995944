"""Compares two runs by their held-out losses, batch by batch, with a confidence interval.

Two runs evaluated on the same fixed batches of held-out text differ by much less noise than each
loss has by itself: a batch that is hard for one is hard for the other. So the mean of the
differences is taken, and Student's 95 % interval of that mean over the batches.

The interval covers the choice of text. It does not cover the choice of seed: how much a run changes
with its seed can only be seen from several runs (`compare.statistics.seeds`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from compare.differences import differing_options, has_effect
from compare.groups import Spread
from compare.reading.json_values import as_float
from compare.reading.run import Run
from compare.statistics.comparison import METRIC, Comparison, paired
from config import schema

MIN_BATCHES = 5
_SOURCE = "eval/val_loss/"  # before the name of a source, in a record
At = Literal["newest", "same step", "best"]
"""Which evaluations are compared: each run's newest; those at the newest step that both runs have;
each run's best."""


def compare_runs(a: Run, b: Run, at: At = "newest") -> Comparison | str:
    """Compares two evaluations; returns the reason as text if they cannot be compared."""
    chosen = _evaluations(a, b, at)
    if isinstance(chosen, str):
        return chosen
    if reason := _why_not_paired(a, b, *chosen):
        return reason
    whole = _compared(*chosen, METRIC, slice(None))
    return replace(whole, sources=_by_source(*chosen))


def _compared(a: dict[str, Any], b: dict[str, Any], metric: str, batches: slice) -> Comparison:
    """Returns the comparison of two evaluations over some of their batches."""
    # Pairs, not two means: most of the variance between batches is in both runs and cancels here.
    losses = [record["eval/val_losses"][batches] for record in (a, b)]
    of_a, of_b = (Spread(1, _loss(record, metric), math.nan) for record in (a, b))
    return Comparison(
        metric,
        paired(*losses),
        of_a,
        of_b,
        step_a=a["step"],
        step_b=b["step"],
        speaks_for="other text",
        test="paired",
        batches=len(losses[0]),
    )


def _by_source(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Comparison]:
    """Returns the comparison on each source of a mixture. Each has equally many batches, one source
    after the other, in the order in which the record names them."""
    metrics, others = ([key for key in record if key.startswith(_SOURCE)] for record in (a, b))
    each = len(a["eval/val_losses"]) // max(1, len(metrics))
    if metrics != others or each < MIN_BATCHES:
        return {}
    return {
        metric.removeprefix(_SOURCE): _compared(a, b, metric, slice(at * each, (at + 1) * each))
        for at, metric in enumerate(metrics)
    }


def _evaluations(a: Run, b: Run, at: At) -> tuple[dict[str, Any], dict[str, Any]] | str:
    """Returns the record of each run to compare, or why there is none."""
    by_step = [
        {record["step"]: record for record in run.records if "eval/val_loss" in record}
        for run in (a, b)
    ]
    for run, evaluations in zip((a, b), by_step, strict=True):
        if not evaluations:
            return f"{run.name} has no evaluation"
    of_a, of_b = by_step
    if at == "best":
        return _best(of_a), _best(of_b)
    if at == "newest":
        return of_a[max(of_a)], of_b[max(of_b)]
    shared = of_a.keys() & of_b.keys()
    if not shared:
        return "there is no step at which both were evaluated"
    return of_a[max(shared)], of_b[max(shared)]


def _best(evaluations: dict[int, dict[str, Any]]) -> dict[str, Any]:
    return min(evaluations.values(), key=_loss)


def _loss(record: dict[str, Any], metric: str = METRIC) -> float:
    value = as_float(record[metric])
    return math.inf if value is None else value


def _why_not_paired(a: Run, b: Run, record_a: dict[str, Any], record_b: dict[str, Any]) -> str:
    """Returns why the losses of two evaluations cannot be subtracted; '' if they can."""
    counts = []
    for run, record in ((a, record_a), (b, record_b)):
        losses = record.get("eval/val_losses")
        if not isinstance(losses, list) or not record.get("eval/rows"):
            return f"{run.name} has no loss of each batch: its version did not store them"
        if any(as_float(loss) is None for loss in losses):
            return f"{run.name} has batches whose loss is not a number (step {record['step']})"
        counts.append(len(losses))
    # A fingerprint of the evaluated tokens, their order and targets: equal only for equal batches.
    if record_a["eval/rows"] != record_b["eval/rows"]:
        return different_text([a, b])
    if counts[0] != counts[1]:
        return f"they were evaluated in {counts[0]} and {counts[1]} batches"
    if counts[0] < MIN_BATCHES:
        return (
            f"{counts[0]} held-out batches are too few for an interval: it takes {MIN_BATCHES} "
            "(training.eval_iters)"
        )
    return ""


def different_text(runs: Sequence[Run]) -> str:
    """Returns that runs were evaluated on different rows, with the options that explain it; between
    tokenizers, the bits per byte."""
    found = [key for key in differing_options(runs) if has_effect(key, "text", "eval_rows")]
    lists = [schema().list_of(key) for key in found]
    named = (key if of is None else of.key for key, of in zip(found, lists, strict=True))
    keys = list(dict.fromkeys(named))  # sources as dataset.mixture
    why = f": they differ in {', '.join(keys)}" if keys else ""
    reason = f"they were evaluated on different held-out text{why}"
    bits = [run.bits_per_byte for run in runs]
    if any(key.startswith("tokenizer.") for key in keys) and None not in bits:
        shown = " and ".join(f"{value:.4f}" for value in bits)
        reason += f". Over tokenizers bits per byte compare: {shown}"
    return reason

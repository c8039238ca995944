"""Which of two runs is better, and whether that can be said: held-out losses compared in pairs.

Two runs evaluated on the same fixed batches of held-out text differ by much less noise than either
has by itself, because what makes a batch hard is hard for both. The interval is Student's, of the
mean difference over the batches. It speaks for other text of this kind; for other seeds it does not
speak, which only several runs can. The quantile: Abramowitz and Stegun, 26.7.3 and 26.7.4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Literal

from compare.differences import options_with_effect
from compare.records import number
from compare.run import Run

LEAST_BATCHES = 5
CONFIDENCE = 0.95
At = Literal["last", "same", "best"]
"""Each run's newest evaluation; the newest at a step that both have; each run's best."""


@dataclass(frozen=True)
class Paired:
    """Held-out loss of b minus that of a, in nats per token, with its 95 % interval."""

    difference: float
    low: float
    high: float
    batches: int
    step_a: int
    step_b: int

    @property
    def verdict(self) -> str:
        """Of b against a, in words."""
        if self.low <= 0 <= self.high:
            return "no difference shown" if self.low < self.high else "equal"
        return "better" if self.high < 0 else "worse"


def compare(a: Run, b: Run, at: At = "last") -> Paired | str:
    """Compares two evaluations, or says why they cannot be compared."""
    pair = _evaluations(a, b, at)
    if isinstance(pair, str):
        return pair
    if reason := _unlike(a, b, *pair):
        return reason
    losses_a, losses_b = (record["eval/val_losses"] for record in pair)
    differences = [after - before for before, after in zip(losses_a, losses_b, strict=True)]
    count, mean = len(differences), fmean(differences)
    margin = t_quantile(CONFIDENCE, count - 1) * stdev(differences) / math.sqrt(count)
    steps = (record["step"] for record in pair)
    return Paired(mean, mean - margin, mean + margin, count, *steps)


def t_quantile(confidence: float, freedom: int) -> float:
    """The t that Student's distribution stays within, on both sides, with this probability."""
    low, high = 0.0, 1e4
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return middle


def _within(t: float, freedom: int) -> float:
    """The probability of [-t, t]: a finite sum, as the degrees of freedom are a whole number."""
    angle, odd = math.atan(t / math.sqrt(freedom)), freedom % 2
    term = total = (math.cos(angle) if freedom > 1 else 0.0) if odd else 1.0
    for power in range(2 + odd, freedom - 1, 2):
        term *= (power - 1) / power * math.cos(angle) ** 2
        total += term
    return (angle + math.sin(angle) * total) * 2 / math.pi if odd else math.sin(angle) * total


def _evaluations(a: Run, b: Run, at: At) -> tuple[dict[str, Any], dict[str, Any]] | str:
    """The evaluation of each run to be compared, or why there is none."""
    of_a, of_b = _by_step(a), _by_step(b)
    for run, evaluations in ((a, of_a), (b, of_b)):
        if not evaluations:
            return f"{run.name} has no evaluation"
    if at == "best":
        return _lowest(of_a), _lowest(of_b)
    if at == "last":
        return of_a[max(of_a)], of_b[max(of_b)]
    shared = of_a.keys() & of_b.keys()
    if not shared:
        return "there is no step at which both were evaluated"
    return of_a[max(shared)], of_b[max(shared)]


def _by_step(run: Run) -> dict[int, dict[str, Any]]:
    return {record["step"]: record for record in run.records() if "eval/val_loss" in record}


def _lowest(evaluations: dict[int, dict[str, Any]]) -> dict[str, Any]:
    def loss(record: dict[str, Any]) -> float:
        value = number(record["eval/val_loss"])
        return math.inf if value is None else value

    return min(evaluations.values(), key=loss)


def _unlike(a: Run, b: Run, record_a: dict[str, Any], record_b: dict[str, Any]) -> str:
    """Why two evaluations cannot be taken in pairs; '' if they can."""
    counts = []
    for run, record in ((a, record_a), (b, record_b)):
        losses = record.get("eval/val_losses")
        if not isinstance(losses, list) or not record.get("eval/rows"):
            return f"{run.name} has no loss of each batch: its version did not store them"
        if any(number(loss) is None for loss in losses):
            return f"{run.name} has batches whose loss is not a number (step {record['step']})"
        counts.append(len(losses))
    if record_a["eval/rows"] != record_b["eval/rows"]:
        return _other_text(a, b)
    if counts[0] != counts[1]:
        return f"they were evaluated in {counts[0]} and {counts[1]} batches"
    if counts[0] < LEAST_BATCHES:
        return (
            f"{counts[0]} held-out batches are too few for an interval: it takes {LEAST_BATCHES} "
            "(training.eval_iters)"
        )
    return ""


def _other_text(a: Run, b: Run) -> str:
    chosen = options_with_effect("text", "eval_rows")
    keys = [
        key
        for key, value in a.config.items()
        if key in chosen and key in b.config and value != b.config[key]
    ]
    why = f": they differ in {', '.join(keys)}" if keys else ""
    reason = f"they were evaluated on different held-out text{why}"
    bits = [run.bits_per_byte for run in (a, b)]
    if any(key.startswith("tokenizer.") for key in keys) and None not in bits:
        shown = " and ".join(f"{value:.4f}" for value in bits)
        reason += f". Over tokenizers bits per byte compare: {shown}"
    return reason

"""A difference of means with its 95 % interval, which question it answers, and how it is worded.

`runs.py test`, `diff` and the report say the same of a comparison, in the words of this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev, variance
from typing import Any

from compare.groups import Spread
from compare.statistics.student import t_quantile, two_sided_p

CONFIDENCE = 0.95
METRIC = "eval/val_loss"


@dataclass(frozen=True)
class MeanDifference:
    """A difference of means, its standard error, and the degrees of freedom of its t-test."""

    difference: float
    error: float
    freedom: float

    @property
    def p(self) -> float:
        """The probability of a difference at least this large if there is none (two-sided)."""
        if self.error == 0:  # all values of a side are equal: the limit of ever smaller deviations
            return 1.0 if self.difference == 0 else 0.0
        return two_sided_p(self.difference / self.error, self.freedom)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval."""
        margin = t_quantile(CONFIDENCE, self.freedom) * self.error
        return self.difference - margin, self.difference + margin


def welch(a: Sequence[float], b: Sequence[float]) -> MeanDifference:
    """Returns the mean of b minus that of a, for samples of two or more with unequal variances."""
    of_a, of_b = variance(a) / len(a), variance(b) / len(b)
    # Degrees of freedom after Welch and Satterthwaite: between those of the smaller sample and
    # those of both together. Samples without any variance have no such number; any will do.
    parts = of_a**2 / (len(a) - 1) + of_b**2 / (len(b) - 1)
    freedom = (of_a + of_b) ** 2 / parts if parts else len(a) + len(b) - 2.0
    return MeanDifference(fmean(b) - fmean(a), math.sqrt(of_a + of_b), freedom)


def paired(a: Sequence[float], b: Sequence[float]) -> MeanDifference:
    """Returns the mean of b minus a, value by value, for two pairs or more."""
    differences = [of_b - of_a for of_a, of_b in zip(a, b, strict=True)]
    error = stdev(differences) / math.sqrt(len(differences))
    return MeanDifference(fmean(differences), error, len(differences) - 1)


@dataclass(frozen=True)
class Comparison:
    """A metric of B minus that of A: of two runs over held-out batches, or of groups over runs."""

    metric: str
    mean: MeanDifference
    a: Spread
    b: Spread
    """The metric of each side, over its runs."""
    step_a: int
    step_b: int
    speaks_for: str
    """`other text` or `other seeds`."""
    test: str
    """`paired` or `Welch`."""
    batches: int = 0
    """Held-out batches that were compared; 0 where runs were."""
    notes: tuple[str, ...] = ()
    """What a reader has to know of the runs, a sentence each."""
    sources: Mapping[str, Comparison] = field(default_factory=dict)
    """Of each source of a mixture; empty without one, and with too few batches of each."""

    @property
    def verdict(self) -> str:
        """Whether B is better than A; of a metric that is no loss, whether it is lower."""
        low, high = self.mean.interval
        if low <= 0 <= high:
            return "no difference shown" if low < high else "equal"
        below, above = ("better", "worse") if is_loss(self.metric) else ("lower", "higher")
        return below if high < 0 else above

    @property
    def question(self) -> str:
        """For what the verdict holds, and what was the same."""
        on_text = ", on this text" if self.metric.startswith("eval/") else ""
        return f"for {self.speaks_for}{', with these two runs' if self.batches else on_text}"

    @property
    def basis(self) -> str:
        """What the t-test is over, and where: `paired, 3 and 3 runs, step 300`."""
        runs = f"{self.test}, {self.a.count} and {self.b.count} runs"
        steps = f"step {self.step_b:,}"
        if self.step_a != self.step_b:
            steps += f" vs {self.step_a:,}"
        return f"{f'{self.batches} batches' if self.batches else runs}, {steps}"

    @property
    def difference_text(self) -> str:
        return number_format(self.metric, "+")(self.mean.difference)

    @property
    def interval_text(self) -> str:
        return " to ".join(map(number_format(self.metric, "+"), self.mean.interval))

    def values(self) -> dict[str, Any]:
        """Returns the comparison as plain values, for JSON."""
        low, high = self.mean.interval
        batches = {"batches": self.batches} if self.batches else {}
        return batches | {
            "metric": self.metric,
            "difference": self.mean.difference,
            "low": low,
            "high": high,
            "p": self.mean.p,
            "freedom": self.mean.freedom,
            "test": self.test,
            "verdict": self.verdict,
            "speaks_for": self.speaks_for,
            "step_a": self.step_a,
            "step_b": self.step_b,
            "a": self.a.values(),
            "b": self.b.values(),
            "notes": list(self.notes),
            "sources": {name: own.values() for name, own in self.sources.items()},
        }


def comparison_values(found: Comparison | str) -> dict[str, Any]:
    """Returns a comparison, or the reason why there is none, as plain values for JSON."""
    return {"not_compared": found} if isinstance(found, str) else found.values()


def is_loss(metric: str) -> bool:
    """Returns whether lower values of a metric are better."""
    return "loss" in metric or "bits_per_byte" in metric


def number_format(metric: str, sign: str = "") -> Callable[[float], str]:
    """Returns the function that writes values of a metric."""
    return f"{{:{sign}{'.4f' if is_loss(metric) else '.6g'}}}".format


def p_text(p: float) -> str:
    """Returns `p = 0.012`, with more digits where it is small, or `p < 0.0001`."""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.4f}" if p < 0.01 else f"p = {p:.3f}"

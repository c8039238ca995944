"""Whether groups differ from the best one, and which question that answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compare.groups import Group
from compare.report.text import utf8_text
from compare.statistics.paired import PairedDifference, compare_runs
from compare.statistics.seeds import SeedDifference, compare_groups

OTHER_SEEDS, OTHER_TEXT = "for other seeds, on this text", "for other text, with this seed"


@dataclass(frozen=True)
class Comparison:
    """The held-out loss of a group minus that of the best one, with its 95 % interval."""

    difference: float
    low: float
    high: float
    verdict: str
    """Whether the group is better or worse."""
    question: str
    """For what the verdict holds."""
    sample: str
    """What the interval was computed from."""
    details: tuple[str, ...]
    """Sentences for the reader who wants to know more."""


def comparison(first: Group, group: Group) -> Comparison | str:
    """Compares a group with the first; returns the reason as text if they cannot be compared.

    Runs that stand alone are compared batch by batch of the held-out text, groups of several by the
    losses of their runs.
    """
    if len(first.runs) == len(group.runs) == 1:
        pair = compare_runs(first.runs[0], group.runs[0], "best")
        return pair if isinstance(pair, str) else _over_text(pair)
    mean = compare_groups(first, group)
    return mean if isinstance(mean, str) else _over_seeds(mean)


def _over_text(pair: PairedDifference) -> Comparison:
    steps = f"steps {pair.step_a:,} and {pair.step_b:,}"
    sources = [
        f"On {utf8_text(name)} {own.difference:+.4f} ({own.low:+.4f} to {own.high:+.4f}): "
        f"{own.verdict}"
        for name, own in pair.sources.items()
    ]
    return Comparison(
        pair.difference,
        pair.low,
        pair.high,
        pair.verdict,
        OTHER_TEXT,
        f"over {pair.batches} batches",
        (f"{pair.batches} batches, {steps}", *sources),
    )


def _over_seeds(mean: SeedDifference) -> Comparison:
    low, high = mean.mean.interval
    test = "paired by seed" if mean.paired else "Welch's test"
    runs = f"{mean.a.count} and {mean.b.count} runs"
    return Comparison(
        mean.mean.difference,
        low,
        high,
        mean.verdict,
        OTHER_SEEDS,
        f"for other seeds: {runs} at step {mean.step:,}, {test}",
        (f"{runs} at step {mean.step:,}, {test}, p = {mean.mean.p:.2g}", *mean.notes),
    )


def lead_sentence(found: Comparison | str, second: str, its_loss: str, lead: float) -> str:
    """Returns by how much the best group leads the second, and whether that is noise."""
    if isinstance(found, str):
        return f"{lead:.4f} below {second} ({its_loss}); no interval: {found}."
    interval = f"95 % interval {found.low:.4f} to {found.high:.4f}, {found.sample}"
    if found.low > 0:
        return f"{found.difference:.4f} below {second} ({interval})."
    if found.high < 0:  # groups are ranked by their best losses, and compared at one step
        lower = f"{-found.difference:.4f} lower"
        return f"But {second} is {lower} at the newest step of all ({interval})."
    side = f"{abs(found.difference):.4f} {'higher' if found.difference >= 0 else 'lower'}"
    return f"Not told apart from {second}: its loss is {side} ({interval})."


def comparison_values(found: Comparison | str) -> dict[str, object]:
    """Returns a comparison as the page shows it; `low` is None if there is none."""
    if isinstance(found, str):
        return {"low": None, "verdict": utf8_text(found)}
    return {
        "difference": found.difference,
        "low": found.low,
        "high": found.high,
        "text": f"{found.difference:+.4f}",
        "interval": f"{found.low:+.4f} to {found.high:+.4f}",
        "verdict": found.verdict,
        "details": [utf8_text(text) for text in (found.question, *found.details)],
    }


def comparisons_note(groups: Sequence[Group], first: str) -> str:
    """Returns what the intervals are, and what they do not say."""
    end = (
        "with the 95 % interval of the mean. An interval that touches the dotted line shows no "
        "difference."
    )
    if all(len(group.runs) == 1 for group in groups):
        return (
            f"Held-out loss of each run minus that of {first}, batch by batch over the same text, "
            f"each at its best evaluation, {end} It speaks for this kind of text, not for other "
            "seeds."
        )
    return (
        f"Mean held-out loss of each group minus that of {first}, at the newest step that all "
        f"their runs have, {end} It speaks for other seeds, on this held-out text. Where both "
        "groups have the same seeds, runs are compared seed by seed; otherwise by Welch's test."
    )

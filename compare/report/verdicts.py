"""Whether groups differ from the best one, and which question that answers."""

from __future__ import annotations

from collections.abc import Sequence

from compare.groups import RunGroup
from compare.report.text import utf8_text
from compare.statistics.comparison import Comparison, p_text
from compare.statistics.paired import compare_runs
from compare.statistics.seeds import compare_groups


def comparison(first: RunGroup, group: RunGroup) -> Comparison | str:
    """Compares a group with the first; returns the reason as text if they cannot be compared.

    Runs that stand alone are compared batch by batch of the held-out text, groups of several by the
    losses of their runs.
    """
    if len(first.runs) == len(group.runs) == 1:
        return compare_runs(first.runs[0], group.runs[0], "best")
    return compare_groups(first, group)


def lead_sentence(found: Comparison | str, second: str, its_loss: str, lead: float) -> str:
    """Returns by how much the best group leads the second, and whether that is noise."""
    if isinstance(found, str):
        return f"{lead:.4f} below {second} ({its_loss}); no interval: {found}."
    low, high = found.mean.interval
    off = f"{abs(found.mean.difference):.4f}"
    interval = f"95 % interval {low:.4f} to {high:.4f}, {found.question}; {found.basis}"
    if low > 0:
        return f"{off} below {second} ({interval})."
    if high < 0:  # groups are ranked by their best losses, and compared at one step
        return f"But {second} is {off} lower at the newest step of all ({interval})."
    side = "higher" if found.mean.difference >= 0 else "lower"
    return f"Not told apart from {second}: its loss is {off} {side} ({interval})."


def pair_content(found: Comparison | str) -> dict[str, object]:
    """Returns a comparison as the page shows it; `low` is None if there is none."""
    if isinstance(found, str):
        return {"low": None, "verdict": utf8_text(found)}
    low, high = found.mean.interval
    sources = [
        f"On {name} {own.difference_text} ({own.interval_text}): {own.verdict}"
        for name, own in found.sources.items()
    ]
    details = (found.question, f"{found.basis}, {p_text(found.mean.p)}", *found.notes, *sources)
    return {
        "difference": found.mean.difference,
        "low": low,
        "high": high,
        "text": found.difference_text,
        "interval": found.interval_text,
        "verdict": found.verdict,
        "details": [utf8_text(text) for text in details],
    }


def comparisons_note(groups: Sequence[RunGroup], first: str) -> str:
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

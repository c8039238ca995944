"""What `runs.py test` answers: whether B is better than A, and for what the answer speaks.

With several runs on each side it speaks for other seeds, with one run on each for other text. With
one run against several nothing can be said; the message says what to train.
"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from compare.curves import by_step
from compare.groups import SEED, Group, group_labels, group_values, list_of
from compare.labels import names
from compare.reading.run import restart_command
from compare.statistics.goal import Goal, Progress, progress_to
from compare.statistics.paired import PairedDifference, compare_runs
from compare.statistics.seeds import METRIC, SeedDifference, compare_groups, is_loss
from compare.table import aligned, spread_values, width
from config import ConfigError


def answer(a: Group, b: Group, metric: str) -> SeedDifference | PairedDifference:
    """Returns the comparison that the numbers of runs allow; raises ConfigError if none is."""
    if {run.path.resolve() for run in a.runs} & {run.path.resolve() for run in b.runs}:
        alone = f"differ in {list_of(a.over)} alone" if len(a.runs) > 1 else "is both"
        raise ConfigError(
            f"A and B are one experiment: {', '.join(names(a.runs))} {alone}. Name runs of two, or "
            "a folder for each side."
        )
    counts = len(a.runs), len(b.runs)
    if min(counts) == 1 < max(counts):
        raise ConfigError(_one_against_several(a, b))
    if counts == (1, 1) and metric != METRIC:
        raise ConfigError(f"with one run on each side only {METRIC} can be tested, not {metric}.")
    found: SeedDifference | PairedDifference | str = (
        # Not at the newest of each: the run that went on longer is usually better there.
        compare_runs(a.runs[0], b.runs[0], "same step")
        if counts == (1, 1)
        else compare_groups(a, b, metric)
    )
    if isinstance(found, str):
        raise ConfigError(f"{' and '.join(group_labels([a, b]))} cannot be compared: {found}.")
    return found


def _one_against_several(a: Group, b: Group) -> str:
    one, several = (a, b) if len(a.runs) == 1 else (b, a)
    both = shlex.join(str(group.runs[0].path) for group in (a, b))
    return (
        f"{names(one.runs)[0]} is one run, against {several.size}: what {one.others} would make of "
        "it is unknown. Train it again:\n"
        f"  {_again(one, several)}\n"
        f"How these two runs do on other text: python runs.py diff {both}"
    )


def _again(one: Group, other: Group) -> str:
    """Returns the command that trains the run of one group with a seed of the other group."""
    run = one.runs[0]
    if one.over != (SEED,):
        return f"{restart_command(run)} (with another {list_of(one.over)})"
    (own,) = one.values[0]
    new = [value for (value,) in other.values if value != own]
    return f"{restart_command(run)} {SEED}={new[0] if new else own + 1}"


# ---- as text


def answer_lines(a: Group, b: Group, metric: str) -> list[str]:
    """Returns the answer as lines; raises ConfigError if there is none."""
    found = answer(a, b, metric)
    if isinstance(found, PairedDifference):
        return _lines_over_text(a, b, found)
    what = list_of([key.rpartition(".")[2] for key in a.over])
    rows = [["", "", "runs", what, f"{found.metric} at step {found.step:,}"]]
    labels = group_labels([a, b])
    for side, label, group, spread in zip("AB", labels, (a, b), (found.a, found.b), strict=True):
        text = spread.text(_number_format(metric))
        rows.append([side, label, str(spread.count), group_values(group), text])
    made = (
        f"Paired t-test over {found.a.count} differences, one for each {what}."
        if found.paired
        else "Welch's t-test of the two means."
    )
    low, high = found.mean.interval
    return [
        f"For {a.others}: {_sentence(found.verdict)}.",
        "",
        *aligned(rows, [True] * 5),
        "",
        _difference_line(metric, found.mean.difference, low, high, found.mean.p),
        made,
        *(["It does not speak for other held-out text."] if metric.startswith("eval/") else []),
        *(line for note in found.notes for line in textwrap.wrap(note, width())),
        *(f"{side}: {', '.join(names(own.runs))}" for side, own in (("A", a), ("B", b))),
    ]


def _lines_over_text(a: Group, b: Group, found: PairedDifference) -> list[str]:
    runs = a.runs[0], b.runs[0]
    rows = [["", "", "run", f"{METRIC} at step {found.step_a:,}"]]
    for side, label, name, run in zip("AB", group_labels([a, b]), names(runs), runs, strict=True):
        loss = _number_format(METRIC)(by_step(run, METRIC)[found.step_a])
        rows.append([side, label if label != name else "", name, loss])
    commands = [f"  {_again(a, b)}", f"  {_again(b, a)}"]
    return [
        f"For other text, with these two runs: {_sentence(found.verdict)}.",
        "",
        *aligned(rows, [True] * 4),
        "",
        _difference_line(METRIC, found.difference, found.low, found.high, found.p),
        f"Paired t-test over {found.batches} batches of held-out text.",
        f"It says nothing of {a.others}. To ask that, train both again:",
        *commands,
    ]


def _sentence(verdict: str) -> str:
    return {
        "no difference shown": "no difference between A and B is shown",
        "equal": "A and B are equal",
    }.get(verdict, f"B is {verdict} than A")


def _difference_line(metric: str, difference: float, low: float, high: float, p: float) -> str:
    show = _number_format(metric, "+")
    interval = f"95 % interval {show(low)} to {show(high)}"
    return f"B - A: {show(difference)}, {interval}, {p_text(p)}"


def _number_format(metric: str, sign: str = "") -> Callable[[float], str]:
    return f"{{:{sign}{'.4f' if is_loss(metric) else '.6g'}}}".format


def p_text(p: float) -> str:
    """Returns `p = 0.012`, with more digits where it is small, or `p < 0.0001`."""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.4f}" if p < 0.01 else f"p = {p:.3f}"


def difference_cells(found: SeedDifference) -> list[str]:
    """Returns the cells of a difference in a table of several."""
    show, (low, high) = _number_format(found.metric, "+"), found.mean.interval
    kind = "paired" if found.paired else "Welch"
    return [
        show(found.mean.difference),
        f"{show(low)} to {show(high)}",
        p_text(found.mean.p),
        found.verdict,
        f"({kind}, {found.b.count} vs {found.a.count} runs at step {found.step:,})",
    ]


# ---- as plain values


def answer_values(a: Group, b: Group, metric: str) -> dict[str, Any]:
    """Returns the answer as plain values, for JSON; raises ConfigError if there is none."""
    sides = zip("ab", group_labels([a, b]), (a, b), strict=True)
    runs = {
        side: {"label": label, "runs": [str(run.path) for run in group.runs]}
        for side, label, group in sides
    }
    return runs | {"difference": difference_values(answer(a, b, metric))}


def difference_values(found: SeedDifference | PairedDifference | str) -> dict[str, Any]:
    """Returns a comparison as plain values, for JSON."""
    if isinstance(found, str):
        return {"not_compared": found}
    if isinstance(found, PairedDifference):
        sources = {name: difference_values(own) for name, own in found.sources.items()}
        words = {"verdict": found.verdict, "speaks_for": "other text", "p": found.p}
        return asdict(found) | words | {"sources": sources}
    low, high = found.mean.interval
    return {
        "metric": found.metric,
        "step": found.step,
        "a": spread_values(found.a),
        "b": spread_values(found.b),
        "difference": found.mean.difference,
        "low": low,
        "high": high,
        "p": found.mean.p,
        "freedom": found.mean.freedom,
        "test": "paired" if found.paired else "Welch",
        "verdict": found.verdict,
        "speaks_for": found.others,
        "notes": list(found.notes),
    }


# ---- goals


def goal_lines(groups: Sequence[Group], goal: Goal, level: float) -> list[str]:
    """Returns for each group whether and at which step it has reached a goal."""
    lines, labels = list[str](), group_labels(groups)
    for group, label in zip(groups, labels, strict=True):
        found = progress_to(goal, group.runs, level)
        text = (
            f"is not tested: {found}"
            if isinstance(found, str)
            else _progress_text(goal, found, level)
        )
        lines += textwrap.wrap(f"{label} ({group.size}): {goal} {text}.", width())
    return lines


def _progress_text(goal: Goal, found: Progress, level: float) -> str:
    show = _number_format(goal.metric)
    at = f"{found.spread.text(show)} (n = {found.spread.count}), {p_text(found.p)}"
    if found.passed:
        return (
            f"is reached at step {found.step:,}: {at}, below {level:g}; the first of "
            f"{found.looked_at} steps that passes, so test it with new seeds before claiming it"
        )
    gap = goal.direction * (found.spread.mean - goal.bound)
    if gap >= 0:
        side = "above" if goal.direction > 0 else "below"
        missed = f"the mean is {show(gap)} {side} at its best, step {found.step:,}"
        return f"is not reached: {missed}: {at}"
    more = (
        f"with this mean and deviation it takes {found.enough} runs"
        if found.enough
        else "no thousand runs with this mean and deviation would do"
    )
    return f"is not shown with p < {level:g}: nearest at step {found.step:,}, {at}; {more}"


def goal_values(groups: Sequence[Group], goal: Goal, level: float) -> list[dict[str, Any]]:
    """Returns the progress of each group as plain values, for JSON."""
    values = []
    for group, label in zip(groups, group_labels(groups), strict=True):
        found = progress_to(goal, group.runs, level)
        own = {"not_tested": found} if isinstance(found, str) else asdict(found)
        if isinstance(found, Progress):
            own |= {"spread": spread_values(found.spread)}
        values.append(
            {"label": label, "runs": [str(run.path) for run in group.runs], "goal": str(goal)} | own
        )
    return values

"""Compares two groups of runs by a metric: does the difference hold for other seeds?

Each run gives one value, and these values are the sample: the held-out batches of one run cannot
tell it (`compare.statistics.paired`). If both groups have the same seeds, the differences seed by
seed are tested, since runs that share a seed share the order of their data and differ by less;
otherwise Welch's test allows for unequal deviations. The rule looks at the seeds only, never at the
values: choosing the test that gives the smaller p would make p wrong.

The paired test finds a difference where there is none in 5 % of cases, with any number of seeds.
Welch's is an approximation: 2.3 % with 2 seeds on each side, 3.7 % with 3, 4.7 % with 5, 4.9 % with
20, but 9.8 % with 2 against 10 (20,000 simulated cases each, of equal deviations).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from compare.differences import differing_environment, texts_differ
from compare.groups import RunGroup, Spread, list_of
from compare.plot.curves import by_step, forked_at, shared_steps
from compare.reading.json_values import as_str
from compare.reading.run import Run
from compare.statistics.comparison import METRIC, Comparison, is_loss, paired, welch
from compare.statistics.paired import different_text

_HELD_OUT = ("eval/", "final/")  # how metrics of evaluations begin
# Differences inside a group that the reader is told of.
_MACHINE = ("git", "torch", "device", "processes")


def compare_groups(a: RunGroup, b: RunGroup, metric: str = METRIC) -> Comparison | str:
    """Compares two groups of two or more runs at the newest step at which all of them have the
    metric; returns the reason as text if they cannot be compared."""
    runs = [*a.runs, *b.runs]
    if reason := _why_not_comparable(a, b, metric):
        return reason
    by_run = [by_step(run, metric) for run in runs]
    steps = shared_steps(runs, by_run)
    if reason := why_no_step(runs, metric, by_run, steps) or _rows_differ(runs, metric, steps[-1]):
        return reason
    values = [known[steps[-1]] for known in by_run]
    of_a, of_b = values[: len(a.runs)], values[len(a.runs) :]
    spread_a, spread_b = Spread.of(of_a), Spread.of(of_b)
    assert spread_a and spread_b
    by_seed = dict(zip(b.values, of_b, strict=True))
    is_paired = by_seed.keys() == {*a.values}
    test = paired(of_a, [by_seed[seed] for seed in a.values]) if is_paired else welch(of_a, of_b)
    notes = [*_run_notes(runs, [max(known) for known in by_run], steps[-1])]
    notes += [*_group_notes(a), *_group_notes(b)]
    if not is_paired and by_seed.keys() & {*a.values}:
        shared = f"They share some values of {list_of(a.over)}"
        notes.append(f"{shared}; with the same on both sides the test is paired.")
    if not is_paired and max(len(of_a), len(of_b)) > 2 * min(len(of_a), len(of_b)):
        notes.append("So unequal numbers of runs find differences that are none too often.")
    return Comparison(
        metric,
        test,
        spread_a,
        spread_b,
        step_a=steps[-1],
        step_b=steps[-1],
        speaks_for=a.others,
        test="paired" if is_paired else "Welch",
        notes=tuple(notes),
    )


def _why_not_comparable(a: RunGroup, b: RunGroup, metric: str) -> str:
    """Returns why values of the metric do not compare between the groups; '' if they do."""
    for group in (a, b):
        if len(group.runs) < 2:
            return f"{group.runs[0].name} is one run and shows nothing of other seeds"
    runs = [*a.runs, *b.runs]
    held_out = metric.startswith(_HELD_OUT)
    if (held_out or is_loss(metric)) and texts_differ(runs):
        done = "evaluated on different held-out" if held_out else "trained on different"
        return f"they were {done} text"
    if len(_tokenizers(runs)) > 1 and "loss" in metric:
        return "their tokenizers differ: eval/bits_per_byte compares, losses per token do not"
    return ""


def why_no_step(
    runs: Sequence[Run], metric: str, by_run: Sequence[Mapping[int, float]], steps: Sequence[int]
) -> str:
    """Returns why the runs cannot be compared at any of `steps`, those that they share; '' if they
    can."""
    for run, known in zip(runs, by_run, strict=True):
        if not known:
            return f"{run.name} has no {metric}"
        # Without this a run that diverged would be judged by its last good evaluation.
        for record in run.records if steps else ():
            if record["step"] > steps[-1] and metric in record and record["step"] not in known:
                return f"{metric} of {run.name} is no finite number at step {record['step']:,}"
    if steps:
        return ""
    nowhere = f"there is no step at which all runs have {metric}"
    last = forked_at(runs)
    return f"{nowhere} after {last:,}, which forks of one checkpoint share" if last else nowhere


def _rows_differ(runs: Sequence[Run], metric: str, step: int) -> str:
    """Returns that the runs were evaluated on different rows at a step, '' if not or if unknown:
    rows of different tokenizers always differ, and their bits per byte compare all the same."""
    if not metric.startswith(_HELD_OUT) or len(_tokenizers(runs)) > 1:
        return ""
    at_step = (record for run in runs for record in run.records if record["step"] == step)
    rows = {as_str(record.get("eval/rows")) for record in at_step} - {""}
    return different_text(runs) if len(rows) > 1 else ""


def _tokenizers(runs: Sequence[Run]) -> set[Any]:
    return {run.config.get("tokenizer.name") for run in runs}


def _run_notes(runs: Sequence[Run], newest: Sequence[int], step: int) -> Iterator[str]:
    """Yields what shortens the comparison: runs of other lengths, and unfinished ones."""
    longer = [
        f"{run.name} to {last:,}" for run, last in zip(runs, newest, strict=True) if last > step
    ]
    if longer:
        yield f"Step {step:,} is the newest that all have; {', '.join(longer)} went on."
    unfinished = [f"{run.name} ({run.state})" for run in runs if run.state != "done"]
    if unfinished:
        yield f"Not finished: {', '.join(unfinished)}."


def _group_notes(group: RunGroup) -> Iterator[str]:
    """Yields what else differs between the runs of a group, and which runs do not count."""
    rows = differing_environment(group.runs)
    if differing := [key for key in _MACHINE if key in rows]:
        named = ", ".join(run.name for run in group.runs)
        yield f"Beside {list_of(group.over)}, {named} differ in {list_of(differing)}."
    if last := forked_at(group.runs):
        yield f"Forks of one checkpoint: they share {last:,} steps, and differ by what came after."
    if group.repeats:
        left_out = ", ".join(run.name for run in group.repeats)
        yield f"Not counted, since another run has the same {list_of(group.over)}: {left_out}."

"""What `runs.py test` answers: whether B is better than A, and for what the answer speaks.

With several runs on each side it speaks for other seeds, with one run on each for other text. With
one run against several nothing can be said; the message says what to train.
"""

from __future__ import annotations

import shlex
import textwrap
from typing import Any

from compare.groups import SEED, RunGroup, group_labels, group_values, list_of
from compare.labels import names
from compare.reading.json_values import as_count, as_path
from compare.reading.run import read_run, restart_command
from compare.statistics.comparison import METRIC, Comparison, number_format, p_text
from compare.statistics.paired import compare_runs
from compare.statistics.seeds import compare_groups
from compare.tables.table import aligned, width
from compare.tables.tree import parent_path
from config import ConfigError
from engine.run_directory.find_runs import is_run
from engine.run_directory.fork import OPTION as FORK_FROM


def answer(a: RunGroup, b: RunGroup, metric: str) -> Comparison:
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
    found = (
        # Not at the newest of each: the run that went on longer is usually better there.
        compare_runs(a.runs[0], b.runs[0], "same step")
        if counts == (1, 1)
        else compare_groups(a, b, metric)
    )
    if isinstance(found, str):
        raise ConfigError(f"{' and '.join(group_labels([a, b]))} cannot be compared: {found}.")
    return found


def _one_against_several(a: RunGroup, b: RunGroup) -> str:
    one, several = (a, b) if len(a.runs) == 1 else (b, a)
    both = shlex.join(str(group.runs[0].path) for group in (a, b))
    return (
        f"{names(one.runs)[0]} is one run, against {several.size}: what {one.others} would make of "
        "it is unknown. Train it again:\n"
        f"  {_again(one, several)}\n"
        f"How these two runs do on other text: python runs.py diff {both}"
    )


def _again(one: RunGroup, other: RunGroup) -> str:
    """Returns the command that trains the run of one group with a seed of the other group."""
    run = one.runs[0]
    if one.over != (SEED,):
        return f"{restart_command(run)} (with another {list_of(one.over)})"
    (own,) = one.values[0]
    if type(own) is not int:
        return f"(the command for {run.name} is not known: its seed cannot be read)"
    new = [value for (value,) in other.values if type(value) is int and value != own]
    seed = f"{SEED}={new[0] if new else own + 1}"
    again = f"{restart_command(run)} {seed}"
    if not run.parent:
        return again
    # A fork has its parent's seed, so the parent is trained first.
    path = parent_path(run)
    parent = read_run(path) if path is not None and is_run(path) else None
    if parent is None or parent.parent:
        first = f"(first a run like {as_path(run.parent.get('run'))} with {seed})"
    else:
        first = f"{restart_command(parent)} {seed}"
    checkpoint = f"RUN/checkpoint_{as_count(run.parent.get('step'))}.pt"
    return f"{first}\n  {again} {FORK_FROM}={checkpoint}  # RUN: the one before"


def answer_lines(a: RunGroup, b: RunGroup, metric: str) -> list[str]:
    """Returns the answer as lines; raises ConfigError if there is none."""
    found = answer(a, b, metric)
    alone, what = found.batches > 0, list_of([key.rpartition(".")[2] for key in a.over])
    rows = [["", "", "runs", "run" if alone else what, f"{metric} at step {found.step_a:,}"]]
    labels = group_labels([a, b])
    for side, label, group, spread in zip("AB", labels, (a, b), (found.a, found.b), strict=True):
        own = names(group.runs)[0] if alone else group_values(group)
        cells = [str(spread.count), own, spread.text(number_format(metric))]
        rows.append([side, label if label != own else "", *cells])
    difference = f"{found.difference_text}, 95 % interval {found.interval_text}"
    return [
        f"{found.question.capitalize()}: {_sentence(found.verdict)}.",
        "",
        *aligned(rows, [True] * 5),
        "",
        f"B - A: {difference}, {p_text(found.mean.p)}",
        f"t-test: {found.basis}.",
        *(line for note in found.notes for line in textwrap.wrap(note, width())),
        *(_more_seeds(a, b) if alone else (f"A: {_listed(a)}", f"B: {_listed(b)}")),
    ]


def _more_seeds(a: RunGroup, b: RunGroup) -> list[str]:
    why = f"It says nothing of {a.others}. To ask that, train both again:"
    return [why, f"  {_again(a, b)}", f"  {_again(b, a)}"]


def _listed(group: RunGroup) -> str:
    return ", ".join(names(group.runs))


def _sentence(verdict: str) -> str:
    return {
        "no difference shown": "no difference between A and B is shown",
        "equal": "A and B are equal",
    }.get(verdict, f"B is {verdict} than A")


def answer_values(a: RunGroup, b: RunGroup, metric: str) -> dict[str, Any]:
    """Returns the answer as plain values, for JSON; raises ConfigError if there is none."""
    sides = zip("ab", group_labels([a, b]), (a, b), strict=True)
    runs = {
        side: {"label": label, "runs": [str(run.path) for run in group.runs]}
        for side, label, group in sides
    }
    return runs | {"difference": answer(a, b, metric).values()}

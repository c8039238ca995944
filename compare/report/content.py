"""What the report says and shows, as plain values: the best runs, tables, comparisons, curves.

The page shows groups. A group is one run, or the runs that differ in the options of `--over` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from compare import differences
from compare.groups import SEED, RunGroup, group_labels, group_runs, group_values, list_of
from compare.labels import labels, names, short_names
from compare.plot.curves import AXES, COLOURS, DARK_COLOURS
from compare.reading.run import Run
from compare.report.parallel import parallel
from compare.report.run_content import group_curves, panels, run_content
from compare.report.tables import (
    BEST_LOSS,
    BITS_PER_BYTE,
    columns_of,
    contexts_of,
    option_title,
    settings_of,
    several_tokenizers,
    spread_of,
)
from compare.report.text import progress_text, utf8_text
from compare.report.verdicts import comparison, comparisons_note, lead_sentence, pair_content
from compare.statistics.comparison import Comparison
from settings.formatting import format_plural

_MAX_NAMED = 6  # options named in the answer


@dataclass(frozen=True)
class Measure:
    """By which value runs are ranked; the lowest is best."""

    name: str
    value: Callable[[Run], float | None]
    column: str


LOSS = Measure("held-out loss", lambda run: run.best_loss, BEST_LOSS)
BITS = Measure("bits per byte", lambda run: run.bits_per_byte, BITS_PER_BYTE)
UNRANKED = Measure("", lambda run: None, BEST_LOSS)


def report(runs: Sequence[Run], over: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the content of the page; its groups are in order, the best first.

    over: options in which runs of a group may differ. By default runs that differ in their seed
    alone are a group.
    """
    groups, measure = ranked(folded(runs, over))
    runs = [run for group in groups for run in (*group.runs, *group.repeats)]
    titles = [utf8_text(label) for label in group_labels(groups)]
    several, columns = len(groups) > 1, columns_of(groups)
    pairs = [comparison(groups[0], group) for group in groups[1:]]
    headline, answer = _answer(groups, titles, measure, pairs)
    single = [RunGroup((run,), ()) for run in runs]
    result = next((column for column in columns if column["title"] == measure.column), None)
    return {
        "overline": f"Report of {_count(groups)}",
        "headline": headline,
        "answer": answer + _comparison(groups),
        "footer": f"Written {datetime.now():%Y-%m-%d %H:%M} by runs.py report. This page holds "
        "all it shows and loads nothing.",
        "colours": {"light": COLOURS, "dark": DARK_COLOURS},
        "axes": {key: title[0].upper() + title[1:] for key, title in AXES.items()},
        "panels": panels(runs),
        "groups": _groups(groups, titles, runs),
        "runs": _runs(groups, titles),
        "columns": columns,
        "run_columns": columns_of(single) if len(single) > len(groups) else [],
        "parallel": parallel(settings_of(groups), result) if several and result else None,
        "pairs": [pair_content(pair) | {"group": n} for n, pair in enumerate(pairs, 1)],
        "pairs_note": comparisons_note(groups, titles[0]),
        "contexts": contexts_of(runs) if len(runs) > 1 else [],
    }


def folded(runs: Sequence[Run], over: Sequence[str]) -> list[RunGroup]:
    """Returns the groups of the page.

    By default a seed that was trained several times makes no group: these runs say nothing of other
    seeds, and stay apart.
    """
    groups = group_runs(runs, over or (SEED,))
    if over:
        return groups
    return [
        own
        for group in groups
        for own in (
            [group]
            if len(group.runs) > 1
            else [RunGroup((run,), ()) for run in runs if run in (*group.runs, *group.repeats)]
        )
    ]


def _groups(
    groups: Sequence[RunGroup], titles: Sequence[str], runs: Sequence[Run]
) -> list[dict[str, Any]]:
    """Returns name, runs (their places in `runs`) and, of several runs, the mean curves."""
    rest = dict(zip(runs, short_names(runs), strict=True))
    return [
        {
            "label": title,
            "short_name": utf8_text(rest[group.runs[0]])
            if len(group.runs) == 1
            else utf8_text(f"{group.size}: {group_values(group)}"),
            "runs": [runs.index(run) for run in group.runs],
            **(group_curves(group.runs) if len(group.runs) > 1 else {}),
        }
        for group, title in zip(groups, titles, strict=True)
    ]


def _runs(groups: Sequence[RunGroup], titles: Sequence[str]) -> list[dict[str, Any]]:
    runs = [run for group in groups for run in (*group.runs, *group.repeats)]
    # Of runs in a group the label says what tells them apart: `lr 0.001, seed 1`.
    inside = [labels(own) for group in groups if (own := [*group.runs, *group.repeats])]
    run_labels = [
        f"{title}, {label}" if len(own) > 1 else title
        for title, own in zip(titles, inside, strict=True)
        for label in own
    ]
    return [
        run_content(run, utf8_text(name))
        | {"label": utf8_text(label), "short_name": utf8_text(rest)}
        for run, name, label, rest in zip(
            runs, names(runs), run_labels, short_names(runs), strict=True
        )
    ]


# ---- the answer


def ranked(groups: Sequence[RunGroup]) -> tuple[list[RunGroup], Measure]:
    """Returns the groups, the lowest mean first, and the measure that ranks them.

    Losses per token compare only between runs with one tokenizer, bits per byte between all runs
    that were evaluated on the same text.
    """
    runs = [run for group in groups for run in group.runs]
    if differences.texts_differ(runs):
        return list(groups), UNRANKED
    bits_known = all(run.bits_per_byte is not None for run in runs)
    measure = BITS if several_tokenizers(groups) and bits_known else LOSS

    def sort_key(group: RunGroup) -> tuple[bool, float]:
        spread = spread_of(group, measure.value)
        return (True, 0.0) if spread is None else (False, spread.mean)

    return sorted(groups, key=sort_key), measure


def _answer(
    groups: Sequence[RunGroup],
    titles: Sequence[str],
    measure: Measure,
    pairs: Sequence[Comparison | str],
) -> tuple[str, list[str]]:
    """Returns the headline and the sentences below it."""
    spreads = [spread_of(group, measure.value) for group in groups]
    runs = [run for group in groups for run in group.runs]
    if measure is UNRANKED:
        headline = f"{_count(groups)} on different text: none is best"
        return headline, ["Losses on different held-out text do not compare."]
    if spreads[0] is None:  # then the others are unknown too: the groups are ranked
        evaluating = [run.config.get("training.test_freq", True) is not None for run in runs]
        running = [run.state == "running" for run in runs]
        coming = any(a and b for a, b in zip(evaluating, running, strict=True))
        headline = f"{_count(groups)}, none evaluated{' yet' if coming else ''}"
        never = ["training.test_freq is null: they are trained without evaluations."]
        return (
            headline if len(runs) > 1 else f"{titles[0]}: no evaluation",
            [] if any(evaluating) else never,
        )
    best = f"{measure.name} {spreads[0].text()}"
    best += f" over {groups[0].size}" if len(groups[0].runs) > 1 else ""
    if len(runs) == 1:
        lowest = f"Its lowest, at step {runs[0].best_step or 0:,}; {progress_text(runs[0])}."
        return f"{titles[0]}: {best}", [lowest]
    if len(groups) == 1:
        return f"{titles[0]}: {best}", ["Mean and standard deviation of the lowest of each run."]
    second = spreads[1]
    if second is None:
        return f"Best: {titles[0]}, with {best}", []
    lead = second.mean - spreads[0].mean
    if measure is BITS:
        sentence = (
            f"{lead:.4f} bits per byte below {titles[1]}. Their tokenizers differ, so losses per "
            "token do not compare."
        )
    else:
        # Being ranked first says little: the interval decides whether a difference is claimed.
        sentence = lead_sentence(pairs[0], titles[1], second.text(), lead)
    return f"Best: {titles[0]}, with {best}", [sentence]


def _comparison(groups: Sequence[RunGroup]) -> list[str]:
    """Returns the sentences about the differences of several runs."""
    runs = [run for group in groups for run in group.runs]
    if len(runs) == 1:
        return []
    over = {key for group in groups for key in group.over}
    options = [option_title(k) for k in differences.differing_options(runs) if k not in over]
    if len(options) > _MAX_NAMED:
        options[_MAX_NAMED:] = [f"{len(options) - _MAX_NAMED} more"]
    listed = list_of(options)
    inside = (
        f", and runs of a group in {', '.join(map(option_title, sorted(over)))}" if over else ""
    )
    if len(groups) == 1 and over:
        listed, inside = ", ".join(map(option_title, sorted(over))), ""
    subject = "Groups" if inside else "They"
    named = dict(zip(runs, labels(runs), strict=True))
    running = [named[run] for run in runs if run.state == "running"]
    repeats = [name for group in groups for name in names(group.repeats)]
    return [
        f"{subject} differ in {listed}{inside}." if listed else "Their settings are the same.",
        *([f"Still running: {'; '.join(running)}."] if running else []),
        *([f"Not counted, since another run repeats it: {'; '.join(repeats)}."] if repeats else []),
    ]


def _count(groups: Sequence[RunGroup]) -> str:
    runs = sum(len(group.runs) + len(group.repeats) for group in groups)
    counted = f"{runs} runs" if runs > 1 else "1 run"
    return counted if runs == len(groups) else f"{counted} in {format_plural(len(groups), 'group')}"

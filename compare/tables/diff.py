"""What `runs.py diff` prints: tables of what differs and of the results, or the same as JSON."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from compare.differences import (
    MISSING,
    differing_data,
    differing_environment,
    differing_options,
    differing_without_effect,
    equal_options,
)
from compare.groups import RunGroup, group_labels
from compare.labels import labels, names, shared_start, short_names
from compare.reading.run import Run
from compare.statistics.comparison import METRIC, Comparison, comparison_values
from compare.statistics.paired import At, compare_runs
from compare.statistics.seeds import compare_groups
from compare.tables.table import (
    COLUMNS,
    aligned,
    cell,
    column_spread,
    group_cell,
    group_summary,
    states,
    steps,
    summary,
    value_text,
    width,
)
from settings.formatting import format_duration

_MAX_VALUE = 40  # characters of a value in a table; --json has all of it


def diff_lines(runs: Sequence[Run]) -> list[str]:
    """Returns the lines of all tables."""
    without_effect = ", ".join(differing_without_effect(runs))
    lines = [
        *_full_names(runs),
        *_section(labels(runs), "Settings that differ", differing_options(runs)),
        f"({equal_options(runs)} other options are equal)",
    ]
    if without_effect:
        lines.append(f"(without effect on the result, they differ in {without_effect})")
    return [
        *lines,
        *_section(labels(runs), "Results", _results(runs)),
        *_section(labels(runs), "Machine and software", differing_environment(runs)),
        *_data_lines(runs),
        *_paired_lines(runs),
    ]


def diff_values(runs: Sequence[Run]) -> dict[str, Any]:
    """Returns the content of all tables as plain values; a value that a run lacks is left out."""

    def by_run(rows: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
        return [
            {key: row[place] for key, row in rows.items() if row[place] is not MISSING}
            for place in range(len(runs))
        ]

    pairs = [compare_runs(runs[0], run) for run in runs[1:]]
    return {
        # The configs, of some 100 options each, are in `runs.py list --json`.
        "runs": [summary(run) | {"config": None} for run in runs],
        "settings": by_run(differing_options(runs)),
        "without_effect": by_run(differing_without_effect(runs)),
        "equal_options": equal_options(runs),
        "environment": by_run(differing_environment(runs)),
        "data": by_run(differing_data(runs)),
        "against_first": [comparison_values(pair) for pair in pairs],
    }


def _full_names(runs: Sequence[Run]) -> list[str]:
    """Returns what all names begin with, which the tables leave out, and the rest of each."""
    shared, short = shared_start(names(runs)), ", ".join(short_names(runs))
    return textwrap.wrap(f"Runs {shared}...: {short}", width()) if shared else []


def _results(runs: Sequence[Run]) -> dict[str, list[str]]:
    rows = {"run": short_names(runs)}
    rows |= {column.name: [cell(column, run) for run in runs] for column in COLUMNS[1:]}
    rows["time"] = ["-" if run.seconds is None else format_duration(run.seconds) for run in runs]
    if any(run.end_reason for run in runs):
        rows["reason"] = [run.end_reason or "-" for run in runs]
    return rows


def _section(headings: Sequence[str], title: str, rows: Mapping[str, Sequence[Any]]) -> list[str]:
    """Returns a titled table with a column per run or group, in several parts if it would be too
    wide."""
    if not rows:
        return []
    columns = [[*map(_shortened, column)] for column in zip(*rows.values(), strict=True)]
    widths = [
        2 + max(map(len, (heading, *column)))
        for heading, column in zip(headings, columns, strict=True)
    ]
    first_width = max(map(len, (title, *rows)))
    lines, start = list[str](), 0
    while start < len(headings):
        end = start + 1
        while end < len(headings) and first_width + sum(widths[start : end + 1]) <= width():
            end += 1
        body = [list(row) for row in zip(rows, *columns[start:end], strict=True)]
        table = [[title, *headings[start:end]], *body]
        lines += ["", *aligned(table, [True] * (end - start + 1))]
        start = end
    return lines


def _shortened(value: Any) -> str:
    """Returns a value's text without its middle if it is long: the ends of paths differ most."""
    text = value if isinstance(value, str) and value.isprintable() else value_text(value)
    half = _MAX_VALUE // 2 - 2  # the dots take the rest
    return text if len(text) <= _MAX_VALUE else f"{text[:half]}...{text[-half:]}"


def _data_lines(runs: Sequence[Run]) -> list[str]:
    data = differing_data(runs)
    printed = data.pop("ledger", [])
    lines = _section(labels(runs), "Data", data)
    if printed:
        lines += ["", "Data, as said at the start"]
        for label, own in zip(labels(runs), printed, strict=True):
            lines += [f"  {label}: {line}" for line in own]
    return lines


def _paired_lines(runs: Sequence[Run]) -> list[str]:
    """Returns the comparison of each run with the first, or why there is none."""
    first, *others = labels(runs)
    rows, reasons = list[list[str]](), list[str]()
    for run, label in zip(runs[1:], others, strict=True):
        for at, pair in _pairs(runs[0], run):
            if isinstance(pair, Comparison):
                rows.append([f"  {label}", *_cells(pair, at)])
                own = pair.sources.items()
                rows += [[f"    on {name}", *_cells(each, at)] for name, each in own]
            else:
                reasons.append(f"  {label} is not compared: {pair}.")
    lines = ["", f"Held-out loss less that of {first}, nats per token, with its 95 % interval:"]
    if rows:
        lines += aligned(rows, [True] * len(rows[0]))
        lines.append("(batch by batch of the same held-out text; it says nothing of other seeds)")
    return lines + reasons


def _pairs(first: Run, run: Run) -> list[tuple[At, Comparison | str]]:
    """Returns the comparison of the newest evaluations and, if they were made at different steps,
    those at a shared step and of the best evaluations."""
    newest = compare_runs(first, run)
    pairs: list[tuple[At, Comparison | str]] = [("newest", newest)]
    if isinstance(newest, str) or newest.step_a == newest.step_b:
        return pairs
    # The run with more steps is usually better at its newest: only these two tell whether it also
    # learns better.
    others: tuple[At, ...] = ("same step", "best")
    for at in others:
        pair = compare_runs(first, run, at)
        if isinstance(pair, Comparison) and pair != newest:
            pairs.append((at, pair))
    return pairs


def _cells(found: Comparison, at: At | None = None) -> list[str]:
    basis = f"({f'{at}: ' if at else ''}{found.basis})"
    return [found.difference_text, found.interval_text, found.verdict, basis]


# ---- groups of runs


def group_diff_lines(groups: Sequence[RunGroup]) -> list[str]:
    """Returns the lines of all tables with a column per group: means and deviations."""
    headings, tables = group_labels(groups), _tables_by_group(groups)
    own = (", ".join(names(group.runs)) for group in groups)
    return [
        *(f"{label}: {runs}" for label, runs in zip(headings, own, strict=True)),
        *_section(headings, "Settings that differ", tables["settings"]),
        f"({equal_options([run for group in groups for run in group.runs])} other options are "
        "equal)",
        *_section(headings, "Results, mean \u00b1 sd", _group_results(groups)),
        *_section(headings, "Machine and software", tables["environment"]),
        *_section(headings, "Data", tables["data"]),
        *_seed_lines(groups, headings),
    ]


def group_diff_values(groups: Sequence[RunGroup]) -> dict[str, Any]:
    """Returns the content of all tables over groups as plain values."""
    tables = _tables_by_group(groups)
    by_group = {
        title: [{key: row[place] for key, row in rows.items()} for place in range(len(groups))]
        for title, rows in tables.items()
    }
    labelled = zip(groups, group_labels(groups), strict=True)
    return {
        "groups": [group_summary(group, label) for group, label in labelled],
        **by_group,
        "against_first": [
            comparison_values(compare_groups(groups[0], group)) for group in groups[1:]
        ],
    }


def _tables_by_group(groups: Sequence[RunGroup]) -> dict[str, dict[str, list[Any]]]:
    """Returns what differs between groups: title of a table -> key -> the value of each group."""
    runs = [run for group in groups for run in group.runs]
    over = {key for group in groups for key in group.over}
    tables = {
        "settings": {k: row for k, row in differing_options(runs).items() if k not in over},
        "environment": differing_environment(runs),
        "data": {k: row for k, row in differing_data(runs).items() if k == "fingerprint"},
    }
    return {
        title: {key: _by_group(groups, row) for key, row in rows.items()}
        for title, rows in tables.items()
    }


def _by_group(groups: Sequence[RunGroup], row: Sequence[Any]) -> list[Any]:
    """Returns the value of each group; if its runs have several, all of them as one text."""
    left = iter(row)
    by_group = []
    for group in groups:
        own = list(itertools.islice(left, len(group.runs)))
        equal = all(value == own[0] for value in own)
        by_group.append(own[0] if equal else " | ".join(dict.fromkeys(map(value_text, own))))
    return by_group


def _group_results(groups: Sequence[RunGroup]) -> dict[str, list[str]]:
    rows = {
        "runs": [group.size for group in groups],
        "state": [*map(states, groups)],
        "step": [*map(steps, groups)],
    }
    rows |= {
        column.name: [group_cell(column, group) for group in groups]
        for column in COLUMNS
        if column.name not in (*rows, "planned_steps")
        and any(column_spread(column, group) for group in groups)
    }
    return rows


def _seed_lines(groups: Sequence[RunGroup], headings: Sequence[str]) -> list[str]:
    """Returns the comparison of each group with the first, or why there is none."""
    rows, reasons = list[list[str]](), list[str]()
    for group, label in zip(groups[1:], headings[1:], strict=True):
        found = compare_groups(groups[0], group)
        if isinstance(found, str):
            reasons.append(f"  {label} is not compared: {found}.")
        else:
            rows.append([f"  {label}", *_cells(found)])
    title = f"{METRIC} less that of {headings[0]}, with its 95 % interval over the runs:"
    table = aligned(rows, [True] * len(rows[0])) if rows else []
    return ["", title, *table, *reasons]

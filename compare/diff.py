"""What `runs.py diff` prints: tables of what differs and of the results, or the same as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from compare.differences import (
    MISSING,
    differing_data,
    differing_environment,
    differing_options,
    differing_without_effect,
    equal_options,
)
from compare.labels import labels, names, shared_start, short_names
from compare.reading.run import Run
from compare.statistics.paired import At, PairedDifference, compare_runs
from compare.table import COLUMNS, aligned, cell, summary, value_text, width
from settings.formatting import format_duration

_MAX_VALUE = 40  # characters of a value in a table; --json has all of it


def diff_lines(runs: Sequence[Run]) -> list[str]:
    """Returns the lines of all tables."""
    without_effect = ", ".join(differing_without_effect(runs))
    lines = [
        *_full_names(runs),
        *_section(runs, "Settings that differ", differing_options(runs)),
        f"({equal_options(runs)} other options are equal)",
    ]
    if without_effect:
        lines.append(f"(without effect on the result, they differ in {without_effect})")
    return [
        *lines,
        *_section(runs, "Results", _results(runs)),
        *_section(runs, "Machine and software", differing_environment(runs)),
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
        "against_first": [
            _pair_values(pair) if isinstance(pair, PairedDifference) else {"not_compared": pair}
            for pair in pairs
        ],
    }


def _pair_values(pair: PairedDifference) -> dict[str, Any]:
    sources = {name: _pair_values(own) for name, own in pair.sources.items()}
    return asdict(pair) | {"verdict": pair.verdict, "sources": sources}


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


def _section(runs: Sequence[Run], title: str, rows: Mapping[str, Sequence[Any]]) -> list[str]:
    """Returns a titled table with a column per run, in several parts if it would be too wide."""
    if not rows:
        return []
    headings = labels(runs)
    columns = [[*map(_shortened, column)] for column in zip(*rows.values(), strict=True)]
    widths = [
        2 + max(map(len, (heading, *column)))
        for heading, column in zip(headings, columns, strict=True)
    ]
    first_width = max(map(len, (title, *rows)))
    lines, start = list[str](), 0
    while start < len(runs):
        end = start + 1
        while end < len(runs) and first_width + sum(widths[start : end + 1]) <= width():
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
    lines = _section(runs, "Data", data)
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
            if isinstance(pair, PairedDifference):
                rows.append([f"  {label}", *_paired_cells(pair, at)])
                own = pair.sources.items()
                rows += [[f"    on {name}", *_paired_cells(each, at)] for name, each in own]
            else:
                reasons.append(f"  {label} is not compared: {pair}.")
    lines = ["", f"Held-out loss less that of {first}, nats per token, with its 95 % interval:"]
    if rows:
        lines += aligned(rows, [True] * len(rows[0]))
        lines.append("(batch by batch of the same held-out text; it says nothing of other seeds)")
    return lines + reasons


def _pairs(first: Run, run: Run) -> list[tuple[At, PairedDifference | str]]:
    """Returns the comparison of the newest evaluations and, if they were made at different steps,
    those at a shared step and of the best evaluations."""
    newest = compare_runs(first, run)
    pairs: list[tuple[At, PairedDifference | str]] = [("newest", newest)]
    if isinstance(newest, str) or newest.step_a == newest.step_b:
        return pairs
    # The run with more steps is usually better at its newest: only these two tell whether it also
    # learns better.
    others: tuple[At, ...] = ("same step", "best")
    for at in others:
        pair = compare_runs(first, run, at)
        if isinstance(pair, PairedDifference) and pair != newest:
            pairs.append((at, pair))
    return pairs


def _paired_cells(pair: PairedDifference, at: At) -> list[str]:
    steps = f"{pair.step_b:,}" + (f" vs {pair.step_a:,}" if pair.step_a != pair.step_b else "")
    return [
        f"{pair.difference:+.4f}",
        f"{pair.low:+.4f} to {pair.high:+.4f}",
        pair.verdict,
        f"({at}: step {steps}, {pair.batches} batches)",
    ]

"""The table of `runs.py list`: a line per run or group of runs, with the options that differ."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from compare.differences import MISSING
from compare.groups import RunGroup, Spread
from compare.labels import LONGEST, descriptions, short_names
from compare.reading.json_values import as_float
from compare.reading.run import Run
from settings.formatting import format_count
from settings.terminal import printable
from settings.values import one_line, to_text

WIDTH = 100
"""Characters of a line where the output is no terminal."""
_UNKNOWN = "-"


@dataclass(frozen=True)
class Column:
    """One value of a run: its name in JSON and filters, its heading, and how it is printed."""

    name: str
    heading: str
    value: Callable[[Run], Any]
    show: Callable[[Any], str] = str


def _loss(value: float) -> str:
    return f"{value:.4f}"


COLUMNS = (
    Column("name", "run", lambda run: run.name),
    Column("state", "state", lambda run: run.state),
    Column("model", "model", lambda run: run.model or None),
    Column("parameters", "params", lambda run: run.parameters, format_count),
    Column("step", "step", lambda run: run.step),
    Column("planned_steps", "planned", lambda run: run.planned_steps),
    Column("tokens", "tokens", lambda run: run.tokens, format_count),
    Column("best_loss", "best", lambda run: run.best_loss, _loss),
    Column("last_loss", "last", lambda run: run.last_loss, _loss),
    Column("bits_per_byte", "bits/B", lambda run: run.bits_per_byte, _loss),
    Column("tokens_per_sec", "tok/s", lambda run: run.tokens_per_sec, format_count),
    Column("precision", "precision", lambda run: run.precision or None),
)
COLUMN_BY_NAME = {name: column for column in COLUMNS for name in (column.name, column.heading)}
_DIFFERS = "differs in"
_MIN_DESCRIPTION = 16  # characters
_OF_GROUPS = ("best_loss", "last_loss", "bits_per_byte")
_LEFT_ALIGNED = {"run", "first run", _DIFFERS, "state", "model", "precision"}


def summary(run: Run) -> dict[str, Any]:
    """Returns all that is known of a run as plain values, for JSON."""
    columns = {column.name: column.value(run) for column in COLUMNS}
    others = {"path": str(run.path), "reason": run.end_reason or None, "best_step": run.best_step}
    more = {"parent": dict(run.parent) or None, "config": dict(run.config)}
    return others | columns | more | {"problems": list(run.problems)}


def list_lines(runs: Sequence[Run], sorted_by: str = "") -> list[str]:
    """Returns the lines of the table of runs.

    sorted_by: a metric that gets a column, unless one shows its values already.
    """
    columns = (*COLUMNS, *_metric_column(runs, sorted_by))
    headings = [column.heading for column in columns if column.name != "planned_steps"]
    headings[headings.index("step")] = "steps"
    rows = [headings, *(_row(columns, *each) for each in zip(runs, short_names(runs), strict=True))]
    return _with_differences(rows, runs)


def group_lines(groups: Sequence[RunGroup], sorted_by: str = "") -> list[str]:
    """Returns the lines of the table of groups: the mean and deviation of their runs' values."""
    firsts = [group.runs[0] for group in groups]
    more = _metric_column([run for group in groups for run in group.runs], sorted_by)
    columns = [*(COLUMN_BY_NAME[name] for name in _OF_GROUPS), *more]
    rows = [["first run", "n", "state", "steps", *(column.heading for column in columns)]]
    for group, name in zip(groups, short_names(firsts), strict=True):
        cells = [group_cell(column, group) for column in columns]
        rows.append([name, str(len(group.runs)), states(group), steps(group), *cells])
    return _with_differences(rows, firsts, {key for group in groups for key in group.over})


def _with_differences(
    rows: Sequence[list[str]], runs: Sequence[Run], without: Collection[str] = ()
) -> list[str]:
    """Returns the lines of a table that has a row of headings and one for each run; after the name,
    the options in which the runs differ get the width that is left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = width() - sum(widths) - len(widths)
    described = descriptions(runs, min(LONGEST, max(_MIN_DESCRIPTION, left)), without)
    if any(described):
        for row, text in zip(rows, [_DIFFERS, *described], strict=True):
            row.insert(1, text)
    return aligned(rows, [heading in _LEFT_ALIGNED for heading in rows[0]])


def states(group: RunGroup) -> str:
    """Returns `done`, or `2 done, 1 crashed`."""
    counts = Counter(run.state for run in group.runs)
    return ", ".join(f"{n} {state}" if len(counts) > 1 else state for state, n in counts.items())


def steps(group: RunGroup) -> str:
    """Returns the steps taken, from the fewest to the most."""
    ends = sorted({run.step for run in group.runs})
    return f"{ends[0]}-{ends[-1]}" if len(ends) > 1 else str(ends[0])


def group_cell(column: Column, group: RunGroup) -> str:
    """Returns the mean and deviation of a column as text; `-` if no run has a value, and how many
    have one if not all do."""
    spread = column_spread(column, group)
    if spread is None:
        return _UNKNOWN
    is_count = column.show is format_count and spread.deviation == 0  # such as of the parameters
    lacking = f" (of {spread.count})" if spread.count < len(group.runs) else ""
    return (column.show(spread.mean) if is_count else spread.text(column.show)) + lacking


def column_spread(column: Column, group: RunGroup) -> Spread | None:
    """Returns the spread of a column's numbers over the runs of a group."""
    values = [as_float(column.value(run)) for run in group.runs]
    return Spread.of([value for value in values if value is not None])


def group_summary(group: RunGroup, label: str) -> dict[str, Any]:
    """Returns all that is known of a group as plain values, for JSON."""
    known = {column.name: column_spread(column, group) for column in COLUMNS}
    return {
        "label": label,
        "runs": [str(run.path) for run in group.runs],
        "over": {key: [run.config.get(key) for run in group.runs] for key in group.over},
        "not_counted": [str(run.path) for run in group.repeats],
        "n": len(group.runs),
        "states": [run.state for run in group.runs],
        **{name: spread.values() for name, spread in known.items() if spread},
    }


def _metric_column(runs: Sequence[Run], key: str) -> list[Column]:
    shown = [[column.value(run) for run in runs] for column in COLUMNS]
    values = [as_float(run.newest.get(key)) for run in runs]
    if key in COLUMN_BY_NAME or values in shown or not any(value is not None for value in values):
        return []
    heading = key.partition("/")[2] or key
    return [Column(key, heading, lambda run: as_float(run.newest.get(key)), "{:.6g}".format)]


def _row(columns: Sequence[Column], run: Run, name: str) -> list[str]:
    cells = {column.name: cell(column, run) for column in columns}
    planned = cells.pop("planned_steps")
    cells["step"] += "" if planned == _UNKNOWN else f"/{planned}"
    cells["precision"] = cells["precision"].replace(" weights", "")  # to fit 100 characters
    return list((cells | {"name": name}).values())


def width() -> int:
    """Returns the width of the terminal, at least `WIDTH`."""
    return max(WIDTH, shutil.get_terminal_size().columns) if sys.stdout.isatty() else WIDTH


def cell(column: Column, run: Run) -> str:
    """Returns a column's value as text; `-` if it is unknown."""
    value = column.value(run)
    return _UNKNOWN if value is None else column.show(value)


def aligned(rows: Sequence[Sequence[str]], left: Sequence[bool]) -> list[str]:
    """Returns the lines of a table; the gap between columns is one space if two are too wide.

    left: which columns are aligned to the left. Names of runs may hold escape sequences, which a
    terminal would obey: all control characters are written as `\\x1B`.
    """
    rows = [[printable(text.replace("\n", "\\n")) for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    gap = "  " if sum(widths) + 2 * (len(widths) - 1) <= width() else " "
    return [
        gap.join(
            text.ljust(size) if is_left else text.rjust(size)
            for text, size, is_left in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in rows
    ]


def value_text(value: Any) -> str:
    """Returns a value as a config writes it, or an en dash if it is missing."""
    if value == MISSING:
        return MISSING
    plain = value is None or isinstance(value, (str, bool, int, float))
    return to_text(value) if plain else one_line(str(value))
